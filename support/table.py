"""An out folder's units -> results.json, and results.md: the table, where gradients conflict, what merging cost.

    python -m support.table OUT        at any time, of a run that is still going as well

An entry of results.json is one method with one seed; it is there as soon as all of its trainings are finished.
"""

import json
import math
import sys
from pathlib import Path

import numpy as np

from support.checkpoint import BadInput, read_json, write_text
from support.runs import FIFTHS, end, locked

# ---------------------------------------------------------------------------------------------------------------------
# One training's conflicts


def share_of_pairs(x):
    """(blocks, T, T) -> (blocks,): the mean over the pairs i < j, where a pair without a gradient counts as 0."""
    T = x.shape[1]
    return x.triu(1).sum((1, 2)) / max(1, T * (T - 1) // 2)


def statistics(watch, block_names):
    """A `Watch`'s sums -> means over the steps: by block [conflict rate, cosine, removed norm], by task pair the rate.

    fifths: over each fifth of the training the rate, each task's effective weight, and its gradient's norm; of fewer
    than 5 steps, each is one.
    """
    rate, cosine, removed = [x.cpu().double() / watch.steps for x in watch.sums]  # in this order: mps has no float64
    columns = [share_of_pairs(rate), share_of_pairs(cosine), removed.mean(1)]
    pairs = {
        f"{a}-{b}": round(rate[:, i, j].mean().item(), 6)
        for i, a in enumerate(watch.tasks)
        for j, b in enumerate(watch.tasks)
        if i < j
    }
    counts = np.bincount(np.arange(watch.steps) * FIFTHS // watch.steps, minlength=FIFTHS)
    there = counts > 0
    fifths = (watch.fifths.cpu().double().numpy()[there] / counts[there, None]).round(6)  # (5, 1 + 2 T)
    effective, norms = fifths[:, 1:].T.reshape(2, len(watch.tasks), len(fifths)).tolist()
    return {
        "rate": round(columns[0].mean().item(), 6),
        "cosine": round(columns[1].mean().item(), 6),
        "removed": round(columns[2].mean().item(), 6),
        "pairs": pairs,
        "blocks": {name: [round(c[b].item(), 6) for c in columns] for b, name in enumerate(block_names)},
        "fifths": {
            "rate": fifths[:, 0].tolist(),
            "effective": dict(zip(watch.tasks, effective, strict=True)),
            "norms": dict(zip(watch.tasks, norms, strict=True)),
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# A folder -> results


def seed_folders(out, method):
    """{seed: folder} of a method in an out folder, ascending."""
    folders = [path for path in out.glob(f"{method}/seed*") if path.name[4:].isdecimal()]
    return {int(path.name[4:]): path for path in sorted(folders, key=lambda path: int(path.name[4:]))}


def entry_of(parts, tasks):
    """The results of one method and seed out of its units'."""
    entry = {"tasks": {t: part["tasks"][t] for t in tasks for part in parts if t in part["tasks"]}}
    entry["average"] = float(np.mean([scores["score"] for scores in entry["tasks"].values()]))
    for name in ("adapter_parameters", "head_parameters"):
        entry[name] = sum(part[name] for part in parts)
    return entry | {name: parts[0][name] for name in ("conflicts", "cosines") if name in parts[0]}


def gather(out, about):
    """(results.json's contents, {method: {seed: the timings of its units}}) of an out folder, whose settings.json holds
    `about`. Raises BadInput."""
    facts, tasks = about["facts"], about["tasks"]
    results = {
        "settings": about["settings"],
        "demo": about["demo"],
        "device": facts["device"],
        "tasks": tasks,
        "seeds": [],
        "versions": {name: facts[name] for name in ("python", "torch", "numpy")},
        "majority": about["majority"],
        "methods": {},
    }
    timings = {}
    for method, row in about["methods"].items():
        for seed, folder in seed_folders(out, method).items():
            units = [folder / task for task in tasks] if row["own"] else [folder]
            if all((unit / "result.json").exists() for unit in units):
                entry = entry_of([read_json(unit / "result.json") for unit in units], tasks)
                results["methods"].setdefault(method, {})[str(seed)] = entry
                timings.setdefault(method, {})[str(seed)] = [read_json(unit / "timing.json") for unit in units]
    results["seeds"] = sorted({int(seed) for runs in results["methods"].values() for seed in runs})
    results["summary"] = {method: summary(results, method, about["methods"]) for method in results["methods"]}
    return results, timings


def averages(results, method):
    """{seed: average} of a method."""
    return {seed: run["average"] for seed, run in results["methods"].get(method, {}).items()}


def summary(results, method, methods):
    """A method's mean and standard deviation over seeds, and for a projection the gap recovered, over common seeds."""
    own, single, joint = (averages(results, m) for m in (method, "single", "joint"))
    values = list(own.values())
    found = {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(own) > 1 else None}
    seeds = [seed for seed in own if seed in single and seed in joint]
    if methods[method]["project"] and seeds:
        found["gap_recovered"] = gap_recovered(*([x[seed] for seed in seeds] for x in (single, joint, own)))
    return found


# Student's t at 97.5 % for 3 to 10 seeds, on n - 1 degrees of freedom; of more seeds the last, which is a little strict
T975 = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def gap_recovered(single, joint, other):
    """How much of the gap between joint and single-task training `other` closes; averages per seed, paired.

    (other - joint) / (single - joint) of the means, with the gain's spread over seeds, where the gap is clear of 0: at
    least 3 seeds, and a mean of more than t standard errors. Otherwise both in points.
    """
    single, joint, other = (np.asarray(x, float) for x in (single, joint, other))
    gap, gain, n = single - joint, other - joint, len(joint)
    if n < 3 or gap.mean() <= T975[min(n, 10) - 3] * gap.std(ddof=1) / math.sqrt(n):
        return f"{gain.mean():+.1f} of {gap.mean():+.1f}"
    share = 100 * gain / gap.mean()
    return f"{share.mean():.0f} ± {share.std(ddof=1):.0f} %"


# ---------------------------------------------------------------------------------------------------------------------
# Results -> text


def mean_and_spread(values, digits=1):
    """'71.3 ± 0.8' (sample standard deviation), or '71.3' for one value."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def markdown(rows):
    """Rows of cells as an aligned Markdown table; the first row is the header, the first column the names."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def table(results, timings):
    """Rows: methods; columns: tasks, average, gap recovered, parameters, time and, on a GPU, memory."""
    tasks, runs, majority = results["tasks"], results["methods"], results["majority"]
    seconds = {m: np.mean([sum(t["seconds_per_step"] for t in units) for units in timings[m].values()]) for m in runs}
    memory = {m: max(t["peak_memory_bytes"] or 0 for units in timings[m].values() for t in units) for m in runs}
    base = "joint" if "joint" in runs else next(iter(runs))
    rows = [["method", *tasks, "average", "gap recovered", "adapter", "heads", "step time"]]
    guess = [majority[t]["score"] for t in tasks]
    rows.append(["majority class", *(f"{score:.1f}" for score in [*guess, np.mean(guess)]), "", "", "", ""])
    for method, seeds in runs.items():
        first = next(iter(seeds.values()))
        scores = [mean_and_spread([run["tasks"][t]["score"] for run in seeds.values()]) for t in tasks]
        average = mean_and_spread([run["average"] for run in seeds.values()])
        gap = results["summary"][method].get("gap_recovered", "—")
        time = f"{seconds[method] / seconds[base]:.2f}" if seconds[method] and seconds[base] else "—"
        counts = [f"{first[name]:,}" for name in ("adapter_parameters", "head_parameters")]
        some = "" if len(seeds) == len(results["seeds"]) else f" ({len(seeds)} seed{'s' * (len(seeds) > 1)})"
        rows.append([method + some, *scores, average, gap, *counts, time])
    if any(memory.values()):
        cells = ["memory", "", *(f"{memory[method] / 2**20:,.0f} MiB" if memory[method] else "—" for method in runs)]
        rows = [[*row, cell] for row, cell in zip(rows, cells, strict=True)]
    return markdown(rows)


def by_task(results):
    """What each task gains over joint, seed by seed, and what the projection made of its gradient; where there is both.

    Rows: tasks; columns: single and every projected method less joint; the length of the task's gradient under
    `ortho`, and the weight that the update gave it, both in the first fifth of the training: later a task that is
    learned has a short gradient, too. Not with --balance, where both would be those of gradients made equally long.
    """
    runs = results["methods"]
    projected = [m for m, seeds in runs.items() if "conflicts" in next(iter(seeds.values())) and m != "joint"]
    if "joint" not in runs or not projected:
        return ""
    others = [m for m in ("single", *projected) if m in runs]
    projections = {} if results["settings"].get("balance") else runs.get("ortho", {})
    fifths = [run["conflicts"]["fifths"] for run in projections.values()]
    share = 1 / len(results["tasks"]) if results["settings"].get("combine") == "mean" else 1  # of it the rows have
    seen = ["length", "ortho's weight"] if fifths else []
    rows = [["task", *(f"{m} − joint" for m in others), *seen]]
    for t in results["tasks"]:
        row = [t]
        for m in others:
            gains = [
                run["tasks"][t]["score"] - runs["joint"][s]["tasks"][t]["score"]
                for s, run in runs[m].items()
                if s in runs["joint"]
            ]
            row.append(mean_and_spread(gains) if gains else "")
        if fifths:
            row.append(f"{np.mean([x['norms'][t][0] for x in fifths]) / share:.2f}")
            row.append(f"{np.mean([x['effective'][t][0] for x in fifths]) * share:.2f}")
        rows.append(row)
    said = "By task, in points."
    if "single" in runs:
        said += " Where single is far above joint, joint training has neglected the task."
    if fifths:
        factors = results["settings"].get("factors", "AB")
        of = "the task's gradient" + f" of {factors} alone" * (factors != "AB")
        said += f" length: of {of}, its loss's weight included, in the first fifth of the steps."
        said += " weight: by what factor that gradient goes into the update then; in joint training it is 1."
    return f"{said}\n\n{markdown(rows)}"


def picture(results):
    """Where `ortho` saw conflicts: layer x factor, in text; and by task pair."""
    runs = [run["conflicts"] for run in results["methods"].get("ortho", {}).values()]
    if not runs or len(results["tasks"]) < 2:
        return ""
    rates = {name: np.mean([run["blocks"][name][0] for run in runs]) for name in runs[0]["blocks"]}
    layers, factors = {}, sorted({name.rpartition(".")[2] for name in rates})
    for name, rate in rates.items():
        number = next((part for part in name.split(".") if part.isdigit()), "other" if "." in name else "all")
        layers.setdefault(number, {}).setdefault(name.rpartition(".")[2], []).append(rate)
    title = "Where gradients conflict (ortho): share of task pairs at a negative cosine; 50 % is chance"
    lines = [title, "", "layer  " + "".join(f"{f:<32}" for f in factors)]
    for number, found in layers.items():
        shares = [np.mean(found[factor]) for factor in factors]
        bars = ["█" * round(20 * share) + "·" * (20 - round(20 * share)) for share in shares]
        cells = [f"{bar} {100 * share:3.0f} %".ljust(32) for bar, share in zip(bars, shares, strict=True)]
        lines.append(f"{number:>5}  " + "".join(cells))
    pairs = {p: 100 * np.mean([run["pairs"][p] for run in runs]) for p in runs[0]["pairs"]}
    by_pair = ", ".join(f"{p} {share:.0f} %" for p, share in sorted(pairs.items(), key=lambda pair: -pair[1]))
    lines += ["", f"by task pair: {by_pair}"]
    return "\n".join(line.rstrip() for line in lines)


def merges(results, methods):
    """For each merge: the cosines between what was merged, and each task's drop from its own adapter."""
    lines, pairs = [], np.tril_indices(len(results["tasks"]), -1)
    for method, runs in results["methods"].items():
        own = results["methods"].get(methods[method]["source"], {})
        if methods[method]["own"] or not own.keys() & runs.keys():
            continue
        cosines = np.abs([run["cosines"] for run in runs.values()])[:, *pairs]
        drops = []
        for task in results["tasks"]:
            lost = [own[s]["tasks"][task]["score"] - run["tasks"][task]["score"] for s, run in runs.items() if s in own]
            drops.append(f"{task} {mean_and_spread(lost)}")
        between = f"|cosine| between the merged deltas {cosines.mean():.3f}, at most {cosines.max():.3f}"
        lines.append(f"{method}: {between}; drop from the task's own adapter: {', '.join(drops)}")
    return "\n\n".join(lines)


def differences(timings):
    """A line where the units were not made by the same code on the same machine; nothing where they were."""
    kinds = {}  # {(code, machine): the methods with a unit made by it}
    for method, seeds in timings.items():
        for unit in (unit for units in seeds.values() for unit in units):
            kinds.setdefault((unit["source"], unit["hardware"]), {})[method] = True
    if len(kinds) < 2:
        return ""
    parts = [f"{', '.join(methods)}: code {code}, {machine}" for (code, machine), methods in sorted(kinds.items())]
    return "NOTICE: not all trainings are by the same code on the same machine. " + "; ".join(parts) + "."


# settings that the table says elsewhere; and per_task, for which auto stands for one or the other
TOLD = ("tasks", "steps", "batch_size", "lr", "rank", "task_weights", "holdout", "dtype", "per_task")


def report(results, timings, about):
    """results.md, and what the run prints at its end."""
    s, seeds = results["settings"], results["seeds"]
    if not results["methods"]:
        return "No method is finished with any seed yet.\n"
    demo = "The demo: a toy grammar and a tiny encoder, not GLUE"
    scored = f"{s['holdout']} held-out training rows per task" if s["holdout"] else "the validation split"
    others = {name: x for name, x in about.get("changed", {}).items() if name not in TOLD}
    others = ", ".join(f"--{name.replace('_', '-')}" + f" {x}" * (x is not True) for name, x in others.items())
    hardware = next(unit["hardware"] for seeds in timings.values() for units in seeds.values() for unit in units)
    base = "joint" if "joint" in results["methods"] else "the first method"
    parts = [
        f"## {demo}" if results["demo"] else f"## {about['model']} on {about['glue']}",
        f"{s['steps']} steps of {s['batch_size']} examples per task, lr {s['lr']:g}, rank {s['rank']}"
        + (f", task weights {s['task_weights']}" if s.get("task_weights") else "")
        + f", {others}" * bool(others)
        + f", on {scored}: "
        + (f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}")
        + f", {s['dtype']} on {hardware}.",
        table(results, timings),
        "A score is the mean of the task's metrics × 100. gap recovered: of the average, (method − joint) / (single − "
        "joint), ± the spread of method − joint over the mean gap; both in points where that gap is not clearly above "
        "0, by its paired 95 % interval over at least 3 seeds. adapter, heads: trained scalars. step time: of all "
        f"tasks' batches together, relative to {base}.",
        differences(timings),
        by_task(results),
        merges(results, about["methods"]),
        picture(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write(out):
    """Write OUT/results.json and results.md, and return the latter's text. Raises BadInput: no out folder."""
    out = Path(out)
    if not (out / "settings.json").exists():
        raise BadInput(f"{out} has no settings.json, so no run is in it")
    with locked(out, wait=True):  # a process that adds methods writes settings.json anew
        about = read_json(out / "settings.json")
        wanted = {"settings", "facts", "methods", "tasks", "majority", "demo"}
        if not wanted <= about.keys() or "disjoint" in about["settings"]:
            raise BadInput(f"{out} has no run of train.py in it; continual.py prints its own table, with --resume")
        results, timings = gather(out, about)
        text = report(results, timings, about)
        write_text(out / "results.json", json.dumps(results, indent=1) + "\n")
        write_text(out / "results.md", text)
    return text


def main(argv):
    if len(argv) != 1 or {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0 if {"-h", "--help"} & set(argv) else 2
    try:
        print(write(argv[0]))
    except (BadInput, OSError) as e:
        print(f"support.table: {e}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    end(lambda: main(sys.argv[1:]))
