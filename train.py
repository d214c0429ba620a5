"""Train and compare: one shared LoRA adapter under joint training, PCGrad and Ortho-LoRA, and one adapter per task.

    python train.py                                    roberta-base on four GLUE tasks from the Hub; offline, the demo
    python train.py --demo                             the demo: a toy grammar and a tiny encoder, no network
    python train.py --model FOLDER --glue FOLDER --tasks rte,mrpc --methods joint,ortho --seeds 0,1,2
    python train.py --out OUT --resume ...             go on with the run in OUT, or add methods and seeds to it
    torchrun --nproc-per-node 2 train.py ...           the same run, every batch shared out over two processes

It ends with a table, and leaves adapters, logs and results in the out folder: support/runs.py says how.
"""

import argparse
import contextlib
import copy
import json
import math
import os
import sys
import time
import zlib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

import lora
import lori
from evaluate import fast_in_bf16, find_device, load_tuned, predict, scores_in_training
from glue import TASKS, TRAINED, batches_of_steps, load_data, load_tokenizer, score
from model import MultiTaskModel, load_encoder
from ortholora import OrthoLoRA, balance
from support import runs, table
from support.checkpoint import BadInput, read_json, save_adapter, write_safetensors
from support.hub import HubError, find_checkpoint
from support.runs import LOCAL_RANK, RANK, WORLD, agreed  # agreed(do): the first process does it, all get its result
from support.toy import DEMO, demo, demo_settings

# ---------------------------------------------------------------------------------------------------------------------
# Methods and settings


@dataclass(frozen=True)
class Method:
    about: str
    own: bool = False  # each task has an adapter of its own; else one for all
    project: bool = False  # the tasks' gradients are projected; else they just add up
    balance: bool = False  # as --balance: the tasks' gradients of the adapter are scaled to one norm first
    frozen_A: bool = False  # LoRI: A is random, and only B trains
    source: str = ""  # made from that method's adapters: masked by them, or merged out of them


METHODS = {  # head differs from joint, and pcgrad from ortho, by name alone: see build and projected_blocks
    "head": Method("frozen encoder, trained heads: the floor"),
    "single": Method("one adapter per task: what joint training is to be measured against", own=True),
    "joint": Method("one shared adapter, the tasks' gradients added"),
    "pcgrad": Method("one shared adapter, all its factors projected as one vector", project=True),
    "ortho": Method("one shared adapter, each factor A and B projected alone: Ortho-LoRA", project=True),
    "balanced": Method("ortho with the tasks' gradients scaled to one norm first", project=True, balance=True),
    "lori-ortho": Method("ortho with A frozen and random, so that only B is projected", project=True, frozen_A=True),
    "lori-d": Method("one adapter per task, A frozen and random: LoRI, dense", own=True, frozen_A=True),
    "lori-s": Method("lori-d on the tenth of B it made largest: sparse", own=True, frozen_A=True, source="lori-d"),
    "lora-merged": Method("single's adapters merged into one, not trained again", source="single"),
    "lori-d-merged": Method("lori-d's adapters merged into one", source="lori-d"),
    "lori-s-merged": Method("lori-s's adapters merged into one", source="lori-s"),
}


def setting(default, text, choices=None, low=0, high=math.inf):
    return field(default=default, metadata={"help": text, "choices": choices, "low": low, "high": high})


@dataclass
class Settings:
    """Everything that can be set; each line is a flag, and its text the --help."""

    # what
    model: str = setting("roberta-base", "checkpoint folder or Hub id: BERT, RoBERTa, XLM-R or DistilBERT")
    revision: str = setting("main", "the model's revision on the Hub")
    glue: str = setting("nyu-mll/glue", "GLUE folder in the Hub's layout, or Hub id")
    tasks: str = setting("rte,mrpc,stsb,cola", f"out of {', '.join(TRAINED)}")
    methods: str = setting("head,single,joint,pcgrad,ortho", "; ".join(f"{k}: {m.about}" for k, m in METHODS.items()))
    seeds: str = setting("0", "one run each; a seed sets A, heads, batches, dropout and order of projection")
    # adapter
    rank: int = setting(8, "r of every LoRA layer", low=1, high=100_000)
    alpha: float = setting(16.0, "scale = alpha / rank", high=1e6)
    rslora: bool = setting(False, "scale = alpha / sqrt(rank) instead")
    targets: str = setting("", "linear layers to adapt, by name, or all-linear; default: query and value")
    dropout: float = setting(0.0, "on the input of A, in training", high=0.99)
    encoder_dropout: bool = setting(False, "keep the frozen encoder's own dropout in training; without, it has none")
    # projection
    unit: str = setting("tensor", "one vector: each A or B; all A, all B; all, as pcgrad", ["tensor", "factor", "all"])
    factors: str = setting("AB", "project these; the other factor's gradients add up", ["A", "B", "AB"])
    sequential: bool = setting(False, "project off the others' gradients as projected so far, not the originals: slow")
    combine: str = setting("sum", "what becomes of the projected gradients", ["sum", "mean"])
    balance: bool = setting(False, "scale the tasks' gradients of the adapter to one norm first, for joint too")
    task_weights: str = setting("", "one number per task, multiplying its loss; default: 1 each")
    # LoRI
    sparsity: float = setting(0.9, "lori-s leaves this share of B at zero", high=0.999999)
    sparse_lr: float = setting(0.0, "lori-s's learning rate for B, its heads keep --lr; 0: ten times --lr", high=1e3)
    own_a: bool = setting(False, "single: draw each task an A of its own, as LoRI does, for merging; else joint's A")
    merge: str = setting("cat", "how adapters are merged: cat adds products BA, linear factors", ["cat", "linear"])
    merge_weight: float = setting(0.0, "weight of each adapter in a merge; 0: 1 / number of tasks", high=1e3)
    # training
    steps: int = setting(600, "optimizer steps; each draws one batch from every task", low=1, high=10_000_000)
    batch_size: int = setting(16, "examples per task and step", low=1, high=10_000_000)
    window: int = setting(32, "batches sorted together by length, to pad little; 1: none", low=1, high=10_000_000)
    lr: float = setting(5e-4, "peak learning rate, for adapter and heads", high=1e3)
    warmup: float = setting(0.06, "share of steps in which the rate rises; then it falls to 0, both linearly", high=1)
    optimizer: str = setting("adamw", "SGD has momentum 0.9", ["adamw", "sgd"])
    weight_decay: float = setting(0.01, "AdamW's, decoupled", high=1e3)
    clip: float = setting(1.0, "largest norm of the whole gradient, after the projection; 0: no clipping", high=1e9)
    max_length: int = setting(128, "tokens; longer pairs lose tokens from the longer sentence first", low=8)
    holdout: int = setting(0, "score on so many held-out training rows per task, to choose settings; 0: validation")
    # how
    device: str = setting("auto", "auto, cpu, cuda or cuda:N")
    dtype: str = setting("auto", "of the frozen encoder in training; auto: bf16 on a GPU", ["auto", "fp32", "bf16"])
    per_task: str = setting("auto", "a pass per task, or one for all; auto: one, on a GPU", ["auto", "loop", "stacked"])
    compile: bool = setting(False, "torch.compile the encoder: slow at first; what it gains is not measured")
    out: str = setting("", "out folder; default: runs/MODEL-DATE-TIME")
    resume: bool = setting(False, "keep what --out has finished, go on with what was interrupted, run what is missing")
    save_every: float = setting(60.0, "seconds between saves of what --resume needs")
    eval_every: int = setting(0, "score every so many steps, into log.jsonl; 0: only at the end")
    jobs: int = setting(1, "trainings at a time; from 2 on, in processes of one thread each", low=1, high=1000)
    demo: bool = setting(False, "run the demo: settings as given, else those of DEMO in support/toy.py")


# What may differ when a run goes on. Model, data, device type and threads are held to by runs.facts instead.
UNBOUND = {"methods", "seeds", "out", "resume", "save_every", "eval_every", "jobs", "demo", "model", "glue", "device"}
MOVED = {
    "--evaluate": "python evaluate.py ADAPTER",
    "--submit": "python evaluate.py ADAPTER --submit FOLDER",
    "--continual": "python experiments/continual.py",
    "--disjoint": "python experiments/continual.py --disjoint",
}


def parse(argv, prog="train.py", about=__doc__):
    """The flags that were given, as {name: value}. Raises BadInput for one that has moved."""
    for word in argv:
        if (flag := word.partition("=")[0]) in MOVED:
            raise BadInput(f"{flag} has moved: {MOVED[flag]}")
    parser = argparse.ArgumentParser(prog=prog, argument_default=argparse.SUPPRESS, allow_abbrev=False)
    parser.description, parser.formatter_class = about, argparse.RawDescriptionHelpFormatter
    for f in fields(Settings):
        flag, text = "--" + f.name.replace("_", "-"), f.metadata["help"].replace("%", "%%")
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=text)
        else:
            others = [f"; or {choice}" for choice in f.metadata["choices"] or () if choice != f.default]
            text += f" [default {f.default}{''.join(others)}]" if f.default != "" else ""
            parser.add_argument(flag, type=f.type, help=text, metavar=f.name.upper())
    given = vars(parser.parse_args(argv))  # "a, b" is "a,b", in what binds a run, too
    given |= {k: x.replace(", ", ",") for k, x in given.items() if isinstance(x, str) and k not in UNBOUND}
    return given | {"out": os.path.expanduser(given["out"])} if "out" in given else given


def listed(text, flag, kind=str, known=None):
    """'a, b' -> ['a', 'b']. Raises BadInput where one is unknown, or is there twice (weights may be)."""
    try:
        values = [kind(part.strip()) for part in text.split(",")]
    except ValueError:
        raise BadInput(f"--{flag} {text!r} is not a list of {'whole ' * (kind is int)}numbers such as 1,2") from None
    if stray := [x for x in values if known is not None and x not in known]:
        raise BadInput(f"--{flag}: unknown {stray[0]!r}; there are {', '.join(known)}")
    if kind is not float and len(set(values)) < len(values):
        raise BadInput(f"--{flag} {text!r}: give each one once")
    if kind is not str and not all(0 <= x < 2**32 for x in values):  # NaN is not; torch's seeds on a CPU
        raise BadInput(f"--{flag} {text!r}: each must be at least 0 and below 2^32")
    return values


def check(s):
    """What can be judged before anything is loaded. Raises BadInput."""
    for f in fields(s):
        flag, value, choices = "--" + f.name.replace("_", "-"), getattr(s, f.name), f.metadata["choices"]
        low, high = f.metadata["low"], f.metadata["high"]
        if f.type in (int, float) and not low <= value <= high:  # NaN is not
            raise BadInput(f"{flag} {value} is outside {low:,} to {high:,}")
        if choices and value not in choices:
            raise BadInput(f"{flag} {value!r} is none of {', '.join(choices)}")
    tasks, methods = listed(s.tasks, "tasks", known=TRAINED), listed(s.methods, "methods", known=METHODS)
    listed(s.seeds, "seeds", int)
    if s.task_weights and len(listed(s.task_weights, "task-weights", float)) != len(tasks):
        raise BadInput(f"--task-weights {s.task_weights}: {len(tasks)} tasks need {len(tasks)} weights")
    if len(tasks) == 1 and any(METHODS[m].source and not METHODS[m].own for m in methods):
        raise BadInput(f"--methods {s.methods} with one task, {s.tasks}: nothing to merge; name at least two tasks")
    for method in methods if not s.resume else ():  # with it, the out folder may have what this is made of
        if METHODS[method].source not in ("", *methods):
            raise BadInput(f"--methods: {method} is made from {METHODS[method].source}, so name that too")
    if "lori-ortho" in methods and "B" not in s.factors:
        raise BadInput(f"--factors {s.factors}: lori-ortho trains B alone, so it would project nothing")
    shared = [m for m in METHODS if METHODS[m].project or m == "joint"]
    if s.balance and not set(shared) & set(methods):
        raise BadInput(f"--balance: no shared adapter among --methods {s.methods}; add one of {', '.join(shared)}")
    if s.balance and s.task_weights:
        raise BadInput("--balance undoes --task-weights in the adapter: leave out --task-weights, or --balance")
    if (s.balance or "balanced" in methods) and s.factors != "AB":
        raise BadInput(f"--factors {s.factors}: --balance and method balanced scale A and B; give AB or leave them out")
    if s.resume and not s.out:
        raise BadInput("--resume needs --out FOLDER: the folder of the run to go on with")
    if s.batch_size % WORLD:
        raise BadInput(f"--batch-size {s.batch_size} can't be shared out evenly over {WORLD} processes")
    if WORLD > 1 and s.device.startswith("cuda:"):
        raise BadInput(f"--device {s.device} under torchrun: each process takes its own; say cuda, or leave it out")
    if s.jobs > 1 and WORLD > 1:
        raise BadInput(f"--jobs {s.jobs} under torchrun: leave one of the two out")


# ---------------------------------------------------------------------------------------------------------------------
# The model and its loss


def seed_of(*parts):
    """A seed out of what it is a function of: seeds, steps, names."""
    return zlib.crc32(" ".join(map(str, parts)).encode())


def build(method, frozen, tasks, seed, s):
    """A model of the frozen encoder's weights with LoRA, and a head for each of `tasks`.

    A depends on the seed alone and a head on the seed and its task, so every method starts from the same numbers; but
    where an A of its own is wanted (LoRI's adapters, to be merged), it depends on the seed and the tasks.
    """
    torch.manual_seed(seed)
    shared = {id(p): p for p in frozen.parameters()}  # what deepcopy is not to copy: the weights
    model = MultiTaskModel(copy.deepcopy(frozen, shared), {})
    try:
        targets = [t.strip() for t in s.targets.split(",")] if s.targets else None
        layers = lora.add_lora(model.encoder, targets, s.rank, s.alpha, s.dropout, rslora=s.rslora)
    except ValueError as e:
        raise BadInput(f"--targets {s.targets}: {e}") from None
    for data in tasks:
        torch.manual_seed(seed_of(data.name, seed))
        model.add_head(data.name, TASKS[data.name].outputs)
        if data.regression:  # start from the mean label; its distance from 0 is nothing to learn
            torch.nn.init.constant_(model.heads[data.name].out.bias, data.majority())
    if METHODS[method].frozen_A or (method == "single" and s.own_a):
        lori.draw_A(model.encoder, seed_of(",".join(data.name for data in tasks), seed))
    for layer in layers.values():
        layer.A.requires_grad_(method != "head" and not METHODS[method].frozen_A)
        layer.B.requires_grad_(method != "head")
    if method == "lori-s" and round((1 - s.sparsity) * (N := lori.trained_scalars(model.encoder))) < 1:
        raise BadInput(f"--sparsity {s.sparsity}: lori-s would train none of the {N:,} entries of B; lower it")
    if s.compile:
        torch._dynamo.config.cache_size_limit = 64  # 8 are too few: mask or none, trained or not, each method
        model.encoder.compile(dynamic=True)
    return model.to(next(frozen.parameters()).device)


def task_losses(model, batch):
    """One loss for each task in the batch, in float32: cross-entropy, or squared error over the labels' variance."""
    hidden = model.encoder(batch.ids, batch.mask, batch.types, tokens=1)  # (sequences, 1, width)
    losses, parts = [], model.encoder.summary(hidden).split(batch.sizes)
    for data, x, labels in zip(batch.tasks, parts, batch.labels, strict=True):
        logits = model.heads[data.name](x)  # (size, outputs)
        if data.regression:
            losses.append(F.mse_loss(logits.squeeze(1), labels) / data.label_variance())
        else:
            losses.append(F.cross_entropy(logits, labels))
    return losses


# ---------------------------------------------------------------------------------------------------------------------
# One step


def projected_blocks(method, model, s):
    """The blocks for `OrthoLoRA`, and a name for each: its factor's path, or which factors are in it."""
    blocks = lora.blocks(model.encoder, "all" if method == "pcgrad" else s.unit, s.factors)
    names = {id(p): name for name, p in model.encoder.named_parameters()}
    paths = [[names[id(p)] for p in block] for block in blocks]
    return blocks, [x[0] if len(x) == 1 else "".join(sorted({path[-1] for path in x})) for x in paths]


def projection(method, model, num_tasks, s):
    """The method's OrthoLoRA, or None where gradients just add up. (--balance: joint has one, to scale its rows.)"""
    if not METHODS[method].project and not (method == "joint" and s.balance):
        return None
    share = [1 / num_tasks] * num_tasks if s.combine == "mean" and METHODS[method].project else None
    return OrthoLoRA(projected_blocks(method, model, s)[0], num_tasks, weights=share, sequential=s.sequential)


def one_by_one(model, batches, ortho, seed):
    """A pass forward and back for each task. Returns every task's loss, (T,)."""
    losses = []
    for t, batch in enumerate(batches):
        torch.manual_seed(seed_of(seed, batch.tasks[0].name))  # a task has the same dropout alone and among others
        (loss,) = task_losses(model, batch)
        (batch.tasks[0].weight * loss).backward()
        if ortho:
            ortho.collect(t)  # .grad of A and B moves to the task's row; the head keeps its own
        losses.append(loss.detach())
    return torch.stack(losses)


def stacked(model, batches, ortho, seed):
    """One pass for all tasks' sequences, with their gradients kept apart. Returns every task's loss, (T,)."""
    (batch,) = batches
    torch.manual_seed(seed)
    with lora.per_task(model.encoder, batch.sizes) if ortho else contextlib.nullcontext() as views:
        losses = task_losses(model, batch)
        sum(data.weight * loss for data, loss in zip(batch.tasks, losses, strict=True)).backward()
    if ortho:
        ortho.collect_stacked(views)
        for p, view in views.items():
            if view.grad is not None:  # a factor in no block: its gradients just add up
                p.grad = view.grad.sum(0)
    return torch.stack(losses).detach()


def gradients(method, model, batches, ortho, seed, s):
    """One step's gradients into .grad. Returns each task's loss, (T,), and what the projection saw, or None.

    seed: the step's. The order of projection is drawn from it on every process alike, dropout on each its own.
    """
    one_pass = stacked if s.per_task == "stacked" else one_by_one
    losses = one_pass(model, batches, ortho, seed_of(seed, RANK))
    if WORLD > 1:
        runs.average(losses, *(p.grad for p in model.parameters()), ortho and ortho.rows)
    if ortho is None:
        return losses, None
    if s.balance or METHODS[method].balance:
        balance(ortho.rows)
    ortho.generator.manual_seed(seed)
    nobody = torch.empty(len(losses), 0, dtype=torch.long)  # joint's rows meet nobody: they add up
    return losses, ortho.project(None if METHODS[method].project else nobody)


# ---------------------------------------------------------------------------------------------------------------------
# The training loop


def lr_at(step, s):
    """The learning rate's factor: up linearly in the warm-up, then down to 0."""
    warm = max(1, round(s.warmup * s.steps))
    return min((step + 1) / warm, (s.steps - step) / max(1, s.steps - warm + 1))


def make_optimizer(method, trained, s):
    """AdamW or SGD, with each group's peak rate: lori-s's B has one of its own."""
    adapter = [p for name, p in trained.items() if name.startswith("encoder.")]
    heads = [p for name, p in trained.items() if not name.startswith("encoder.")]
    lr = (s.sparse_lr or 10 * s.lr) if method == "lori-s" else s.lr
    groups = [{"params": params, "peak": peak} for params, peak in ((adapter, lr), (heads, s.lr)) if params]
    if s.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9)
    return torch.optim.AdamW(groups, weight_decay=s.weight_decay)


def train(unit, model, tasks, encoder, s, log, bar):
    """Train a built model, from its start or where the unit was interrupted. Returns (Watch, seconds per step)."""
    device = next(model.parameters()).device
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, ortho = make_optimizer(unit.method, trained, s), projection(unit.method, model, len(tasks), s)
    watch = runs.Watch(unit.tasks, trained, s.steps, device)
    start, spent = runs.resume(unit, trained, optimizer, watch, log)
    bar.skip(start * len(tasks))
    model.train()
    model.encoder.train(s.encoder_dropout)  # without, only heads and LoRA layers know that this is training
    for layer in lora.lora_layers(model.encoder).values():
        layer.train()

    begin = saved = time.perf_counter()
    stream = batches_of_steps(tasks, unit.seed, s, model.encoder.config.pad_token_id, device, start, RANK, WORLD)
    for step, batches in zip(range(start, s.steps), stream, strict=False):
        optimizer.zero_grad()
        losses, conflicts = gradients(unit.method, model, batches, ortho, seed_of(unit.seed, step), s)
        # without a .grad a parameter has the norm of an empty tensor: 0
        norms = torch.stack(torch._foreach_norm([losses[:0] if p.grad is None else p.grad for p in trained.values()]))
        torch.nn.utils.clip_grads_with_norm_(trained.values(), s.clip or math.inf, norms.norm())
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * lr_at(step, s)
        optimizer.step()
        watch.see(step, losses, norms, conflicts)
        bar.update(len(tasks))

        last, now = step == s.steps - 1, time.perf_counter()
        logged = last or step % max(1, s.steps // 50) == 0
        due = not RANK and not last and now - saved >= s.save_every
        scored = s.eval_every and (step + 1) % s.eval_every == 0
        if logged or due or scored:  # only here the host waits for the device
            watch.check(unit)
        if logged:
            entry = {"step": step, "lr": optimizer.param_groups[0]["lr"], "grad_norm": norms.norm().item()}
            entry["loss"] = dict(zip(unit.tasks, losses.tolist(), strict=True))
            if conflicts is not None:
                entry["conflict_rate"] = conflicts.rate.item()
                entry["effective"] = dict(zip(unit.tasks, conflicts.effective.tolist(), strict=True))
            print(json.dumps(entry), file=log, flush=True)
        if scored and not RANK:
            paused = time.perf_counter()
            print(json.dumps({"step": step, "scores": scores_in_training(model, encoder, tasks)}), file=log, flush=True)
            begin += time.perf_counter() - paused  # it is no part of a step
        if due:
            runs.save(unit, step + 1, spent + time.perf_counter() - begin, trained, optimizer, watch, log)
            saved = time.perf_counter()
    return watch, (spent + time.perf_counter() - begin) / s.steps


# ---------------------------------------------------------------------------------------------------------------------
# A unit (of support/runs.py, not --unit's): one method and seed, and one task where each has its own adapter.


def run(unit, encoder, frozen, tasks, s, bar):
    """Train a unit, or merge it out of others; then save its adapters, and score them as they are on disk."""
    tasks = [data for data in tasks if data.name in unit.tasks]
    bar.set_description(str(unit))
    with contextlib.ExitStack() as stack:
        agreed(lambda: stack.enter_context(runs.locked(unit.folder)))
        if agreed(lambda: unit.finished):  # meanwhile, by another process
            bar.skip(0 if unit.merged else s.steps * len(tasks))
        elif unit.merged:
            agreed(lambda: run_merge(unit, encoder, tasks, s))
        else:
            run_training(unit, encoder, frozen, tasks, s, bar)


def run_training(unit, encoder, frozen, tasks, s, bar):
    model, masks = build(unit.method, frozen, tasks, unit.seed, s), None
    if unit.source:  # lori-s: the mask out of lori-d's B; then all over again, on the same A
        masks = agreed(lambda: masks_of(unit, encoder, s))
        masked = lori.MaskedB(model.encoder, masks)
    result = {"adapter_parameters": lori.trained_scalars(model.encoder)}
    with open(os.devnull if RANK else unit.folder / "log.jsonl", "a", encoding="utf-8") as log:
        watch, seconds = train(unit, model, tasks, encoder, s, log, bar)
    timing = runs.timing(unit, encoder, seconds, s.steps, s.eval_every)  # now: scoring's memory is not training's
    if watch.sums:
        result["conflicts"] = table.statistics(watch, projected_blocks(unit.method, model, s)[1])
    if masks:
        masked.remove()
    agreed(lambda: finish(unit, model, encoder, tasks, result, timing, s, masks))


def masks_of(unit, encoder, s):
    """lori-s's masks, on the CPU, out of what lori-d trained."""
    (task,) = unit.tasks
    dense = load_tuned(encoder, unit.adapter(task, unit.source), task)
    try:
        return {path: mask.cpu() for path, mask in lori.magnitude_masks(dense.encoder, s.sparsity).items()}
    except ValueError as e:
        raise BadInput(f"{unit}: {e}") from None


def run_merge(unit, encoder, tasks, s):
    """An adapter merged out of the tasks' own, as they are on disk; each task keeps its head."""
    parts = [load_tuned(encoder, unit.adapter(data.name, unit.source), data.name) for data in tasks]
    adapters, weights = [lori.adapter(part.encoder) for part in parts], [s.merge_weight or 1 / len(parts)] * len(parts)
    model = MultiTaskModel(copy.deepcopy(encoder), {})
    lori.insert(model.encoder, lori.merge(adapters, weights, s.merge))
    for data, part in zip(tasks, parts, strict=True):
        model.heads[data.name] = part.heads[data.name]
    own = [read_json(unit.adapter(data.name, unit.source) / "result.json") for data in tasks]
    result = {"adapter_parameters": sum(x["adapter_parameters"] for x in own)}
    result["cosines"] = lori.delta_cosines(adapters).numpy().round(6).tolist()
    finish(unit, model, encoder, tasks, result, runs.timing(unit, encoder, 0.0, s.steps), s)


def finish(unit, model, encoder, tasks, result, timing, s, masks=None):
    """Save a unit's adapters, score what was saved, and say that it is finished."""
    about = runs.origin(unit, encoder, s)
    result |= {"head_parameters": sum(p.numel() for p in model.heads.parameters()), "tasks": {}}
    for data in tasks:
        folder = save_adapter(model, unit.adapter(data.name), data.name, s.model, about)
        if masks:
            write_safetensors(folder / "masks.safetensors", masks)
        predictions = predict(load_tuned(encoder, folder, data.name), data.name, data.validation)
        result["tasks"][data.name] = score(data.name, predictions, data.validation_labels)
    unit.finish(result, timing)


# ---------------------------------------------------------------------------------------------------------------------
# The job


def load(s):
    """(encoder, frozen, tasks): all that a run reads. Trainings read `frozen`, in --dtype; scores are the encoder's."""
    folder = find_checkpoint(s.model, s.revision)
    tokenizer, encoder = load_tokenizer(folder), load_encoder(folder)
    if s.max_length > encoder.config.max_length:
        raise BadInput(f"--max-length {s.max_length}: {s.model} takes at most {encoder.config.max_length} tokens")
    names = listed(s.tasks, "tasks")
    weights = listed(s.task_weights, "task-weights", float) if s.task_weights else [1.0] * len(names)
    tasks = [
        load_data(name, s.glue, tokenizer, encoder.config, s.max_length, s.holdout, weight)
        for name, weight in zip(names, weights, strict=True)
    ]
    encoder = encoder.to(find_device(s.device, LOCAL_RANK))
    return encoder, copy.deepcopy(encoder).bfloat16() if s.dtype == "bf16" else encoder, tasks


def load_or_demo(s, given):
    """What `load` gives; the demo's, where nothing was asked for by name and the Hub has nothing to give."""
    if not s.demo:
        print(f"loading {s.model}, and {s.tasks} from {s.glue}", flush=True)
        try:
            return agreed(lambda: load(s), everywhere=True)
        except HubError as e:
            if {"model", "revision", "glue", "tasks"} & given.keys() or agreed(lambda: runs.is_demo(s.out)) is False:
                raise
            print(f"NOTICE: {e}.\nSo this is the demo; with files of your own, give --model FOLDER --glue FOLDER.\n")
    vars(s).update(demo_settings(given, WORLD))
    check(s)
    resolve(s)
    toy = agreed(lambda: demo(s))
    s.model, s.glue, s.demo = str(toy / "model"), str(toy / "glue"), True
    return agreed(lambda: load(s), everywhere=True)


def open_out(s, encoder, tasks, again):
    """Make the out folder, or hold what binds it against this run."""
    settings = {name: value for name, value in asdict(s).items() if name not in UNBOUND}
    usual = asdict(type(s)(**DEMO if s.demo else {}))
    about = {what: Path(x).name if Path(x).exists() else x for what, x in (("model", s.model), ("glue", s.glue))}
    guesses = {data.name: np.full(len(data.validation), data.majority()) for data in tasks}
    about["majority"] = {d.name: score(d.name, guesses[d.name], d.validation_labels) for d in tasks}
    about |= {"demo": s.demo, "tasks": list(guesses), "methods": {name: asdict(m) for name, m in METHODS.items()}}
    about["changed"] = {name: value for name, value in settings.items() if value != usual[name]}
    runs.open_out(Path(s.out), settings, runs.facts(encoder, tasks), about, s.resume, again)


def resolve(s):
    """Put in the place of --dtype auto and --per-task auto what they stand for on this device."""
    device = agreed(lambda: find_device(s.device, LOCAL_RANK), everywhere=True)
    s.dtype = s.dtype if s.dtype != "auto" else "bf16" if fast_in_bf16(device) else "fp32"
    s.per_task = s.per_task if s.per_task != "auto" else "stacked" if device.type == "cuda" else "loop"


def compare(s, given, argv, workers):
    """Run every unit that is not finished, in the workers with --jobs, and print the table."""
    if s.out:  # before anything is loaded
        agreed(lambda: runs.refuse_taken(Path(s.out), s.resume, runs.again(argv, s.out, s.demo or runs.is_demo(s.out))))
    resolve(s)
    workers.start(s.jobs)  # so that they import while this loads
    encoder, frozen, tasks = load_or_demo(s, given)
    workers.start(s.jobs)  # a demo has --jobs of its own
    if s.jobs > 1 or s.demo:  # so that the number of cores changes no digit
        torch.set_num_threads(1)
    s.out = s.out or agreed(lambda: runs.new_out("demo" if s.demo else Path(s.model).name))
    methods = {name: METHODS[name] for name in METHODS if name in listed(s.methods, "methods")}
    build("lori-s" if "lori-s" in methods else "joint", frozen, tasks, 0, s)  # unfit targets or sparsities show here
    agreed(lambda: open_out(s, encoder, tasks, runs.again(argv, s.out, s.demo)))
    units = runs.units(Path(s.out), methods, listed(s.seeds, "seeds", int), [data.name for data in tasks])
    todo = agreed(lambda: runs.unfinished(units))
    print(f"examples to train on: {', '.join(f'{data.name} {len(data.train):,}' for data in tasks)}")
    print(f"{len(todo)} of {len(units)} trainings to do, {s.jobs} at a time, {s.steps} steps, into {s.out}", flush=True)
    with runs.Bar(sum(s.steps * len(unit.tasks) for unit in todo if not unit.merged), RANK > 0 or not todo) as bar:
        failed = workers.do(todo, (encoder, frozen, tasks, s), bar)
    if not RANK:
        print(f"\n{table.write(s.out)}\nall of it is in {s.out}; to draw it: python experiments/plot.py {s.out}")
    if failed:
        raise FloatingPointError("; ".join(map(str, failed)))


def main(argv=None):
    argv, s, here = sys.argv[1:] if argv is None else argv, None, not LOCAL_RANK
    try:
        given = parse(argv)
        s = Settings(**demo_settings(given, WORLD) if "demo" in given else given)
        check(s)
        runs.join_processes(s.device)
        with runs.Workers(run) as workers:
            return compare(s, given, argv, workers)
    except (BadInput, OSError) as e:  # the user's; or a full disk, a folder taken away
        error, status = str(e), 2
    except FloatingPointError as e:
        error, status = f"{e}; a smaller --lr may help", 1
    except torch.OutOfMemoryError as e:  # of a GPU, and so of this process alone
        here, error, status = True, f"{str(e).splitlines()[0]} A smaller --batch-size or --max-length may help", 1
    except KeyboardInterrupt:
        begun = s and s.out and (Path(s.out) / "settings.json").exists()
        error, status = "interrupted" + (f"; to go on: {runs.again(argv, s.out, s.demo)}" if begun else ""), 130
    if here:  # one on every machine, since it may be that machine's alone
        print(f"train.py: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    runs.end(main)
