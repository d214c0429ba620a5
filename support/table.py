"""What a run prints at its end: the table, where gradients conflict, what merging cost.

mean_and_spread, gap_recovered, markdown      numbers -> cells, cells -> an aligned Markdown table
report                                        results.json's and timing.json's contents -> results.md's text
statistics                                    what projections saw, added up -> an entry of results.json
"""

import math

import numpy as np


def share_of_pairs(x):
    """(blocks, T, T), symmetric with an empty diagonal counted -> (blocks,), the mean over pairs i < j."""
    T = x.shape[1]
    return x.triu(1).sum((1, 2)) / max(1, T * (T - 1) // 2)


def statistics(totals, block_names, task_names, steps):
    """Means over the steps: by block [conflict rate, cosine, removed norm], by task pair the conflict rate."""
    rate, cosine, removed = [x.double().cpu() / steps for x in totals]
    columns = [share_of_pairs(rate), share_of_pairs(cosine), removed.mean(1)]
    pairs = {
        f"{a}-{b}": round(rate[:, i, j].mean().item(), 6)
        for i, a in enumerate(task_names)
        for j, b in enumerate(task_names)
        if i < j
    }
    return {
        "rate": round(columns[0].mean().item(), 6),
        "cosine": round(columns[1].mean().item(), 6),
        "removed": round(columns[2].mean().item(), 6),
        "pairs": pairs,
        "blocks": {name: [round(c[b].item(), 6) for c in columns] for b, name in enumerate(block_names)},
    }


def mean_and_spread(values, digits=1):
    """'71.3 ± 0.8' (sample standard deviation), or '71.3' for one value."""
    spread = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{spread}"


def gap_recovered(single, joint, other):
    """How much of the gap between joint and single-task training `other` closes; averages per seed, paired.

    (other - joint) / (single - joint) of the means, with its spread over seeds, where the gap is there: at least 3
    seeds, and a mean of more than twice its standard error. Otherwise the points themselves, and why.
    """
    single, joint, other = (np.asarray(x, float) for x in (single, joint, other))
    gap, gain, n = single - joint, other - joint, len(joint)
    points = f"{gain.mean():+.1f} of {gap.mean():+.1f} points"
    if n < 3:
        return f"{points} ({'one seed' if n == 1 else 'two seeds'})"
    if gap.mean() <= 2 * gap.std(ddof=1) / math.sqrt(n):
        return f"{points} (no gap to recover)"
    share = 100 * gain / gap.mean()
    return f"{share.mean():.0f} ± {share.std(ddof=1):.0f} %"


def summary(method, averages, projected):
    """A method's mean and standard deviation over seeds, and for a projection the gap recovered."""
    own = averages[method]
    found = {"mean": float(np.mean(own)), "std": float(np.std(own, ddof=1)) if len(own) > 1 else None}
    if projected and {"single", "joint"} <= averages.keys():
        found["gap_recovered"] = gap_recovered(averages["single"], averages["joint"], own)
    return found


def markdown(rows):
    """Rows of cells as an aligned Markdown table; the first row is the header, the first column the names."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [
        "| "
        + " | ".join(
            cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        + " |"
        for row in rows
    ]
    rule = "|" + "|".join("-" * (w + 2) if c == 0 else "-" * (w + 1) + ":" for c, w in enumerate(widths)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def table(results, timing, methods):
    """Rows: methods; columns: tasks, average, gap recovered, parameters, time and memory."""
    tasks, runs = results["tasks"], results["methods"]
    rows = [["method", *tasks, "average", "gap recovered", "adapter", "heads", "step time", "memory"]]
    guess = results["majority"]
    rows.append(
        [
            "majority class",
            *(f"{guess[t]['score']:.1f}" for t in tasks),
            f"{np.mean([guess[t]['score'] for t in tasks]):.1f}",
            *[""] * 5,
        ]
    )
    averages = {m: [run["average"] for run in seeds.values()] for m, seeds in runs.items()}
    base = next((m for m in ("joint", *runs) if m in runs), None)
    step = {m: np.mean([t["seconds_per_step"] for t in timing["methods"][m].values()]) for m in runs}
    for method, seeds in runs.items():
        first = next(iter(seeds.values()))
        gap = summary(method, averages, methods[method].project).get("gap_recovered", "—")
        memory = [t["peak_memory_bytes"] for t in timing["methods"][method].values()]
        rows.append(
            [
                method,
                *(mean_and_spread([run["tasks"][t]["score"] for run in seeds.values()]) for t in tasks),
                mean_and_spread(averages[method]),
                gap,
                f"{first['adapter_parameters']:,}",
                f"{first['head_parameters']:,}",
                f"{step[method] / step[base]:.2f}" if step[method] else "—",
                "—" if None in memory else f"{max(memory) / 2**20:,.0f} MiB",
            ]
        )
    return markdown(rows)


def picture(results, method="ortho"):
    """Where conflicts occur: layer x factor, in text; and by task pair."""
    runs = [run["conflicts"] for run in results["methods"].get(method, {}).values() if "conflicts" in run]
    if not runs or len(results["tasks"]) < 2:
        return ""
    rates = {name: np.mean([run["blocks"][name][0] for run in runs]) for name in runs[0]["blocks"]}
    layers, factors = {}, sorted({name.rpartition(".")[2] for name in rates})
    for name, rate in rates.items():
        number = next((part for part in name.split(".") if part.isdigit()), "all")
        layers.setdefault(number, {}).setdefault(name.rpartition(".")[2], []).append(rate)
    lines = [
        f"Where gradients conflict ({method}): share of task pairs at a negative cosine, all steps and seeds",
        "",
        "layer  " + "".join(f"{f:<32}" for f in factors),
    ]
    for number, found in layers.items():
        cells = []
        for factor in factors:
            rate = np.mean(found.get(factor, [0.0]))
            bar = "█" * round(20 * rate) + "·" * (20 - round(20 * rate))
            cells.append(f"{bar} {100 * rate:3.0f} %".ljust(32))
        lines.append(f"{number:>5}  " + "".join(cells))
    pairs = {p: 100 * np.mean([run["pairs"][p] for run in runs]) for p in runs[0]["pairs"]}
    removed = 100 * np.mean([run["removed"] for run in runs])
    lines += [
        "",
        "by task pair: " + ", ".join(f"{p} {v:.0f} %" for p, v in sorted(pairs.items(), key=lambda x: -x[1])),
        f"the projection took {removed:.0f} % of a task's gradient norm, on average",
    ]
    return "\n".join(line.rstrip() for line in lines)


def merges(results, methods):
    """For each merge: the cosines between what was merged, and each task's drop from its own adapter."""
    lines = []
    for method, runs in results["methods"].items():
        if not methods[method].merged:
            continue
        own = results["methods"][methods[method].source]
        cosines = np.abs([run["cosines"] for run in runs.values()])[:, *np.tril_indices(len(results["tasks"]), -1)]
        drops = []
        for task in results["tasks"]:
            lost = [own[seed]["tasks"][task]["score"] - run["tasks"][task]["score"] for seed, run in runs.items()]
            drops.append(f"{task} {mean_and_spread(lost)}")
        lines.append(
            f"{method}: |cosine| between the merged deltas {cosines.mean():.3f}, at most {cosines.max():.3f}; "
            f"drop from the task's own adapter: {', '.join(drops)}"
        )
    return "\n\n".join(lines)


def sequence(results):
    """--continual's table for each method: scores after each stage, and what was forgotten."""
    tasks, parts = results["tasks"], []
    for method, runs in results["methods"].items():
        rows = [[f"{'lora' if method == 'single' else method}, after", *tasks, "average"]]
        for stage, task in enumerate(tasks):
            cells = [mean_and_spread([run["matrix"][stage][t] for run in runs.values()]) for t in range(stage + 1)]
            mean = mean_and_spread([np.mean(run["matrix"][stage]) for run in runs.values()])
            rows.append([task, *cells, *[""] * (len(tasks) - stage - 1), mean])
        lost = f"forgetting {mean_and_spread([run['forgetting'] for run in runs.values()])}"
        shared = [run["overlap"] for run in runs.values() if "overlap" in run]
        parts += [markdown(rows), lost + (f"; overlap of the masks {np.mean(shared):.3f}" if shared else "")]
    return "\n\n".join(parts)


def report(results, timing, methods):
    """results.md, and what the run prints at its end."""
    s, demo = results["settings"], results["demo"]
    what = "the demo: a toy grammar and a tiny encoder, not GLUE" if demo else f"{s['model']} on {s['glue']}"
    seeds = results["seeds"]
    scored = f"{s['holdout']} held-out training rows per task" if s["holdout"] else "the validation split"
    parts = [
        f"## {what[0].upper() + what[1:]}" if demo else f"## {what}",
        f"{s['steps']} steps of {s['batch_size']} examples per task, lr {s['lr']:g}, rank {s['rank']}, on {scored}: "
        + (f"mean ± standard deviation of {len(seeds)} seeds" if len(seeds) > 1 else f"seed {seeds[0]}")
        + f", {s['dtype']} on {timing['hardware']}.",
        sequence(results) if s["continual"] else table(results, timing, methods),
        "A score is the mean of the task's metrics × 100. adapter, heads: trained scalars. step time: relative to "
        + f"{'joint' if 'joint' in results['methods'] else 'the first method'}, all tasks' batches together. memory: "
        + ("the GPU allocator's peak." if "cuda" in timing["device"] else "the process's peak."),
        "" if s["continual"] else merges(results, methods),
        "" if s["continual"] else picture(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"
