"""Kill a run with SIGKILL at random moments, resume it until it is done, and compare it with one never killed.

    python tests/kills.py --count 50 --kills 3 --mode one         one process
    python tests/kills.py --count 10 --kills 3 --mode torchrun    two that share each batch
    python tests/kills.py --count 10 --kills 3 --mode jobs        two that share the trainings; or their parent alone

The run is small, has methods of every kind, and saves after every step. A kill comes when a random share of what was
missing is written, and up to a step's time later. Exit status 1 if a run ends in other files than the whole one, or in
other bytes of one, times and the table with them aside.
"""

import argparse
import contextlib
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"  # as --jobs and torchrun have it

import datasets  # noqa: E402, F401  before the forks, so that none of them has to, as what follows
import torch._dynamo  # noqa: E402, F401

import train  # noqa: E402

METHODS = "single,joint,ortho,lori-d,lori-s,lora-merged,lori-s-merged"
FLAGS = f"--tasks sst2,stsb --methods {METHODS} --steps 4 --batch-size 4 --max-length 32 --dtype fp32 --save-every 0"
COMMANDS = {
    "one": [],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(ROOT / "train.py")],
    "jobs": [str(ROOT / "train.py"), "--jobs", "2"],
}
TIMES = ("timing.json", "results.md")  # these may differ
PHASES = {"state.safetensors": "training", "log.jsonl": "training", "result.json": "elsewhere"}


def start(mode, arguments, out):
    """Start a run. Returns its process id and its output, which ends when its last process does."""
    read, write = os.pipe()
    child = os.fork()
    os.setpgid(child, child)  # in both, whichever comes first: a group of its own, to be killed as one
    if child:
        os.close(write)
        return child, open(read, encoding="utf-8")
    try:
        os.dup2(write, 1)
        os.dup2(write, 2)
        os.close(write)
        command = [*COMMANDS[mode], *arguments, "--out", str(out)]
        if mode != "one":
            os.execv(sys.executable, [sys.executable, *command])
        status = train.main(command) or 0
        sys.stdout.flush()
    finally:
        os._exit(status)


def family(process):
    """A process and all that descend from it: torchrun puts its workers into groups of their own."""
    listed = subprocess.run(["ps", "-e", "-o", "ppid=,pid="], capture_output=True, text=True, check=True).stdout
    pairs = [tuple(map(int, line.split())) for line in listed.splitlines()]
    found = [process]
    for parent in found:  # which grows
        found += [child for above, child in pairs if above == parent]
    return found


def kill(mode, child, alone):
    if mode == "torchrun":
        for process in family(child):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    elif alone:
        os.kill(child, signal.SIGKILL)
    else:
        os.killpg(child, signal.SIGKILL)


def written(out):
    """How much of what stays a run's units have written: steps, adapters and results."""
    steps = sum(path.read_bytes().count(b"\n") for path in out.rglob("log.jsonl"))
    return steps + sum(1 for path in out.glob("*/seed*/**/*.json"))


def phase(out):
    """What a run was at when it was killed, by what it wrote last."""
    files = [path for path in out.rglob("*") if path.is_file()]
    if any(path.suffix == ".tmp" for path in files):
        return "saving"
    last = max(files, key=lambda path: path.stat().st_mtime_ns, default=out)
    return PHASES.get(last.name, "scoring" if "adapter" in last.name else "elsewhere")


def kept(out):
    """{file: bytes} of what must not differ: all but times, and the table that has them."""
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in TIMES
    }


def attempt(mode, arguments, out, goal=math.inf, delay=0.0, alone=False):
    """Start a run, and kill it `delay` seconds after it has `written` so much. Returns (status or None, output)."""
    child, output = start(mode, arguments, out)
    done = 0
    while not done:
        if written(out) >= goal:
            time.sleep(delay)
            kill(mode, child, alone)
            os.waitpid(child, 0)
            break
        time.sleep(0.001)
        done, status = os.waitpid(child, os.WNOHANG)
    signal.alarm(60)  # ends this script, should a process of the run outlive it
    with output:
        text = output.read()
    signal.alarm(0)
    return os.waitstatus_to_exitcode(status) if done else None, text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="runs [%(default)s]")
    parser.add_argument("--kills", type=int, default=3, help="of one run, at most [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [%(default)s]")
    parser.add_argument("--mode", choices=COMMANDS, default="one", help="what is killed, as above [%(default)s]")
    args = parser.parse_args(argv)
    moments, wrong = random.Random(args.seed), []
    killed = dict.fromkeys(("training", "saving", "scoring", "elsewhere"), 0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make = "import sys; from support import toy; toy.make_demo(sys.argv[1], steps=20, rows=64, quiet=True)"
        subprocess.run([sys.executable, "-c", make, str(folder / "demo")], cwd=ROOT, check=True)
        flags = ["--model", str(folder / "demo/model"), "--glue", str(folder / "demo/glue"), *FLAGS.split()]
        flags += ["--dropout", "0.1", "--resume"]
        status, text = attempt(args.mode, flags, folder / "whole")
        if status:
            sys.exit(text)
        whole, total = kept(folder / "whole"), written(folder / "whole")
        for number in range(args.count):
            out, status, kills, said = folder / f"run{number}", None, 0, ""
            while status is None:
                share, delay = moments.random(), moments.uniform(0, 0.03)
                alone = args.mode == "jobs" and moments.random() < 0.5
                goal = written(out) + share * (total - written(out)) if kills < args.kills else math.inf
                status, text = attempt(args.mode, flags, out, goal, delay, alone)
                said += text
                if status is None:
                    kills += 1
                    killed[phase(out)] += 1
            if status or kept(out) != whole:
                wrong.append(number)
                files = {name for name, _ in whole.items() ^ kept(out).items()}
                print(f"run {number}: {f'status {status}' if status else sorted(files)}\n{said}")
            shutil.rmtree(out)
            print(f"{number + 1}/{args.count} runs, {sum(killed.values())} kills, {len(wrong)} wrong", flush=True)
    print("killed while " + ", ".join(f"{name}: {count}" for name, count in killed.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
