"""The experiments' numbers: runs the units of plan.py as a user would, and gathers them in experiments/results/NAME/.

    python experiments/reproduce.py                                         what there is, and how much of it is there
    python experiments/reproduce.py scales --model MODEL --glue GLUE        one experiment (folders, or ids on the Hub)
    python experiments/reproduce.py toy --jobs 2 --minutes 90               two at a time; none begins after 90 minutes

A unit is one row with one seed, on one thread. What it says goes to results/NAME/units/, and what stands there is not
run again; a unit that was interrupted goes on, but for premise's, the late sham's and tries.py's, which start over. So
the same command continues, whenever it is given; on another machine or commit, what was begun starts over, too.
`report.py` turns the units into tables and figures.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import installed, machine  # noqa: E402
from bf16 import slow_in_bf16  # noqa: E402
from plan import EXPERIMENTS  # noqa: E402
from support.checkpoint import write_text  # noqa: E402
from support.toy import demo_settings  # noqa: E402

RESULTS = ROOT / "experiments" / "results"
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # a CPU, whatever else is there

# ---------------------------------------------------------------------------------------------------------------------
# Units


@dataclass(frozen=True)
class Unit:
    experiment: str
    name: str  # of the cell
    cell: object
    row: str
    seed: int

    def __str__(self):
        return re.sub(r"[^\w.=]+", "-", f"{self.name} {self.row} seed{self.seed}")

    def path(self, results):
        return Path(results) / self.experiment / "units" / f"{self}.json"


def units(experiment):
    """Seed by seed, so that what is there when the time is over can be compared."""
    cells = EXPERIMENTS[experiment][1]
    return [
        Unit(experiment, name, cell, row, cell.seeds[n])
        for n in range(max(len(cell.seeds) for cell in cells.values()))
        for name, cell in cells.items()
        if n < len(cell.seeds)
        for row in cell.rows
    ]


def words(unit, model, glue):
    """The unit's command line: the last of two equal flags counts."""
    found, text = {}, shlex.split(f"{unit.cell.flags} {unit.cell.rows[unit.row]}")
    for i, word in enumerate(text):
        if word.startswith("--"):
            value = text[i + 1] if i + 1 < len(text) and not text[i + 1].startswith("--") else True
            found[word] = value
    found |= {"--model": model, "--glue": glue, "--seeds": str(unit.seed)}
    return [
        unit.cell.script,
        *(w for flag, value in found.items() for w in ([flag] if value is True else [flag, value])),
    ]


making = threading.Lock()


def data_of(unit, args):
    """(model, GLUE): as given, or made for the unit's cell, and seed, where they are not there yet."""
    kind, *made = unit.cell.data.split()
    if kind == "glue":
        return args.model, args.glue
    share, holdout = (*made, "0")[:2]
    folder = Path(args.out).resolve() / "-".join([kind, *made, *[str(unit.seed)] * (kind == "toy")])
    with making:  # one at a time, so none twice
        maker = ROOT / ("support/toy.py" if kind == "toy" else "experiments/flipped.py")
        out_of = f"{zlib.crc32(maker.read_bytes())} {'' if kind == 'toy' else args.glue}"
        if not (folder / "made").exists() or (folder / "made").read_text() != out_of:  # else, or half made, anew
            shutil.rmtree(folder, ignore_errors=True)
            toy = ["-m", "support.toy", str(folder), "--seed", str(unit.seed), "--conflict", share]
            flipped = ["experiments/flipped.py", str(folder), "--glue", str(args.glue), "--share", share]
            flipped += ["--holdout", holdout]
            command = [sys.executable, *(toy if kind == "toy" else flipped)]
            if code := subprocess.run(command, stdout=subprocess.DEVNULL, cwd=ROOT, env=ONE_THREAD).returncode:
                raise SystemExit(f"reproduce.py: {shlex.join(command)} ended with {code}")
            (folder / "made").write_text(out_of)
    return (str(folder / "model"), str(folder / "glue")) if kind == "toy" else (args.model, str(folder))


def run(unit, args):
    """Run a unit, and write its file. Raises SystemExit where it fails."""
    folder, begin = Path(args.out) / unit.experiment / str(unit), time.perf_counter()
    script, *flags = words(unit, *data_of(unit, args))
    about, run_it = machine(torch.device("cpu")), []
    if "bf16" in flags and slow_in_bf16():
        run_it = [str(ROOT / "experiments" / "bf16.py")]
        about["processor"] += ", products of bf16 in float32"
    empty_if_begun_elsewhere(folder, about)
    again = ["--resume"] * (script != "experiments/premise.py")
    if not again:
        (folder / "results.json").unlink(missing_ok=True)
    command = [sys.executable, *run_it, str(ROOT / script), *flags, "--out", str(folder), *again]
    with open(folder / "output.txt", "a", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=ONE_THREAD).returncode
    if code:
        raise SystemExit(f"reproduce.py: {unit} ended with {code}; see {folder}/output.txt: {shlex.join(command)}")
    write(unit.path(args.results), gathered(unit, folder, about))
    return time.perf_counter() - begin


def empty_if_begun_elsewhere(folder, about):
    """What was begun on another machine or at another commit starts over. about: `machine`'s."""
    begun, where = folder / "begun.json", json.dumps(about | {"date": ""}, indent=1)
    if not begun.exists() or begun.read_text() != where:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        begun.write_text(where)


def gathered(unit, folder, about):
    """A unit's file, out of its run's folder: where it comes from, scores, losses, what the projection saw.

    about: `machine`'s, of before the run, since the commit may be another one after it.
    """
    found = json.loads((folder / "results.json").read_text())
    times = [json.loads(path.read_text()) for path in folder.rglob("timing.json")]
    facts = json.loads((folder / "settings.json").read_text())["facts"] if (folder / "settings.json").exists() else {}
    losses = json.loads((folder / "losses.json").read_text()) if (folder / "losses.json").exists() else {}
    results = {}
    for method, entries in found["methods"].items():
        entry = results[method] = dict(entries[str(unit.seed)])
        if "conflicts" in entry:  # without the table by block
            entry["conflicts"] = {name: x for name, x in entry["conflicts"].items() if name != "blocks"}
        for task, loss in losses.get(method, {}).get(str(unit.seed), {}).items():
            entry["tasks"][task] = entry["tasks"][task] | loss
    return {
        "experiment": unit.experiment,
        "cell": unit.name,
        "row": unit.row,
        "seed": unit.seed,
        "command": shlex.join(["python", *words(unit, "MODEL", "GLUE")]),
        "data": unit.cell.data,
        "tasks": found["tasks"],
        "checksums": {name: facts[name] for name in facts if name.startswith(("the weights of", "the data of"))},
        **about,
        "hardware": times[0]["hardware"],
        "source": ", ".join(sorted({unit["source"] for unit in times})),
        "seconds": round(sum(unit["seconds_per_step"] * unit["steps"] for unit in times), 1),
        "majority": {task: scores["score"] for task, scores in found.get("majority", {}).items()},
        "results": results,
    }


def reproduce(name, args):
    """Run what is missing of an experiment, until the time is over."""
    todo = [u for u in units(name) if re.search(args.only, f"{u.name}: {u.row}") and not u.path(args.results).exists()]
    end = time.monotonic() + 60 * args.minutes
    print(f"{name}: {EXPERIMENTS[name][0]} {len(todo)} units to run")

    def one(unit):
        if time.monotonic() < end:
            print(f"{unit}: {run(unit, args):.0f} s", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for done in tqdm([pool.submit(one, unit) for unit in todo], unit="unit", mininterval=10, disable=not todo):
            try:
                done.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise


# ---------------------------------------------------------------------------------------------------------------------
# The demo, and what a run survives


def demo(args):
    """The demo as README's first command runs it, and its picture, for which it is scored on the way."""
    folder, begin = Path(args.out).resolve() / "demo", time.perf_counter()
    empty_if_begun_elsewhere(folder, machine(torch.device("cpu")))
    run_demo = [sys.executable, "train.py", "--demo", "--eval-every", "25", "--out", str(folder), "--resume"]
    subprocess.run(run_demo, check=True, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
    about = facts("demo", demo.__doc__, demo_settings({}, 1)["jobs"], time.perf_counter() - begin)
    found, table = json.loads((folder / "results.json").read_text()), (folder / "results.md").read_text()
    write(
        Path(args.results) / "demo" / "results.json",
        about | {"seeds": found["seeds"], "table": table, "results": found},
    )
    picture = Path(args.results).resolve() / "demo.svg"
    subprocess.run([sys.executable, "experiments/plot.py", str(folder), "--file", str(picture)], check=True, cwd=ROOT)


TRUST = [
    "tests/kills.py --count 50 --kills 3",
    "tests/kills.py --mode torchrun --count 10",
    "tests/kills.py --mode jobs --count 10",
    "tests/fuzz.py --count 100000",
]


def trust(args):
    """What a run survives: 70 runs killed and resumed, 100,000 damaged files read."""

    def tried(command):
        command = [sys.executable, *command.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ONE_THREAD)
        return {"command": shlex.join(["python", *command[1:]]), "status": done.returncode, "output": done.stdout}

    begin = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(tried, TRUST))
    about = facts("trust", trust.__doc__, args.jobs, time.perf_counter() - begin) | {"seeds": [0]}
    write(Path(args.results) / "trust" / "results.json", about | {"tried": found})


def facts(name, about, jobs, seconds):
    """Where the demo's and the kill test's results come from."""
    command = f"python experiments/reproduce.py {name}"
    found = {"experiment": name, "about": about, "command": command, **machine(torch.device("cpu"))}
    return found | {"hardware": "CPU, 1 thread", "jobs": jobs, "minutes": round(seconds / 60, 1)}


def write(path, results):
    """Whole, or not at all; numbers to five decimals, a list of numbers is a line."""
    results = json.loads(json.dumps(results), parse_float=lambda x: round(float(x), 5))
    text = re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), json.dumps(results, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")


SPECIAL = {"demo": demo, "trust": trust}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=[*EXPERIMENTS, *SPECIAL])
    parser.add_argument("--only", default="", metavar="REGEX", help="only units in whose 'CELL: ROW' it is found")
    parser.add_argument("--model", help="checkpoint folder or Hub id")
    parser.add_argument("--glue", default="nyu-mll/glue", help="GLUE folder or Hub id [nyu-mll/glue]")
    parser.add_argument("--jobs", type=int, default=1, help="units at a time, of one thread each [1]")
    parser.add_argument("--minutes", type=float, default=1e6, help="begin no unit after so many [no limit]")
    parser.add_argument("--out", default="runs/reproduce", help="where the runs go [runs/reproduce]")
    parser.add_argument("--results", default=str(RESULTS), help="where results go [experiments/results]")
    args = parser.parse_args()
    try:
        re.compile(args.only)
    except re.error as e:
        parser.error(f"--only {args.only!r} is no regular expression: {e}")
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: at least one")
    if not args.experiment:
        for name, (about, _) in EXPERIMENTS.items():
            there = [unit.path(args.results).exists() for unit in units(name)]
            print(f"{name:14} {about} {sum(there)} of {len(there)} units")
        for name, do in SPECIAL.items():
            print(f"{name:14} {do.__doc__}")
        return
    if Path(args.glue).exists():
        args.glue = str(Path(args.glue).resolve())  # data are made from another folder than this
    package = {"trust": "safetensors", "demo": "matplotlib"}.get(args.experiment)
    if package and not installed(package):
        parser.error(f"{args.experiment} needs {package}, not installed; run pip install -r requirements-dev.txt")
    if args.experiment in SPECIAL:
        return SPECIAL[args.experiment](args)
    needy = [unit for unit in units(args.experiment) if not unit.cell.data.startswith("toy")]
    if needy and not args.model:
        parser.error(f"{args.experiment} needs --model FOLDER_OR_ID")
    reproduce(args.experiment, args)


if __name__ == "__main__":
    main()
