"""Train and compare: one shared LoRA adapter under joint training, PCGrad and Ortho-LoRA, and one adapter per task.

    python train.py                                    roberta-base on four GLUE tasks from the Hub; offline, the demo
    python train.py --demo                             the demo: a toy grammar and a tiny encoder, no network
    python train.py --model FOLDER --glue FOLDER --tasks rte,mrpc --methods joint,ortho --seeds 0,1,2
    torchrun --nproc-per-node 2 train.py ...           the same run, every batch shared out over two processes

It ends with a table, and leaves results.json, results.md, timing.json, log.jsonl and the adapters in the out folder.
"""

import argparse
import contextlib
import copy
import dataclasses
import json
import math
import os
import platform
import shlex
import signal
import sys
import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from torch.nn import functional as F
from tqdm import tqdm

import lora
import lori
from evaluate import find_device, predict
from glue import (
    TASKS,
    batches_of_steps,
    load_data,
    load_tokenizer,
    score,
)
from model import MultiTaskModel, load_encoder
from ortholora import OrthoLoRA, balance
from support.checkpoint import (
    BadInput,
    Progress,
    Stopped,
    remove_state,
    save_adapter,
    save_masks,
    write_text,
)
from support.hub import HubError, find_checkpoint, go_offline_if_hub_is_down
from support.table import report, share_of_pairs, statistics, summary
from support.toy import make_demo


@dataclass(frozen=True)
class Method:
    about: str
    own: bool = False  # each task has an adapter of its own; else one for all
    project: bool = False  # the tasks' gradients are projected; else they just add up
    frozen_A: bool = False  # LoRI: A is random, and only B trains
    source: str = ""  # made from that method's adapters: masked by them, or merged out of them

    @property
    def merged(self):
        return bool(self.source) and not self.own


METHODS = {
    "head": Method("frozen encoder, trained heads: the floor"),
    "single": Method("one adapter per task: what joint training is to be measured against", own=True),
    "joint": Method("one shared adapter, the tasks' gradients added"),
    "pcgrad": Method("one shared adapter, all its factors projected as one vector", project=True),
    "ortho": Method("one shared adapter, each factor A and B projected alone: Ortho-LoRA", project=True),
    "lori-ortho": Method(
        "ortho with A frozen and random, so that only B is trained and projected", project=True, frozen_A=True
    ),
    "lori-d": Method("one adapter per task, A frozen and random: LoRI, dense", own=True, frozen_A=True),
    "lori-s": Method(
        "lori-d again, training only the tenth of B that it made largest: LoRI, sparse",
        own=True,
        frozen_A=True,
        source="lori-d",
    ),
    "lora-merged": Method("single's adapters merged into one, not trained again", source="single"),
    "lori-d-merged": Method("lori-d's adapters merged into one", frozen_A=True, source="lori-d"),
    "lori-s-merged": Method("lori-s's adapters merged into one", frozen_A=True, source="lori-s"),
}
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
STATE = "state.safetensors"  # in the out folder


def setting(default, text, **more):
    return field(default=default, metadata={"help": text, **more})


@dataclass
class Settings:
    """Everything that can be set; each line is a flag, and its text the --help."""

    # what
    model: str = setting("roberta-base", "checkpoint folder or Hub id: BERT, RoBERTa, XLM-R or DistilBERT")
    revision: str = setting("main", "the model's revision on the Hub")
    glue: str = setting("nyu-mll/glue", "GLUE folder in the Hub's layout, or Hub id")
    tasks: str = setting("rte,mrpc,stsb,cola", f"out of {', '.join(TASKS)}")
    methods: str = setting("head,single,joint,pcgrad,ortho", "; ".join(f"{k}: {m.about}" for k, m in METHODS.items()))
    # adapter
    rank: int = setting(8, "r of every LoRA layer")
    alpha: float = setting(16.0, "scale = alpha / rank")
    rslora: bool = setting(False, "scale = alpha / sqrt(rank) instead")
    targets: str = setting("", "linear layers to adapt, by name, or all-linear; default: query and value")
    dropout: float = setting(0.0, "on the input of A, in training")
    encoder_dropout: bool = setting(False, "keep the frozen encoder's own dropout in training; without, it only reads")
    # projection
    unit: str = setting("tensor", "what ortho projects as one vector", choices=["tensor", "factor", "all"])
    factors: str = setting("AB", "project these; the other factor's gradients add up", choices=["A", "B", "AB"])
    sequential: bool = setting(
        False, "project off the others' gradients as projected so far, not the originals: slow, pair by pair"
    )
    combine: str = setting("sum", "what becomes of the projected gradients", choices=["sum", "mean"])
    balance: bool = setting(False, "scale the tasks' gradients of the adapter to one norm, for joint too")
    task_weights: str = setting("", "one number per task, multiplying its loss; default: 1 each")
    # LoRI
    sparsity: float = setting(0.9, "lori-s leaves this share of B at zero")
    sparse_lr: float = setting(0.0, "lori-s's learning rate for B, its heads keep --lr; 0: ten times --lr")
    own_a: bool = setting(False, "single: an A of each task's own, as merging wants and LoRI has, not joint's")
    merge: str = setting("cat", "how adapters are merged", choices=["cat", "linear"])
    merge_weight: float = setting(0.0, "weight of each adapter in a merge; 0: 1 / number of tasks")
    continual: bool = setting(
        False, "train the tasks one after the other; methods out of " + ", ".join(m for m in METHODS if METHODS[m].own)
    )
    disjoint: bool = setting(False, "with --continual: lori-s's masks share no entry")
    # training
    steps: int = setting(600, "optimizer steps; each draws one batch from every task")
    batch_size: int = setting(16, "examples per task and step")
    window: int = setting(32, "batches that are shuffled, then sorted by length, together, to pad little; 1: plain")
    lr: float = setting(5e-4, "peak learning rate, for adapter and heads")
    warmup: float = setting(0.06, "share of the steps in which it rises; then it falls to 0, both linearly")
    optimizer: str = setting("adamw", "SGD has momentum 0.9", choices=["adamw", "sgd"])
    weight_decay: float = setting(0.01, "AdamW's, decoupled")
    clip: float = setting(1.0, "largest norm of the whole gradient, after the projection; 0: no clipping")
    max_length: int = setting(128, "tokens; longer pairs lose tokens from the longer sentence first")
    seeds: str = setting("0", "one run each: A, heads, batches, dropout, order of projection")
    # how
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting(
        "auto",
        "of the frozen encoder in training; the rest is float32. auto: bf16 on a GPU with it",
        choices=["auto", "fp32", "bf16"],
    )
    per_task: str = setting(
        "auto",
        "a pass forward and back for each task, or one for all tasks' sequences stacked; auto: stacked on a GPU",
        choices=["auto", "loop", "stacked"],
    )
    compile: bool = setting(False, "torch.compile the encoder: slow at first, then faster on a GPU")
    holdout: int = setting(0, "hold this many training rows of each task out and score on them: to choose settings by")
    deterministic: bool = setting(False, "ask torch for deterministic kernels: slower on a GPU, the same on a CPU")
    out: str = setting("", "out folder; default: runs/demo, or runs/MODEL-DATE-TIME")
    resume: bool = setting(False, "go on with the interrupted run in --out, under the same settings")
    save_every: float = setting(60.0, "seconds between saves of what --resume needs")
    demo: bool = setting(False, "run the demo: settings as given, else those of DEMO in this file")


DEMO = {  # what the demo changes
    "tasks": "sst2,mrpc,mnli,stsb",
    "steps": 120,
    "lr": 4e-3,
    "max_length": 64,
    "seeds": "0,1,2",
}


# ---------------------------------------------------------------------------------------------------------------------
# Settings


MOVED = {"--evaluate": "python evaluate.py ADAPTER", "--submit": "python evaluate.py ADAPTER --submit FOLDER"}


def parse(argv):
    """The flags that were given, as {name: value}. Raises BadInput, naming the new command, for a flag that moved."""
    for word in argv:
        if (flag := word.partition("=")[0]) in MOVED:
            raise BadInput(f"{flag} is now a command of its own: {MOVED[flag]}")
    parser = argparse.ArgumentParser(
        prog="train.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for f in dataclasses.fields(Settings):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            shown = f" [{f.default}]" if f.default != "" else ""
            parser.add_argument(flag, type=f.type, help=text + shown, choices=f.metadata.get("choices"))
    return vars(parser.parse_args(argv))


def names(text, known, what):
    """'a, b' -> ['a', 'b'], each in `known` and none twice."""
    found = [name.strip() for name in text.split(",") if name.strip()]
    for name in found:
        if name not in known:
            raise BadInput(f"unknown {what} {name!r}; there are {', '.join(known)}")
    if not found or len(set(found)) < len(found):
        raise BadInput(f"--{what}s {text!r}: give each {what} once, at least one")
    return found


def numbers(text, kind, flag):
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"{flag} {text!r} is not a list of numbers such as 0,1,2") from None
    if not all(0 <= v < math.inf for v in values):
        raise BadInput(f"{flag} {text!r}: negative or not finite")
    return values


def check(s):
    """Every setting that can be judged by itself. Raises BadInput."""
    for flag in ("rank", "steps", "batch_size", "window"):
        if not 1 <= getattr(s, flag) <= 10_000_000:
            raise BadInput(f"--{flag.replace('_', '-')} {getattr(s, flag)} is outside 1 to 10,000,000")
    if s.max_length < 8:
        raise BadInput(f"--max-length {s.max_length}: at least 8 is needed")
    for flag, low, high in (
        ("alpha", 0, 1e6),
        ("lr", 0, 1e3),
        ("weight_decay", 0, 1e3),
        ("clip", 0, math.inf),
        ("warmup", 0, 1),
        ("dropout", 0, 0.99),
        ("holdout", 0, 1e9),
        ("sparse_lr", 0, 1e3),
        ("merge_weight", 0, 1e3),
        ("sparsity", 0, 0.999999),
        ("save_every", 0, 1e9),
    ):
        if not low <= getattr(s, flag) <= high:  # NaN is not
            raise BadInput(f"--{flag.replace('_', '-')} {getattr(s, flag)} is outside {low} to {high}")
    tasks = names(s.tasks, TASKS, "task")
    methods = names(s.methods, [m for m in METHODS if METHODS[m].own or not s.continual], "method")
    for method in methods:
        if METHODS[method].source not in ("", *methods) and not s.continual:
            raise BadInput(f"--methods: {method} is made from {METHODS[method].source}, so name that too")
    if s.continual and len(tasks) < 2:
        raise BadInput(f"--continual with one task, {s.tasks}: there is nothing to forget; name at least two")
    if any(METHODS[method].merged for method in methods) and len(tasks) < 2:
        raise BadInput(f"--methods {s.methods} with one task, {s.tasks}: there is nothing to merge; name at least two")
    if s.disjoint and (not s.continual or round(len(tasks) * (1 - s.sparsity), 9) > 1):
        raise BadInput(f"--disjoint needs --continual, and {len(tasks)} masks of --sparsity {s.sparsity} to fit into B")
    if "lori-ortho" in methods and "B" not in s.factors:
        raise BadInput(f"--factors {s.factors}: lori-ortho trains B alone, so it would project nothing")
    shared = [m for m in METHODS if METHODS[m].project or m == "joint"]
    if s.balance and (s.continual or not set(shared) & set(methods)):
        raise BadInput(f"--balance: no shared adapter among --methods {s.methods}; give {', '.join(shared)}")
    if s.balance and s.task_weights:
        raise BadInput("--balance gives every task the same weight: leave out --task-weights")
    if s.balance and s.factors != "AB":
        raise BadInput(f"--balance with --factors {s.factors}: the other factor would stay as it is; leave one out")
    seeds = numbers(s.seeds, int, "--seeds")
    if len(set(seeds)) < len(seeds) or max(seeds) >= 2**63:
        raise BadInput(f"--seeds {s.seeds}: give each seed once, and none of 2^63 or more")
    if s.task_weights and len(numbers(s.task_weights, float, "--task-weights")) != len(tasks):
        raise BadInput(f"--task-weights {s.task_weights}: {len(tasks)} tasks need as many weights")
    if s.resume and not (s.out or s.demo):
        raise BadInput("--resume needs --out FOLDER: the folder of the run that was interrupted")
    if s.resume and WORLD > 1:
        raise BadInput("--resume continues the training of one process: leave out torchrun")
    if WORLD > 1 and s.device.startswith("cuda:"):
        raise BadInput(f"--device {s.device} under torchrun: each process takes its own; say cuda, or leave it out")


def check_masks_fit(encoder, tasks, s):
    """Raises BadInput where --disjoint's masks, each rounded to whole entries, are more than B has."""
    if not (s.disjoint and "lori-s" in s.methods):
        return
    model = build("lori-s", encoder, tasks, 0, s)
    n = sum(layer.B.numel() for layer in lora.lora_layers(model.encoder).values())
    for name, k in {"the model": round((1 - s.sparsity) * n)}.items():
        if k * len(tasks) > n:
            raise BadInput(
                f"--disjoint: {len(tasks)} masks of {k} entries do not fit into the {n} of {name}; "
                "raise --sparsity a little"
            )


def check_out(out, s):
    """Raises BadInput where --resume has nothing to go on with, or another run was interrupted in the out folder."""
    if s.resume and not list(out.glob(STATE + "*")):
        raise BadInput(f"--resume: no interrupted run in {out}" + ", it is finished" * (out / "results.json").exists())
    if not s.resume and not s.demo and list(out.glob(STATE + "*")):
        raise BadInput(f"--out {out} has an interrupted run: go on with it by --resume, or choose another --out")


def open_out(folder, s):
    """Make the out folder, and take an earlier run's results out of it, or, to resume, what a kill left half-written.

    Raises BadInput where it can't be written, and as `check_out` does.
    """
    out = Path(folder)
    if RANK:
        return out
    check_out(out, s)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for path in [*out.glob(".*.tmp"), *out.glob("*/seed*/*/.*.tmp")]:
            path.unlink()
        if not s.resume:
            for name in ("results.json", "results.md", "timing.json"):
                (out / name).unlink(missing_ok=True)
            remove_state(out / STATE)
            (out / "log.jsonl").write_text("")
    except OSError as e:
        raise BadInput(f"--out {out} can't be written: {e.strerror}") from None
    return out


# ---------------------------------------------------------------------------------------------------------------------
# Model


def device_of(model):
    return next(model.parameters()).device


def copy_modules(encoder):
    """A copy with modules of its own, and the same (frozen) weights."""
    return copy.deepcopy(encoder, {id(p): p for p in encoder.parameters()})


def halve(encoder):
    """Make the frozen weights bf16, once, where autocast would at every use; A and B stay float32.

    The activations are bf16 then, too: `LoRALinear` casts its factors to what it is given.
    """
    for module in encoder.modules():
        if not isinstance(module, lora.LoRALinear):
            for name, p in list(module.named_parameters(recurse=False)):
                setattr(module, name, torch.nn.Parameter(p.bfloat16(), requires_grad=False))


def build(method, encoder, tasks, seed, s):
    """A copy of the encoder with LoRA, and a head for each of `tasks`, on the encoder's device.

    A depends on the seed alone and a head on the seed and its task, so every method starts from the same numbers; but
    where an A of its own is wanted (LoRI's adapters, to be merged), it depends on the seed and the tasks.
    """
    torch.manual_seed(seed)
    model = MultiTaskModel(copy_modules(encoder), {})
    targets = [t.strip() for t in s.targets.split(",")] if s.targets else None
    try:
        lora.add_lora(model.encoder, targets, s.rank, s.alpha, s.dropout, rslora=s.rslora)
    except ValueError as e:
        raise BadInput(f"--targets {s.targets}: {e}") from None
    for data in tasks:
        torch.manual_seed(zlib.crc32(f"{data.name} {seed}".encode()))
        model.add_head(data.name, TASKS[data.name].outputs)
        if data.regression:  # start from the mean label; its distance from 0 is nothing to learn
            torch.nn.init.constant_(model.heads[data.name].out.bias, data.majority())
    if method == "head":
        model.encoder.requires_grad_(False)
    if METHODS[method].frozen_A or (method == "single" and s.own_a):
        lori.draw_A(model.encoder, zlib.crc32(f"{','.join(d.name for d in tasks)} {seed}".encode()))
        for layer in lora.lora_layers(model.encoder).values():
            layer.A.requires_grad_(method == "single")
    if s.dtype == "bf16":
        halve(model.encoder)
    if s.compile:
        torch._dynamo.config.cache_size_limit = 64  # 8 are too few: mask or none, trained or not, each method
        model.encoder.compile(dynamic=True)
    torch.manual_seed((seed * WORLD + RANK) % 2**63)  # dropout
    return model.to(device_of(encoder))


def projected_blocks(model, method, s):
    """The blocks for `OrthoLoRA`, and a name for each: a factor's path, or the roles in it."""
    if not METHODS[method].project and not (method == "joint" and s.balance):
        return [], []
    layers = lora.lora_layers(model.encoder)
    paths = {id(p): f"{path}.{f}" for path, layer in layers.items() for f, p in (("A", layer.A), ("B", layer.B))}
    blocks = lora.blocks(model.encoder, "all" if method == "pcgrad" else s.unit, s.factors)
    found = [[paths[id(p)] for p in block] for block in blocks]
    return blocks, [x[0] if len(x) == 1 else "".join(sorted({path[-1] for path in x})) for x in found]


def task_losses(model, batch, s):
    """One loss for each task in the batch: cross-entropy, or the squared error over the labels' variance, in float32.

    Each is a mean over the step's examples, so that what several processes have adds up.
    """
    hidden = model.encoder(batch.ids, batch.mask, batch.types, tokens=1)  # (sequences, 1, width)
    found = []
    for data, x, labels in zip(
        batch.tasks, model.encoder.summary(hidden).float().split(batch.sizes), batch.labels, strict=True
    ):
        logits = model.heads[data.name](x)  # (size, outputs)
        if data.regression:
            total = F.mse_loss(logits.squeeze(1), labels, reduction="sum") / data.label_variance()
        else:
            total = F.cross_entropy(logits, labels, reduction="sum")
        found.append(total / s.batch_size)
    return found


def merged(model, encoder):
    """`model` for scoring: the adapter merged into `encoder`'s float32 weights, the same heads."""
    plain = MultiTaskModel(copy_modules(encoder), {})
    lori.insert(plain.encoder, lori.adapter(model.encoder))
    lora.merge_lora(plain.encoder)
    plain.heads = model.heads
    return plain


# ---------------------------------------------------------------------------------------------------------------------
# Several processes: torchrun --nproc-per-node N train.py ... All arrive at the same adapter; the first one writes.


def join_processes(s):
    """Meet the other processes that torchrun has started, if any. Only the first one goes on to print."""
    if WORLD > 1:
        device = find_device(s.device, int(os.environ.get("LOCAL_RANK", 0)))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for good


def leave_processes():
    """Part from the other processes; left to the interpreter's end, gloo's threads can abort it."""
    if WORLD > 1 and dist.is_initialized():
        dist.destroy_process_group()


def sum_over_processes(x):
    """`x`, added up over all processes in place."""
    if WORLD > 1:
        dist.all_reduce(x)
    return x


def sum_gradients(parameters):
    """Add every .grad up over all processes, in one all-reduce."""
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    for p, grad in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(grad.view_as(p))


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def lr_at(step, s):
    """The learning rate's factor: up linearly in the warm-up, then down to 0."""
    warm = max(1, round(s.warmup * s.steps))
    return min((step + 1) / warm, (s.steps - step) / max(1, s.steps - warm + 1))


def projection(method, model, tasks, seed, s):
    """The method's OrthoLoRA (for joint with --balance one that only scales), or None where gradients just add up."""
    blocks, _ = projected_blocks(model, method, s)
    if not blocks:
        return None
    share = [1 / len(tasks)] * len(tasks) if s.combine == "mean" and METHODS[method].project else None
    generator = torch.Generator().manual_seed(seed)
    return OrthoLoRA(blocks, len(tasks), weights=share, generator=generator, sequential=s.sequential)


def gradients(method, model, tasks, parts, ortho, s):
    """One step's gradients into .grad: (each task's loss, (T,), and `Conflicts` or None). `parts`: see `draw`."""
    losses = torch.zeros(len(tasks), device=device_of(model))
    for batch in parts:
        stacked = ortho and len(batch.tasks) > 1
        with lora.per_task(model.encoder, batch.sizes) if stacked else contextlib.nullcontext() as grads:
            found = task_losses(model, batch, s)
            sum(data.weight * loss for data, loss in zip(batch.tasks, found, strict=True)).backward()
        places = [tasks.index(data) for data in batch.tasks]
        if stacked:
            ortho.collect_stacked(grads)
            for p, own in grads.items():
                if own.grad is not None:  # a factor in no block: its gradients just add up
                    p.grad = own.grad.sum(0)
        elif ortho:
            ortho.collect(places[0])  # .grad of A and B moves to the task's row; the head keeps its own
        for place, loss in zip(places, found, strict=True):
            losses[place] = loss.detach()
    if WORLD > 1:
        collected = {id(p) for p in ortho.parameters} if ortho else ()
        sum_gradients([p for p in model.parameters() if p.requires_grad and id(p) not in collected])
        if ortho:
            dist.all_reduce(ortho.rows)
    if ortho is None:
        return losses, None
    if s.balance:
        balance(ortho.rows)
    nobody = torch.empty(len(losses), 0, dtype=torch.long)  # joint's rows meet nobody: they add up
    return losses, ortho.project(None if METHODS[method].project else nobody)


def train(method, model, tasks, seed, s, log, bar, progress):
    """Train what is trainable of a built model on `tasks`. Returns (conflict statistics or None, seconds per step).

    From the first step, or from the one that `progress` has; if that is beyond the last, this only fills in the model.
    """
    device, lr = device_of(model), (s.sparse_lr or 10 * s.lr) if method == "lori-s" else s.lr
    adapter = [p for p in model.encoder.parameters() if p.requires_grad]
    heads = [p for data in tasks for p in model.heads[data.name].parameters()]
    groups = [{"params": p, "peak": peak} for p, peak in ((adapter, lr), (heads, s.lr)) if p]
    if s.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, weight_decay=s.weight_decay)
    else:
        optimizer = torch.optim.SGD(groups, momentum=0.9)
    ortho = projection(method, model, tasks, seed, s)
    totals, times, trained = None, [], adapter + heads
    good = torch.tensor(True, device=device)  # no loss or gradient so far was NaN or infinite
    bad = torch.zeros(1 + len(tasks) + len(trained), device=device)  # if so: the first such step, its losses and norms

    def state():
        """All that the next step depends on."""
        tensors = {f"parameter {i}": p for i, p in enumerate(trained)}
        tensors |= {f"{k} {i}": v for i, p in enumerate(trained) for k, v in optimizer.state[p].items()}
        tensors |= {f"total {i}": x for i, x in enumerate(totals or ())} | {"dropout": torch.get_rng_state()}
        if device.type == "cuda":
            tensors["dropout on the GPU"] = torch.cuda.get_rng_state(device)
        return tensors | ({"order": ortho.generator.get_state()} if ortho else {})

    def check():
        """Raise FloatingPointError if a loss or gradient so far was not finite. Waits for the device."""
        if not sum_over_processes((~good).float()):
            return
        at, values, norms = int(bad[0]), bad[1 : 1 + len(tasks)].tolist(), bad[1 + len(tasks) :]
        found = [f"the loss of {d.name} is {v}" for d, v in zip(tasks, values, strict=True) if not math.isfinite(v)]
        by_id = {id(p): name for name, p in model.named_parameters()}
        wrong = [by_id[id(p)] for p, fine in zip(trained, norms.isfinite().tolist(), strict=True) if not fine]
        if wrong:
            among = f" (tasks {', '.join(d.name for d in tasks)})" if not found else ""
            found.append(f"the gradient of {wrong[0]} is not finite{among}")
        raise FloatingPointError(f"{method}, seed {seed}, step {at}: " + (" and ".join(found) or "in another process"))

    tensors, start, seconds = progress.enter()
    for i, p in enumerate(trained if tensors else ()):
        p.data.copy_(tensors[f"parameter {i}"])
        for name in ("step", "exp_avg", "exp_avg_sq", "momentum_buffer"):
            if (value := tensors.get(f"{name} {i}")) is not None:
                optimizer.state[p][name] = value if name == "step" else value.to(device)
    if "total 0" in tensors:
        totals = [tensors[f"total {i}"].to(device) for i in range(3)]
    if "dropout" in tensors:
        torch.set_rng_state(tensors["dropout"])
    if "dropout on the GPU" in tensors:
        torch.cuda.set_rng_state(tensors["dropout on the GPU"], device)
    if "order" in tensors:
        ortho.generator.set_state(tensors["order"])
    bar.update(start * len(tasks))
    model.train()
    if not s.encoder_dropout:
        model.encoder.eval()
        for layer in lora.lora_layers(model.encoder).values():
            layer.train()

    pad_id = model.encoder.config.pad_token_id
    stream = batches_of_steps(tasks, seed, s, pad_id, device, start, RANK, WORLD)
    for step, parts in zip(range(start, s.steps), stream, strict=False):
        begin = time.perf_counter()
        optimizer.zero_grad()
        losses, conflicts = gradients(method, model, tasks, parts, ortho, s)
        bar.update(len(tasks))
        if conflicts:
            seen = [x.float() for x in (conflicts.conflicts, conflicts.cosines, conflicts.removed)]
            totals = seen if totals is None else [a + b for a, b in zip(totals, seen, strict=True)]
        norms = torch.stack(torch._foreach_norm([p.grad if p.grad is not None else losses[:0] for p in trained]))
        norm, seen = norms.norm(), torch.cat([losses.new_full((1,), step), losses, norms])
        first = good & ~seen.isfinite().all()
        good, bad = good & ~first, torch.where(first, seen, bad)
        torch.nn.utils.clip_grads_with_norm_(trained, s.clip or math.inf, norm)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, s)
        optimizer.step()

        if step % max(1, s.steps // 50) == 0 or step == s.steps - 1:  # only here the host waits for the device
            check()
            values = dict(zip([data.name for data in tasks], sum_over_processes(losses).tolist(), strict=True))
            entry = {
                "method": method,
                "seed": seed,
                "step": step,
                "lr": lr * lr_at(step, s),
                "loss": values,
                "grad_norm": norm.item(),
            }
            if ortho:
                entry["conflict_rate"] = share_of_pairs(conflicts.conflicts.float()).mean().item()
            print(json.dumps(entry), file=log, flush=True)
        if device.type == "cuda" and step in (0, s.steps - 1):
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
        seconds = float(np.median(times)) if device.type == "cpu" else float(np.mean(times[1:] or times))
        if step == s.steps - 1:
            check()
            kept = {name: x for name, x in state().items() if name.startswith(("parameter", "total", "dropout"))}
            progress.save(kept, step, seconds, log)
        elif progress.due():
            check()
            progress.save(state(), step, seconds, log)
    names = projected_blocks(model, method, s)[1], [data.name for data in tasks]
    stats = None if totals is None else statistics(totals, *names, s.steps)
    return stats, seconds


def run_method(method, encoder, tasks, seed, s, out, log, bar, kept, progress, done=None):
    """Train and score one method with one seed: its entry for results.json, and its timing.

    done: these two, if an interrupted run had got so far; then this only fills in what other methods need.

    kept: {method: {task: (adapter, head, trained scalars)}} of the per-task methods that this seed has run, for those
    that are made from them; this adds to it.
    """
    reset_peak_memory(device_of(encoder))
    entry = {"tasks": {}, "average": 0.0, "adapter_parameters": 0, "head_parameters": 0}
    seconds, masks = 0.0, None
    for group in [[data] for data in tasks] if METHODS[method].own else [tasks]:
        bar.set_description(f"{method} seed {seed}" + (f" {group[0].name}" if METHODS[method].own else ""))
        model = build(method, encoder, group, seed, s)
        if METHODS[method].merged:
            own = [kept[METHODS[method].source][data.name] for data in tasks]
            adapters = [adapter for adapter, _, _ in own]
            weights = [s.merge_weight or 1 / len(tasks)] * len(tasks)
            lori.insert(model.encoder, lori.merge(adapters, weights, s.merge))
            entry["cosines"] = lori.delta_cosines(adapters).numpy().round(6).tolist()
            entry["adapter_parameters"] = sum(count for _, _, count in own)
            for data, (_, head, _) in zip(tasks, own, strict=True):
                model.heads[data.name] = head
        else:
            if method == "lori-s":  # the mask out of lori-d's B; then all over again, on the same A
                masks = calibrated_masks(model, kept["lori-d"][group[0].name][0], s)
                masked = lori.MaskedB(model.encoder, masks)
            trained = lori.trained_scalars(model.encoder)
            entry["adapter_parameters"] += trained
            stats, per_step = train(method, model, group, seed, s, log, bar, progress)
            seconds += per_step
            if stats:
                entry["conflicts"] = stats
            if masks:
                masked.remove()
        if METHODS[method].own:
            data = group[0]
            kept.setdefault(method, {})[data.name] = lori.adapter(model.encoder), model.heads[data.name], trained
        if done:
            continue
        scorer = merged(model, encoder)
        for data in group:
            entry["head_parameters"] += sum(p.numel() for p in model.heads[data.name].parameters())
            entry["tasks"][data.name] = score(
                data.name, predict(scorer, data.name, data.validation), data.validation_labels
            )
            save(model, data, method, seed, s, out, masks)
        progress.stop_if_asked()
    if done:
        return done
    entry["average"] = float(np.mean([scores["score"] for scores in entry["tasks"].values()]))
    return entry, {"seconds_per_step": seconds, "peak_memory_bytes": peak_memory(device_of(encoder))}


def save(model, data, method, seed, s, out, masks=None):
    """Write one task's adapter, its mask if it has one, and what scoring it again takes."""
    if RANK:
        return
    metadata = {"method": method, "seed": str(seed), "revision": s.revision, "glue": s.glue}
    metadata |= {"max_length": str(s.max_length)}
    folder = save_adapter(model, out / method / f"seed{seed}" / data.name, data.name, s.model, metadata)
    if masks:
        save_masks(folder, masks)


def calibrated_masks(model, adapter, s, exclude=None):
    """The masks that an adapter trained without any asks for; leaves `model` with the same A, and B = 0."""
    try:
        lori.insert(model.encoder, adapter)
        masks = lori.magnitude_masks(model.encoder, s.sparsity, exclude)
    except ValueError as e:
        raise BadInput(f"lori-s: {e}") from None
    for layer in lora.lora_layers(model.encoder).values():
        torch.nn.init.zeros_(layer.B)
    return masks


def run_sequence(method, encoder, tasks, seed, s, out, log, bar, progress):
    """Train one adapter on the tasks one after the other; a head each. Its entry for results.json.

    "matrix": row k has the scores of tasks 0 to k after stage k. "forgetting": how far a task's score has fallen, from
    after its own stage to the end, averaged over all tasks but the last. "overlap": the share of a lori-s mask's
    entries that an earlier task's mask has too, averaged over the pairs.
    """
    bar.set_description(f"{method} seed {seed}")
    model, matrix, used, overlaps = build(method, encoder, tasks, seed, s), [], [], []
    for stage, data in enumerate(tasks):
        if method == "lori-s":  # the mask from a run of the task's own, from B = 0 on the same A
            probe = build("lori-d", encoder, tasks, seed, s)
            train("lori-d", probe, [data], seed, s, log, bar, progress)
            masks = calibrated_masks(probe, lori.adapter(probe.encoder), s, used if s.disjoint else None)
            masked = lori.MaskedB(model.encoder, masks)  # other entries stay as earlier tasks left them
        train(method, model, [data], seed, s, log, bar, progress)
        if method == "lori-s":
            masked.remove()
            overlaps += [lori.overlap(masks, earlier) for earlier in used]
            used.append(masks)
        seen, scorer = tasks[: stage + 1], merged(model, encoder)
        matrix.append(
            [score(d.name, predict(scorer, d.name, d.validation), d.validation_labels)["score"] for d in seen]
        )
    for stage, data in enumerate(tasks):
        save(model, data, method, seed, s, out, used[stage] if used else None)
    forgetting = float(np.mean([matrix[t][t] - matrix[-1][t] for t in range(len(tasks) - 1)]))
    entry = {"matrix": matrix, "average": float(np.mean(matrix[-1])), "forgetting": forgetting}
    return entry | ({"overlap": float(np.mean(overlaps))} if overlaps else {})


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory


def reset_peak_memory(device):
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: forget the process's peak


def peak_memory(device):
    """Bytes: of the GPU's allocator, or of the whole process; None where the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return None


def passes(method, s):
    """How many times a method trains --steps steps on each task."""
    if METHODS[method].merged:
        return 0
    return 2 if s.continual and method == "lori-s" else 1


def estimate(encoder, tasks, methods, seeds, s):
    """Seconds that the whole run will take, from a few batches timed."""
    model = build("joint", encoder, tasks, 0, s)
    times = {True: 0.0, False: 0.0}  # with and without a backward pass, one batch of each task
    for backward in (True, False):
        stream = batches_of_steps(tasks, 0, s, encoder.config.pad_token_id, device_of(encoder), 0, RANK, WORLD)
        for step, parts in zip(range(3), stream, strict=False):
            begin = time.perf_counter()
            for batch in parts:
                with torch.set_grad_enabled(backward):
                    loss = sum(task_losses(model, batch, s))
                if backward:
                    loss.backward()
                sum(p.grad.sum() for p in model.parameters() if p.grad is not None) + loss.item()  # wait for the device
            if step:  # the first one warms up
                times[backward] += (time.perf_counter() - begin) / 2
    steps = sum(times[method != "head"] * passes(method, s) for method in methods) * s.steps
    scored = (len(tasks) + 1) / 2 if s.continual else 1  # times that a task is scored
    scoring = times[False] / len(tasks) / s.batch_size * sum(len(d.validation) for d in tasks) * len(methods) * scored
    return (steps + scoring) * len(seeds)


def clock(seconds):
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def fingerprints(encoder, tasks):
    """Checksums of what a run reads, so that it is not resumed with anything else."""
    found = {"the weights of the model": 0}
    for p in encoder.parameters():
        found["the weights of the model"] = zlib.crc32(p.detach().cpu().numpy().data, found["the weights of the model"])
    for data in tasks:
        rows = np.concatenate([np.asarray(ids + types, np.int32) for ids, types in data.train + data.validation])
        labels = np.concatenate([data.train_labels, data.validation_labels])
        found[f"the data of {data.name}"] = zlib.crc32(rows.data, zlib.crc32(labels.data))
    return found


def hardware(device):
    one = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{WORLD} × {one}" if WORLD > 1 else one


# ---------------------------------------------------------------------------------------------------------------------
# The jobs


@contextlib.contextmanager
def heeding_signals(progress):
    """While it lasts, Ctrl-C and SIGTERM let the step end and its state be saved; a second one ends at once."""

    def heed(number, _):
        progress.signal = number
        signal.signal(number, before[number])

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    try:
        for number in before:
            signal.signal(number, heed)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def prepare(s, device):
    """(encoder, tasks): everything that can fail on bad input has been read when this returns."""
    print(f"loading {s.model}, and {s.tasks} from {s.glue}", flush=True)
    go_offline_if_hub_is_down(s.model, s.glue)
    folder = find_checkpoint(s.model, s.revision)
    tokenizer, encoder = load_tokenizer(folder), load_encoder(folder)
    if s.max_length > encoder.config.max_length:
        raise BadInput(f"--max-length {s.max_length}: {s.model} takes at most {encoder.config.max_length} tokens")
    if tokenizer.get_vocab_size() > encoder.config.vocab_size:
        raise BadInput(
            f"{folder}: tokenizer.json knows {tokenizer.get_vocab_size()} tokens, the model only "
            f"{encoder.config.vocab_size}"
        )
    tasks, weights = names(s.tasks, TASKS, "task"), numbers(s.task_weights, float, "") if s.task_weights else ()
    tasks = [load_data(name, s.glue, tokenizer, encoder.config, s.max_length, s.holdout) for name in tasks]
    for data, weight in zip(tasks, weights, strict=False):
        data.weight = weight
    return encoder.to(device), tasks


def compare(s):
    """Train every method with every seed, and print the table."""
    if s.out:  # before anything is loaded
        check_out(Path(s.out), s)
    device = find_device(s.device, int(os.environ.get("LOCAL_RANK", 0)))
    if s.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
        torch.use_deterministic_algorithms(True)
    cuda = device.type == "cuda"
    fast = cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    s.dtype = s.dtype if s.dtype != "auto" else "bf16" if fast else "fp32"
    s.per_task = s.per_task if s.per_task != "auto" else "stacked" if cuda else "loop"
    asked, seeds = names(s.methods, METHODS, "method"), numbers(s.seeds, int, "--seeds")
    methods = [method for method in METHODS if method in asked]  # what is made from another comes after it
    encoder, tasks = prepare(s, device)
    seconds = estimate(encoder, tasks, methods, seeds, s)  # builds a model: unfit targets show here
    check_masks_fit(encoder, tasks, s)
    out = open_out(s.out or f"runs/{Path(s.model).name}-{time.strftime('%Y%m%d-%H%M%S')}", s)
    s.out = str(out)
    for data in tasks:
        print(f"{data.name:5} {len(data.train):6} examples to train on, {len(data.validation)} to score on")
    print(
        f"{', '.join(methods)} × {len(seeds)} seed{'s' * (len(seeds) > 1)} × {s.steps} steps on {hardware(device)}: "
        f"about {clock(seconds)}",
        flush=True,
    )
    unshown = ("out", "demo", "device", "resume", "save_every")
    shown = {k: v for k, v in dataclasses.asdict(s).items() if k not in unshown}
    results = {
        "settings": shown,
        "demo": s.demo,
        "device": device.type,
        "tasks": [d.name for d in tasks],
        "seeds": seeds,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "majority": {
            d.name: score(d.name, np.full(len(d.validation), d.majority()), d.validation_labels) for d in tasks
        },
        "methods": {m: {} for m in methods},
    }
    timing = {
        "hardware": hardware(device),
        "device": str(device),
        "estimated_seconds": seconds,
        "methods": {m: {} for m in methods},
    }
    facts = shown | {"device": device.type, "torch": torch.__version__} | fingerprints(encoder, tasks)
    progress = Progress(out / STATE, facts, s.save_every, s.resume, active=WORLD == 1)
    begin = time.perf_counter()
    total = sum(passes(method, s) for method in methods) * len(seeds) * s.steps * len(tasks)
    often = 0.5 if sys.stderr.isatty() else 10
    bar = tqdm(total=total, unit="batch", smoothing=0.05, mininterval=often, disable=RANK > 0)
    log = open(os.devnull if RANK else out / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115
    with log, bar, heeding_signals(progress) if progress.active else contextlib.nullcontext():
        if s.resume:
            log.truncate(progress.info["log"])
            log.seek(0, os.SEEK_END)
        for seed in seeds:
            kept = {}
            for method in methods:
                done = progress.begin(method, seed)
                derived = [m for m in methods if METHODS[m].source and f"{m} {seed}" not in progress.info["entries"]]
                needed = method in [m.source for m in METHODS.values()] and derived and not s.continual
                if done and not needed:
                    entry, timed = done
                    bar.update(passes(method, s) * s.steps * len(tasks))
                elif s.continual:
                    entry, timed = run_sequence(method, encoder, tasks, seed, s, out, log, bar, progress), None
                else:
                    entry, timed = run_method(method, encoder, tasks, seed, s, out, log, bar, kept, progress, done)
                if not done:
                    progress.finish(entry, timed, log, needed)
                results["methods"][method][seed] = entry
                if timed:
                    timing["methods"][method][seed] = timed
            for method in methods:
                progress.forget(f"{method} {seed}")
    timing["seconds"] = time.perf_counter() - begin
    averages = {m: [run["average"] for run in runs.values()] for m, runs in results["methods"].items()}
    results["summary"] = {m: summary(m, averages, METHODS[m].project) for m in methods}
    text = report(results, timing, METHODS)
    if RANK:
        return
    write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(out / "timing.json", json.dumps(timing, indent=1) + "\n")
    write_text(out / "results.md", text)
    remove_state(out / STATE)
    print(f"\n{text}\n{out} has results.json, results.md, timing.json, log.jsonl, and adapters in METHOD/seedN/TASK")


def main(argv=None):
    given = {}
    try:
        given = parse(sys.argv[1:] if argv is None else argv)
    except BadInput as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    s = Settings(
        **({"methods": ",".join(m for m in METHODS if METHODS[m].own)} if "continual" in given else {}) | given
    )
    try:
        check(s)
        join_processes(s)
        if s.demo and {"model", "glue"} & given.keys():
            raise BadInput("--demo brings its own model and data: leave out --model and --glue")
        if not s.demo:
            bare = not {"model", "glue", "tasks"} & given.keys()
            try:
                return compare(s)
            except HubError as e:
                if not bare or WORLD > 1:  # other processes may have got what this one has not
                    raise
                print(
                    f"NOTICE: {e}.\nNOTICE: so this is the demo instead: a toy grammar and a tiny encoder, not GLUE. "
                    "With a local checkpoint and GLUE, give --model FOLDER --glue FOLDER.\n",
                    flush=True,
                )
        s = dataclasses.replace(s, **{**DEMO, **given, "demo": True})
        check(s)
        s.out = str(open_out(s.out or "runs/demo", s))
        if RANK == 0:
            make_demo(Path(s.out) / "demo")
        if WORLD > 1:
            dist.barrier()
        folder = Path(s.out) / "demo"
        s.model, s.glue = str(folder / "model"), str(folder / "glue")
        return compare(s)
    except BadInput as e:
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except OSError as e:  # a full disk, a folder taken away
        print(f"train.py: {e}", file=sys.stderr)
        return 2
    except FloatingPointError as e:
        print(f"train.py: {e}; a smaller --lr may help", file=sys.stderr)
        return 1
    except Stopped as stopped:
        more = ["--resume"] * (not s.resume) + ["--out", s.out] * ("out" not in given)
        more += ["--demo"] * (s.demo and "demo" not in given)
        again = shlex.join([*(sys.argv[1:] if argv is None else argv), *more])
        print(f"\ntrain.py: stopped, and saved; go on with: python train.py {again}", file=sys.stderr)
        return 128 + stopped.args[0]
    except KeyboardInterrupt:
        print("\ntrain.py: interrupted", file=sys.stderr)
        return 130
    finally:
        leave_processes()


if __name__ == "__main__":
    sys.exit(main())
