"""What it costs: time and memory of the projection and of whole training steps, as ratios within one run.

    python experiments/bench.py project                              the projection alone, at RoBERTa-base's LoRA shapes
    python experiments/bench.py project --num-tasks 2,4,8,16,32,64,128     and with more tasks
    python experiments/bench.py project --shapes 7b                  at a 7-B Llama's, by tensor and as one block
    python experiments/bench.py step --model FOLDER_OR_ID            a training step: joint, pcgrad, ortho
    python experiments/bench.py memory --model FOLDER_OR_ID          its peak memory, each mode in a process of its own
    python experiments/bench.py padding --model … --glue …           batches of alike lengths against plain shuffling
    python experiments/bench.py waits --model FOLDER_OR_ID           on a GPU: how often ten steps wait for it

Every table is one run. Times are medians of --rounds rounds (a fifth of them at 7b and from 32 tasks on) in which the
modes take turns; padding's are sums. Times of two runs, or of two machines, are not comparable. Peers (torchjd;
transformers with peft) are timed where installed, and left out elsewhere.
What is printed is also written to experiments/results/bench-WHAT-….json and .md; --out FOLDER puts it elsewhere.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import itertools
import json
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import glue  # noqa: E402
import train  # noqa: E402
from evaluate import find_device  # noqa: E402
from model import Config, Encoder, load_encoder  # noqa: E402
from ortholora import OrthoLoRA  # noqa: E402
from support import runs  # noqa: E402
from support.checkpoint import BadInput  # noqa: E402
from support.hub import find_checkpoint  # noqa: E402
from support.table import markdown  # noqa: E402


def factors(r, *layers):
    """The shapes of A and B of linear layers (in, out) at rank r."""
    return [shape for n_in, n_out in layers for shape in ((r, n_in), (n_out, r))]


ROBERTA_BASE = factors(8, *[(768, 768)] * 24)  # query and value in 12 layers
LLAMA_7B = factors(16, *[*[(4096, 4096)] * 4, (4096, 11008), (4096, 11008), (11008, 4096)] * 32)  # all seven, 32 layers


# ---------------------------------------------------------------------------------------------------------------------
# Timing


clock = time.perf_counter  # or, by --clock cpu, time.process_time


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fewer(args):
    """The rounds of what takes long."""
    return max(3, args.rounds // 5)


def take_turns(modes, rounds, device, warmup=2):
    """{name: (prepare or None, run)} -> {name: median seconds of run()}, in rounds of every mode once, shuffled."""
    times, order = {name: [] for name in modes}, random.Random(0)
    for _ in range(warmup + rounds):
        for name in order.sample(list(modes), len(modes)):
            prepare, run = modes[name]
            if prepare:
                prepare()
            synchronize(device)
            begin = clock()
            run()
            synchronize(device)
            times[name].append(clock() - begin)
    return {name: statistics.median(seconds[warmup:]) for name, seconds in times.items()}


def machine(device):
    """What a number was measured on, and with which commit."""
    return {
        "hardware": runs.hardware(torch.nn.Linear(1, 1, device=device)),
        "processor": f"{processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def commit():
    """The commit that is run, marked where its Python files have been changed."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    said = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True).stdout
    return (said or "unknown") + " with changes" * bool(changed.strip())


def processor():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def installed(*packages):
    return all(importlib.util.find_spec(package) for package in packages)


# ---------------------------------------------------------------------------------------------------------------------
# The projection alone


def projection_modes(T, device, with_torchjd):
    """(OrthoLoRA, modes for `take_turns`): what T tasks cost at ROBERTA_BASE, on random gradients."""
    torch.manual_seed(T)
    parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in ROBERTA_BASE]
    grads = [[torch.randn_like(p) for p in parameters] for _ in range(T)]
    stack = torch.stack([torch.stack([g.flatten() for g in of_block]) for of_block in zip(*grads, strict=True)])
    ortho = OrthoLoRA([[p] for p in parameters], T)

    def clear():
        for p in parameters:
            p.grad = None

    def collect():
        for t in range(T):
            for p, grad in zip(parameters, grads[t], strict=True):
                p.grad = grad
            ortho.collect(t)

    def fill():
        clear()
        ortho.rows.copy_(rows)

    collect()
    rows = ortho.rows.clone()  # (T, P)
    modes = {"collect": (clear, collect), "project": (fill, ortho.project), "gram": (None, lambda: stack @ stack.mT)}
    if with_torchjd:
        from torchjd.aggregation import PCGrad

        pcgrad = PCGrad()
        modes["torchjd"] = None, lambda: [pcgrad(block) for block in stack]  # stack: (blocks, T, n)
    return ortho, modes


def promised(ortho):
    """The most bytes that `project` may take beside the rows, the new .grad included."""
    T, P = ortho.rows.shape
    return 2 * 4 * P + 2**26 + 8 * 8 * len(ortho.blocks) * T * T


def bench_large(args, device):
    """`project` at LLAMA_7B with T = 4, every tensor alone and all as one block."""
    rows = [["blocks", "project", "of reading the rows once", "peak beside the rows", "at most"]]
    results = []
    for unit in ("tensor", "all"):
        parameters = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in LLAMA_7B]
        ortho = OrthoLoRA([[p] for p in parameters] if unit == "tensor" else [parameters], 4)

        def fill(ortho=ortho, parameters=parameters):
            ortho.rows.normal_()
            for p in parameters:
                p.grad = None

        modes = {"project": (fill, ortho.project), "sum": (fill, ortho.rows.sum)}
        times = take_turns(modes, fewer(args), device, warmup=1)
        peak = peak_of(ortho.project, device, prepare=fill)
        found = {"unit": unit, "blocks": len(ortho.blocks), "seconds": times["project"], "sum_seconds": times["sum"]}
        results.append(found | {"peak_bytes": peak, "promised_bytes": promised(ortho), "rows_bytes": ortho.rows.nbytes})
        time_, ratio = f"{1e3 * times['project']:.0f} ms", f"{times['project'] / times['sum']:.1f}"
        memory = [f"{x / 2**20:.0f} MiB" for x in (peak, promised(ortho))]
        rows.append([f"{len(ortho.blocks)}", time_, ratio, *memory])
        print(" ".join(rows[-1]), flush=True)
    notes = [
        f"T = 4, P = {ortho.rows.shape[1]:,}: r 16 on all seven linear layers of a 7-B Llama's 32 blocks, float32; "
        f"the rows take {ortho.rows.nbytes / 2**20:.0f} MiB. at most: 2 · 4·P bytes, 64 MiB and eight (blocks, T, T) "
        "in float64."
    ]
    return rows, results, notes


def bench_project(args, device):
    """`collect` and `project` at RoBERTa-base's shapes, beside the Gram product that no way of projecting can avoid."""
    if args.shapes == "7b":
        return bench_large(args, device)
    rows = [["tasks", "collect", "project", "bare Gram", "torchjd", "project / Gram", "torchjd / project", "MiB"]]
    results = []
    for T in map(int, args.num_tasks.split(",")):
        ortho, modes = projection_modes(T, device, args.torchjd_up_to >= T and installed("torchjd"))
        times = take_turns(modes, args.rounds if T < 32 else fewer(args), device)
        extra = peak_of(ortho.project, device, prepare=modes["project"][0])
        ms = {name: 1e3 * seconds for name, seconds in times.items()}
        results.append({"tasks": T, "milliseconds": ms, "extra_bytes": extra, "rows_bytes": ortho.rows.nbytes})
        own = [f"{ms[name]:.2f} ms" for name in ("collect", "project", "gram")]
        theirs = [f"{ms['torchjd']:.1f} ms", f"{ms['torchjd'] / ms['project']:.1f}"] if "torchjd" in ms else ["—", "—"]
        rows.append([str(T), *own, theirs[0], f"{ms['project'] / ms['gram']:.1f}", theirs[1], f"{extra / 2**20:.1f}"])
        print(" ".join(rows[-1]), flush=True)
    notes = [
        "48 blocks of 6,144 numbers (r 8, query and value), float32. collect: of all tasks. bare Gram: the "
        "batched product of every block with itself. MiB: what project() takes beside the rows. From 32 tasks on "
        f"{fewer(args)} rounds."
    ]
    if args.step:
        config = Config("roberta", 50265, 768, 12, 12, 3072, 514, 1, "gelu", 0.1, 0.1, 0.1, type_vocab_size=1)
        encoder = in_dtype(Encoder(config), args, device)
        one_task = Step("joint", "loop", argparse.Namespace(**{**vars(args), "tasks": 1}), device, encoder)
        seconds = take_turns({"": (None, one_task)}, 3, device, warmup=1)[""]
        shares = [
            f"{100 * r['milliseconds']['project'] / (1e3 * seconds * r['tasks']):.2f} % at T = {r['tasks']}"
            for r in results
        ]
        notes.append(
            f"A RoBERTa-base step takes {seconds:.2f} s per task ({args.batch_size} sequences of "
            f"{args.length} tokens, {args.dtype}; 3 rounds): project() is {', '.join(shares)} of it."
        )
        results.append({"step_seconds_per_task": seconds})
    return rows, results, notes


# ---------------------------------------------------------------------------------------------------------------------
# A training step


def in_dtype(encoder, args, device):
    """The frozen encoder as trainings read it."""
    return encoder.to(device, torch.bfloat16 if args.dtype == "bf16" else torch.float32)


class Step:
    """One training step of a method in a mode, on random sequences without padding."""

    def __init__(self, method, how, args, device, encoder):
        s = train.Settings(batch_size=args.batch_size, per_task=how, dtype=args.dtype, compile=args.compile)
        labels = np.arange(args.batch_size) % 2
        rng = np.random.default_rng(0)
        self.tasks = []
        for name in itertools.islice([t for t in glue.TASKS if glue.TASKS[t].outputs == 2] * 100, args.tasks):
            ids = rng.integers(5, encoder.config.vocab_size, (args.batch_size, args.length)).tolist()
            self.tasks.append(glue.TaskData(name, [(row, [0] * len(row)) for row in ids], labels, [], labels))
        model = self.model = train.build(method, encoder, self.tasks, 0, s)
        self.batches, self.s = next(glue.batches_of_steps(self.tasks, 0, s, encoder.config.pad_token_id, device)), s
        model.eval()  # no dropout anywhere, in no mode
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.method, self.ortho = method, train.projection(method, model, args.tasks, s)

    def __call__(self):
        self.optimizer.zero_grad()
        train.gradients(self.method, self.model, self.batches, self.ortho, 0, self.s)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


class PeftStep:
    """The same joint step by `transformers` and `peft`: a sequence classifier, the batches' gradients added."""

    def __init__(self, attention, precision, args, device, config):
        import peft
        import transformers

        transformers.logging.set_verbosity_error()
        names = {"dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob"}
        made = transformers.AutoConfig.from_pretrained(config, num_labels=2, **dict.fromkeys(names.values(), 0.0))
        model = transformers.AutoModelForSequenceClassification.from_config(made, attn_implementation=attention)
        if precision == "bf16 weights":
            model = model.to(torch.bfloat16)
        wanted = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"], task_type="SEQ_CLS")
        self.model, self.device = peft.get_peft_model(model, wanted).to(device).eval(), device
        if args.compile:
            self.model = torch.compile(self.model, dynamic=True)
        self.autocast = precision == "autocast"
        rng = torch.Generator().manual_seed(0)
        shape = args.batch_size, args.length
        labels = (torch.arange(args.batch_size) % 2).to(device)
        ids = [torch.randint(5, made.vocab_size, shape, generator=rng).to(device) for _ in range(args.tasks)]
        self.batches = [{"input_ids": x, "labels": labels} for x in ids]
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)

    def __call__(self):
        self.optimizer.zero_grad()
        for batch in self.batches:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                loss = self.model(**batch).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()


MODES = {  # name -> method, how
    "joint, loop": ("joint", "loop"),
    "joint, one mixed batch": ("joint", "stacked"),
    "pcgrad, loop": ("pcgrad", "loop"),
    "ortho, loop": ("ortho", "loop"),
    "ortho, stacked": ("ortho", "stacked"),
}


def bench_step(args, device):
    """A whole step in every mode, against the faster of the two joint steps; and against the peers' joint step."""
    folder = find_checkpoint(args.model)
    encoder = in_dtype(load_encoder(folder), args, device)
    steps = {name: Step(method, how, args, device, encoder) for name, (method, how) in MODES.items()}
    if not args.no_peers and installed("transformers", "peft") and encoder.config.model_type != "distilbert":
        for attention in ("sdpa", "eager"):
            for precision in ("autocast", "bf16 weights") if args.dtype == "bf16" else ("float32",):
                name = f"transformers + peft, joint, {attention}, {precision}"
                steps[name] = PeftStep(attention, precision, args, device, folder)
    times = take_turns({name: (None, step) for name, step in steps.items()}, args.rounds, device)
    joint = min(t for name, t in times.items() if name.startswith("joint"))
    tokens = args.tasks * args.batch_size * args.length
    rows = [["step", "time", "tokens / s", "against the faster joint step"]]
    rows += [[name, f"{1e3 * t:.0f} ms", f"{tokens / t:,.0f}", f"{t / joint:.3f}"] for name, t in times.items()]
    notes = [
        f"{args.tasks} tasks of {args.batch_size} sequences of {args.length} tokens, {args.dtype}, "
        f"{Path(args.model).name}, no padding, no dropout{', compiled' if args.compile else ''}."
    ]
    theirs = {name: t for name, t in times.items() if "peft" in name}
    if theirs:
        best = min(theirs, key=theirs.get)
        notes.append(f"Our joint step is {theirs[best] / joint:.2f} times as fast as the fastest of theirs ({best}).")
    return rows, [{"mode": name, "seconds": t} for name, t in times.items()], notes


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak_of(run, device, prepare=None):
    """Bytes that torch's allocator has given out at the peak of `run()`, beyond what was out before."""
    if prepare:
        prepare()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run()
        seen.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
    events = sorted((e["ts"], i, e["args"]) for i, e in enumerate(events) if e.get("name") == "[memory]")
    totals = [args["Total Allocated"] for *_, args in events]
    return max(totals) - (totals[0] - events[0][2]["Bytes"])


def peak_of_step(args, device):
    """In this process, for --mode alone: the peak of the third step, beyond what stands between steps."""
    step = Step(*MODES[args.mode], args, device, in_dtype(load_encoder(args.model), args, device))
    step(), step()
    step.optimizer.zero_grad()
    return peak_of(step, device)


def bench_memory(args, device):
    """Each mode in a process of its own, against joint training in the same way (loop, or one mixed batch)."""
    peaks = {}
    for mode in MODES:
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--mode", mode], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        peaks[mode] = int(done.stdout.split()[-1])
    step = Step("ortho", "loop", args, device, in_dtype(load_encoder(args.model), args, device))
    TP = step.ortho.rows.nbytes  # these stand between steps, too
    rows = [["step", "peak beyond the weights", "beyond joint", "in rows of T · P floats", "against joint"]]
    for mode, peak in peaks.items():
        base = peaks["joint, loop" if "loop" in mode else "joint, one mixed batch"]
        more = peak - base + (TP if "ortho" in mode or "pcgrad" in mode else 0)
        rows.append(
            [
                mode,
                f"{peak / 2**20:.1f} MiB",
                f"{more / 2**20:.2f} MiB",
                f"{more / TP:.2f}",
                f"{(base + more) / base:.3f}",
            ]
        )
    notes = [
        f"{args.tasks} tasks of {args.batch_size} sequences of {args.length} tokens, {args.dtype}, "
        f"{Path(args.model).name}. The rows, T · P floats, take {TP / 2**20:.2f} MiB and are counted in."
    ]
    return (
        rows,
        [{"mode": mode, "peak_bytes": peak} for mode, peak in peaks.items()] + [{"rows_bytes": TP}],
        notes,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Waiting for the device

WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


class Watched:
    """In the place of a run's progress bar: profiles ten steps between two log lines, then ends the run."""

    def __init__(self, device):
        self.step, self.device = 0, device
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
        self.profile = profile(activities=kinds)

    def skip(self, batches):
        pass

    def update(self, batches):
        self.step += 1
        if self.step == 5:  # by now everything has been allocated and compiled
            synchronize(self.device)
            self.profile.start()
        if self.step == 15:
            self.profile.stop()
            raise StopIteration


def bench_waits(args, device):
    """The training loop as `train.py` runs it: what the profiler counts of calls that wait for the device."""
    encoder = in_dtype(load_encoder(args.model), args, device)
    rows, results = [["method", "steps", *WAITS]], []
    for method, how in MODES.values():
        step, watched = Step(method, how, args, device, encoder), Watched(device)
        s = dataclasses.replace(step.s, steps=1000, save_every=1e9)
        unit = runs.Unit(Path("nowhere"), method, 0, tuple(data.name for data in step.tasks))
        with contextlib.suppress(StopIteration):
            train.train(unit, step.model, step.tasks, encoder, s, io.StringIO(), watched)
        seen = [event.name for event in watched.profile.events()]
        if device.type == "cuda" and not any(name.startswith("cudaLaunchKernel") for name in seen):
            raise BadInput("waits: the profiler saw no CUDA call, so nothing was counted; it may lack the permission")
        found = {name: seen.count(name) for name in WAITS}
        found["cudaDeviceSynchronize"] -= seen.count("cudaDeviceSynchronize") > 0  # the profiler's own, as it stops
        results.append({"method": method, "how": how, "waits": found})
        rows.append([f"{method}, {how}", "10", *map(str, found.values())])
    notes = [
        f"{args.tasks} tasks of {args.batch_size} sequences of {args.length} tokens, {args.dtype}, "
        f"{Path(args.model).name}; AdamW, clipping and the checks that train.py makes."
    ]
    return rows, results, notes


# ---------------------------------------------------------------------------------------------------------------------
# Padding


def bench_padding(args, device):
    """Joint steps on real tasks, with batches of alike lengths and with plain shuffling: padding, tokens per second."""
    folder = find_checkpoint(args.model)
    tokenizer, encoder = glue.load_tokenizer(folder), in_dtype(load_encoder(folder), args, device)
    base = train.Settings(batch_size=args.batch_size, per_task="loop")
    names = args.tasks_named.split(",")
    tasks = [glue.load_data(name, args.glue, tokenizer, encoder.config, args.length) for name in names]
    rows = [
        [
            "batches",
            *(f"{name}: padding" for name in names),
            "all: padding",
            "stacked: padding",
            "real tokens / s",
            "against plain",
        ]
    ]
    streams, found = {}, {}
    for window in (1, base.window):
        s = dataclasses.replace(base, window=window)
        model = train.build("joint", encoder, tasks, 0, s)
        share, totals, stacked = [], [0, 0], [0, 0]
        for data in tasks:
            drawn = list(itertools.islice(glue.rows_of_steps(data.lengths, s.batch_size, 0, data.name, window), 200))
            real, all_ = (sum(int(f(data.lengths[b])) for b in drawn) for f in (np.sum, lambda x: len(x) * x.max()))
            share.append(1 - real / all_)
            totals = [totals[0] + real, totals[1] + all_]
        for step in itertools.islice(
            zip(*(glue.rows_of_steps(d.lengths, s.batch_size, 0, d.name, window) for d in tasks), strict=True), 200
        ):
            lengths = np.concatenate([d.lengths[b] for d, b in zip(tasks, step, strict=True)])
            stacked = [stacked[0] + lengths.sum(), stacked[1] + len(lengths) * lengths.max()]
        found[window] = share, 1 - totals[0] / totals[1], 1 - stacked[0] / stacked[1]
        streams[window] = model, glue.batches_of_steps(tasks, 0, s, encoder.config.pad_token_id, device), s

    def ten_steps(window):
        model, stream, s = streams[window]
        for batches in itertools.islice(stream, 10):
            model.zero_grad()
            train.gradients("joint", model, batches, None, 0, s)
            counted[window] += sum(b.ids.numel() if b.mask is None else b.mask.sum() for b in batches)  # waits for none

    counted, seconds = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0.0)
    for turn in range(1 + max(2, args.rounds // 4)):  # sums, not medians: the batches differ
        for window in streams:
            begin = clock()
            ten_steps(window)
            synchronize(device)
            seconds[window] += clock() - begin
        if turn == 0:
            counted, seconds = dict.fromkeys(streams, 0), dict.fromkeys(streams, 0.0)
    rate = {window: int(counted[window]) / seconds[window] for window in streams}
    for window, (share, total, stacked) in found.items():
        rows.append(
            [
                f"windows of {window}" if window > 1 else "plain",
                *(f"{100 * x:.1f} %" for x in share),
                f"{100 * total:.1f} %",
                f"{100 * stacked:.1f} %",
                f"{rate[window]:,.0f}",
                f"{rate[window] / rate[1]:.2f}",
            ]
        )
    notes = [
        f"Joint steps of {args.batch_size} sequences per task, at most {args.length} tokens, {args.dtype}, "
        f"{Path(args.model).name}. padding: its share of all tokens, over 200 batches. stacked: all tasks' "
        "batches padded to the longest of them."
    ]
    results = [
        {
            "window": w,
            "padding": dict(zip(names, f[0], strict=True)),
            "padding_all": f[1],
            "padding_stacked": f[2],
            "tokens_per_second": rate[w],
        }
        for w, f in found.items()
    ]
    return rows, results, notes


# ---------------------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["project", "step", "memory", "padding", "waits"])
    parser.add_argument("--num-tasks", default="4,8,64", help="project: numbers of tasks [%(default)s]")
    whose = "project: RoBERTa-base's LoRA shapes, or those of a 7-B Llama [%(default)s]"
    parser.add_argument("--shapes", default="base", choices=["base", "7b"], help=whose)
    parser.add_argument("--step", action="store_true", help="project: as a share of a RoBERTa-base step, too")
    parser.add_argument("--torchjd-up-to", type=int, default=64, help="project: most tasks for torchjd [%(default)s]")
    parser.add_argument("--model", default="roberta-base", help="checkpoint folder or Hub id [%(default)s]")
    parser.add_argument("--glue", default="nyu-mll/glue", help="padding: GLUE folder or Hub id [%(default)s]")
    parser.add_argument("--tasks-named", default="rte,mrpc,cola,stsb", help="padding: the tasks [%(default)s]")
    parser.add_argument("--tasks", type=int, default=4, help="step, memory, waits: how many [%(default)s]")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per task [%(default)s]")
    parser.add_argument("--length", type=int, default=64, help="tokens per sequence, at most [%(default)s]")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the encoder [%(default)s]")
    parser.add_argument("--no-peers", action="store_true", help="step: leave transformers and peft out")
    parser.add_argument("--compile", action="store_true", help="torch.compile, in every mode")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument(
        "--clock",
        default="wall",
        choices=["wall", "cpu"],
        help="cpu: of the process, which a busy host does not stretch; with one thread",
    )
    parser.add_argument("--rounds", type=int, default=20, help="timed rounds [%(default)s]")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"), help="folder for the results")
    parser.add_argument("--mode", help=argparse.SUPPRESS)  # memory: the one mode that this process measures
    args = parser.parse_args()
    device = find_device(args.device)
    if device.type not in ("cpu", "cuda"):
        parser.error(f"--device {args.device}: only a CPU or an NVIDIA GPU can be timed here")
    if args.what == "waits" and device.type != "cuda":
        parser.error("waits counts CUDA's calls; on a CPU see test_no_step_waits_for_the_device in tests/test_train.py")
    if args.clock == "cpu":
        if torch.get_num_threads() > 1 or device.type != "cpu":
            parser.error("--clock cpu adds up the time of all threads: set OMP_NUM_THREADS=1, and --device cpu")
        global clock
        clock = time.process_time
    if args.mode:
        print(peak_of_step(args, device))
        return
    rows, results, notes = globals()[f"bench_{args.what}"](args, device)
    about = machine(device) | {"clock": args.clock}
    command = " ".join(["python experiments/bench.py", *sys.argv[1:]])
    where = (
        f"{args.clock} time, {about['hardware']} ({about['processor']}), torch {about['torch']}, "
        f"commit {about['commit']}, {about['date']}"
    )
    rounds = fewer(args) if args.shapes == "7b" else args.rounds
    timed = f"{rounds} rounds, " if args.what in ("project", "step") else ""
    text = "\n\n".join([markdown(rows), *notes, f"`{command}`: {timed}{where}."])
    print(f"\n{text}")
    variant = {"step": args.dtype, "project": args.shapes}.get(args.what, "base" if args.dtype == "fp32" else "bf16")
    name = f"bench-{args.what}" + f"-{variant}" * (variant != "base") + ("-cpu" if device.type == "cpu" else "-gpu")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    written = {"command": command, **about, "rounds": rounds, "results": results}
    (out / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
    (out / f"{name}.md").write_text(text + "\n")


if __name__ == "__main__":
    try:
        main()
    except (BadInput, OSError) as e:
        print(f"bench.py: {e}", file=sys.stderr)
        sys.exit(2)
