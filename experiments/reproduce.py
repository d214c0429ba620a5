"""Every published number: runs train.py as a user would, and gathers what it says into experiments/results/NAME/.

    python experiments/reproduce.py main --model FOLDER_OR_ID --glue FOLDER_OR_ID      one experiment
    python experiments/reproduce.py main --model … --glue … --full                     at full size: wants a GPU
    python experiments/reproduce.py --list                                             what there is

Each row of an experiment first has its learning rate chosen, by half as many steps and on training rows held out;
then it is run with every seed and scored on the official validation split. Runs go to --out, one folder for each;
those that are finished are not run again, and one that was interrupted goes on, so the same command continues.
--jobs N runs N at a time, for as many CPU cores. `report.py` turns the gathered numbers into tables and figures.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"


@dataclass
class Experiment:
    """Rows of a table, each run with the same seeds, and so on the same batches."""

    about: str
    rows: dict  # {name: flags of train.py}
    flags: str  # of every row
    seeds: int
    rates: tuple = ()  # learning rates to choose a row's from; none: it is in the flags
    toy: dict = field(default_factory=dict)  # {row: conflict}: rows on a toy grammar, with this share of mixed words
    full: str = ""  # what --full adds, and so changes


FIVE = {m: f"--methods {m}" for m in ("head", "single", "joint", "pcgrad", "ortho")}
RATES = (1e-3, 2e-3, 4e-3)
SIZE, FULL = "--steps 400 --batch-size 8 --max-length 64 --dtype bf16", "--steps 1500 --batch-size 16 --max-length 128"
LEVELS = (0.0, 0.25, 0.5, 0.75, 1.0)
DEMO = "--tasks sst2,mrpc,mnli,stsb --steps 120 --max-length 64 --lr 4e-3"

EXPERIMENTS = {
    "main": Experiment(
        "Does projection recover what joint training loses? Four tasks, as the paper's kind of comparison has it.",
        FIVE, f"--tasks rte,mrpc,sst2,stsb {SIZE}", 5, RATES, full=FULL),
    "three": Experiment(
        "The same for sentiment, paraphrase and inference (whose training rows here may be a subset).",
        FIVE, f"--tasks sst2,mrpc,mnli {SIZE}", 3, RATES, full=FULL),
    "seven": Experiment(
        "The same for all seven tasks with an official validation split.",
        FIVE, f"--tasks rte,mrpc,cola,stsb,sst2,qnli,mnli {SIZE}", 3, RATES, full=FULL),
    "conflict": Experiment(
        "A known conflict: the toy grammar's tasks contradict each other on a share p of the traits.",
        {f"p = {p:g}": "--methods head,single,joint,pcgrad,ortho" for p in LEVELS}, DEMO, 10,
        toy={f"p = {p:g}": p for p in LEVELS}),
}  # fmt: skip


def chosen(text):
    """'--a 1 --b --a 2' -> {'--a': '2', '--b': True}: the last one counts, as on train.py's command line."""
    found, words = {}, shlex.split(text)
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else True
            found[word] = value
    return found


def run(folder, flags, jobs):
    """One call of train.py into `folder`, or what is left of it. Returns its results.json and timing.json."""
    if not (folder / "results.json").exists():
        command = [sys.executable, str(ROOT / "train.py"), *flags, "--out", str(folder)]
        command += ["--resume"] * bool(list(folder.glob("state.safetensors*")))
        threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        with open(folder / "output.txt", "a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **threads}).returncode
        if code:
            raise SystemExit(f"{shlex.join(command)}\nended with {code}; see {folder}/output.txt")
        print(f"{folder.name:32} {time.perf_counter() - begin:6.0f} s", flush=True)
    return json.loads((folder / "results.json").read_text()), json.loads((folder / "timing.json").read_text())


def reproduce(name, args):
    """Choose the rates, run the seeds, and write results/NAME/results.json."""
    experiment, out = EXPERIMENTS[name], Path(args.out) / (name + "-full" * args.full)
    common = chosen(experiment.flags + " " + experiment.full * args.full)
    print(f"{name}: {experiment.about}", flush=True)

    def flags(row, **more):
        given = common | chosen(experiment.rows[row])
        if row in experiment.toy:
            world = out / f"toy-{experiment.toy[row]:g}"
            given |= {"--model": str(world / "model"), "--glue": str(world / "glue")}
        else:
            given |= {"--model": args.model, "--glue": args.glue}
        given |= {"--" + k: f"{v}" for k, v in more.items()}
        return [word for flag, value in given.items() for word in ([flag] if value is True else [flag, value])]

    for level in sorted(set(experiment.toy.values())):
        world = [sys.executable, str(ROOT / "toy.py"), str(out / f"toy-{level:g}"), "--conflict", f"{level:g}"]
        subprocess.run(world, check=True, stdout=subprocess.DEVNULL)

    half = int(common["--steps"]) // 2
    with ThreadPoolExecutor(args.jobs) as pool:
        tried = {(row, rate): pool.submit(run, out / f"rate {row} {rate:g}",
                                          flags(row, lr=rate, steps=half, holdout=300, seeds=1000), args.jobs)
                 for rate in experiment.rates for row in experiment.rows}  # fmt: skip
        held = {row: {} for row in experiment.rows}
        for (row, rate), found in tried.items():
            (entries,) = found.result()[0]["methods"].values()
            held[row][rate] = entries["1000"]["average"]
        rate = {row: {"lr": f"{max(scores, key=scores.get):g}"} if scores else {} for row, scores in held.items()}
        done = {(row, seed): pool.submit(run, out / f"{row} seed {seed}", flags(row, seeds=seed, **rate[row]),
                                         args.jobs)
                for seed in range(experiment.seeds) for row in experiment.rows}  # fmt: skip
        done = {key: found.result() for key, found in done.items()}

    first, timing = done[next(iter(experiment.rows)), 0]
    results = {
        "experiment": name, "about": experiment.about,
        "command": f"python experiments/reproduce.py {name}" + " --model MODEL --glue GLUE" * (not experiment.toy)
        + " --full" * args.full,
        "commit": args.commit, "hardware": timing["hardware"], "versions": first["versions"],
        "minutes": round(sum(t["seconds"] for _, t in done.values()) / 60, 1),
        "settings": {k.lstrip("-"): v for k, v in common.items()}, "rows": experiment.rows,
        "seeds": list(range(experiment.seeds)), "tasks": first["tasks"], "held_out": held,
        "chosen": {row: float(r["lr"]) for row, r in rate.items() if r},
        "majority": {row: {t: m["score"] for t, m in done[row, 0][0]["majority"].items()} for row in experiment.rows},
        "runs": {},
    }  # fmt: skip
    for (row, seed), (found, _) in done.items():
        for method, entries in found["methods"].items():
            entry = entries[str(seed)]
            kept = {"scores": {t: round(m["score"], 4) for t, m in entry["tasks"].items()},
                    "average": round(entry["average"], 4), "adapter": entry["adapter_parameters"]}  # fmt: skip
            kept |= {"conflicts": entry["conflicts"]} if "conflicts" in entry else {}
            results["runs"].setdefault(row, {}).setdefault(method, {})[str(seed)] = kept
    path = Path(args.results) / (name + "-full" * args.full) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"wrote {path}; now python experiments/report.py")


def commit():
    """The commit that is run, marked where files differ from it."""
    git = ["git", "-C", str(ROOT)]
    said = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True).stdout
    return (said or "unknown") + " and changes" * bool(changed.strip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=list(EXPERIMENTS))
    parser.add_argument("--list", action="store_true", help="say what there is, and end")
    parser.add_argument("--model", help="checkpoint folder or Hub id")
    parser.add_argument("--glue", default="nyu-mll/glue", help="GLUE folder or Hub id [nyu-mll/glue]")
    parser.add_argument("--full", action="store_true", help="full size: 1,500 steps, length 128")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each if more than one [1]")
    parser.add_argument("--out", default="runs/reproduce", help="where the runs go [runs/reproduce]")
    parser.add_argument("--results", default=str(RESULTS), help="where results go [experiments/results]")
    args = parser.parse_args()
    if args.list or not args.experiment:
        for name, experiment in EXPERIMENTS.items():
            print(f"{name:10} {experiment.about}")
        return
    if not args.model and not EXPERIMENTS[args.experiment].toy:
        parser.error(f"{args.experiment} needs --model FOLDER_OR_ID")
    args.commit = commit()
    reproduce(args.experiment, args)


if __name__ == "__main__":
    main()
