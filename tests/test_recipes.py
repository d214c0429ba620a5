"""docs/recipes.md keeps its word: every recipe runs as it stands, and writes the .grad that tests/oracle.py expects.

Held against each other at every step, at the parameters of that step: what `project` left in .grad, and PCGrad in plain
float64 loops of gradients that `torch.autograd.grad` takes of the same model, with the order that was drawn. Error:
largest difference over largest entry. At most 1e-6 in float32, 1e-2 in bf16; and, where the model is float32, at most
5e-6 from gradients of a copy of it in float64, most of which is the float32 model's own rounding.

GradScaler is run as `torch.amp.GradScaler("cpu")` with float16 autocast: scaling, overflows (the step is skipped, the
scale halved), unscaling and clipping. That it does so on a GPU is not shown here.
"""

import copy
import json
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import oracle
import peft
import pytest
import torch
import torch.distributed as dist
from oracle import recipe
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, TrainingArguments

import lora
import lori
import ortholora

T = 3
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def bert():
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=2, **SIZES, **STILL))


def llama():
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_key_value_heads=2, **SIZES))


def examples(steps, seed=0, tasks=T, lengths=(6,)):
    """For each step a list with one batch (ids, labels) per task, of one of these lengths."""
    g = torch.Generator().manual_seed(seed)

    def batch(k):
        ids = torch.randint(50, (4, lengths[k % len(lengths)]), generator=g)
        return ids, torch.randint(2, (4,), generator=g)

    return [[batch(k + t) for t in range(tasks)] for k in range(steps)]


class Data(list):
    """Steps, one after the other. Before the first, what trains is moved a little: B = 0 would leave A no gradient."""

    def __init__(self, steps, model):
        super().__init__(steps)
        self.model = model  # a function: a recipe may put another in its place

    def __iter__(self):
        g = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for p in self.model().parameters():
                if p.requires_grad:
                    p += 0.1 * torch.randn(p.shape, generator=g).to(p.dtype)
        return super().__iter__()


class World:
    """The names that a recipe's first sentence takes for granted, and the oracle beside them."""

    def __init__(self, steps=None, dtype=torch.float32):
        torch.manual_seed(0)
        self.encoder, self.heads = bert().bert.to(dtype), nn.ModuleList(nn.Linear(16, 2) for _ in range(T))
        self.model = nn.ModuleList([self.encoder, self.heads])  # the oracle copies it whole
        self.steps = examples(5) if steps is None else steps
        self.names = {"encoder": self.encoder, "heads": self.heads, "loss": partial(self.loss, self.model)}
        self.names["data"] = Data(self.steps, lambda: self.model)

    @staticmethod
    def loss(model, t, batch):
        encoder, heads = model
        ids, labels = batch
        return cross_entropy(heads[t](encoder(ids).last_hidden_state[:, 0].to(heads[t].weight.dtype)), labels)

    def losses(self, model, k):
        return [self.loss(model, t, batch) for t, batch in enumerate(self.steps[k])]

    def run(self, title, monkeypatch, **how):
        """Executes the recipe; returns what it wrote, step by step."""
        steps = oracle.watch(monkeypatch, **{"model": lambda: self.model, "losses": self.losses, **how})
        exec(recipe(title)[0], self.names)
        return steps


ERRORS = ("error", "other_error", "error64", "joint")


def right(steps, tolerance=1e-6, count=5):
    """All steps are, and joint training would not have been."""
    errors = [max(getattr(s, name) for s in steps) for name in ERRORS]
    print("errors {:.1e}, others {:.1e}, in float64 {:.1e}; joint {:.1g}".format(*errors))
    assert len(steps) >= count
    assert max(errors[:2]) <= tolerance
    assert errors[2] <= 5 * tolerance
    assert errors[3] > 0.05
    return True


# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_every_recipe_is_tested_somewhere():
    text = oracle.RECIPES.read_text(encoding="utf-8")
    tests = Path(__file__).read_text(encoding="utf-8") + (Path(__file__).parent / "outside.py").read_text()
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles and [title for title in titles if f'"{title}"' not in tests] == []


def test_plain_loop(monkeypatch):
    assert right(World().run("Plain loop", monkeypatch))


def test_plain_loop_on_a_bf16_base(monkeypatch):  # factors and heads are float32, and so are their gradients
    assert right(World(dtype=torch.bfloat16).run("Plain loop", monkeypatch, half=True))


def test_accumulation(monkeypatch):
    world = World(list(zip(examples(5, 0), examples(5, 1), strict=True)))

    def losses(model, k):
        return [[world.loss(model, t, batches[t]) / 2 for batches in world.steps[k]] for t in range(T)]

    assert right(world.run("Gradient accumulation", monkeypatch, losses=losses))


def test_grad_scaler_and_clipping(monkeypatch):
    world, overflow, stepped = World(examples(10)), 6, []

    def loss(model, t, batch):
        strength = 1e6 if t == 1 and batch is world.steps[overflow][1] else 5.0  # 5: so that clipping has work
        return strength * world.loss(model, t, batch)

    def losses(model, k):
        scale = world.names["scaler"].get_scale()
        with torch.autocast("cpu", torch.float16):
            found = [loss(model, t, batch) for t, batch in enumerate(world.steps[k])]
        return [scale * x for x in found]

    def before_step(optimizer, *_):
        grads = {p: p.grad for group in optimizer.param_groups for p in group["params"]}
        step = steps[-1]
        scale = world.names["scaler"].get_scale()
        expected = {p: e / scale for p, e in (step.projected | step.others).items()}
        norm = float(sum((e**2).sum() for e in expected.values())) ** 0.5
        assert norm > 1
        stepped.append((step.index, oracle.distance(grads, {p: e / norm for p, e in expected.items()})))

    world.names |= {"device": "cpu", "loss": partial(loss, world.model)}
    hook = register_optimizer_step_pre_hook(before_step)
    steps = oracle.watch(monkeypatch, model=lambda: world.model, losses=losses, half=True)
    try:
        exec(recipe("GradScaler and clipping")[0], world.names)
    finally:
        hook.remove()
    skipped = [step.index for step in steps if float("inf") in (step.error, step.other_error)]
    assert overflow in skipped and steps[overflow].error == float("inf")  # the first scale is too large for a head, too
    assert right([step for step in steps if step.index not in skipped])
    assert [index for index, _ in stepped] == [k for k in range(10) if k not in skipped]
    assert max(error for _, error in stepped) <= 1e-5  # clip_grad_norm_ adds 1e-6 to the norm
    assert world.names["scaler"].get_scale() == 2.0 ** (16 - len(skipped))


@pytest.mark.parametrize("sizes", [(4, 4, 4), (4, 1, 3)])
def test_one_pass_for_all_tasks(monkeypatch, sizes):
    world = World()
    for batches in world.steps:
        batches[:] = [(ids[:n], y[:n]) for (ids, y), n in zip(batches, sizes, strict=True)]
    assert right(world.run("One pass for all tasks", monkeypatch))


METHODS = {
    "lora": lambda: (bert(), peft.LoraConfig(task_type="SEQ_CLS")),
    "lora in bf16": lambda: (bert().bfloat16(), peft.LoraConfig(task_type="SEQ_CLS")),
    "ia3": lambda: (bert(), peft.IA3Config(task_type="SEQ_CLS")),
    "prefix": lambda: (llama(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8)),
}


@pytest.mark.parametrize("method", METHODS)
def test_any_peft_method(monkeypatch, method):
    torch.manual_seed(0)
    model, config = METHODS[method]()
    half = model.dtype == torch.bfloat16
    if half:  # peft's own default is a float32 adapter, whatever the base is
        monkeypatch.setattr(peft, "get_peft_model", partial(peft.get_peft_model, autocast_adapter_dtype=False))
    world = World()
    label = {True: lambda ids, _: ids, False: lambda _, labels: labels}[method == "prefix"]
    for batches in world.steps:
        batches[:] = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": label(x, y)} for x, y in batches]
    world.names |= {"model": model, "config": config, "data": Data(world.steps, lambda: world.names["model"])}

    def blocks(model):
        return [[p] for name, p in model.named_parameters() if p.requires_grad and "classifier" not in name]

    steps = world.run(
        "Any peft method",
        monkeypatch,
        model=lambda: world.names["model"],
        losses=lambda model, k: [model(**batch).loss for batch in world.steps[k]],
        blocks=blocks,
        half=half,
    )
    assert right(steps, 1e-2 if half else 1e-6)
    assert steps[-1].dtypes == {torch.bfloat16 if half else torch.float32}
    assert len(steps[0].projected) == {"lora": 8, "lora in bf16": 8, "ia3": 8, "prefix": 1}[method]
    assert len(steps[0].others) == (0 if method == "prefix" else 2)


def test_uncertainty_weighting(monkeypatch):
    world = World()

    def model():
        return nn.ModuleList([*world.model, nn.ParameterList([world.names["log_variance"]])])

    def losses(model, k):
        found = world.losses(model[:2], k)
        return [x / torch.exp(s) + s / 2 for x, s in zip(found, model[2][0], strict=True)]

    steps = world.run("Weights that change at every step", monkeypatch, model=model, losses=losses)
    assert right(steps)
    log_variance = world.names["log_variance"]
    assert log_variance in steps[-1].others and (log_variance != 0).all()


def to_mean_norm(grads, projected):
    norms = [sum(float((g[p] ** 2).sum()) for p in projected) ** 0.5 for g in grads]
    for g, norm in zip(grads, norms, strict=True):
        for p in projected:
            g[p] *= sum(norms) / len(norms) / norm


def test_balance(monkeypatch):
    assert right(World().run("Balance", monkeypatch, change=to_mean_norm))


def test_balance_alone(monkeypatch):
    """The recipe's last sentence: with an order of (T, 0), balanced joint training."""
    world = World()
    [code] = recipe("Balance")
    [instead] = re.findall(r"`(ortho\.project\(torch\.empty.*?)`", oracle.RECIPES.read_text(encoding="utf-8"))
    steps = oracle.watch(monkeypatch, model=lambda: world.model, losses=world.losses, change=to_mean_norm)
    exec(code.replace("ortho.project()", instead), world.names)
    assert {tuple(map(tuple, step.order)) for step in steps} == {((),) * T}
    assert len(steps) == 5 and max(step.error for step in steps) <= 1e-6


def test_one_input_with_several_heads(monkeypatch):
    world = World()
    world.steps = [(batches[0][0], [labels for _, labels in batches]) for batches in world.steps]
    world.names["data"] = Data(world.steps, lambda: world.model)

    def losses(model, k):
        ids, labels = world.steps[k]
        return [world.loss(model, t, (ids, y)) for t, y in enumerate(labels)]

    assert right(world.run("One input, several heads", monkeypatch, losses=losses))


def test_some_of_the_tasks(monkeypatch):
    world, present = World(), [(0, 1), (1, 2), (0, 1, 2), (2,), (2, 0), (1, 0)]
    world.steps = [{t: batches[t] for t in there} for there, batches in zip(present, examples(6), strict=True)]
    world.names["data"] = Data(world.steps, lambda: world.model)

    def losses(model, k):
        return [world.loss(model, t, world.steps[k][t]) if t in world.steps[k] else [] for t in range(T)]

    assert right(world.run("Only some tasks in a step", monkeypatch, losses=losses))


UNITS = {
    "each A and each B": lambda A, B: [[p] for p in A + B],
    "all A, and all B": lambda A, B: [A, B],
    "everything": lambda A, B: [A + B],
    "B alone": lambda A, B: [[p] for p in B],
    "each layer": lambda A, B: [list(pair) for pair in zip(A, B, strict=True)],
}


@pytest.mark.parametrize("unit", UNITS)
def test_the_unit_of_projection(monkeypatch, unit):
    world = World()
    [code] = recipe("The unit of projection")

    def blocks(model):
        named = list(model.named_parameters())
        return UNITS[unit](*([p for name, p in named if name.endswith(end)] for end in (".A", ".B")))

    steps = oracle.watch(monkeypatch, model=lambda: world.model, losses=world.losses, blocks=blocks)
    exec(code.replace('units["each layer"]', f"units[{unit!r}]"), world.names)
    assert right(steps)
    assert world.names["units"].keys() == UNITS.keys()


def test_resuming(monkeypatch, tmp_path):
    steps = examples(6)

    def run(seed, part, path):
        world = World(part)
        world.names |= {"path": path, "data": part}
        torch.manual_seed(seed)  # of the adapter; heads and optimizer know nothing either
        nn.init.normal_(world.heads[0].weight)
        watched = world.run("Resuming", monkeypatch)
        return watched, [p.detach().clone() for p in world.names["trained"]]

    watched, whole = run(0, steps, tmp_path / "whole.pt")
    assert right(watched, count=6)
    first, _ = run(0, steps[:3], tmp_path / "parts.pt")
    second, resumed = run(1, steps[3:], tmp_path / "parts.pt")  # another start, but all is in the file
    assert {file.name for file in tmp_path.iterdir()} == {"whole.pt", "parts.pt"}
    assert [step.order for step in first + second] == [step.order for step in watched]
    assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


def test_saving(tmp_path):
    torch.manual_seed(0)
    base = bert().eval()
    model = copy.deepcopy(base)
    lora.add_lora(model.bert, targets=["query", "value"], r=3, alpha=5)
    for p in lora.lora_parameters(model):
        nn.init.normal_(p, std=0.3)
    exec(recipe("Saving")[0], {"model": model, "folder": tmp_path / "adapter"})
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter").eval()
    ids = torch.randint(50, (4, 6))
    expected, found = model(ids).logits, loaded(ids).logits
    assert (expected - base(ids).logits).abs().max() > 1e-3 * expected.abs().max()
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["r"] == 3


def test_lori(monkeypatch):
    world, masks = World(), []
    lora.add_lora(world.encoder, targets=["query", "value"], r=8, alpha=16)
    frozen = {name: p.clone() for name, p in world.encoder.named_parameters() if not name.endswith((".A", ".B"))}
    choose = lori.magnitude_masks
    monkeypatch.setattr(lori, "magnitude_masks", lambda *a, **k: masks.append(choose(*a, **k)) or masks[-1])
    world.names["data"] = world.steps
    [code] = recipe("LoRI")
    exec(code, world.names)
    learned, both = world.names["learned"], world.names["both"]
    for task, (found, mask) in enumerate(zip(learned, masks, strict=True)):
        assert sum(int(m.sum()) for m in mask.values()) == round(0.1 * sum(m.numel() for m in mask.values()))
        g = torch.Generator().manual_seed(task)
        for path, (A, B, _) in found.items():
            assert torch.equal(A, torch.empty(8, 16).uniform_(-1 / 4, 1 / 4, generator=g))  # as `seed` drew it
            assert torch.equal(B != 0, mask[path])  # each active entry has moved, and no other
    for path, (A, B, scale) in both.items():
        expected = sum(0.5 * s * b.double() @ a.double() for a, b, s in (found[path] for found in learned))
        assert (scale * B.double() @ A.double() - expected).abs().max() <= 1e-6 * expected.abs().max()
        now = world.encoder.get_submodule(path).delta().detach()
        assert (now - expected).abs().max() <= 1e-6 * expected.abs().max()
    deltas = [torch.cat([(s * b.double() @ a.double()).flatten() for a, b, s in x.values()]) for x in learned]
    assert (world.names["cosine"] - torch.cosine_similarity(*deltas, dim=0)).abs() <= 1e-9
    kept = dict(world.encoder.named_parameters())
    assert all(torch.equal(kept[name], p) for name, p in frozen.items())


# ---------------------------------------------------------------------------------------------------------------------
# What would train something else without a word, and is refused at the first step


def another_model(names):
    torch.manual_seed(1)
    names["model"] = peft.get_peft_model(bert(), names["config"])


def another_adapter(names):
    names["model"].add_adapter("second", names["config"])
    names["model"].set_adapter("second")


def other_parameters(names):  # as fully_shard makes them
    for module in names["model"].modules():
        for name, p in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(p.detach().clone(), requires_grad=p.requires_grad))


@pytest.mark.parametrize("change", [another_model, another_adapter, other_parameters])
def test_ortho_made_too_early(change):
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"])
    names = {"model": peft.get_peft_model(bert(), config), "config": config}
    ortho = ortholora.OrthoLoRA(oracle.each_factor(names["model"]), num_tasks=T)
    change(names)
    ids, labels = examples(1)[0][0]
    names["model"](input_ids=ids, labels=labels).loss.backward()
    with pytest.raises(RuntimeError, match="no parameter in blocks has a .grad; .* that the model has now"):
        ortho.collect(0)


# ---------------------------------------------------------------------------------------------------------------------
# torch.distributed and the Trainer: one process here, two in `two_processes`


def distributed(monkeypatch, rank, world_size, steps, dropout=0.0):
    """The recipe as rank `rank`: another start and other batches on each, no batch of one task on one rank."""
    world = World()
    lengths = [[(6,), (3, 9, 5)][r] for r in range(world_size)]
    shares = [examples(steps, seed=r, lengths=lengths[r]) for r in range(world_size)]
    for k in range(steps):
        shares[-1][k][k % T] = None
    torch.manual_seed(100 + rank)
    nn.init.normal_(world.heads[0].weight)  # private heads start apart, too

    def loss(t, batch):
        torch.rand(1 + 2 * rank)  # a stray draw
        return world.loss(world.model, t, batch)

    def losses(model, k):  # the mean over ranks
        there = [[share[k][t] for share in shares if share[k][t] is not None] for t in range(T)]
        return [[world.loss(model, t, batch) / world_size for batch in there[t]] for t in range(T)]

    world.names |= {"loss": loss, "data": Data(shares[rank], lambda: world.model)}
    with monkeypatch.context() as patch:
        patch.setattr(lora, "add_lora", partial(lora.add_lora, dropout=dropout))
        if not dropout:
            return world.run("torch.distributed", patch, losses=losses), world.model
        exec(recipe("torch.distributed")[0], world.names)
    return [], world.model


def wrapped(monkeypatch, rank, steps):
    """The recipe's "Under a DDP wrapper": it averages in every backward, so rows and heads come averaged."""
    shares = [examples(steps, seed=r) for r in range(2)]
    world = World(shares[rank])

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.heads = world.encoder, world.heads

        def forward(self, t, ids):
            return self.heads[t](self.encoder(ids).last_hidden_state[:, 0])

    def losses(model, k):
        return [[world.loss(model, t, share[k][t]) / 2 for share in shares] for t in range(T)]

    lora.add_lora(world.encoder, targets=["query", "value"])
    iter(Data([], lambda: world.model))  # B is not 0 any more
    model = nn.parallel.DistributedDataParallel(Whole(), find_unused_parameters=True)
    with monkeypatch.context() as patch:
        watched = oracle.watch(patch, model=lambda: world.model, losses=losses)
        ortho = ortholora.OrthoLoRA(lora.blocks(world.encoder), T)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        for batches in shares[rank]:
            optimizer.zero_grad()
            for t, (ids, y) in enumerate(batches):
                cross_entropy(model(t, ids), y).backward()
                ortho.collect(t)
            ortho.project()
            optimizer.step()
    return watched, world.model


def trainer(monkeypatch, folder, world_size, accumulation, steps, dropout=0.0):
    """The recipe, with one record of what the model was given: micro-batches, each with a batch per task."""
    torch.manual_seed(0)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query", "value"], lora_dropout=dropout)
    model, seen = peft.get_peft_model(bert(), config), []
    g = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            nn.init.normal_(p, std=0.1, generator=g)
    item = lambda y: {"input_ids": torch.randint(50, (6,), generator=g).tolist(), "labels": y}  # noqa: E731
    dataset = [[item(k // 2**t % 2) for t in range(T)] for k in range(64)]
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    def losses(twin, k):
        found = seen[-T * accumulation :]  # of the optimizer's step, on this rank
        if world_size > 1:
            everyone = [None] * world_size
            dist.all_gather_object(everyone, found)
            found = sum(everyone, [])
        return [[twin(**batch).loss / accumulation / world_size for batch in found[t::T]] for t in range(T)]

    def record(module, _, batch):
        if module is model:  # not the oracle's copy
            seen.append({name: x.clone() for name, x in batch.items() if isinstance(x, torch.Tensor)})
            torch.rand(1 + 2 * int(os.environ.get("RANK", 0)))  # a stray draw

    model.register_forward_pre_hook(record, with_kwargs=True)
    names = {"model": model, "args": args, "dataset": dataset}
    with monkeypatch.context() as patch:
        watched = [] if dropout else oracle.watch(patch, model=lambda: model, losses=losses)
        exec(recipe("transformers.Trainer")[0], names)
    assert len(seen) == T * accumulation * steps
    return watched, model


def test_torch_distributed_on_one_process(monkeypatch, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        steps, _ = distributed(monkeypatch, 0, 1, 6)
    finally:
        dist.destroy_process_group()
    assert right(steps)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_on_one_process(monkeypatch, tmp_path, accumulation):
    assert right(trainer(monkeypatch, tmp_path, 1, accumulation, 5)[0])


def two_processes(rank, folder):
    """What runs as rank `rank` of two. Saves the largest errors, and the parameters at the end, of each case."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    patch = pytest.MonkeyPatch()
    cases = {
        "loop": distributed(patch, rank, 2, 6),
        "loop, dropout": distributed(patch, rank, 2, 20, dropout=0.1),
        "DDP": wrapped(patch, rank, 6),
        "trainer 1": trainer(patch, folder, 2, 1, 5),
        "trainer 2": trainer(patch, folder, 2, 2, 5),
        "trainer 2, dropout": trainer(patch, folder, 2, 2, 20, dropout=0.1),
    }
    found = {}
    for case, (steps, model) in cases.items():
        found[case] = {"parameters": [p.detach() for p in model.parameters()]}
        found[case] |= {"steps": [{name: getattr(s, name) for name in ERRORS} for s in steps]}
    torch.save(found, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    torch.multiprocessing.spawn(two_processes, (folder,), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", ["loop", "DDP", "trainer 1", "trainer 2"])
def test_two_processes(ranks, case):
    for found in ranks:
        assert right([SimpleNamespace(**step) for step in found[case]["steps"]])


@pytest.mark.parametrize("case", ["loop", "loop, dropout", "DDP", "trainer 1", "trainer 2", "trainer 2, dropout"])
def test_two_processes_stay_equal_to_the_bit(ranks, case):
    a, b = (found[case]["parameters"] for found in ranks)
    assert len(a) == len(b) > 30
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
