"""The out folder is the state: each training is a unit with a folder of its own, and nothing is known of it elsewhere.

    OUT/settings.json                          what binds every unit in OUT; what differs from it is refused
    OUT/METHOD/seedN[/TASK]/                   a unit's folder
        state.safetensors                      while it runs, and after it was interrupted: all that its next step needs
        log.jsonl, timing.json                 a line per logged step; seconds per step, memory, which code
        result.json                            scores and statistics; written last, so a unit that has it is finished
    OUT/METHOD/seedN/TASK/                     a task's adapter, with its head, as peft loads it

A unit that is finished is kept, one that has a state goes on, one that has neither starts. So a run can be interrupted
anywhere, methods and seeds can be added to it, and several processes can share it, each with units of its own.
"""

import contextlib
import datetime
import fcntl
import functools
import hashlib
import json
import multiprocessing.connection
import multiprocessing.resource_tracker
import os
import pickle
import platform
import re
import shlex
import signal
import sys
import threading
import time
import traceback
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import distributed as dist
from tqdm import tqdm

from support.checkpoint import BadInput, load_state, read_json, save_state, weights_checksum, write_text

# Set by torchrun: which process this is, out of how many, and which of its machine's.
RANK, WORLD, LOCAL_RANK = (int(os.environ.get(x) or 0) for x in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
if WORLD <= 1:  # one process is the first, whatever else a cluster has set
    RANK, WORLD, LOCAL_RANK = 0, 1, 0

# ---------------------------------------------------------------------------------------------------------------------
# Several processes under torchrun: the first one alone looks at OUT and writes to it


@contextlib.contextmanager
def together():
    """What all processes do at once. Raises ConnectionError where another one has ended, which has said why.

    An error of this process's own GPU may surface here, later than it happened; it is raised as it is.
    """
    try:
        yield
    except (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError)):  # 2.6 has no second
        raise
    except RuntimeError as e:
        raise ConnectionError(f"another process has ended: {str(e).splitlines()[0]}") from None


def agreed(do, everywhere=False):
    """What do() returns in the first process, for all of them; with `everywhere` each does it, and has its own.

    Where it fails in one process for want of good input, or of disk, all of them raise that error.
    """
    result = error = None
    if everywhere or not RANK:
        try:
            result = do()
        except (BadInput, OSError) as e:
            error = e
    if WORLD > 1:
        errors, box = [None] * WORLD, [result]
        with together():
            dist.all_gather_object(errors, error)
            error = next((e for e in errors if e is not None), None)
            if error is None and not everywhere:
                dist.broadcast_object_list(box, 0)
                (result,) = box
    if error is not None:
        raise error
    return result


def join_processes(device):
    """Meet the other processes that torchrun has started, if any. Only the first one goes on to print.

    Raises BadInput: more processes than GPUs; WORLD_SIZE without the rest, as some schedulers leave it.
    """
    if RANK:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  for good
    if WORLD > 1:
        cuda, here = device != "cpu" and torch.cuda.is_available(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if cuda and here > torch.cuda.device_count():
            raise BadInput(f"{here} processes on {torch.cuda.device_count()} GPUs: give torchrun at most one for each")
        if cuda:
            torch.cuda.set_device(LOCAL_RANK)
        try:  # the first one scores, so the others may wait for long
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(days=1))
        except ValueError as e:
            unset = f"WORLD_SIZE is {WORLD}, and torchrun's other variables are not set"
            raise BadInput(f"{unset}; start with torchrun, or unset WORLD_SIZE: {e}") from None


def end(main):
    """Run main() and end the process with the status that it returns.

    Under torchrun at once, and without parting from the others: after an error in one process, NCCL would wait for
    them for ever, and while the interpreter ends, a thread of gloo's may abort it.
    """
    if sys.stdout is not None:
        sys.stdout.reconfigure(errors="replace")  # a table has "±", which not every terminal can show
    if WORLD == 1:
        sys.exit(main())
    try:
        status = main()
    except Exception:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def average(*tensors):
    """Replace each tensor by its mean over all processes, in place, in one all-reduce. None stays None, everywhere."""
    tensors = [x for x in tensors if x is not None]
    flat = torch.cat([x.flatten() for x in tensors])
    with together():
        dist.all_reduce(flat)
    for x, mean in zip(tensors, (flat / WORLD).split([x.numel() for x in tensors]), strict=True):
        x.copy_(mean.view_as(x))


# ---------------------------------------------------------------------------------------------------------------------
# Units and their folders


@dataclass(frozen=True)
class Unit:
    """One training, or one merge: a method with a seed, and, where each task has an adapter of its own, one task."""

    out: Path
    method: str
    seed: int
    tasks: tuple  # names: one, or all
    own: bool = False  # each task has an adapter of its own
    source: str = ""  # the method whose adapters this one is made of

    def __str__(self):
        return f"{self.method}, seed {self.seed}" + (f", {self.tasks[0]}" if self.own else "")

    def adapter(self, task, method=None):
        """The folder of a task's adapter, this unit's or another method's."""
        return self.out / (method or self.method) / f"seed{self.seed}" / task

    @property
    def folder(self):
        return self.adapter(self.tasks[0] if self.own else "")

    @property
    def state(self):
        return self.folder / "state.safetensors"

    @property
    def merged(self):
        """Whether it is made of the source's adapters without training."""
        return bool(self.source) and not self.own

    @property
    def finished(self):
        return (self.folder / "result.json").exists()

    @property
    def ready(self):
        """Whether all that it is made of is there. A source has an adapter per task, so one result.json per task."""
        return not self.source or all((self.adapter(t, self.source) / "result.json").exists() for t in self.tasks)

    def finish(self, result, timing):
        write_text(self.folder / "timing.json", json.dumps(timing, indent=1) + "\n")
        write_text(self.folder / "result.json", json.dumps(result, indent=1) + "\n")
        self.state.unlink(missing_ok=True)


def units(out, methods, seeds, tasks):
    """Every training and merge of the methods, {name: train.Method} in train.METHODS' order: sources come first."""
    return [
        Unit(out, name, seed, group, method.own, method.source)
        for seed in seeds
        for name, method in methods.items()
        for group in ([(task,) for task in tasks] if method.own else [tuple(tasks)])
    ]


def unfinished(units):
    """Those that are still to do. Raises BadInput where the source of one is neither there nor among them."""
    methods = {unit.method for unit in units}
    for unit in units:
        if unit.finished:
            unit.state.unlink(missing_ok=True)  # left by a process that was killed right then
        elif not (unit.ready or unit.source in methods):
            raise BadInput(
                f"--methods: {unit} is made from {unit.source}, which {unit.out} does not have; name that too"
            )
    return [unit for unit in units if not unit.finished]


@contextlib.contextmanager
def locked(folder, wait=False):
    """Make the folder, and keep other processes out of it while this lasts. What a killed one was writing goes.

    Raises BadInput where another process has it, unless told to wait.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise BadInput(f"another process is at work on {folder}; let it end, or leave that part to it") from None
        for path in folder.glob(".*.tmp") if wait else folder.rglob(".*.tmp"):  # units have own locks
            if re.search(r"\.\d+\.tmp$", path.name):  # as atomic_write has it
                path.unlink(missing_ok=True)
        yield
    finally:
        os.close(handle)


def new_out(name):
    """A folder for a run that was not given one, named by what it is and when."""
    return f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}"


def again(argv, out, demo, script="train.py"):
    """The whole command that goes on with the run in `out`."""
    more, given = [["--demo"] if demo else [], ["--out", out], ["--resume"]], {word.split("=")[0] for word in argv}
    words = [*argv, *(word for words in more if words and words[0] not in given for word in words)]
    return f"{'torchrun …' if WORLD > 1 else 'python'} {script} {shlex.join(words)}"


def is_demo(out):
    """Whether the run in `out` is of the demo; None where there is none."""
    path = Path(out, "settings.json")
    return read_json(path).get("demo") if out and path.exists() else None


def refuse_taken(out, resume, go_on):
    """Raises BadInput where there is a run in `out` and nobody said --resume; `go_on`: the command that would go on."""
    if (out / "settings.json").exists() and not resume:
        raise BadInput(f"--out {out} has a run in it; to go on with it, or to add to it: {go_on}")
    units = [path for path in out.glob("*/seed[0-9]*") if not path.parent.is_symlink()]  # merging.py links a method
    for path in (out / "results.json", out / "results.md", *units):
        if path.exists() and not (out / "settings.json").exists():
            found = path.relative_to(out)
            raise BadInput(f"--out {out} has a {found}, and no settings.json that says of what; choose another folder")


def open_out(out, settings, facts, about, resume, go_on):
    """Make the out folder, with its settings.json, or hold what binds it, settings and facts, against what is there.

    about binds nothing; of it, methods that are newer than the folder are added. All three are as JSON has them. Raises
    BadInput, naming the first thing that differs, and where the folder can't be written.
    """
    path, text = out / "settings.json", json.dumps({"settings": settings, "facts": facts, **about}, indent=1)
    try:
        with locked(out, wait=True):
            refuse_taken(out, resume, go_on)
            if not path.exists():
                write_text(path, text + "\n")
    except OSError as e:
        raise BadInput(f"--out {out} can't be written: {e.strerror}") from None
    known, bound = read_json(path), settings | facts
    if not all(isinstance(known.get(part), dict) for part in ("settings", "facts", "methods")):
        raise BadInput(f"{path} was not written by train.py; choose another folder")
    there = known["settings"] | known["facts"]
    for what in there | bound:
        if (old := there.get(what)) != (new := bound.get(what)):
            hint = " (1 with --jobs; else OMP_NUM_THREADS sets it)" if what == "threads" else ""
            raise BadInput(f"--out {out}: {what} was {old!r} and is {new!r}{hint}; choose another folder for that")
    if about["methods"].keys() - known["methods"].keys():
        with locked(out, wait=True):
            known = read_json(path)
            known["methods"] = about["methods"] | known["methods"]
            write_text(path, json.dumps(known, indent=1) + "\n")


def facts(encoder, tasks):
    """What binds a run beside its settings: the machine's side of it, and checksums of all that it reads."""
    found = {"device": next(encoder.parameters()).device.type, "processes": WORLD, "threads": torch.get_num_threads()}
    found |= {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    found["the weights of the model"] = weights_checksum(encoder)
    found |= {f"the model's {name}": value for name, value in vars(encoder.config).items()}
    for data in tasks:
        rows = np.concatenate([np.asarray(ids + types, np.int32) for ids, types in data.train + data.validation])
        labels = np.concatenate([data.train_labels, data.validation_labels])
        found[f"the data of {data.name}"] = zlib.crc32(rows.data, zlib.crc32(labels.data))
        found[f"the number of {data.name}'s rows to train on"] = len(data.train)
    return found


def timing(unit, encoder, seconds, steps, scored=False):
    """timing.json: seconds per step, a GPU's peak memory in training, and what they were measured with.

    No memory where the training was scored on its way: the peak may be the scoring's.
    """
    device, memory = next(encoder.parameters()).device, None
    if device.type == "cuda" and not unit.merged and not scored:
        memory = torch.cuda.max_memory_allocated(device)
    about = {"hardware": hardware(encoder), "source": source_checksum()}
    return {"seconds_per_step": seconds, "steps": steps, "peak_memory_bytes": memory, **about}


def origin(unit, encoder, s):
    """What an adapter's file says of its making, by which evaluate.py scores it: strings."""
    said = {"method": unit.method, "seed": str(unit.seed), "weights": str(weights_checksum(encoder))}
    said |= {"revision": s.revision, "glue": s.glue, "max_length": str(s.max_length)}
    return said | ({"holdout": str(s.holdout)} if s.holdout else {})  # without, scores are the validation split's


def hardware(encoder):
    """What a time was measured on."""
    device, threads = next(encoder.parameters()).device, torch.get_num_threads()
    name = f"CPU, {threads} thread{'s' if threads > 1 else ''}" if device.type == "cpu" else device.type
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else name
    return f"{WORLD} × {name}" if WORLD > 1 else name


@functools.cache
def source_checksum():
    """Of the Python files that a training runs: units made by different code are told apart by it."""
    root = Path(__file__).resolve().parent.parent
    files = [*sorted(root.glob("*.py")), *sorted((root / "support").glob("*.py"))]
    return hashlib.sha256(b"".join(f.read_bytes() for f in files if not f.name.startswith("test_"))).hexdigest()[:16]


source_checksum()  # now: of the files as they are loaded, not as they are when a training ends


# ---------------------------------------------------------------------------------------------------------------------
# Inside a unit


def save(unit, step, seconds, trained, optimizer, watch, log):
    """All that the next step depends on. Batches, dropout and the order of projection are functions of the step."""
    tensors = {f"parameter {name}": p for name, p in trained.items()} | watch.tensors()
    tensors |= {f"{kind} {name}": x for name, p in trained.items() for kind, x in optimizer.state[p].items()}
    log.flush()
    os.fsync(log.fileno())
    save_state(unit.state, tensors, {"step": step, "seconds": seconds, "log": log.tell()})


def resume(unit, trained, optimizer, watch, log):
    """Fill in what `save` wrote, if it did, and cut the log back to it. Returns (steps done, seconds that they took).

    A GPU's peak memory counts from here. Raises BadInput where the state is damaged: it is not used, and goes when the
    user deletes it.
    """
    begin = {}, {"step": 0, "seconds": 0.0, "log": 0}
    tensors, info = agreed(lambda: load_state(unit.state) if unit.state.exists() else begin)
    if not RANK:
        log.truncate(min(info["log"], log.seek(0, os.SEEK_END)))  # less where someone has taken it away
        log.seek(0, os.SEEK_END)
    watch.fill(tensors)
    for key, x in tensors.items():
        kind, _, name = key.partition(" ")
        if kind == "parameter":
            trained[name].data.copy_(x)
        elif kind != "watch":
            optimizer.state[trained[name]][kind] = x if kind == "step" else x.to(trained[name].device)
    if watch.bad.is_cuda:
        torch.cuda.reset_peak_memory_stats(watch.bad.device)
    return info["step"], info["seconds"]


FIFTHS = 5  # parts of a training, to see what changes on its way


class Watch:
    """What a training sees on its way: conflict statistics, added up, and the first step that was not finite.

    All of it stays on the device until it is asked for, so that no step waits.
    """

    def __init__(self, tasks, trained, steps, device):
        self.tasks, self.trained, self.steps = list(tasks), list(trained), steps
        self.sums = None  # conflicts and cosines (blocks, T, T), removed (blocks, T)
        self.fifths = torch.zeros(FIFTHS, 1 + 2 * len(tasks), device=device)  # rate; effective weights; tasks' norms
        self.bad = torch.zeros(1 + len(tasks) + len(self.trained), device=device)  # that step, losses, p's norms
        self.good = torch.ones((), dtype=torch.bool, device=device)  # there was none so far

    def see(self, step, losses, norms, conflicts):  # losses: the tasks'; norms: the parameters'
        seen = torch.cat([losses.new_full((1,), step), losses, norms])
        first = self.good & ~seen.isfinite().all()
        self.good, self.bad = self.good & ~first, torch.where(first, seen, self.bad)
        if conflicts is not None:
            more = [x.float() for x in (conflicts.conflicts, conflicts.cosines, conflicts.removed)]
            self.sums = more if self.sums is None else [a + b for a, b in zip(self.sums, more, strict=True)]
            parts = [conflicts.rate[None], conflicts.effective, conflicts.squares.sum(0).sqrt()]
            self.fifths[step * FIFTHS // self.steps] += torch.cat([x.float() for x in parts])

    def check(self, unit):
        """Raise FloatingPointError if a step was not finite, naming it, task and parameter. Waits for the device."""
        if self.good:
            return
        step, losses, norms = self.bad.cpu().split([1, len(self.tasks), len(self.trained)])
        wrong = [f"the loss of {t} is {x}" for t, x in zip(self.tasks, losses.tolist(), strict=True)]
        wrong = [text for text, x in zip(wrong, losses, strict=True) if not x.isfinite()]
        if not norms.isfinite().all():
            name = self.trained[int((~norms.isfinite()).nonzero()[0])]
            among = "" if wrong else f" (tasks {', '.join(self.tasks)})"
            wrong.append(f"the gradient of {name} is not finite{among}")
        raise FloatingPointError(f"{unit}, step {int(step)}: {' and '.join(wrong)}")

    def tensors(self):
        sums = {f"watch sum {i}": x for i, x in enumerate(self.sums or ())}
        return {"watch good": self.good, "watch bad": self.bad, "watch fifths": self.fifths} | sums

    def fill(self, tensors):
        if "watch good" in tensors:
            found = {name: x.to(self.bad.device) for name, x in tensors.items() if name.startswith("watch ")}
            self.good, self.bad, self.fifths = (found[f"watch {name}"] for name in ("good", "bad", "fifths"))
            self.sums = [found[f"watch sum {i}"] for i in range(3)] if "watch sum 0" in found else None


# ---------------------------------------------------------------------------------------------------------------------
# --jobs: several units at a time, each in a process of one thread


class Bar(tqdm):
    """The progress bar of all trainings, in batches."""

    def __init__(self, total, disable):
        often = 0.5 if sys.stderr.isatty() else 10
        super().__init__(total=total, unit="batch", smoothing=0.05, mininterval=often, disable=disable)

    def skip(self, batches):
        """Count what was done before: it says nothing of the time that is left."""
        if not self.disable:
            self.initial, self.n, self.last_print_n = (x + batches for x in (self.initial, self.n, self.last_print_n))
            self.refresh()


class Ticks:
    """In a worker, in the place of the progress bar: tells the parent."""

    def __init__(self, parent):
        self.update, self.set_description = parent.send, lambda text: None
        self.skip = lambda batches: parent.send(-batches)


def work(run, parent):
    """A worker: runs the units that come; an error is for the parent to say."""
    alive = multiprocessing.parent_process()
    threading.Thread(target=lambda: (alive.join(), os._exit(1)), daemon=True).start()  # never outlive a killed parent
    tqdm.set_lock(threading.RLock())  # its own, between processes, would be called leaked when this one is ended
    torch.set_num_threads(1)
    try:
        loaded = pickle.loads(parent.recv_bytes())
        while True:
            parent.send(None)  # no batches, but room for a unit
            unit = parent.recv()
            try:
                run(unit, *loaded, Ticks(parent))
            except FloatingPointError as e:
                parent.send(named(e, unit))
    except (BadInput, OSError, torch.OutOfMemoryError) as e:
        parent.send(e)


def named(e, unit):
    """A FloatingPointError that says of which unit it is, and keeps nothing of it in memory, as a traceback does."""
    return FloatingPointError(str(e) if str(e).startswith(str(unit)) else f"{unit}: {e}")


def in_turn(run, units, loaded, bar):
    """`Workers.do` without any, in this process."""
    failed = []
    for unit in units:
        if failed and not unit.ready:
            continue
        try:
            run(unit, *loaded, bar)
        except FloatingPointError as e:
            if WORLD > 1:  # the other processes may not know
                raise
            failed.append(named(e, unit))
    return failed


class Workers:
    """Processes that wait for units, and import meanwhile. They end when the context is left.

    They never hear Ctrl-C: it is the parent's, which ends them.
    """

    def __init__(self, run):
        self.run, self.started = run, {}  # {pipe: process}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in [worker for worker in self.started.values() if worker.is_alive()]:
            worker.terminate()
            worker.join()

    def start(self, jobs):
        """Start what is missing of `jobs`; one job is the parent's own, and needs none."""
        missing, context = jobs - len(self.started) if jobs > 1 else 0, multiprocessing.get_context("spawn")
        if missing:
            multiprocessing.resource_tracker.ensure_running()  # else the first worker starts it, and it unblocks SIGINT
        heard = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            for _ in range(missing):
                here, there = context.Pipe()
                self.started[here] = context.Process(target=work, args=(self.run, there), daemon=True)
                self.started[here].start()
                there.close()  # so that, when the worker ends, `here` does
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, heard)

    def do(self, units, loaded, bar):
        """run(unit, *loaded, bar) in them, each unit when what it is made of is finished. Raises a worker's error.

        But a FloatingPointError ends one training alone: the others go on, less what would be made of that one. Returns
        a list of them. loaded goes to them as bytes, so they read nothing again, and need no shared memory.
        """
        if not (units and self.started):
            return in_turn(self.run, units, loaded, bar)
        waiting, idle, failed = sorted(units, key=lambda unit: -len(unit.tasks)), [], []  # long first: all end together
        loaded = pickle.dumps(loaded)
        for worker in self.started:
            with contextlib.suppress(ConnectionError):  # it has ended, as is seen below
                worker.send_bytes(loaded)
        while waiting or len(idle) < len(self.started):
            for worker in multiprocessing.connection.wait(self.started):
                try:
                    said = worker.recv()
                except (EOFError, ConnectionResetError):
                    self.started[worker].join()
                    code = self.started[worker].exitcode
                    why = f"a worker of --jobs ended with exit code {code} (-9: killed, as when memory runs out)"
                    raise ChildProcessError(f"{why}; go on with --resume, and fewer --jobs if need be") from None
                if isinstance(said, FloatingPointError):
                    failed.append(said)
                elif isinstance(said, Exception):
                    raise said
                elif said is None:
                    idle.append(worker)
                else:
                    bar.update(said) if said > 0 else bar.skip(-said)
            for unit in [unit for unit in waiting if unit.ready][: len(idle)]:
                waiting.remove(unit)
                with contextlib.suppress(ConnectionError):
                    idle.pop().send(unit)
            if failed and len(idle) == len(self.started):
                break  # what is left would be made of what has failed
        return failed
