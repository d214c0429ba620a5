"""Every published number: runs the commands as a user would, and gathers what they say into experiments/results/NAME/.

    python experiments/reproduce.py                                         what there is
    python experiments/reproduce.py main --model MODEL --glue GLUE          one experiment (folders, or ids on the Hub)
    python experiments/reproduce.py main --model … --glue … --full          at full size: wants a GPU

Each row of an experiment first has its learning rate chosen, on training rows held out, by half as many steps and one
seed (on the toy grammar by as many and two); then it is run with other seeds and scored on the validation split. Runs
go to --out, one folder for each; those that are finished are kept, and one that was interrupted goes on, so the same
command continues. --jobs N runs N at a time, for as many CPU cores. `report.py` turns the gathered numbers
into tables and figures.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import commit, installed, machine  # noqa: E402

import lora  # noqa: E402
import train  # noqa: E402
from glue import batches_of_steps  # noqa: E402
from ortholora import OrthoLoRA  # noqa: E402
from support import runs  # noqa: E402

RESULTS = ROOT / "experiments" / "results"


@dataclass
class Experiment:
    """Rows of a table, each run with the same seeds, and so on the same batches."""

    about: str
    rows: dict  # {name: flags of the script}
    flags: str  # of every row
    seeds: int
    rates: dict = field(default_factory=dict)  # {row, or "" for the others: learning rates to choose from}
    toy: dict = field(default_factory=dict)  # {row, or "" for all: conflict}: run on the toy grammar, not on GLUE
    full: str = ""  # what --full adds, and so changes
    script: str = "train.py"


FIVE = {m: f"--methods {m}" for m in ("head", "single", "joint", "pcgrad", "ortho")}
AT = {f"{m} at 0.002": f"--methods {m} --lr 2e-3" for m in ("joint", "ortho")}
RATES, HOLDOUT = {"": (1e-3, 2e-3, 4e-3)}, 300
SIZE, FULL = "--batch-size 8 --max-length 64 --dtype bf16", "--steps 1500 --batch-size 16 --max-length 128"
TOY = "--tasks sst2,mrpc,mnli,stsb --steps 400 --max-length 64"
TOY_RATES, SGD_RATES = (4e-3, 8e-3, 1.6e-2), (0.1, 0.3, 1.0)
LEVELS = {f"p = {p:g}: {m}": (p, m) for p in (0.0, 0.25, 0.5, 0.75, 1.0) for m in ("single", "joint", "ortho")}
SAME = {"p = 0.25: joint at 0.008": "--methods joint --lr 8e-3"}  # ortho's rate, where the choice gave joint another
LORI = {"LoRA": "--methods single{} --lr 2e-3", "LoRI": "--methods lori-d,lori-s{} --lr 1e-2 --sparse-lr 5e-2"}
ORDERS = ("sst2,mrpc,stsb,rte", "rte,stsb,mrpc,sst2")

EXPERIMENTS = {
    "main": Experiment(
        "Does projection recover what joint training loses? Four tasks of GLUE.",
        FIVE,
        f"--tasks rte,mrpc,sst2,stsb --steps 400 {SIZE}",
        5,
        RATES,
        full=FULL,
    ),
    "three": Experiment(
        "The same for sentiment, paraphrase and inference.",
        FIVE | AT,
        f"--tasks sst2,mrpc,mnli --steps 400 {SIZE}",
        3,
        RATES | dict.fromkeys(AT, ()),
        full=FULL,
    ),
    "conflict": Experiment(
        "A known conflict: the toy grammar's tasks contradict each other on a share p of the traits.",
        {row: f"--methods {m}" for row, (_, m) in LEVELS.items()} | SAME,
        TOY,
        6,
        {"": TOY_RATES[:2]} | dict.fromkeys(SAME, ()),
        toy={row: p for row, (p, _) in LEVELS.items()} | {"": 0.25},
    ),
    "matters": Experiment(
        "What matters in the method, on the toy grammar, where there is a gap to recover.",
        {
            name: "--methods " + flags
            for name, flags in {
                "single": "single",
                "joint": "joint",
                "ortho": "ortho",
                "ortho, by factor": "ortho --unit factor",
                "pcgrad": "pcgrad",
                "ortho, A alone": "ortho --factors A",
                "ortho, B alone": "ortho --factors B",
                "ortho, sequential": "ortho --sequential",
                "lori-ortho": "lori-ortho",
                "joint, balanced": "joint --balance",
                "ortho, balanced": "ortho --balance",
                "joint, SGD": "joint --optimizer sgd",
                "ortho, SGD": "ortho --optimizer sgd",
                "joint, batch 4": "joint --batch-size 4",
                "ortho, batch 4": "ortho --batch-size 4",
            }.items()
        },
        TOY,
        8,
        {"": TOY_RATES, "joint, SGD": SGD_RATES, "ortho, SGD": SGD_RATES},
        toy={"": 0.5},
    ),
    "balance": Experiment(
        "Beyond the paper: every task's gradient at one norm, with and without projection. The main table's tasks.",
        {
            "joint": "--methods joint",
            "joint, balanced": "--methods joint --balance",
            "ortho, balanced": "--methods ortho --balance",
        },
        f"--tasks rte,mrpc,sst2,stsb --steps 400 --lr 2e-3 {SIZE}",
        3,
        full=FULL,
    ),
    "lori": Experiment(
        "LoRI: a frozen A and a sparse B, alone and merged.",
        {
            "LoRA": LORI["LoRA"].format(",lora-merged --own-a"),
            "LoRI": LORI["LoRI"].format(",lori-d-merged,lori-s-merged"),
        },
        f"--tasks sst2,mrpc,stsb,rte --steps 200 {SIZE}",
        3,
        full=FULL,
    ),
    "continual": Experiment(
        "LoRI: the tasks one after the other on one adapter, in two orders.",
        {
            f"{method}: {order}": f"{flags.format('')} --tasks {order}"
            for order in ORDERS
            for method, flags in LORI.items()
        },
        f"--steps 100 {SIZE}",
        3,
        full=FULL,
        script="experiments/continual.py",
    ),
}


KEPT = ("average", "adapter_parameters", "conflicts", "cosines", "matrix", "forgetting", "overlap")


def chosen(text):
    """'--a 1 --b --a 2' -> {'--a': '2', '--b': True}: the last one counts, as on a command line."""
    found, words = {}, shlex.split(text)
    for i, word in enumerate(words):
        if word.startswith("--"):
            value = words[i + 1] if i + 1 < len(words) and not words[i + 1].startswith("--") else True
            found[word] = value
    return found


def run(folder, script, flags, jobs):
    """One run of a script into `folder`, or what is left of it. Returns its results.json, and what it took.

    That is {hardware, seconds of all trainings, commit with which it ended}.
    """
    ended = folder / "commit.txt"
    if not ended.exists():
        command = [sys.executable, str(ROOT / script), *flags, "--out", str(folder), "--resume"]
        threads = {"OMP_NUM_THREADS": "1"} if jobs > 1 else {}
        folder.mkdir(parents=True, exist_ok=True)
        begin = time.perf_counter()
        with open(folder / "output.txt", "a", encoding="utf-8") as log:
            code = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **threads}).returncode
        if code:
            raise SystemExit(f"{shlex.join(command)}\nended with {code}; see {folder}/output.txt")
        ended.write_text(commit())
        print(f"{folder.name:32} {time.perf_counter() - begin:6.0f} s", flush=True)
    times = [json.loads(path.read_text()) for path in folder.rglob("timing.json")]
    seconds = sum(unit["seconds_per_step"] * unit["steps"] for unit in times)
    took = {"hardware": times[0]["hardware"], "seconds": seconds, "commit": ended.read_text()}
    return json.loads((folder / "results.json").read_text()), took


def reproduce(name, args):
    """Choose the rates, run the seeds, and write results/NAME/results.json."""
    experiment, out = EXPERIMENTS[name], Path(args.out) / (name + "-full" * args.full)
    common = chosen(experiment.flags + " " + experiment.full * args.full)
    print(f"{name}: {experiment.about}", flush=True)

    def flags(row, **more):
        given = common | chosen(experiment.rows[row])
        if experiment.toy:
            world = out / f"toy-{experiment.toy.get(row, experiment.toy.get('')):g}"
            given |= {"--model": str(world / "model"), "--glue": str(world / "glue")}
        else:
            given |= {"--model": args.model, "--glue": args.glue}
        given |= {"--" + k: f"{v}" for k, v in more.items()}
        return [word for flag, value in given.items() for word in ([flag] if value is True else [flag, value])]

    for level in sorted(set(experiment.toy.values())):
        world = [sys.executable, "-m", "support.toy", str((out / f"toy-{level:g}").resolve())]
        world += ["--conflict", f"{level:g}"]
        subprocess.run(world, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)

    steps, seeds = int(common["--steps"]), range(experiment.seeds)
    trial, calls = {"steps": steps // 2, "seeds": "1000", "holdout": HOLDOUT}, [str(seed) for seed in seeds]
    if experiment.toy:  # quick runs: all seeds in one call, and two whole ones for a rate
        trial, calls = {"seeds": "1000,1001", "holdout": HOLDOUT}, [",".join(calls)]
    with ThreadPoolExecutor(args.jobs) as pool:

        def start(folder, words):
            return pool.submit(run, out / folder, experiment.script, words, args.jobs)

        rates = {row: experiment.rates.get(row, experiment.rates.get("", ())) for row in experiment.rows}
        tried = {
            (row, rate): start(f"rate {row} {rate:g}", flags(row, lr=rate, **trial))
            for row in experiment.rows
            for rate in rates[row]
        }
        held = {row: {} for row in experiment.rows}
        for (row, rate), found in tried.items():
            (entries,) = found.result()[0]["methods"].values()
            held[row][rate] = sum(entry["average"] for entry in entries.values()) / len(entries)
        rate = {row: {"lr": f"{max(scores, key=scores.get):g}"} if scores else {} for row, scores in held.items()}
        done = {
            (row, call): start(f"{row} seed {call}", flags(row, **rate[row], seeds=call))
            for call in calls
            for row in experiment.rows
        }
        done = {key: found.result() for key, found in done.items()}

    first = {row: done[row, calls[0]] for row in experiment.rows}
    (found, timing), *_ = first.values()
    commits = ", ".join(sorted({t["commit"] for _, t in done.values()}))
    results = facts(name, experiment.about, args, timing, sum(t["seconds"] for _, t in done.values())) | {
        "commit": commits,
        "settings": {k.lstrip("-"): v for k, v in common.items()},
        "rows": experiment.rows,
        "seeds": list(seeds),
        "tasks": found["tasks"],
        "held_out": held,
        "chosen": {row: found["settings"]["lr"] for row, (found, _) in first.items()},
        "majority": {row: {t: m["score"] for t, m in found["majority"].items()} for row, (found, _) in first.items()},
        "runs": {},
    }
    for (row, _), (found, _) in done.items():
        for method, entries in found["methods"].items():
            for seed, entry in entries.items():
                kept = {name: entry[name] for name in KEPT if name in entry}
                if "tasks" in entry:
                    kept["scores"] = {task: round(metrics["score"], 4) for task, metrics in entry["tasks"].items()}
                results["runs"].setdefault(row, {}).setdefault(method, {})[seed] = kept
    write(name, results, args)


def demo(args):
    """The demo as README's first command runs it."""
    found, timing = run(Path(args.out) / "demo", "train.py", ["--demo"], 1)
    about = facts("demo", "The demo: a toy grammar, 3 seeds.", args, timing, timing["seconds"])
    write("demo", about | {"table": (Path(args.out) / "demo" / "results.md").read_text(), "results": found}, args)


RANKS, HALF, BINS = (1, 2, 4, 8, 16), 8, 5


def noise(args):
    """Where conflict lives, beside what gradient noise alone makes: two batches of each task at every joint step.

    The two batches' gradients, of one task and of different ones, are held against each other: a pair of one task
    has no conflict to find, only noise. With cosines c between the two halves, c_ij / sqrt(c_ii c_jj) is what the
    cosine of tasks i and j would be without noise.
    """
    s = train.Settings(
        model=args.model,
        glue=args.glue,
        tasks="rte,mrpc,sst2,stsb",
        batch_size=HALF,
        lr=2e-3,
        steps=1500 if args.full else 150,
        max_length=128 if args.full else 64,
        dtype="bf16",
        per_task="loop",
    )
    begin, (encoder, frozen, tasks) = time.perf_counter(), train.load(s)
    kept = {k: v for k, v in dataclasses.asdict(s).items() if k not in ("model", "glue")}  # not where these lie
    results = {"settings": kept, "seeds": [0], "tasks": [d.name for d in tasks], "ranks": {}}
    for s.rank in RANKS:
        results["ranks"][s.rank] = measure(frozen, tasks, s)
    about = facts(
        "noise", noise.__doc__.splitlines()[0], args, {"hardware": runs.hardware(encoder)}, time.perf_counter() - begin
    )
    write("noise", about | results, args)


def measure(frozen, tasks, s, seed=0):
    """Train jointly; mean cosine and conflict rate between the halves, (bins of steps, blocks, T, T), summed up."""
    T, model = len(tasks), train.build("joint", frozen, tasks, seed, s)
    trained = [p for p in model.parameters() if p.requires_grad]
    ortho = OrthoLoRA(lora.blocks(model.encoder), 2 * T)
    nobody = torch.empty(2 * T, 0, dtype=torch.long)  # whom each gradient meets: they add up, and are watched
    optimizer = torch.optim.AdamW(trained, weight_decay=0.01)
    cosines = torch.zeros(BINS, len(ortho.blocks), T, T)
    rates = torch.zeros_like(cosines)
    pad, device = model.encoder.config.pad_token_id, ortho.rows.device
    streams = [batches_of_steps(tasks, seed + half, s, pad, device) for half in (0, 1)]
    for step in tqdm(range(s.steps), desc=f"rank {s.rank}", mininterval=10):
        optimizer.zero_grad()
        for half, stream in enumerate(streams):
            for t, batch in enumerate(next(stream)):
                (train.task_losses(model, batch)[0] / 2).backward()
                ortho.collect(half * T + t)
        across = ortho.project(nobody).cosines[:, :T, T:].cpu()  # (blocks, T, T): task i's first batch, task j's second
        cosines[step * BINS // s.steps] += across
        rates[step * BINS // s.steps] += (across < 0).float()
        torch.nn.utils.clip_grad_norm_(trained, s.clip)
        optimizer.param_groups[0]["lr"] = s.lr * train.lr_at(step, s)
        optimizer.step()
    each = s.steps / BINS
    names = train.projected_blocks("ortho", model, s)[1]
    return {
        "blocks": names,
        "steps per bin": each,
        "cosines": (cosines.mean(0) / each).tolist(),
        "rates": (rates.mean(0) / each).tolist(),  # (blocks, T, T)
        "rates by time": (rates.mean(1) / each).tolist(),
        "cosines by time": (cosines.mean(1) / each).tolist(),
    }


KILLS = [
    "tests/kills.py --count 50 --kills 3",
    "tests/kills.py --mode torchrun --count 10",
    "tests/kills.py --mode jobs --count 10",
]
TRUST = [*KILLS, "tests/fuzz.py --count 100000"]


def trust(args):
    """What a run survives: 70 runs killed and resumed, 100,000 damaged files read."""

    def tried(command):
        done = subprocess.run(
            [sys.executable, *command.split()],
            cwd=ROOT,
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        return {"command": "python " + command, "status": done.returncode, "output": done.stdout}

    begin = time.perf_counter()
    with ThreadPoolExecutor(args.jobs) as pool:
        found = list(pool.map(tried, TRUST))
    about = facts("trust", trust.__doc__, args, {"hardware": "CPU, 1 thread"}, time.perf_counter() - begin)
    write("trust", about | {"seeds": [0], "tried": found}, args)


def facts(name, about, args, timing, seconds):
    """What every result says of where it comes from."""
    needs = "" if name in ("demo", "trust", "conflict", "matters") else " --model MODEL --glue GLUE"
    return {
        "experiment": name,
        "about": about,
        "command": f"python experiments/reproduce.py {name}{needs}" + " --full" * args.full,
        **machine(torch.device("cpu")),
        "hardware": timing["hardware"],
        "jobs": args.jobs,
        "minutes": round(seconds / 60, 1),
    }


def write(name, results, args):
    path = Path(args.results) / (name + "-full" * args.full) / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(rounded(results), indent=1)
    path.write_text(re.sub(r"\[[^][{}]*\]", lambda m: " ".join(m[0].split()), text) + "\n")  # a list of numbers: a line
    print(f"wrote {path}; now: python experiments/report.py")


def rounded(x):
    """The same with every number to five decimals."""
    if isinstance(x, dict):
        return {k: rounded(v) for k, v in x.items()}
    return [rounded(v) for v in x] if isinstance(x, list) else round(x, 5) if isinstance(x, float) else x


SPECIAL = {"noise": noise, "demo": demo, "trust": trust}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", nargs="?", choices=[*EXPERIMENTS, *SPECIAL])
    parser.add_argument("--model", help="checkpoint folder or Hub id")
    parser.add_argument("--glue", default="nyu-mll/glue", help="GLUE folder or Hub id [nyu-mll/glue]")
    parser.add_argument("--full", action="store_true", help="full size: 1,500 steps, length 128")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one thread each if more than one [1]")
    parser.add_argument("--out", default="runs/reproduce", help="where the runs go [runs/reproduce]")
    parser.add_argument("--results", default=str(RESULTS), help="where results go [experiments/results]")
    args = parser.parse_args()
    if not args.experiment:
        about = {name: experiment.about for name, experiment in EXPERIMENTS.items()}
        for name, text in (about | {name: f.__doc__.splitlines()[0] for name, f in SPECIAL.items()}).items():
            print(f"{name:10} {text}")
    elif args.experiment == "trust" and not installed("safetensors"):
        parser.error("trust needs safetensors, not installed; run pip install -r requirements-dev.txt")
    elif args.experiment in ("demo", "trust"):
        SPECIAL[args.experiment](args)
    elif not args.model and not (args.experiment in EXPERIMENTS and EXPERIMENTS[args.experiment].toy):
        parser.error(f"{args.experiment} needs --model FOLDER_OR_ID")
    elif args.experiment == "noise":
        noise(args)
    else:
        reproduce(args.experiment, args)


if __name__ == "__main__":
    main()
