"""The recipes of docs/recipes.md that need packages outside requirements-dev.txt, held against tests/oracle.py.

    pip install accelerate trl lightning
    python tests/outside.py

Runs Accelerate and Lightning (one process and two), FSDP2 (two) and TRL's SFTTrainer as they stand there, on a CPU;
prints the largest error of any step, and writes the table into docs/recipes.md if all were run and are right. Error:
largest difference over largest entry of what `project` left in .grad, float32 in all of them. Exit status 1 otherwise.
"""

import copy
import datetime
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import oracle  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from test_recipes import Data, World, examples, llama  # noqa: E402
from torch import nn  # noqa: E402
from torch.nn.functional import cross_entropy  # noqa: E402

import lora  # noqa: E402
from ortholora import OrthoLoRA  # noqa: E402


def everyone(mine):
    """The lists of all ranks as one."""
    if not dist.is_initialized():
        return mine
    lists = [None] * dist.get_world_size()
    dist.all_gather_object(lists, mine)
    return sum(lists, [])


def beside(model, factors, names):
    """For `oracle.watch`: hold what the recipe trains, `names["factors"]`, against a model that nobody has changed.

    factors: the same ones in that model; at every step they take over the values and .grad.
    """

    def follow():
        for p, q in zip(factors, names["factors"], strict=True):
            assert p.dtype == q.dtype and type(p) is type(q)  # so not sharded
            p.data.copy_(q.data)
            p.grad = q.grad.clone()
        return model

    def mirror(parameters):
        pairs = dict(zip(names["factors"], factors, strict=True))
        return [pairs[p] for p in parameters]

    return {"model": follow, "mirror": mirror}


def world_with_adapter(seed=0):
    world = World(examples(6))
    lora.add_lora(world.encoder, targets=["query", "value"])
    torch.manual_seed(seed)
    for p in world.model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1)
    return world


def accelerate(patch, rank, folder):
    """Two micro-batches a step. Two ranks start apart, and DDP, which `prepare` wraps around, makes them equal."""
    world, seen = world_with_adapter(rank), []

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.heads = world.encoder, world.heads

        def forward(self, t, ids):
            return self.heads[t](self.encoder(ids).last_hidden_state[:, 0])

    def task_loss(model, t, batch):
        return cross_entropy(model(t, batch[0]), batch[1])

    def loss(model, t, batch):
        seen.append((t, batch))
        return task_loss(model, t, batch)

    def losses(twin, k):  # seen: what this rank has been given so far, 2 micro-batches of 3 tasks a step
        found = everyone(seen[6 * k :])
        return [[task_loss(twin, t, batch) * 3 / len(found) for t, batch in found if t == task] for task in range(3)]

    g = torch.Generator().manual_seed(0)
    items = [[(torch.randint(50, (6,), generator=g), k // 2**t % 2) for t in range(3)] for k in range(96)]
    loader, model = torch.utils.data.DataLoader(items, batch_size=4), Model()
    names = {"encoder": world.encoder, "heads": world.heads, "model": model, "loader": loader, "loss": loss}
    steps = oracle.watch(patch, model=lambda: model, losses=losses)
    exec(oracle.recipe("Accelerate")[0], names)
    return steps, list(model.parameters())


def fsdp2(patch, rank, folder):
    """Base sharded in bf16, factors whole in float32, 3 tasks, 2 micro-batches. Held against the unsharded model."""
    from torch.distributed.tensor import DTensor

    with pytest.raises(ValueError, match="sharded, by FSDP; see FSDP2 in docs/recipes.md"):
        OrthoLoRA([[p] for p in torch.distributed.fsdp.fully_shard(llama()).parameters()], num_tasks=3)

    torch.manual_seed(0)
    model = llama().bfloat16()
    whole = copy.deepcopy(model)
    lora.add_lora(whole, targets=["q_proj", "v_proj"], r=8, alpha=16)
    shares = [list(zip(examples(6, 2 * r), examples(6, 2 * r + 1), strict=True)) for r in range(2)]
    batch = lambda ids: {"input_ids": ids, "labels": ids}  # noqa: E731
    shares = [[[[batch(ids) for ids, _ in micro] for micro in step] for step in share] for share in shares]

    def losses(twin, k):
        micro_batches = [micro for share in shares for micro in share[k]]
        return [[twin(**micro[t]).loss / 4 for micro in micro_batches] for t in range(3)]

    names = {"model": model, "data": Data(shares[rank], lambda: nn.ParameterList(names["factors"]))}
    steps = oracle.watch(patch, **beside(whole, lora.lora_parameters(whole), names), losses=losses, half=True)
    torch.manual_seed(rank)  # the factors start apart
    exec(oracle.recipe("FSDP2")[0], names)
    base = [p for p in model.parameters() if not p.requires_grad]
    assert len(base) == 21 and all(isinstance(p, DTensor) and p.dtype == torch.bfloat16 for p in base)
    return steps, names["factors"]


def trl(patch, rank, folder):
    """Two data sets of words of their own, so that a batch tells its task; two micro-batches a step."""
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = ["<pad>", "<eos>", "<unk>", *(f"w{i}" for i in range(3, 50))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    model, seen, started, g = llama(), [], [], torch.Generator().manual_seed(0)
    plain = copy.deepcopy(model)  # the trainer gives its own another forward
    model.config._name_or_path = model.name_or_path = str(folder)  # where the trainer looks for the tokenizer

    def texts(low, high):
        draws = torch.randint(low, high, (32, 7), generator=g).tolist()
        return Dataset.from_dict(
            {"text": [" ".join(words[i] for i in row[: 3 + k % 5]) for k, row in enumerate(draws)]}
        )

    def compute_loss(self, model, inputs, *others, **named):
        if not started:  # B = 0 would leave A no gradient
            started.extend(nn.init.normal_(p, std=0.1, generator=g) for p in names["factors"])
        kept = {name: x for name, x in inputs.items() if name in ("input_ids", "attention_mask", "labels")}
        seen.append((self.state.global_step, int(inputs["input_ids"][0, 0] >= 26), kept))
        return original(self, model, inputs, *others, **named)

    def losses(twin, k):
        return [[twin(**batch).loss / 2 for step, task, batch in seen if (step, task) == (k, t)] for t in range(2)]

    names = {"model": model, "first": texts(3, 26), "second": texts(26, 50)}
    names["config"] = LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    names["args"] = SFTConfig(
        str(folder),
        max_steps=6,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    original = SFTTrainer.compute_loss
    patch.setattr(SFTTrainer, "compute_loss", compute_loss)
    plain = get_peft_model(plain, names["config"])
    factors = [p for p in plain.parameters() if p.requires_grad]
    steps = oracle.watch(patch, **beside(plain, factors, names), losses=losses)
    exec(oracle.recipe("TRL's SFTTrainer")[0], names)
    return steps, []


def lightning(patch, rank, folder):
    """On two ranks, which start apart, with what the recipe's last sentence has in place of devices=1."""
    import lightning

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "default_root_dir": folder}
    patch.setattr(lightning, "Trainer", partial(lightning.Trainer, **quiet))
    world, seen, code = world_with_adapter(rank), [], oracle.recipe("Lightning")[0]
    world.steps = examples(6)
    if dist.is_initialized():  # Lightning shares the steps out
        world.steps = examples(12)
        code = code.replace("devices=1", re.search(r"`(devices=2, .*?)`", oracle.RECIPES.read_text("utf-8"))[1])

    def loss(t, batch):
        seen.append((t, batch))
        return world.loss(world.model, t, batch)

    def losses(twin, k):
        found = everyone(seen[3 * k :])
        return [[world.loss(twin, t, batch) * 3 / len(found) for t, batch in found if t == task] for task in range(3)]

    world.names |= {"loader": torch.utils.data.DataLoader(world.steps, batch_size=None), "loss": loss}
    steps = oracle.watch(patch, model=lambda: world.model, losses=losses)
    exec(code, world.names)
    return steps, list(world.model.parameters())


# title: (what runs, numbers of processes, the packages it is about)
RECIPES = {
    "Accelerate": (accelerate, (1, 2), ["accelerate"]),
    "FSDP2": (fsdp2, (2,), ["torch", "transformers"]),
    "TRL's SFTTrainer": (trl, (1,), ["trl", "peft"]),
    "Lightning": (lightning, (1, 2), ["lightning"]),
}


def process(rank, world_size, title, folder):
    torch.set_num_threads(1)
    ranks = {
        "ACCELERATE_USE_CPU": "true",
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
    }
    if world_size > 1:
        os.environ |= {name: str(value) for name, value in ranks.items()}
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    with pytest.MonkeyPatch.context() as patch:
        steps, parameters = RECIPES[title][0](patch, rank, folder)
    if world_size > 1:
        for p in parameters:
            first = p.detach().clone()
            dist.broadcast(first, 0)
            assert torch.equal(first, p), "the ranks' parameters differ"
        dist.destroy_process_group()
    assert len(steps) >= 5 and max(step.joint for step in steps) > 0.05
    error = max(max(step.error, step.other_error) for step in steps)
    torch.save((len(steps), error), folder / f"rank{rank}.pt")


def run(title, world_size):
    """(number of steps, largest error) of all ranks."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (world_size, title, Path(folder)), nprocs=world_size)
        found = [torch.load(Path(folder, f"rank{rank}.pt")) for rank in range(world_size)]
    return min(steps for steps, _ in found), max(error for _, error in found)


def main():
    lines, right = ["| recipe | processes | steps | largest error | with |", "|---|---|---|---|---|"], True
    for title, (_, sizes, packages) in RECIPES.items():
        if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
            print(f"{title}: not run, {', '.join(missing)} is not installed; pip install {' '.join(missing)}")
            right = False
            continue
        versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
        for size in sizes:
            steps, error = run(title, size)
            right &= error <= 1e-6
            lines.append(f"| {title} | {size} | {steps} | {error:.0e} | {versions} |")
    print("\n".join(lines))
    if not right:
        print("docs/recipes.md is left as it was: not all were run, or an error is above 1e-6")
        return 1
    when = f"Last run {datetime.date.today()}, torch {torch.__version__}, on a CPU, by `python tests/outside.py`:"
    before, _, rest = oracle.RECIPES.read_text(encoding="utf-8").partition("<!-- outside -->\n")
    _, _, after = rest.partition("<!-- end -->")
    table = "\n".join([when, "", *lines])
    text = f"{before}<!-- outside -->\n{table}\n<!-- end -->{after}"
    oracle.RECIPES.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
