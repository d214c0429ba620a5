"""Tables and figures out of experiments/results/, and the blocks of both pages that show them.

    python experiments/report.py            writes results.md beside every results.json, figures, the pages' blocks
    python experiments/report.py --check    says where a page or a table differs from the results, and ends with 1

A block stands between <!-- experiments/results/….md --> and <!-- end -->: in experiments/README.md that file, word for
word, up to where it says <!-- more -->; in README.md only as far as the end of its first table. No number of an
experiment stands elsewhere. Figures carry their results' checksum. Needs requirements-dev.txt: intervals are scipy's,
figures matplotlib's.
"""

import argparse
import contextlib
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
    from scipy import stats

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "experiments" / "results"
PAGES = [ROOT / "README.md", ROOT / "experiments" / "README.md"]
sys.path.insert(0, str(ROOT))

from support.table import markdown, mean_and_spread  # noqa: E402

MORE = "<!-- more -->"  # what follows it in a results.md is for neither page

# ---------------------------------------------------------------------------------------------------------------------
# Statistics


def interval(differences, level=0.95):
    """(mean, low, high) of paired differences, (seeds,): Student's t interval, mean ± t s / √n."""
    x = np.asarray(differences, float)
    half = stats.t.ppf((1 + level) / 2, len(x) - 1) * x.std(ddof=1) / math.sqrt(len(x))
    return x.mean(), x.mean() - half, x.mean() + half


def fieller(gain, gap, level=0.95):
    """(low, high) for the ratio of the means of two paired samples, or None where the gap's own interval has 0 in it.

    Fieller's interval: all θ at which the mean of gain - θ gap does not differ from 0, so the roots of
    (ȳ² - t² s_yy/n) θ² - 2 (x̄ȳ - t² s_xy/n) θ + (x̄² - t² s_xx/n), x the gain and y the gap. It is an interval only
    where the first factor is positive: where there is a gap to recover.
    """
    x, y = np.asarray(gain, float), np.asarray(gap, float)
    t2 = stats.t.ppf((1 + level) / 2, len(x) - 1) ** 2 / len(x)
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
    """The recovered share with its interval, or that there is none to speak of."""
    found = fieller(gain, gap)
    if found is None:
        return "no gap to recover"
    return f"{100 * np.mean(gain) / np.mean(gap):.0f} % [{100 * found[0]:.0f}, {100 * found[1]:.0f}]"


def verdict(found, up, down, neither):
    """The words that an interval allows."""
    _, low, high = found
    return up if low > 0 else down if high < 0 else neither


def compared(average, row, base):
    """One line about two rows, as strong as their interval allows."""
    found = interval(average[row] - average[base])
    words = verdict(found, "scores higher than", "scores lower than", "is not shown to differ from")
    return f"- `{row}` {words} `{base}` ({signed(found)} points)."


def source(r):
    """Where numbers come from: the last line of every table."""
    jobs = f"{r['jobs']} runs at a time, " * (r.get("jobs", 1) > 1)
    seeds = r.get("seeds") or r.get("results", {}).get("seeds")
    return (
        f"`{r['command']}`, seeds {', '.join(map(str, seeds))}; {r['minutes']:.0f} minutes of runs, {jobs}"
        f"{r['hardware']} ({r['processor']}), torch {r['torch']}, commit {r['commit']}, {r['date']}."
    )


def averages(runs):
    """{method: {seed: entry}} -> {method: (seeds,)}"""
    return {m: np.array([entry["average"] for entry in seeds.values()]) for m, seeds in runs.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def comparison(r):
    """main, three, balance: every method against joint training, paired by seed."""
    runs = {row: next(iter(methods.values())) for row, methods in r["runs"].items()}
    average, tasks, projected = averages(runs), r["tasks"], ("pcgrad", "ortho")
    gap = average["single"] - average["joint"] if "single" in average else None
    of_gap = ["share of the gap, 95 %"] if gap is not None else []
    rows = [["method", *tasks, "average", "− joint, 95 % interval", *of_gap, "lr"]]
    guess = next(iter(r["majority"].values()))
    rows.append(
        [
            "majority class",
            *(f"{guess[t]:.1f}" for t in tasks),
            f"{np.mean([guess[t] for t in tasks]):.1f}",
            *[""] * (len(rows[0]) - len(tasks) - 2),
        ]
    )
    for row, entries in runs.items():
        gain = average[row] - average["joint"]
        part = [] if gap is None else [share(gain, gap) if row in projected else ""]
        rows.append(
            [
                row,
                *(mean_and_spread([e["scores"][t] for e in entries.values()]) for t in tasks),
                mean_and_spread(average[row]),
                "" if row == "joint" else signed(interval(gain)),
                *part,
                f"{r['chosen'][row]:g}",
            ]
        )
    lines = []
    if gap is not None:
        there = verdict(
            interval(gap),
            "joint training loses to one adapter per task",
            "joint training beats one adapter per task",
            "no difference between joint training and one adapter per task is shown",
        )
        lines.append(f"- The gap: {there} (single − joint {signed(interval(gap))} points).")
    given = [row for row in runs if " at " in row]  # at a rate that was not chosen
    pairs = list(itertools.combinations([row for row in runs if row not in ("head", "single", *given)], 2))
    for base in [row for row in given if row.startswith("joint")]:
        same = [row for row in runs if row != base and r["chosen"][row] == r["chosen"][base] and row != "head"]
        pairs += [(base, row) for row in same]
    lines += [compared(average, row, base) for base, row in pairs]
    seen = [e["conflicts"] for e in runs["ortho" if "ortho" in runs else "ortho, balanced"].values()]
    rates = {pair: 100 * np.mean([c["pairs"][pair] for c in seen]) for pair in seen[0]["pairs"]}
    lines.append(
        f"- Conflicts: {100 * np.mean([c['rate'] for c in seen]):.1f} % of task pairs per factor and step, "
        f"mean cosine {np.mean([c['cosine'] for c in seen]):+.3f}; projection took "
        f"{100 * np.mean([c['removed'] for c in seen]):.0f} % of a task's gradient norm. By pair: "
        + ", ".join(f"{pair} {x:.0f} %" for pair, x in sorted(rates.items(), key=lambda p: -p[1]))
        + "."
    )
    s = r["settings"]
    how = (
        f"{s['steps']} steps of {s['batch-size']} examples per task, at most {s['max-length']} tokens, "
        f"{len(r['seeds'])} seeds (± their standard deviation), the official validation splits. "
    )
    if not any(r["held_out"].values()):
        return [markdown(rows), "\n".join(lines), how + "The learning rate is the main table's for `joint`."]
    how += (
        "Each method's learning rate is the best of three on 300 training rows of each task that were held out, by "
        "half as many steps and one other seed" + ", but where it is given" * bool(given) + "."
    )
    return [markdown(rows), "\n".join(lines), how, MORE, held_out(r)]


def held_out(r):
    """The table that the learning rates were chosen by."""
    rates = sorted({float(rate) for scores in r["held_out"].values() for rate in scores})
    rows = [["held out, average", *(f"{rate:g}" for rate in rates)]]
    for row, scores in r["held_out"].items():
        if not scores:
            continue
        scores = {float(rate): f"{x:.1f}" for rate, x in scores.items()}
        rows.append([row, *(scores.get(rate, "") for rate in rates)])
    return markdown(rows)


def levels(r):
    """{p: {method: {seed: entry}}} of the conflict experiment; "joint at 0.008" is a method of its own."""
    found = {}
    for row, methods in r["runs"].items():
        p, method = row.split(": ")
        found.setdefault(float(p.removeprefix("p = ")), {})[method] = next(iter(methods.values()))
    return found


def conflict(r):
    """The toy grammar: what joint training loses, and what projection brings back, by the share of contradictions."""
    methods = ("single", "joint", "ortho")
    rows = [
        [
            "contradictions",
            *methods,
            "single − joint",
            "ortho − joint",
            "ortho: share of the gap",
            "conflicts",
            "lr of each",
        ]
    ]
    where, lines = {"scores higher than": [], "scores lower than": [], "is not shown to differ from": []}, []
    for p, runs in levels(r).items():
        a = averages(runs)
        gap, gain = a["single"] - a["joint"], a["ortho"] - a["joint"]
        where[verdict(interval(gain), *where)].append(f"p = {p:g}")
        rate = np.mean([e["conflicts"]["rate"] for e in runs["ortho"].values()])
        rows.append(
            [
                f"p = {p:g}",
                *(mean_and_spread(a[m]) for m in methods),
                signed(interval(gap), 1),
                signed(interval(gain), 1),
                share(gain, gap),
                f"{100 * rate:.1f} %",
                " ".join(f"{r['chosen'][f'p = {p:g}: {m}']:g}" for m in methods),
            ]
        )
        for base in [m for m in a if " at " in m]:
            lines += [compared(a, m, base).rstrip(".") + f" at p = {p:g}." for m in ("single", "ortho")]
    words = "; ".join(f"{words} `joint` at {', '.join(at)}" for words, at in where.items() if at)
    return [
        markdown(rows),
        "\n".join([f"- `ortho` {words}.", *lines]),
        f"Averages over four toy tasks, {r['settings']['steps']} steps, {len(r['seeds'])} seeds (± their standard "
        "deviation), 95 % intervals of paired differences in points; each row's rate chosen on 300 held-out rows "
        "of each task by two other seeds. One grammar and one pretrained encoder.",
        MORE,
        held_out(r),
    ]


def matters(r):
    """Variants of the method on the toy grammar, each against joint training in its own setting."""
    rows = [["variant", "average", "− joint, 95 % interval", "conflicts", "norm removed", "lr"]]
    average = {row: averages(methods).popitem()[1] for row, methods in r["runs"].items()}
    for row, x in average.items():
        base = next((f"joint, {other}" for other in ("SGD", "batch 4") if row.endswith(other)), "joint")
        seen = [e["conflicts"] for e in next(iter(r["runs"][row].values())).values() if "conflicts" in e]
        gain = "" if row == base else signed(interval(x - average[base])) + f" ({base})" * (base != "joint")
        rows.append(
            [
                row,
                mean_and_spread(x),
                gain,
                f"{100 * np.mean([c['rate'] for c in seen]):.1f} %" if seen else "",
                f"{100 * np.mean([c['removed'] for c in seen]):.1f} %" if seen else "",
                f"{r['chosen'][row]:g}",
            ]
        )
    gap = average["single"] - average["joint"]
    shares = [
        f"`{row}` {share(average[row] - average['joint'], gap)}"
        for row in ("ortho", "pcgrad", "joint, balanced", "ortho, balanced")
    ]
    pairs = [
        ("ortho", "pcgrad"),
        ("joint, balanced", "ortho"),
        ("ortho, balanced", "joint, balanced"),
        ("joint, balanced", "single"),
    ]
    return [
        markdown(rows),
        "\n".join(
            [
                f"- Share of the gap, single − joint {signed(interval(gap))}: {', '.join(shares)}.",
                *(compared(average, row, base) for row, base in pairs),
            ]
        ),
        f"The toy grammar at p = 0.5, {r['settings']['steps']} steps, {len(r['seeds'])} seeds (± their standard "
        "deviation); each variant against joint training with the same optimizer and batches (named where it is "
        "not plain `joint`), its rate chosen on 300 held-out rows of each task by two other seeds.",
        MORE,
        held_out(r),
    ]


def off_diagonal(x):
    x = np.asarray(x)
    return x[..., ~np.eye(x.shape[-1], dtype=bool)].mean(-1)


def on_diagonal(x):
    return np.diagonal(np.asarray(x), axis1=-2, axis2=-1).mean(-1)


def noise(r):
    """Two batches of one task against each other, beside batches of two tasks."""
    rows = [
        [
            "rank",
            "conflicts: two tasks",
            "one task, two batches",
            "cosine: two tasks",
            "one task, two batches",
            "two tasks, without noise",
        ]
    ]
    for rank, found in r["ranks"].items():
        rates, cosines = np.array(found["rates"]), np.array(found["cosines"])  # (blocks, T, T)
        mean = cosines.mean(0)
        rows.append(
            [
                rank,
                f"{100 * off_diagonal(rates).mean():.1f} %",
                f"{100 * on_diagonal(rates).mean():.1f} %",
                f"{off_diagonal(mean):+.4f}",
                f"{on_diagonal(mean):+.4f}",
                f"{off_diagonal(clean(mean)):+.2f}",
            ]
        )
    eight = r["ranks"]["8"]
    by_factor = []
    for f in "AB":
        chosen = np.array([name.endswith("." + f) for name in eight["blocks"]])
        rates = np.array(eight["rates"])[chosen]
        by_factor.append(
            f"{f}: {100 * off_diagonal(rates).mean():.1f} % between tasks, "
            f"{100 * on_diagonal(rates).mean():.1f} % within one"
        )
    time = np.array(eight["rates by time"])
    fifths = ", ".join(f"{100 * off_diagonal(x):.1f} / {100 * on_diagonal(x):.1f}" for x in time)
    mean, names = clean(np.array(eight["cosines"]).mean(0)), r["tasks"]
    pairs = [
        f"{names[i]}-{names[j]} {(mean[i, j] + mean[j, i]) / 2:+.2f}"
        for i, j in itertools.combinations(range(len(names)), 2)
    ]
    s = r["settings"]
    return [
        markdown(rows),
        "- At rank 8, " + "; ".join(by_factor) + ".\n"
        f"- Over the fifths of training, between tasks / within one: {fifths} %.\n"
        f"- Cosines without noise, by pair: {', '.join(pairs)}.",
        f"Joint training of four tasks, {s['steps']} steps, two batches of {s['batch_size']} per task and step, at "
        f"most {s['max_length']} tokens, one seed. A conflict is a negative dot product within one factor, 50 % "
        "for unrelated directions. Without noise: c_ij / √(c_ii c_jj), c the mean cosine of two independent "
        "batches.",
    ]


def clean(c):
    """Cosines (T, T) between independent halves, freed of the noise that shows on the diagonal; NaN where all is."""
    size = np.sqrt(np.clip(np.diagonal(c), 0, None))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (c + c.T) / 2 / np.outer(size, size)


def given_rates(r):
    """The rates in the rows' flags."""
    found = dict.fromkeys(
        f"{row.split(': ')[0]} `{flags[flags.index('--lr') :].partition(' --tasks')[0]}`"
        for row, flags in r["rows"].items()
    )
    return ", ".join(found)


def lori(r):
    """LoRA and LoRI, alone and merged."""
    runs = {m: seeds for methods in r["runs"].values() for m, seeds in methods.items()}
    average, tasks = averages(runs), r["tasks"]
    rows = [["method", *tasks, "average", "− single, 95 % interval", "trained"]]
    guess = next(iter(r["majority"].values()))
    rows.append(
        ["majority class", *(f"{guess[t]:.1f}" for t in tasks), f"{np.mean([guess[t] for t in tasks]):.1f}", "", ""]
    )
    for m, entries in runs.items():
        scores = (mean_and_spread([e["scores"][t] for e in entries.values()]) for t in tasks)
        rows.append(
            [
                m,
                *scores,
                mean_and_spread(average[m]),
                "" if m == "single" else signed(interval(average[m] - average["single"]), 1),
                f"{next(iter(entries.values()))['adapter_parameters']:,}",
            ]
        )
    cosines = []
    for m, entries in runs.items():
        if m.endswith("-merged"):
            below = np.tril_indices(len(tasks), -1)
            found = np.abs([np.array(e["cosines"])[below] for e in entries.values()])
            cosines.append(f"{m} {found.mean():.3f} ({found.max():.3f})")
    s = r["settings"]
    pairs = [("lori-d", "single"), ("lori-s", "single"), ("lori-s", "lori-d"), ("lori-s-merged", "lora-merged")]
    return [
        markdown(rows),
        "\n".join(
            [
                *(compared(average, row, base) for row, base in pairs),
                f"- |cosine| between the merged deltas, on average (at most): {', '.join(cosines)}.",
            ]
        ),
        f"{s['steps']} steps of {s['batch-size']} examples, at most {s['max-length']} tokens, {len(r['seeds'])} "
        f"seeds (± their standard deviation). Rates given, not chosen here: {given_rates(r)}.",
    ]


def continual(r):
    """What is left of each task after the others."""
    rows, lost = [["order", "method", "average at the end", "forgetting", "overlap of masks"]], {}
    for row, methods in r["runs"].items():
        order = row.split(": ")[1].replace(",", ", ")
        for m, entries in methods.items():
            shared = [e["overlap"] for e in entries.values() if "overlap" in e]
            lost.setdefault(order, {})[m] = np.array([e["forgetting"] for e in entries.values()])
            rows.append(
                [
                    order,
                    {"single": "LoRA"}.get(m, m),
                    mean_and_spread([*averages({m: entries})[m]]),
                    mean_and_spread([e["forgetting"] for e in entries.values()]),
                    f"{np.mean(shared):.3f}" if shared else "",
                ]
            )
    s, lines = r["settings"], []
    for order, x in lost.items():
        found = interval(x["lori-s"] - x["single"])
        words = verdict(found, "forgets more than", "forgets less than", "is not shown to forget less or more than")
        lines.append(f"- {order}: `lori-s` {words} LoRA ({signed(found)} points).")
    return [
        markdown(rows),
        "\n".join(lines),
        f"{s['steps']} steps of {s['batch-size']} examples for each task, at most "
        f"{s['max-length']} tokens, {len(r['seeds'])} seeds (± their standard deviation). Forgetting: a task's "
        "score after its own stage, less that at the end, averaged over all but the last. Rates given, not chosen "
        f"here: {given_rates(r)}.",
    ]


def demo(r):
    """The demo's own report, without its heading."""
    return [r["table"].split("\n", 1)[1].strip()]


def trust(r):
    """Kills and damaged files: the last lines of what was run."""
    lines = []
    for part in (part for part in r["tried"] if "kills.py" in part["command"]):
        mode = re.search(r"--mode (\w+)", part["command"])
        runs, phases = part["output"].strip().splitlines()[-2:]
        how = f", {mode[1]}" if mode else ""
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


TABLES = {
    "main": comparison,
    "three": comparison,
    "balance": comparison,
    "conflict": conflict,
    "matters": matters,
    "noise": noise,
    "lori": lori,
    "continual": continual,
    "demo": demo,
    "trust": trust,
}


def table(path):
    """The text of results.md for a results.json."""
    r = json.loads(path.read_text())
    parts = TABLES[r["experiment"]](r)
    parts.insert(parts.index(MORE) if MORE in parts else len(parts), source(r))
    return "\n\n".join(parts) + "\n"


# ---------------------------------------------------------------------------------------------------------------------
# What it costs: bench.py's files in one table


def cost(device="cpu"):
    """The text of cost.md: one line for each question that bench.py answers, first the three that README.md shows."""
    bench = {
        what: json.loads((RESULTS / f"bench-{what}-{device}.json").read_text())
        for what in ("project", "step-fp32", "step-bf16", "memory", "padding")
    }
    link = {what: f"[bench-{what}](bench-{what}-{device}.md)" for what in bench}
    times = {r["tasks"]: r["milliseconds"] for r in bench["project"]["results"] if "tasks" in r}
    step = next(r["step_seconds_per_task"] for r in bench["project"]["results"] if "step_seconds_per_task" in r)
    faster = [f"{times[T]['torchjd'] / times[T]['project']:.0f} at T = {T}" for T in (4, 8, 64)]
    parts = [f"{times[T]['project'] / (10 * step * T):.2f} % at T = {T}" for T in (4, 8, 64)]
    rows = []
    for dtype, name in (("fp32", "float32"), ("bf16", "bf16")):
        seconds = {r["mode"]: r["seconds"] for r in bench[f"step-{dtype}"]["results"]}
        joint = min(seconds["joint, loop"], seconds["joint, one mixed batch"])
        own = [f"{how} {seconds[f'ortho, {how}'] / joint:.3f}" for how in ("loop", "stacked")]
        own.append(f"joint's own loop {seconds['joint, loop'] / joint:.3f}")
        rows.append([f"a step of `ortho` against the faster joint step, {name}", ", ".join(own), link[f"step-{dtype}"]])
        theirs = min(x for mode, x in seconds.items() if "peft" in mode)
        rows.append(
            [
                f"a joint step: times as fast as `transformers` + `peft`, {name}",
                f"{theirs / joint:.2f}",
                link[f"step-{dtype}"],
            ]
        )
    peaks = {r["mode"]: r["peak_bytes"] for r in bench["memory"]["results"] if "mode" in r}
    TP, stands = next((r["rows_bytes"], r["standing_bytes"]) for r in bench["memory"]["results"] if "rows_bytes" in r)
    loop = peaks["ortho, loop"] - peaks["joint, loop"] + stands
    stacked = (peaks["ortho, stacked"] + stands) / peaks["joint, one mixed batch"]
    plain, sorted_ = sorted(bench["padding"]["results"], key=lambda r: r["window"])
    head = ["what", "measured", "where"]
    first = [
        head,
        ["`project()`: share of a RoBERTa-base step", ", ".join(parts), link["project"]],
        rows[0],
        [
            "peak memory of `ortho` beyond joint",
            f"loop {loop / TP:.2f} × 4·T·P bytes, stacked × {stacked:.3f}",
            link["memory"],
        ],
    ]
    then = [
        head,
        ["`project()`: times as fast as `torchjd`'s PCGrad on every factor", ", ".join(faster), link["project"]],
        *rows[1:],
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
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "font.family": "sans-serif",
        "figure.dpi": 100,
    }
    made = {"method": schematic(plt)}
    for name, figure in (("main", figure_main), ("conflict", figure_conflict), ("noise", figure_noise)):
        if name in results:
            made[name] = figure(plt, results[name])
    return made


BLUE, RED, GREY, GREEN = "#2b6cb0", "#c53030", "#a0aec0", "#2f855a"


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


def figure_main(plt, r):
    """Every seed's difference from joint training, with its interval."""
    average = averages({row: next(iter(methods.values())) for row, methods in r["runs"].items()})
    methods = [m for m in ("single", "pcgrad", "ortho") if m in average]
    figure, axis = plt.subplots(figsize=(6.5, 2.3))
    for y, m in enumerate(reversed(methods)):
        x = average[m] - average["joint"]
        mean, low, high = interval(x)
        axis.plot([low, high], [y, y], color=BLUE, lw=2.5, solid_capstyle="butt")
        axis.plot(x, np.full(len(x), y + 0.22), "o", color=GREY, ms=4)
        axis.plot(mean, y, "o", color=BLUE, ms=7)
    axis.axvline(0, color="black", lw=0.8)
    axis.set_yticks(range(len(methods)), list(reversed(methods)))
    axis.set(
        ylim=(-0.5, len(methods) - 0.3),
        xlabel="points above joint training, average of the tasks: each seed, their mean, its 95 % interval",
    )
    axis.xaxis.label.set_fontsize(9)
    figure.tight_layout()
    return r, figure


def figure_conflict(plt, r):
    """The gap, and what is left of it, against the share of contradictions."""
    p = list(levels(r))
    figure, axis = plt.subplots(figsize=(6.5, 2.8))
    for method, color, name in (("single", RED, "single − joint: the gap"), ("ortho", BLUE, "ortho − joint")):
        found = np.array([interval(averages(m)[method] - averages(m)["joint"]) for m in levels(r).values()])
        axis.fill_between(p, found[:, 1], found[:, 2], color=color, alpha=0.2, lw=0)
        axis.plot(p, found[:, 0], "o-", color=color, ms=4, label=name)
    for x, runs in levels(r).items():
        a = averages(runs)
        for base in [m for m in a if " at " in m]:
            for method, color in (("single", RED), ("ortho", BLUE)):
                axis.plot(x, (a[method] - a[base]).mean(), "o", color=color, mfc="white", ms=5)
    axis.plot([], [], "o", color="black", mfc="white", ms=5, label="the same, all at one learning rate")
    axis.axhline(0, color="black", lw=0.8)
    axis.set(xlabel="share p of traits on which the toy tasks contradict each other", ylabel="points", xticks=p)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    return r, figure


def figure_noise(plt, r):
    """Conflict rates by layer and factor: two tasks, and one task against itself."""
    eight = r["ranks"]["8"]
    rates, layers = np.array(eight["rates"]), {}
    for i, name in enumerate(eight["blocks"]):
        layers.setdefault((name[-1], int(re.search(r"\.(\d+)\.", name)[1])), []).append(i)
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 2.5), sharey=True)
    for axis, factor in zip(axes, "AB", strict=True):
        numbers = sorted(number for f, number in layers if f == factor)
        for values, color, name in (
            (off_diagonal(rates), RED, "two tasks"),
            (on_diagonal(rates), GREY, "one task, two batches"),
        ):
            axis.plot(
                numbers, [100 * values[layers[factor, n]].mean() for n in numbers], "o-", color=color, ms=4, label=name
            )
        axis.axhline(50, color="black", lw=0.8, ls=":")
        axis.set(title=f"factor {factor}", xlabel="layer", xticks=numbers, ylim=(0, 60))
    axes[0].set_ylabel("pairs in conflict, %")
    axes[0].legend(frameon=False, fontsize=9, loc="lower left")
    figure.tight_layout()
    return r, figure


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
        shown = path.read_text().partition(MORE)[0].strip()
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
    settle(RESULTS / "cost.md", cost())
    for page in PAGES:
        settle(page, point(embed(page.read_text(), page), page))
    results = {path.parent.name: json.loads(path.read_text()) for path in paths}
    if args.check:
        shown_figures = {x for page in PAGES for x in re.findall(r"results/(\w+)\.svg\)", page.read_text())}
        for name in sorted(shown_figures):
            figure = RESULTS / f"{name}.svg"
            shown = checksum(results[name]) if name in results else checksum("schematic")
            if not figure.exists() or shown not in figure.read_text():
                wrong.append(f"{figure.relative_to(ROOT)} differs from the results; run python experiments/report.py")
    else:
        for name, (shown, figure) in draw(results).items():
            figure.savefig(RESULTS / f"{name}.svg", metadata={"Date": None, "Description": checksum(shown)})
    print(
        "\n".join(wrong)
        or (
            "the pages and the tables are as the results have them"
            if args.check
            else f"{len(paths)} tables, and the blocks of {len(PAGES)} pages"
        )
    )
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
