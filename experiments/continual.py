"""Continual learning: the tasks one after the other on one adapter, a head each. What is left of the earlier ones?

    python experiments/continual.py --model M --glue G --tasks sst2,mrpc,rte --seeds 0,1,2 --out OUT
    … --disjoint        lori-s: every mask out of entries that no earlier task's mask has
    … --resume          keep what is finished, run what is missing

--methods: single, plain LoRA; lori-d, all of B on one frozen A; lori-s, for each task the tenth of B that a run of the
task's own, from B = 0, made largest, while all other entries stay as earlier tasks left them. --steps are those of one
task; the other flags are train.py's, and so is the out folder: OUT/METHOD/seedN has every task's adapter as it is at
the end (the same but for its head, and for lori-s's mask), and result.json, which OUT/results.json gathers:

    matrix      row k: the scores of tasks 0 to k after task k was trained
    average     of the last row
    forgetting  a task's score after its own training less that at the end, averaged over all tasks but the last:
                minus GEM's backward transfer (arXiv 1706.08840). Chaudhry et al., arXiv 1801.10112, take a task's best
                score before the last training, which is at least as high.
    overlap     lori-s: the share of a mask's entries that another task's mask has too, averaged over the pairs
"""

import argparse
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lori  # noqa: E402
import train  # noqa: E402
from evaluate import scores_in_training  # noqa: E402
from support import runs, table  # noqa: E402
from support.checkpoint import BadInput, read_json, save_adapter, write_safetensors, write_text  # noqa: E402
from support.toy import demo, demo_settings  # noqa: E402

METHODS = ("single", "lori-d", "lori-s")


@dataclass
class Settings(train.Settings):
    methods: str = train.setting(",".join(METHODS), f"out of {', '.join(METHODS)}")
    disjoint: bool = train.setting(False, "lori-s: masks share no entry")


def parse(argv):
    """The flags that were given, as {name: value}. Raises BadInput for one that has moved."""
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS, add_help=False, allow_abbrev=False)
    parser.add_argument("--disjoint", action="store_true")
    own, rest = parser.parse_known_args(argv)
    return train.parse(rest, "continual.py", __doc__) | vars(own)


def check(s):
    """What can be judged before anything is loaded. Raises BadInput."""
    methods = train.listed(s.methods, "methods", known=METHODS)
    if s.balance:
        raise BadInput("--balance is between the tasks of one step, and here each is trained alone: leave it out")
    train.check(replace(s, methods="single"))  # here lori-s needs no lori-d beside it
    if "," not in s.tasks:
        raise BadInput(f"--tasks {s.tasks}: with one task there is nothing to forget; name at least two")
    if s.disjoint and "lori-s" not in methods:
        raise BadInput(f"--disjoint is about lori-s's masks: leave it out, or add lori-s to --methods {s.methods}")
    if s.jobs > 1 or runs.WORLD > 1:
        raise BadInput("leave out --jobs and torchrun: this is one process; several can share an --out")


def check_masks_fit(frozen, tasks, s):
    """Raises BadInput where --disjoint's masks, each of round((1 - sparsity) N) entries, are more than B's N."""
    model = train.build("lori-s", frozen, tasks, 0, s)  # unfit targets show here
    N = lori.trained_scalars(model.encoder)
    k = round((1 - s.sparsity) * N)
    if s.disjoint and k * len(tasks) > N:
        raise BadInput(f"--disjoint: {len(tasks)} masks of {k} entries do not fit into the {N} of B; raise --sparsity")


# ---------------------------------------------------------------------------------------------------------------------
# A unit: a method with a seed


def forgetting(matrix):
    """Rows of scores, row k of k + 1 -> how far a task's score has fallen since its own row, on average."""
    return float(np.mean([matrix[t][t] - matrix[-1][t] for t in range(len(matrix) - 1)]))


def train_one(folder, method, seed, model, data, encoder, s, bar):
    """Train the model on one task; its log and its state are in a folder of the task's. Returns seconds per step."""
    unit = runs.Unit(folder, method, seed, (data.name,), own=True)
    bar.set_description(str(unit))
    unit.folder.mkdir(parents=True, exist_ok=True)
    with open(unit.folder / "log.jsonl", "a", encoding="utf-8") as log:
        return train.train(unit, model, [data], encoder, s, log, bar)[1]


def own_masks(unit, frozen, tasks, data, used, encoder, s, bar):
    """(lori-s's masks for a task, seconds per step): out of the B of a run of the task's own, from 0 on the same A."""
    probe = train.build("lori-d", frozen, tasks, unit.seed, s)
    seconds = train_one(unit.folder / "masks", "lori-d", unit.seed, probe, data, encoder, s, bar)
    try:
        return lori.magnitude_masks(probe.encoder, s.sparsity, used if s.disjoint else None), seconds
    except ValueError as e:
        raise BadInput(f"lori-s: {e}") from None


def run(unit, encoder, frozen, tasks, s, bar):
    """Train a unit's tasks in turn, scoring all seen so far after each, and save. What was saved of a task goes on."""
    model = train.build(unit.method, frozen, tasks, unit.seed, s)
    matrix, used, overlaps, times = [], [], [], []
    for k, data in enumerate(tasks):
        if unit.method == "lori-s":
            masks, seconds = own_masks(unit, frozen, tasks, data, used, encoder, s, bar)
            times.append(seconds)
            masked = lori.MaskedB(model.encoder, masks)
        times.append(train_one(unit.out, unit.method, unit.seed, model, data, encoder, s, bar))
        if unit.method == "lori-s":
            masked.remove()
            overlaps += [lori.overlap(masks, other) for other in used]
            used.append(masks)
        matrix.append(list(scores_in_training(model, encoder, tasks[: k + 1]).values()))
    about = runs.origin(unit, encoder, s)
    for k, data in enumerate(tasks):
        folder = save_adapter(model, unit.adapter(data.name), data.name, s.model, about)
        if used:
            write_safetensors(folder / "masks.safetensors", used[k])
        (folder / "state.safetensors").unlink(missing_ok=True)
    shutil.rmtree(unit.folder / "masks", ignore_errors=True)
    result = {"matrix": matrix, "average": float(np.mean(matrix[-1])), "forgetting": forgetting(matrix)}
    result |= {"overlap": float(np.mean(overlaps))} if overlaps else {}
    timing = {"seconds_per_step": float(np.mean(times)), "steps": s.steps * len(times)}
    unit.finish(result, timing | {"hardware": runs.hardware(encoder), "source": runs.source_checksum()})


# ---------------------------------------------------------------------------------------------------------------------
# The job


def report(out):
    """Write OUT/results.json out of what is finished, and return its table."""
    with runs.locked(out, wait=True):  # another process, with seeds of its own, may write it, too
        about, methods = read_json(out / "settings.json"), {}
        for method in METHODS:
            for seed, folder in table.seed_folders(out, method).items():
                if (folder / "result.json").exists():
                    methods.setdefault(method, {})[str(seed)] = read_json(folder / "result.json")
        kept = {name: about[name] for name in ("settings", "tasks", "majority")}
        write_text(out / "results.json", json.dumps(kept | {"methods": methods}, indent=1) + "\n")
    rows = [["method", "average", "forgetting"]]
    for method, found in methods.items():
        columns = ([entry[name] for entry in found.values()] for name in ("average", "forgetting"))
        rows.append([method, *map(table.mean_and_spread, columns)])
    return table.markdown(rows)


def compare(s, again):
    """Run every unit that is not finished, and print the table."""
    runs.refuse_taken(Path(s.out), s.resume, again)
    train.resolve(s)
    s.per_task = "loop"
    if s.demo:
        toy = demo(s)
        s.model, s.glue = str(toy / "model"), str(toy / "glue")
    encoder, frozen, tasks = train.load(s)
    check_masks_fit(frozen, tasks, s)
    train.open_out(s, encoder, tasks, again)
    methods, names = train.listed(s.methods, "methods"), tuple(data.name for data in tasks)
    units = [runs.Unit(Path(s.out), m, seed, names) for seed in train.listed(s.seeds, "seeds", int) for m in methods]
    todo = [unit for unit in units if not unit.finished]
    print(f"{len(todo)} of {len(units)} runs to do, {s.steps} steps for each of {', '.join(names)}; out: {s.out}")
    total = sum(s.steps * len(tasks) * (2 if unit.method == "lori-s" else 1) for unit in todo)
    with runs.Bar(total, not todo) as bar:
        for unit in todo:
            with runs.locked(unit.folder):
                if not unit.finished:  # by another process, meanwhile
                    run(unit, encoder, frozen, tasks, s, bar)
    print(f"\n{report(Path(s.out))}\n\n{s.out} has results.json, and adapters in METHOD/seedN/TASK")


def main(argv=None):
    argv, s, again = sys.argv[1:] if argv is None else argv, None, ""
    try:
        given = parse(argv)
        ours = {"methods": ",".join(METHODS), "task_weights": "", "jobs": 1}
        s = Settings(**demo_settings(ours | given, 1) if "demo" in given else given)
        check(s)
        s.out = s.out or runs.new_out("continual")
        again = runs.again(argv, s.out, s.demo, "experiments/continual.py")
        return compare(s, again)
    except (BadInput, OSError) as e:  # the user's; or a full disk, a folder taken away
        error, status = str(e), 2
    except FloatingPointError as e:
        error, status = f"{e}; a smaller --lr may help", 1
    except KeyboardInterrupt:
        error, status = f"interrupted; to go on: {again}", 130
    print(f"continual.py: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
