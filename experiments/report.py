"""Tables and figures out of experiments/results/, and the blocks of both pages that show them.

    python experiments/report.py            writes results.md beside every results.json, figures, the pages' blocks
    python experiments/report.py --check    says where a page or a table differs from the results, and ends with 1

A block stands between <!-- experiments/results/….md --> and <!-- end -->: in experiments/README.md that file, word for
word; in README.md only as far as the end of its first table. Figures carry
their results' checksum. Needs requirements-dev.txt: intervals are scipy's, figures matplotlib's.
"""

import argparse
import contextlib
import functools
import hashlib
import importlib.util
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np

with contextlib.suppress(ImportError):  # main() says so
    from scipy import optimize, stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

from plan import ACROSS, CONTRASTS, EXPERIMENTS  # noqa: E402
from support.table import markdown, mean_and_spread  # noqa: E402
from train import METHODS  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def interval(differences, level=0.95):
    """(mean, low, high) of paired differences, (seeds,): Student's t interval, mean ± t s / √n."""
    x = np.asarray(differences, float)
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def fieller(gain, gap):
    """(low, high) for the ratio of the means of two paired samples, or None where the gap's interval is not above 0.

    Fieller's interval: all θ at which the mean of gain - θ gap does not differ from 0, so the roots of
    (ȳ² - t² s_yy/n) θ² - 2 (x̄ȳ - t² s_xy/n) θ + (x̄² - t² s_xx/n), x the gain and y the gap. It is an interval only
    where the first factor is positive: where there is a gap to recover.
    """
    x, y = np.asarray(gain, float), np.asarray(gap, float)
    t2 = stats.t.ppf(0.975, len(x) - 1) ** 2 / len(x)
    (sxx, sxy), (_, syy) = np.cov(x, y)
    a, b, c = y.mean() ** 2 - t2 * syy, x.mean() * y.mean() - t2 * sxy, x.mean() ** 2 - t2 * sxx
    if a <= 0 or y.mean() <= 0:
        return None
    root = math.sqrt(max(0.0, b * b - a * c))
    return (b - root) / a, (b + root) / a


# ---------------------------------------------------------------------------------------------------------------------
# Words


def signed(found, digits=2):
    """'+0.31 [-0.20, +0.82]'"""
    mean, low, high = found
    return f"{mean:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"


def share(gain, gap):
    """The recovered share with its interval, or that no gap is seen."""
    found = fieller(gain, gap)
    if found is None:
        return "no gap seen"
    return f"{100 * np.mean(gain) / np.mean(gap):.0f} % [{100 * found[0]:.0f}, {100 * found[1]:.0f}]"


def source(r):
    """Where numbers come from: the last line of every table."""
    jobs = f"{r['jobs']} runs at a time, " * (r["jobs"] > 1)
    return (
        f"`{r['command']}`, seeds {', '.join(map(str, r['seeds']))}; {r['minutes']:.0f} minutes of runs, {jobs}"
        f"{r['hardware']} ({r['processor']}), torch {r['torch']}, commit {r['commit']}, {r['date']}."
    )


# ---------------------------------------------------------------------------------------------------------------------
# Units: the files of reproduce.py, and what they say together


ENOUGH = 3  # seeds that a cell's tables are shown from
A_AND_B = {"mrpc": "A", "qqp": "B"}  # what flipped.py makes is not GLUE, and its tasks are not called so


def units_of(folder):
    """{cell: {row: {seed: unit}}} of what has finished, in the plan's order. Raises SystemExit: a cell's units read
    different weights or data (where they say what: older ones do not)."""
    there, read = {}, {}
    for path in sorted((folder / "units").glob("*.json")):
        text = path.read_text()
        unit = json.loads(text)
        if unit["data"].startswith("flipped"):
            unit = json.loads(text, object_pairs_hook=lambda pairs: {A_AND_B.get(key, key): x for key, x in pairs})
        there[unit["cell"], unit["row"], unit["seed"]] = unit
        world = unit["seed"] if unit["data"].startswith("toy") else ""
        for what, checksum in unit.get("checksums", {}).items():
            if read.setdefault((unit["cell"], world, what), checksum) != checksum:
                raise SystemExit(f"report.py: {path}: {what} is not that of other units of {unit['cell']!r}")
    cells = {}
    for name, cell in EXPERIMENTS[folder.name][1].items():
        for row in cell.rows:
            found = {seed: there[name, row, seed] for seed in cell.seeds if (name, row, seed) in there}
            if found:
                cells.setdefault(name, {})[row] = found
    return cells


def entry(unit):
    """What the unit's method says: the last, where there are several; those before it are what it is made of."""
    return [*unit["results"].values()][-1]


def values(found, task="", score="score"):
    """{seed: the score of a task, or their average} of a row. In [-1, 1] a metric has a name of its own: accuracy."""
    factor = 1 if score in ("score", "loss") else 100
    tasks = [task] if task else list(entry(next(iter(found.values())))["tasks"])
    return {
        seed: factor * float(np.mean([entry(unit)["tasks"][t].get(score, math.nan) for t in tasks]))
        for seed, unit in found.items()
    }  # NaN: losses of what train.py ran, which has none


def differences(row, base):
    """Paired by seed, of those that both have: (seeds,)."""
    return np.array([row[seed] - base[seed] for seed in row if seed in base])


@functools.cache
def noncentrality(n):
    """The √n · difference / spread at which the t test of n pairs shows a difference, at 5 %, in 80 of 100 trials."""
    critical = stats.t.ppf(0.975, n - 1)
    near = critical + stats.t.ppf(0.8, n - 1)  # of many pairs; 5 % too small for three
    return optimize.brentq(lambda d: stats.nct.sf(critical, n - 1, d) - 0.8, 0.9 * near, 1.3 * near)


def detectable(x):
    """The true difference that n pairs of this spread would have shown, at 5 %, in 80 of 100 trials."""
    return noncentrality(len(x)) * np.std(x, ddof=1) / math.sqrt(len(x))


def sign_flips(x):
    """The exact two-sided p of a mean: of the 2^n ways to sign the differences, the share with a mean as far from 0."""
    found = stats.permutation_test((x,), np.mean, permutation_type="samples", n_resamples=np.inf)
    return float(found.pvalue)


def holm(p_values):
    """Adjusted p: the k-th smallest of m times m - k + 1, none smaller than the one before it, at most 1."""
    adjusted, largest = dict.fromkeys(p_values), 0.0
    p_values = {name: 1.0 if math.isnan(p) else p for name, p in p_values.items()}  # of differences that are all 0
    for k, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, (len(p_values) - k) * p_values[name]))
        adjusted[name] = largest
    return adjusted


COLLAPSED = 0.95  # of the predictions are one class


def collapsed(found):
    """{task: how many trainings of a row end up saying one class}, where there are some."""
    counts = {}
    for unit in found.values():
        for task, scores in entry(unit)["tasks"].items():
            counts[task] = counts.get(task, 0) + (scores.get("commonest", 0) >= COLLAPSED)
    return {task: n for task, n in counts.items() if n}


def losses_by_task(rows, tasks):
    """Every row's losses less joint's, as a list: where joint mostly collapses, since a score can't tell how far."""
    if 2 * max(collapsed(rows["joint"]).values(), default=0) < len(rows["joint"]):
        return []
    joint, lines = {t: values(rows["joint"], t, "loss") for t in tasks}, []
    for row, found in rows.items():
        pairs = {t: differences(values(found, t, "loss"), joint[t]) for t in tasks}
        if row != "joint" and len(pairs[tasks[0]]) >= ENOUGH:
            said = ", ".join(f"{t} {signed(interval(x), 3)}" for t, x in pairs.items())
            lines.append(f"- Loss by task, `{row}` less joint: {said}.")
    return ["\n".join(lines)] * bool(lines)


def score_table(rows, tasks):
    """Every row's scores, mean ± standard deviation over its seeds."""
    table = [["method", *tasks, "average", "loss", "collapsed", "seeds"]]
    for row, found in rows.items():
        columns = [list(values(found, task).values()) for task in [*tasks, ""]]
        table.append([row, *map(mean_and_spread, columns)])
        loss = list(values(found, "", "loss").values())
        table[-1] += ["" if np.isnan(loss).any() else mean_and_spread(loss, 3)]
        table[-1] += [", ".join(f"{task} {n}" for task, n in collapsed(found).items()), str(len(found))]
    guesses = [unit["majority"] for unit in next(iter(rows.values())).values()]  # a toy world has its own
    chance = [np.mean([guess[task] for guess in guesses]) for task in tasks]
    return [table[0], ["majority class", *(f"{x:.1f}" for x in [*chance, np.mean(chance)]), "", "", ""], *table[1:]]


def difference_table(title, pairs, tasks, ninety=False):
    """[(name, row, base)] -> row - base, paired by seed, with 95 % intervals; and what the average could have shown.

    loss: of the validation split, in nats or shares of the labels' variance, averaged over the tasks; less is better.
    ninety: the average with a 90 % interval, too, which plan.py's rule for shams is about. Of fewer than ENOUGH pairs
    nothing is said; how many there are is, where that differs, or is less than a row has seeds.
    """
    more, counts, most = ["average, 90 %"] * ninety, ["seeds"], 0
    table = [[title, *tasks, "average", *more, "could have seen", "loss"]]
    for name, row, base in pairs:
        x = [differences(values(row, task), values(base, task)) for task in [*tasks, ""]]
        if len(x[-1]) >= ENOUGH:
            counts.append(f"{len(x[-1])}")
            most = max(most, len(row), len(base))
            loss = differences(*(values(found, "", "loss") for found in (row, base)))
            loss = "" if np.isnan(loss).any() else signed(interval(loss), 3)
            more = [signed(interval(x[-1], 0.9), 1)] * ninety
            table.append([name, *(signed(interval(d), 1) for d in x), *more, f"{detectable(x[-1]):.1f}", loss])
    differ = set(counts[1:]) - {f"{most}"}
    return [[*line, n] for line, n in zip(table, counts, strict=True)] if differ else table


def less(rows, base):
    """The pairs of all rows with one of them."""
    return [(row, found, rows[base]) for row, found in rows.items() if row != base]


def weight_table(rows, tasks):
    """Effective weights and norms of the tasks' gradients, medians over the seeds, in the first and the last fifth of
    the steps; how many pairs of gradients conflict, and their mean cosine, with its interval over the seeds; what
    projection, or a sham, changes of a gradient, in shares of its length."""
    heading = ["weights, first → last fifth", *tasks, "pairs in conflict", "cosine, all pairs", "changed"]
    table, norms, of = [heading], [], ""

    def course(seen, what, task, digits):
        ends = (np.median([x["fifths"][what][task][k] for x in seen]) for k in (0, -1))
        return " → ".join(f"{x:.{digits}}" for x in ends)

    for row, found in rows.items():
        seen = [entry(unit)["conflicts"] for unit in found.values() if "conflicts" in entry(unit)]
        if any(x["fifths"]["effective"][t][0] != 1 for x in seen for t in tasks):  # joint's are 1
            weights = [course(seen, "effective", t, "1f") for t in tasks]
            rate = f"{100 * np.mean([x['rate'] for x in seen]):.1f} %"
            removed = 100 * np.median([x["removed"] for x in seen])
            removed = f"{removed:.0f} %" if removed < 1000 else "> 1000 %"  # a sham's, where a gradient is hardly there
            table.append([row, *weights, rate, signed(interval([x["cosine"] for x in seen]), 3), removed])
            if not norms:
                norms, of = [course(seen, "norms", t, "2g") for t in tasks], row
    said = ", ".join(f"{t} {x}" for t, x in zip(tasks, norms, strict=False))
    note = (
        f"Lengths of the tasks' gradients, `{of}`, first → last fifth: {said}. Lengths, weights and what is changed, "
        "|v − g| / |g|, are medians over seeds, of means over steps (a few steps with hardly a gradient can make a "
        "weight huge); conflicts and cosines are means."
    )
    if any("balanced" in line[0] for line in table):
        note += " Of balanced gradients, a weight comes on top of the factor that balances."
    return table, note if norms else ""


def recovered(rows, tasks, row):
    """The share of the gap, single - joint, that a row brings back: of the average, and of the task that loses most."""
    parts = []
    gaps = {t: differences(values(rows["single"], t), values(rows["joint"], t)) for t in tasks}
    worst = max(tasks, key=lambda t: gaps[t].mean())
    for name, task in (("the average", ""), (worst, worst)):
        seeds = set(rows[row]) & set(rows["single"]) & set(rows["joint"])
        of = [{s: x for s, x in values(rows[r], task).items() if s in seeds} for r in (row, "single", "joint")]
        parts.append(f"of {name} {share(differences(of[0], of[2]), differences(of[1], of[2]))}")
    return "; ".join(parts)


def shares(rows, tasks):
    """What each row brings back of the gap that rows' single and joint make, as a list, if they have seeds enough."""
    both = set(rows["single"]) & set(rows["joint"])
    rest = [row for row in rows if row not in ("single", "joint") and len(both & set(rows[row])) >= ENOUGH]
    return ["\n".join(f"- Share of the gap, `{row}`: {recovered(rows, tasks, row)}." for row in rest)] * bool(rest)


def cell_text(name, rows):
    """A cell as its tables, under a heading."""
    tasks = list(entry(next(iter(next(iter(rows.values())).values())))["tasks"])
    parts = [f"### {name}", markdown(score_table(rows, tasks))]
    base = "joint" if "joint" in rows else next(iter(rows))
    if len(rows) > 1:
        parts.append(markdown(difference_table(f"less {base}", less(rows, base), tasks)))
    if "joint" in rows:
        shams = {row: found for row, found in rows.items() if row.startswith("ortho")}
        if len(shams) > 1 and "ortho" in shams:
            parts.append(markdown(difference_table("less ortho", less(shams, "ortho"), tasks, ninety=True)))
        if "single" in rows:
            parts += shares(rows, tasks)
        parts += losses_by_task(rows, tasks)
    table, norms = weight_table(rows, tasks)
    if norms:
        parts += [markdown(table), norms]
    return parts


def tries_text(name, rows):
    """What changes to the method score, and how far that is from the method: no more is asked of them."""
    return cell_text(name, rows)[:3]


def by_method(rows):
    """{method: {seed: unit}} of rows whose units have several methods, each as if it had been run alone."""
    found = {}
    for seed, unit in itertools.chain.from_iterable(units.items() for units in rows.values()):
        for method, said in unit["results"].items():
            found.setdefault(method, {})[seed] = unit | {"results": {method: said}}
    return found


def lori_text(name, rows):
    """LoRI, alone and merged: scores, each less LoRA's; each merged less what it was before, and that less LoRA's."""
    methods = by_method(rows)
    tasks = list(entry(next(iter(methods["single"].values())))["tasks"])
    alone = {m: found for m, found in methods.items() if not m.endswith("-merged")}
    merged = {m: found for m, found in methods.items() if m.endswith("-merged")}
    before = {m: by_method({m: rows[m]})[METHODS[m].source] for m in merged}  # of the run that m was merged in
    changes = {m: changed(merged[m], before[m]) for m in merged}
    trained = ", ".join(f"{m} {entry(next(iter(x.values())))['adapter_parameters']:,}" for m, x in alone.items())
    tables = [
        score_table(methods, tasks),
        difference_table("alone, less single", less(alone, "single"), tasks),
        difference_table("merged, less lora-merged", less(merged, "lora-merged"), tasks),
        difference_table("by merging", [(m, merged[m], before[m]) for m in merged], tasks),
        difference_table("by merging, less LoRA", less(changes, "lora-merged"), tasks),
    ]
    sizes = f"Trained scalars of all adapters: {trained}."
    tables[0] = without("collapsed", tables[0])
    tables = [markdown(without("loss", table)) for table in tables]  # train.py keeps neither
    return [f"### {name}", *tables, sizes, *cosines_of_deltas(merged)]


def without(column, table):
    at = table[0].index(column)
    return [row[:at] + row[at + 1 :] for row in table]


def changed(row, base):
    """Two rows -> one whose scores are their differences, of the seeds that both have."""
    both = {seed: (entry(unit)["tasks"], entry(base[seed])["tasks"]) for seed, unit in row.items() if seed in base}
    by_task = {seed: {t: {"score": x[t]["score"] - y[t]["score"]} for t in x} for seed, (x, y) in both.items()}
    return {seed: {"results": {"changed": {"tasks": tasks}}} for seed, tasks in by_task.items()}


def cosines_of_deltas(merged):
    """What was merged, ΔW of a task against that of another, over all layers: pairs and seeds, mean and largest."""
    said = []
    for method, found in merged.items():
        cosines = np.array([entry(unit)["cosines"] for unit in found.values()])  # (seeds, tasks, tasks)
        pairs = np.abs(cosines[:, *np.triu_indices(cosines.shape[1], 1)])
        said.append(f"{METHODS[method].source} {pairs.mean():.3f}, at most {pairs.max():.3f}")
    return [f"Mean |cosine| of two tasks' ΔW, before merging: {'; '.join(said)}."] if said else []


def at_the_end(found, order):
    """{what: {seed: number}} of tasks one after the other: each task's score at the end, their average, forgetting."""
    said = {seed: entry(unit) for seed, unit in found.items()}
    scores = {task: {seed: x["matrix"][-1][k] for seed, x in said.items()} for k, task in enumerate(order)}
    return scores | {what: {seed: x[what] for seed, x in said.items()} for what in ("average", "forgetting")}


def continual_text(name, rows):
    """One task after the other: each task's score after its own training, before the last task's and after it."""
    order = next(iter(rows["single"].values()))["tasks"]
    table = [["own training → before the last → end", *order, "average at the end", "forgetting", "seeds"]]
    ends = {row: at_the_end(found, order) for row, found in rows.items()}
    for row, found in rows.items():
        course = []
        for k in range(len(order)):
            after = dict.fromkeys((k, max(k, len(order) - 2), len(order) - 1))  # whose training's rows of the matrix
            scores = [[entry(unit)["matrix"][i][k] for unit in found.values()] for i in after]
            course.append(" → ".join(f"{np.mean(x):.1f}" for x in scores))
        table.append([row, *course, *(mean_and_spread(list(ends[row][x].values())) for x in ("average", "forgetting"))])
        table[-1].append(str(len(found)))
    apart = [["at the end", *order, "average", "forgetting", "forgetting: could have seen"]]
    others = [row for row in rows if row not in ("single", "lori-s")]
    for row, base in [(row, "single") for row in rows if row != "single"] + [("lori-s", row) for row in others]:
        pairs = [differences(ends[row][what], ends[base][what]) for what in ends[row]]
        apart.append([f"{row}, less {base}", *(signed(interval(x), 1) for x in pairs)])
        apart[-1].append(f"{detectable(pairs[-1]):.1f}")
    by_seed = (f"{row} {', '.join(f'{x:.1f}' for x in end['forgetting'].values())}" for row, end in ends.items())
    overlaps = [x["overlap"] for unit in rows.get("lori-s", {}).values() if "overlap" in (x := entry(unit))]
    note = f"Forgetting, seed by seed: {'; '.join(by_seed)}."
    if overlaps:
        note += f" Of lori-s's masks, two tasks' share {100 * np.mean(overlaps):.0f} % of their entries (by chance 10)."
    return [f"### {name}", markdown(table), markdown(apart), note]


CLEAR = 3  # a task's mean gradient is said to be there from so many of its errors on


def pair_at(point, space, i, j):
    """(cosine, error) of two tasks' mean gradients at a point, or None where one of them is not there."""
    spaces = "AB" if space == "A less B" else [space]
    signals = [point[x]["signal"][t] for x in spaces for t in (i, j)]
    found = point[space]["cosine"][i][j], point[space]["error"][i][j]
    return None if None in (*signals, *found) or min(signals) <= CLEAR else found


def rank_row(points, pairs):
    """Of one rank after so many steps, over all seeds' pairs: how many are there, conflict, agree; A against B."""
    there = [[x for pair in pairs if (x := pair_at(point, "A and B", *pair))] for point in points]
    z = [np.array([cosine / error for cosine, error in found]) for found in there]
    counts = [[int((x < -2).sum()) for x in z], [int((x > 2).sum()) for x in z]]
    apart = [(point, pair) for point in points for pair in pairs if pair_at(point, "A less B", *pair)]
    differ = [abs(c) > 2 * e for c, e in (pair_at(point, "A less B", *pair) for point, pair in apart)]
    A, B = (np.array([pair_at(point, x, *pair) for point, pair in apart]).reshape(-1, 2).T for x in "AB")
    larger = int((np.array(differ, bool) & (abs(A[0]) > abs(B[0]))).sum())
    opposite = int(((A[0] * B[0] < 0) & (abs(A[0]) > 2 * A[1]) & (abs(B[0]) > 2 * B[1])).sum())
    rates = [100 * point["rate"] for point in points]
    return [
        f"{sum(map(len, there))} of {len(points) * len(pairs)}",
        *(f"{sum(found)}: {', '.join(map(str, found))}" for found in counts),
        *(f"{abs(x[0]).mean():.2f}" if len(apart) else "" for x in (A, B)),
        f"{sum(differ)} of {len(differ)}; {larger}",
        f"{opposite}",
        f"{min(rates):.1f} to {max(rates):.1f} %",
    ]


def unseen(points, pairs):
    """(pairs that are not there but have an error, those of them that are more than 2 errors from 0)."""
    found = [
        abs(point["A and B"]["cosine"][i][j]) > 2 * point["A and B"]["error"][i][j]
        for point in points
        for i, j in pairs
        if point["A and B"]["error"][i][j] and not pair_at(point, "A and B", i, j)
    ]
    return len(found), sum(found)


def premise_text(name, rows):
    """Cosines of the mean gradients: by pair and point at rank 8, each seed's; by rank, counted; the signal's share."""
    points = {row: [next(iter(u["results"].values()))["points"] for u in found.values()] for row, found in rows.items()}
    tasks, steps = next(iter(rows["rank 8"].values()))["tasks"], list(points["rank 8"][0])
    pairs = list(itertools.combinations(range(len(tasks)), 2))
    table = [["cosine at rank 8, A and B, seed by seed", *(f"after {step} steps" for step in steps)]]
    for i, j in pairs:
        at = [[pair_at(seed[step], "A and B", i, j) for seed in points["rank 8"]] for step in steps]
        cells = ("; ".join(f"{x[0]:+.2f} ± {x[1]:.2f}" if x else "—" for x in found) for found in at)
        table.append([f"{tasks[i]}-{tasks[j]}", *cells])
    signal = [["the signal's share of a batch", *tasks]]
    ranks = [["rank", "after", "pairs there", "in conflict", "agree", "size in A", "in B", "A is not B; larger"]]
    ranks[0] += ["opposite", "conflicts by batch"]
    for row, seeds in points.items():
        for step in steps:
            at = [seed[step] for seed in seeds]
            snr = np.array([point["A and B"]["snr"] for point in at], float)
            signal.append([f"{row}, after {step}", *(mean_and_spread(list(snr[:, t]), 3) for t in range(len(tasks)))])
            ranks.append([row, step, *rank_row(at, pairs)])
    hidden, clear = np.sum([unseen(list(x.values()), pairs) for seeds in points.values() for x in seeds], 0)
    note = (
        f"A pair is there where both tasks' mean gradients are more than {CLEAR} jackknife errors from zero (else a "
        f"dash, which is no zero: of {hidden} such pairs with an error, {clear} are more than 2 errors from it); "
        "cosines ± their jackknife error, over batches at that point. In conflict, agree: by more than 2 errors, which "
        "noise alone does in 4 of 100 each (Student's t, 8 groups); all, and seed by seed. Size: mean |cosine| in A "
        "and in B alone, of pairs that are there in both; A is not B: of these, those whose cosines differ by more "
        "than 2 errors, and how many of them are larger in A; opposite: with opposite signs in A and in B, both by "
        "more than 2 errors. By batch: of pairs and factors, seeds from least to most. The signal's share: |mean "
        "gradient|² over the mean square of one batch's gradient, A and B together."
    )
    return [f"### {name}", *(markdown(x) for x in (table, ranks, signal)), note]


def trained_and_merged(rows):
    """merging.py's rows, "METHOD at RATE" -> the same of what was trained alone, {"MERGED of RATE at WEIGHT": …}."""
    trained, merges = {}, {}
    for row, found in rows.items():
        method, rate = row.split(" at ")
        for name, units in by_method({row: found}).items():
            if " at " in name:
                merges[name.replace(" at ", f" of {rate} at ")] = units
            elif name == method:
                trained[row] = units
    return trained, merges


def search_table(rows, whole):
    """What rates, or weights, were chosen by: means over the seeds, on rows held out; the best is marked if `whole`."""
    grid, seeds = {}, {}
    for row, found in rows.items():
        method, rate = re.fullmatch("(.+?)(?: at |, weight )(.+)", row).groups()
        tasks = list(entry(next(iter(found.values())))["tasks"])
        means = {task: np.mean(list(values(found, task).values())) for task in tasks}
        grid.setdefault(method, {})[float(rate)] = means | {"average": np.mean(list(means.values()))}
        seeds.setdefault(method, set()).add(len(found))
    columns = sorted({rate for rates in grid.values() for rate in rates})
    table = [["held out", "score", *(f"{rate:g}" for rate in columns), "seeds"]]
    for method, rates in grid.items():
        by_task = method in METHODS and METHODS[method].own  # an adapter of each task's own: its best rate, too
        for score in next(iter(rates.values())) if by_task else ["average"]:
            of, best = seeds[method], max(rates, key=lambda rate: rates[rate][score])
            cells = [f"{rates[r][score]:.1f}" if r in rates else "" for r in columns]
            if whole:
                cells[columns.index(best)] = f"**{rates[best][score]:.1f}**"
            table.append([method, score, *cells, " to ".join(f"{n}" for n in sorted({min(of), max(of)}))])
    return table


def origin(name, cells):
    """Where an experiment's numbers come from: the last line of its tables."""
    found = [unit for rows in cells.values() for row in rows.values() for unit in row.values()]
    hardware = ", ".join(sorted({f"{unit['hardware']} ({unit['processor']})" for unit in found}))
    commits, dates = sorted({unit["commit"] for unit in found}), sorted({unit["date"] for unit in found})
    versions = sorted({unit["torch"] for unit in found})
    total = sum(len(cell.rows) * len(cell.seeds) for cell in EXPERIMENTS[name][1].values())
    needs = "" if all(unit["data"].startswith("toy") for unit in found) else " --model MODEL --glue GLUE"
    return (
        f"`python experiments/reproduce.py {name}{needs}`: {len(found)} of {total} units, each with its command and "
        f"seed in `results/{name}/units/`; {sum(unit['seconds'] for unit in found) / 3600:.1f} hours of one thread, "
        f"{hardware}, torch {', '.join(versions)}, commit {', '.join(commits)}, "
        f"{' to '.join(dict.fromkeys((dates[0], dates[-1])))}."
    )


def beside(cell, units):
    """{name: found}: for a cell at W = 10, rows of that at W = 1, where they have seeds enough."""
    rows = units.get(cell.replace("W = 10", "W = 1"), {}) if cell.startswith("W = 10") else {}
    named = {"single": "single, W = 1", "joint": "joint, W = 1", "joint, balanced": "balanced, W = 1"}
    return {said: rows[row] for row, said in named.items() if len(rows.get(row, ())) >= ENOUGH}


def folded(name, *parts):
    return "\n\n".join([f"<details><summary>{name}</summary>", *parts, "</details>"])


def experiment_table(folder):
    """The text of results.md for an experiment's units: its first cell, or the one of a contrast, then, to be unfolded,
    the others, differences across cells, and what rates and weights were chosen by."""
    cells, parts = units_of(folder), []
    judged = [c.cell for c in CONTRASTS if c.experiment == folder.name]
    first = (judged + [name for name in EXPERIMENTS[folder.name][1] if not name.startswith("search")])[0]
    cells = {name: cells[name] for name in sorted(cells, key=lambda name: name != first)}
    for name, rows in cells.items():
        if name.startswith("search"):
            continue
        cell = EXPERIMENTS[folder.name][1][name]
        kinds = {"premise": premise_text, "continual": continual_text, "tries": tries_text, "train": lori_text}
        kind = kinds.get(Path(cell.script).stem, cell_text)
        least = 1 if kind is premise_text else min(ENOUGH, len(cell.seeds))  # its errors are those of each seed
        enough = {row: found for row, found in rows.items() if len(found) >= least}
        missing = [f"`{row}`" for row in cell.rows if row not in enough]
        if not enough or (kind is not cell_text and missing):  # those set all their rows beside each other
            done = sum(map(len, rows.values()))
            parts.append(f"### {name}\n\n{done} of {len(cell.rows) * len(cell.seeds)} units: not yet.")
        else:
            heading, *found = kind(name, enough)
            found += [f"Not there yet: {', '.join(missing)}."] if missing else []
            parts += [heading, *found] if name == first else [folded(name, *found)]
    across = [
        (said, cells[cell][row], cells[other][base])
        for said, (cell, row), (other, base) in ACROSS.get(folder.name, ())
        if row in cells.get(cell, {}) and base in cells.get(other, {})
    ]
    for name, rows in cells.items():
        more = beside(name, cells)
        single = more.get("single, W = 1")
        if single and len(rows.get("joint", ())) >= ENOUGH:
            found = shares({"single": single} | rows, list(entry(next(iter(rows["joint"].values())))["tasks"]))
            parts += [f"{name}, where the gap's other end is the `single` of W = 1:", *found]
    if across:
        tasks = list(entry(next(iter(across[0][1].values())))["tasks"])
        parts.append(folded("Across cells", markdown(difference_table("", across, tasks))))
    for name, rows in cells.items():
        if name.startswith("search"):
            cell = EXPERIMENTS[folder.name][1][name]
            tables = trained_and_merged(rows) if cell.script == "experiments/merging.py" else [rows]
            whole = all(len(rows.get(row, ())) == len(cell.seeds) for row in cell.rows)
            parts.append(folded(name, *(markdown(search_table(found, whole)) for found in tables)))
    return "\n\n".join([*parts, origin(folder.name, cells)]) + "\n"


def budget_table():
    """The text of budget.md: every cell's units, how many are there, and what they take by those that are."""
    table, total = [["experiment", "cell", "units", "there", "seconds of one, by method", "hours of one thread"]], 0.0
    for name, (_, cells) in EXPERIMENTS.items():
        there = units_of(RESULTS / name)
        for cell_name, cell in cells.items():
            rows, units = there.get(cell_name, {}), len(cell.rows) * len(cell.seeds)
            times = {row: np.mean([unit["seconds"] for unit in found.values()]) for row, found in rows.items()}
            said = f"{min(times.values()):.0f} to {max(times.values()):.0f}" if times else "not timed"
            # a row that has not been timed is taken to be like the others
            hours = sum(times.get(row, np.mean([*times.values()])) for row in cell.rows) if times else 0.0
            hours *= len(cell.seeds) / 3600
            count = sum(map(len, rows.values()))
            table.append([name, cell_name, f"{units}", f"{count}", said, f"{hours:.1f}" if times else ""])
            total += hours
    return f"{markdown(table)}\n\nTogether {total:.0f} hours of one thread, as far as timed; two run at a time.\n"


def pairs_of(c, task=""):
    """(row - base, paired by seed, of a contrast's units so far; how many the plan wants)."""
    rows, wanted = units_of(RESULTS / c.experiment).get(c.cell, {}), len(EXPERIMENTS[c.experiment][1][c.cell].seeds)
    there = {c.row, c.base} <= rows.keys()
    x = differences(*(values(rows[row], task, c.score) for row in (c.row, c.base))) if there else np.array([])
    return x, wanted


def contrast_table():
    """The text of contrasts.md: plan.py's contrasts, with Holm's correction, as far as their units are there."""
    found = {c: pairs_of(c) for c in CONTRASTS}
    p_values = {c: stats.ttest_1samp(x, 0).pvalue for c, (x, wanted) in found.items() if len(x) == wanted}
    complete = len(p_values) == len(CONTRASTS)
    adjusted = holm(p_values | dict.fromkeys((c for c in CONTRASTS if c not in p_values), 1.0))
    heading = ["contrast", "cell", "score", "points, 95 %", "p, sign flips", "p, Holm", ""]
    table = [[*heading, "could have seen"]]
    for c, (x, wanted) in found.items():
        start = [f"{c.row} − {c.base}", f"{c.experiment}: {c.cell}", c.score]
        if c not in p_values:
            table.append([*start, f"not yet: {len(x)} of {wanted} seeds", "", "", "", ""])
            continue
        words = "shown" if adjusted[c] < 0.05 else "not shown" if complete else "not shown so far"
        p = [f"{found_p:.2g}" for found_p in (sign_flips(x), adjusted[c])]
        table.append([*start, signed(interval(x)), *p, words, f"{detectable(x):.1f}"])
    note = (
        "Intervals are each contrast's own. p: exact, over all ways to flip the signs; and the paired t test's after "
        "Holm's correction over the four. Could have seen: at p < 0.05, in four of five trials; after it, up to a "
        "third more."
    )
    if not complete:
        note += " A contrast that is not there yet counts as p = 1: what is shown stays shown, what is not may yet be."
    return f"{markdown(table)}\n\n{note}\n"


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def demo(r):
    """The demo's own report, without its heading."""
    return [r["table"].split("\n", 1)[1].strip()]


def trust(r):
    """Kills and damaged files: the last lines of what was run."""
    lines = []
    for part in (part for part in r["tried"] if "kills.py" in part["command"]):
        mode = re.search(r"--mode (\w+)", part["command"])
        runs, phases = part["output"].strip().splitlines()[-2:]
        how = f" ({mode[1]})" if mode else ""
        lines.append(f"- Killed by SIGKILL at random moments and resumed{how}: {runs}; {phases}.")
    rows, total = [["damaged file", "tried", "loaded", "refused in one line", "anything else"]], {}
    for part in (part for part in r["tried"] if "fuzz.py" in part["command"]):
        for kind, *numbers in re.findall(r"^([a-z ]+?) +(\d+) +(\d+) +(\d+) +[\d.]+ +[\d.]+$", part["output"], re.M):
            total[kind] = total.get(kind, 0) + np.array(numbers, int)
    total["all"] = sum(total.values())
    rows += [[kind, *(f"{x:,}" for x in found), f"{found[0] - found[1] - found[2]:,}"] for kind, found in total.items()]
    return [
        "\n".join(lines),
        markdown(rows),
        "Of the damaged files, none was allowed to end the process, to run over its time, or to make it "
        "allocate more than 16 MiB and three times the files' size. "
        + ", ".join(f"`{x['command']}`: exit status {x['status']}" for x in r["tried"])
        + ".",
    ]


TABLES = {"demo": demo, "trust": trust}


def table(path):
    """The text of results.md for a results.json."""
    r = json.loads(path.read_text())
    return "\n\n".join([*TABLES[r["experiment"]](r), source(r)]) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# What it costs: bench.py's files in one table


def cost():
    """The text of cost.md: one line for each question that bench.py answers, first the three that README.md shows."""
    bench = {
        what: json.loads((RESULTS / f"bench-{what}-cpu.json").read_text())
        for what in ("project", "step-fp32", "step-bf16", "memory", "padding")
    }
    link = {what: f"[bench-{what}](bench-{what}-cpu.md)" for what in bench}
    times = {r["tasks"]: r["milliseconds"] for r in bench["project"]["results"] if "tasks" in r}
    step = next(r["step_seconds_per_task"] for r in bench["project"]["results"] if "step_seconds_per_task" in r)
    faster = [f"{times[T]['torchjd'] / times[T]['project']:.0f} at T = {T}" for T in (4, 8, 64)]
    parts = [f"{times[T]['project'] / (10 * step * T):.2f} % at T = {T}" for T in (4, 8, 64)]
    steps, ahead, where = [], [], ", ".join(f"[{x}](bench-step-{x}-cpu.md)" for x in ("fp32", "bf16"))
    for dtype, name in (("fp32", "float32"), ("bf16", "bf16")):
        seconds = {r["mode"]: r["seconds"] for r in bench[f"step-{dtype}"]["results"]}
        joint = min(seconds["joint, loop"], seconds["joint, one mixed batch"])
        modes = {"loop": "ortho, loop", "stacked": "ortho, stacked", "joint's loop": "joint, loop"}
        steps.append(f"{name} " + ", ".join(f"{how} {seconds[mode] / joint:.2f}" for how, mode in modes.items()))
        ahead.append(f"{name} {min(x for mode, x in seconds.items() if 'peft' in mode) / joint:.2f}")
    peaks = {r["mode"]: r["peak_bytes"] for r in bench["memory"]["results"] if "mode" in r}
    TP = next(r["rows_bytes"] for r in bench["memory"]["results"] if "rows_bytes" in r)  # stands from step to step
    loop = peaks["ortho, loop"] - peaks["joint, loop"] + TP
    stacked = peaks["ortho, stacked"] - peaks["joint, one mixed batch"] + TP
    memory = f"loop: joint's + {loop / TP:.2f} × 4·T·P bytes; stacked: a mixed batch's + {stacked / TP:.2f} × 4·T·P"
    plain, sorted_ = sorted(bench["padding"]["results"], key=lambda r: r["window"])
    head = ["what", "measured", "where"]
    first = [
        head,
        ["`project()`: share of a RoBERTa-base step", ", ".join(parts), link["project"]],
        ["a step of `ortho` against the faster joint step", "; ".join(steps), where],
        ["peak memory of `ortho`", memory, link["memory"]],
    ]
    then = [
        head,
        ["`project()`: times as fast as `torchjd`'s PCGrad on every factor", ", ".join(faster), link["project"]],
        ["a joint step: times as fast as `transformers` + `peft`", ", ".join(ahead), where],
        [
            "padding, before and after batches of alike lengths",
            f"{100 * plain['padding_all']:.1f} % and {100 * sorted_['padding_all']:.1f} %; tokens per second × "
            f"{sorted_['tokens_per_second'] / plain['tokens_per_second']:.2f}",
            link["padding"],
        ],
    ]
    tables = (["| " + " | ".join(row) + " |" for row in (rows[0], ["---"] * 3, *rows[1:])] for rows in (first, then))
    return "\n\n".join("\n".join(table) for table in tables) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def draw(results):
    """{file name: (checksum of what it shows, matplotlib figure)}"""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams |= {
        "svg.hashsalt": "ortho-lora",
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    made = {"method": schematic(plt)}
    if any(len(x) == wanted for x, wanted in map(pairs_of, CONTRASTS)):
        made["contrasts"] = results["contrasts"], figure_contrasts(plt)
    for name, (cells, tasks) in DIFFERENCES.items():
        units = units_of(RESULTS / name)
        enough = [cell for cell in cells if len(units.get(cell, {}).get("joint", ())) >= ENOUGH]
        there = {cell: units[cell] | beside(cell, units) for cell in enough}
        if there:
            made[name] = results[name], figure_differences(plt, there, tasks)
    return made


# {experiment: (cells in one figure, tasks in its panels)}
DIFFERENCES = {
    "toy": (("p = 0.5, 400 steps, lr 0.008", "p = 0.5, 1600 steps, lr 0.008"), ("", "sst2")),
    "scales": (("W = 10, 400 steps", "W = 10, 1500 steps"), ("", "sst2", "stsb")),
    "glue": (("1500 steps",), ("", "cola", "sst2")),
}


BLUE, RED = "#2b6cb0", "#c53030"
COLORS, MARKERS = ("#0072b2", "#d55e00", "#009e73"), "osD"  # Okabe and Ito's, for all eyes


def schematic(plt):
    """Two gradients in conflict, joint training's step and the projected one: drawn from the formula."""
    g = np.array([[1.0, 0.15], [-0.75, 0.95]])
    dot = g[0] @ g[1]
    v = np.array([g[0] - dot / (g[1] @ g[1]) * g[1], g[1] - dot / (g[0] @ g[0]) * g[0]])
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.3))
    panels = [
        ("two tasks' gradients of one factor:\nmore than 90° apart", g, None),
        ("joint training adds them:\nmuch of both is lost", g, g.sum(0)),
        ("Ortho-LoRA first takes from each\nwhat points against the other", v, v.sum(0)),
    ]
    for axis, (title, pair, total) in zip(axes, panels, strict=True):
        faint = pair is v
        for x, color, name in zip(g, (BLUE, RED), ("$g_1$", "$g_2$"), strict=True):
            axis.annotate(
                "", x, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8, "alpha": 0.3 if faint else 1}
            )
            axis.text(*(x * 1.1), name, color=color, ha="center", va="center", alpha=0.5 if faint else 1)
        if faint:
            for x, old, color, name in zip(v, g, (BLUE, RED), ("$v_1$", "$v_2$"), strict=True):
                axis.annotate("", x, (0, 0), arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.8})
                axis.plot(*zip(old, x, strict=True), color=color, lw=1, ls=":")
                axis.text(*(x * 1.17), name, color=color, ha="center", va="center")
        if total is not None:
            axis.annotate("", total, (0, 0), arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 2.4})
            axis.text(*(total * 1.08 + [0.09, 0.02]), "sum", ha="center", va="center")
        axis.set(xlim=(-1.1, 1.35), ylim=(-0.25, 1.75), aspect="equal", title=title)
        axis.title.set_fontsize(9)
        axis.axis("off")
    figure.tight_layout()
    return "schematic", figure


def figure_differences(plt, cells, tasks):
    """Rows less joint with 95 % intervals, a panel for each task or the average, a colour for each cell."""
    names = dict.fromkeys(r for rows in cells.values() for r in rows if r != "joint" and len(rows[r]) >= ENOUGH)
    height = 1.3 + 0.34 * len(names)
    figure, axes = plt.subplots(1, len(tasks), figsize=(9, height), sharey=True)
    for axis, task in zip(axes, tasks, strict=True):
        for k, (cell, rows) in enumerate(cells.items()):
            axis.plot([], [], MARKERS[k], color=COLORS[k], label=cell)  # for the legend
            for y, row in enumerate(reversed(names)):
                x = differences(values(rows[row], task), values(rows["joint"], task)) if row in rows else []
                if len(x) < ENOUGH:
                    continue
                mean, low, high = interval(x)
                at = y + 0.28 * (0.5 * (len(cells) - 1) - k)
                axis.plot([low, high], [at, at], color=COLORS[k], lw=2, solid_capstyle="butt")
                axis.plot(mean, at, MARKERS[k], color=COLORS[k], ms=5)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=task or "average", xlabel="points above joint", yticks=range(len(names)))
        axis.margins(y=0.15)
        axis.set_yticklabels(list(reversed(names)))
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="upper center", ncols=len(cells))
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.3 / height))
    return figure


def figure_contrasts(plt):
    """The contrasts that are whole, each by task and on average, with 95 % intervals."""
    whole = [c for c in CONTRASTS if len(pairs_of(c)[0]) == pairs_of(c)[1]]
    figure, axes = plt.subplots(1, len(whole), figsize=(9, 2.6), squeeze=False)
    for axis, c in zip(axes[0], whole, strict=True):
        rows = units_of(RESULTS / c.experiment)[c.cell]
        names = [*entry(next(iter(rows[c.row].values())))["tasks"], ""]
        for y, task in enumerate(reversed(names)):
            mean, low, high = interval(pairs_of(c, task)[0])
            color = COLORS[0] if task else COLORS[1]
            axis.plot([low, high], [y, y], color=color, lw=2, solid_capstyle="butt")
            axis.plot(mean, y, MARKERS[0 if task else 2], color=color, ms=5)
        axis.axvline(0, color="black", lw=0.8)
        axis.set(title=f"{c.row} − {c.base}\n{c.experiment}: {c.cell}", xlabel=f"points of {c.score}")
        axis.set(yticks=range(len(names)), yticklabels=[name or "average" for name in reversed(names)])
        axis.title.set_fontsize(8)
    figure.tight_layout()
    return figure


def checksum(shown):
    return hashlib.sha256(json.dumps(shown).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------


def first_table(text):
    """A text as far as the end of its first table."""
    lines = text.splitlines()
    start = next(i for i, x in enumerate(lines) if x.startswith("|"))
    end = next((i for i, x in enumerate(lines) if i > start and not x.startswith("|")), len(lines))
    return "\n".join(lines[:end])


def embed(text, page):
    """A page with every block as its file has it. Raises SystemExit: a block without a file, or without an end."""

    def block(match):
        path = ROOT / match[1]
        if not path.exists():
            raise SystemExit(f"report.py: {page.name} has a block of {match[1]}, which is not there")
        shown = path.read_text().strip()
        shown = first_table(shown) if page.parent == ROOT else shown
        folder = os.path.relpath(path.parent, page.parent)
        shown = re.sub(r"\]\((?=[\w.-]+\.md\))", f"]({folder}/", shown)  # links of the file, from where the page is
        return f"<!-- {match[1]} -->\n{shown}\n<!-- end -->"

    starts = len(re.findall(r"<!-- experiments/\S+ -->", text))
    new, count = re.subn(r"<!-- (experiments/\S+\.md) -->\n.*?<!-- end -->", block, text, flags=re.S)
    if count != starts:
        raise SystemExit(f"report.py: {page.name} starts {starts} blocks, of which {count} end")
    return new


def point(text, page):
    """A page with every link to a function, [`name`](file.py#L1), at the line where it stands."""

    def line(match):
        name, file = match[1], match[2]
        lines = (page.parent / file).read_text().splitlines()
        found = [n for n, x in enumerate(lines, 1) if re.match(rf"\s*(def|class) {name.rpartition('.')[2]}\b", x)]
        return f"[`{name}`]({file}#L{found[0]})" if found else match[0]

    return re.sub(r"\[`([\w.]+)`\]\(([\w./]+\.py)#L\d+\)", line, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something differs")
    args = parser.parse_args()
    for package in ["scipy"] + ["matplotlib"] * (not args.check):
        if not importlib.util.find_spec(package):
            parser.error(f"needs {package}, not installed; run pip install -r requirements-dev.txt")
    paths = sorted(RESULTS.glob("*/results.json"))
    wrong = []

    def settle(path, text):
        if args.check and (not path.exists() or path.read_text() != text):
            wrong.append(f"{path.relative_to(ROOT)} differs from the results; run python experiments/report.py")
        elif not args.check:
            path.write_text(text)

    for path in paths:
        settle(path.with_name("results.md"), table(path))
    results = {path.parent.name: json.loads(path.read_text()) for path in paths}
    for folder in sorted(path.parent for path in RESULTS.glob("*/units")):
        results[folder.name] = experiment_table(folder)
        settle(folder / "results.md", results[folder.name])
    results["contrasts"] = contrast_table()
    settle(RESULTS / "contrasts.md", results["contrasts"])
    settle(RESULTS / "budget.md", budget_table())
    settle(RESULTS / "cost.md", cost())
    for page in PAGES:
        settle(page, point(embed(page.read_text(), page), page))
    if args.check:
        shown_figures = {x for page in PAGES for x in re.findall(r"results/(\w+)\.svg\)", page.read_text())}
        for name in sorted(shown_figures):
            figure = RESULTS / f"{name}.svg"
            shown = checksum(results[name]) if name in results else checksum("schematic")
            if not figure.exists() or (shown not in figure.read_text() and name != "demo"):  # that is plot.py's own
                wrong.append(f"{figure.relative_to(ROOT)} differs from the results; run python experiments/report.py")
        print("\n".join(wrong) or "the pages and the tables are as the results have them")
    else:
        for name, (shown, figure) in draw(results).items():
            figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None, "Description": checksum(shown)})
        print(f"wrote {len(results) + 2} tables, the figures, and the blocks of {len(PAGES)} pages")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
