"""The README keeps its word: its Python snippets run in order, its links point at what they name, its flags exist."""

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, TrainingArguments

import ortholora
import train

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def world(tmp_path):
    """What the snippets take for granted: encoder, heads, three tasks, data, one process of torch.distributed."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = BertConfig(vocab_size=50, num_labels=2, **sizes)
    model = BertForSequenceClassification(config)
    encoder, heads = copy.deepcopy(model.bert), nn.ModuleList(nn.Linear(16, 2) for _ in range(3))
    data = [[(torch.randint(50, (4, 6)), torch.randint(2, (4,))) for _ in range(3)] for _ in range(4)]

    def loss(t, batch):
        ids, labels = batch
        return nn.functional.cross_entropy(heads[t](encoder(ids).last_hidden_state[:, 0]).float(), labels)

    examples = [{"input_ids": torch.randint(50, (6,)), "labels": i % 2} for i in range(8)]

    def collate_tasks(rows):  # even examples are one task, odd ones the other
        pick = [rows[::2], rows[1::2]]
        return {
            "tasks": [
                {key: torch.stack([torch.as_tensor(row[key]) for row in part]) for key in part[0]} for part in pick
            ]
        }

    args = TrainingArguments(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield {
        "model": model,
        "encoder": encoder,
        "heads": heads,
        "tasks": ["a", "b", "c"],
        "data": data,
        "loss": loss,
        "micro_batches": data[:2],
        "batches": data[0],
        "device": "cpu",
        "scaler": torch.amp.GradScaler("cpu"),
        "args": args,
        "dataset": examples,
        "collate_tasks": collate_tasks,
    }
    dist.destroy_process_group()


def test_snippets_run_and_train(world):
    snippets = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(snippets) == 8
    for snippet in snippets:
        before = [p.detach().clone() for p in (*world["encoder"].parameters(), *world["heads"].parameters())]
        if "class OrthoTrainer" in snippet:
            factors = {n: p.detach().clone() for n, p in world["model"].named_parameters() if "lora_" in n}
        exec(snippet, world)  # noqa: S102
        if "optimizer.step()" in snippet:  # something has moved
            after = [*world["encoder"].parameters(), *world["heads"].parameters()]
            moved = [a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, after, strict=False)]
            assert any(moved), snippet
    trained = dict(world["model"].named_parameters())
    assert factors and all(not torch.equal(trained[name], p) for name, p in factors.items() if "lora_B" in name)


def test_links_point_at_what_they_name():
    links = re.findall(r"\[`(?:\w+\.)?(\w+)`\]\((\w+\.py)#L(\d+)\)", README)
    assert len(links) >= 5
    for name, file, line in links:
        text = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"\s*(def|class) {name}\b", text), f"README: {file}#L{line} is {text!r}, not {name}"
    for path in re.findall(r"\]\(([\w/.-]+)\)", README):
        assert (ROOT / path).exists()


def test_flags_and_files_exist():
    known = {"--" + f.name.replace("_", "-") for f in dataclasses.fields(train.Settings)} | {"--help"}
    known |= {"--nproc-per-node"}  # torchrun's
    for script in (*ROOT.glob("experiments/*.py"), ROOT / "tests/kills.py", ROOT / "tests/fuzz.py"):
        known |= set(re.findall(r'add_argument\("(--[\w-]+)"', script.read_text()))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", README)) <= known
    for line in re.findall(r"^\| `([\w.]+\.py)`", README, re.M):
        assert (ROOT / line).exists()
    assert all(hasattr(ortholora, name) for name in ("project_conflicting", "projection_coefficients", "OrthoLoRA"))


def test_every_method_is_in_the_readme():
    assert all(f"`{method}`" in README for method in train.METHODS)
