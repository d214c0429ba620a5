"""Kill a run with SIGKILL at random moments, resume it until it is done, and compare it with one never killed.

    python tests/kills.py --count 50 --seed 0

The run is a demo in small, of every kind of method, that saves after every step; kills fall into training, saving and
scoring as they come. Exit status 1 if one result differs by a byte: results.json, an adapter, or a file left over.
"""

import argparse
import contextlib
import mmap
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

import train  # noqa: E402  before the forks, so that none of them has to
from support import checkpoint  # noqa: E402

FLAGS = [
    "--tasks",
    "sst2,stsb",
    "--methods",
    "single,joint,ortho,lori-d,lori-s,lora-merged,lori-s-merged",
    "--steps",
    "4",
    "--batch-size",
    "4",
    "--max-length",
    "32",
    "--dtype",
    "fp32",
    "--dropout",
    "0.1",
    "--save-every",
    "0",
]
PHASES = ["elsewhere", "training", "saving", "scoring"]
phase = mmap.mmap(-1, 1)  # shared with the forks: what the run is at


def note_phase(module, name, number):
    """Let phase[0] be `number` while the function is running."""
    function = getattr(module, name)

    def noting(*args, **kwargs):
        before, phase[0] = phase[0], number
        try:
            return function(*args, **kwargs)
        finally:
            phase[0] = before

    setattr(module, name, noting)


def start(arguments, out):
    """The process id of a run; its output goes to OUT.txt."""
    phase[0] = 0
    child = os.fork()
    if child:
        return child
    note_phase(train, "gradients", 1)
    note_phase(checkpoint, "save_state", 2)
    note_phase(train, "predict", 3)
    with open(f"{out}.txt", "a", buffering=1) as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        status = train.main([*arguments, "--out", str(out)]) or 0
    os._exit(status)


def kept(out):
    """{file: bytes} of what must not differ: all but times."""
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in files
        if path.name not in ("timing.json", "results.md")
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=50, help="runs [%(default)s]")
    parser.add_argument("--kills", type=int, default=4, help="of one run, at most [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the moments [%(default)s]")
    args = parser.parse_args(argv)
    moments, kills, wrong = random.Random(args.seed), dict.fromkeys(PHASES, 0), []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        make = "import sys; from support import toy; toy.make_demo(sys.argv[1], steps=20, rows=64, quiet=True)"
        subprocess.run([sys.executable, "-c", make, str(folder / "demo")], cwd=ROOT, check=True)
        flags = ["--model", str(folder / "demo/model"), "--glue", str(folder / "demo/glue"), *FLAGS]
        child, begin, done = start(flags, folder / "whole"), None, 0
        while not done:
            done, status = os.waitpid(child, os.WNOHANG)
            begin = time.monotonic() if begin is None and phase[0] else begin
            time.sleep(0.001)
        if status:
            sys.exit((folder / "whole.txt").read_text())
        whole, seconds = kept(folder / "whole"), time.monotonic() - begin  # from its first step to its end
        for number in range(args.count):
            out, status, attempts = folder / f"run{number}", None, 0
            while status != 0:
                resumed = ["--resume"] if list(out.glob(train.STATE + "*")) else []
                child = start([*flags, *resumed], out)
                end, done = None, 0
                while not done and (attempts >= args.kills or end is None or time.monotonic() < end):
                    done, status = os.waitpid(child, os.WNOHANG)
                    end = time.monotonic() + moments.uniform(0, seconds) if end is None and phase[0] else end
                    time.sleep(0.001)
                if not done:
                    os.kill(child, signal.SIGKILL)
                    status = os.waitpid(child, 0)[1]
                    attempts += 1
                    kills[PHASES[phase[0]]] += 1
                elif status:
                    break
            if status or kept(out) != whole:
                wrong.append(number)
                print(f"run {number}: {'failed' if status else 'differs'}\n{Path(f'{out}.txt').read_text()}")
            else:
                shutil.rmtree(out)
            print(f"{number + 1}/{args.count} runs, {sum(kills.values())} kills, {len(wrong)} wrong", flush=True)
    print("killed while " + ", ".join(f"{name}: {count}" for name, count in kills.items()))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
