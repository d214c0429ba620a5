"""A picture of a run: what each task learned on the way, by method, and what the projection did.

    python experiments/plot.py OUT             writes OUT/plot.svg; OUT is train.py's, finished or still going
    python experiments/plot.py OUT --file F    or any file that matplotlib can write: F.png, F.pdf

The first row has each task's score on the validation split, on the way where the run had --eval-every, and at its end;
the second its training loss. The third is about one projected method (--method): each task's effective weight, the
length of its gradient, and how often two tasks conflict, by layer and factor. Lines are means over the seeds, bands
their range. Needs matplotlib, of requirements-dev.txt.
"""

import argparse
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.checkpoint import BadInput, read_json  # noqa: E402
from support.table import seed_folders  # noqa: E402

# Okabe and Ito's colours and two of Tol's, which all eyes tell apart, and a dash for each, which print does: as many
# as there are tasks, or methods that are trained.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#882255", "#999933")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (3, 1, 1, 1)), (0, (1, 1)), (0, (5, 4)), (0, (8, 2)))

# ---------------------------------------------------------------------------------------------------------------------
# Reading


def logs_of(out, about):
    """{method: {seed: {task: [log entries]}}} of what has been logged."""
    found = {}
    for method, row in about["methods"].items():
        for seed, folder in seed_folders(out, method).items():
            for task in about["tasks"]:
                path = (folder / task if row["own"] else folder) / "log.jsonl"
                if path.exists():
                    lines = [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
                    found.setdefault(method, {}).setdefault(seed, {})[task] = [json.loads(line) for line in lines]
    return found


def results_of(out, about, method):
    """{seed: {task: result.json}} of what has finished."""
    found = {}
    for seed, folder in seed_folders(out, method).items():
        for task in about["tasks"]:
            path = (folder / task if about["methods"][method]["own"] else folder) / "result.json"
            if path.exists():
                found.setdefault(seed, {})[task] = read_json(path)
    return found


def curve(seeds, task, of):
    """(steps, values of each seed (seeds, steps)) of what `of` finds in a log entry, where all seeds have it."""
    found = []
    for entries in seeds.values():
        there = {e["step"] + 1: of(e, task) for e in entries.get(task, ()) if of(e, task) is not None}
        found.append(there)
    steps = sorted(set.intersection(*map(set, found))) if found else []
    return np.array(steps), np.array([[there[step] for step in steps] for there in found])


def smoothed(values, width=5):
    """A running mean along the last axis, shorter at the ends."""

    def sums(row):  # of the `width` around each, or as many as there are
        return np.convolve(row, np.ones(width))[width // 2 :][: len(row)]

    return np.array([sums(row) for row in values]) / sums(np.ones(values.shape[1]))


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def draw_curve(axis, steps, values, k, label):
    if len(steps):
        axis.plot(steps, values.mean(0), color=COLORS[k], ls=DASHES[k], lw=1.6, label=label)
        if len(values) > 1:
            axis.fill_between(steps, values.min(0), values.max(0), color=COLORS[k], alpha=0.12, lw=0)


def logarithmic(axis):
    """A log scale with ticks that read as numbers: 0.5, 1, 2."""
    from matplotlib import ticker

    axis.set_yscale("log")
    axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(ticker.NullLocator())


def score_and_loss(axes, task, logs, results, methods):
    """A task's two panels."""
    for k, method in enumerate(methods):
        seeds = logs.get(method, {})
        steps, values = curve(seeds, task, lambda e, t: e.get("scores", {}).get(t))
        draw_curve(axes[0], steps, values, k, method)
        ends = [found[task]["tasks"][task]["score"] for found in results[method].values() if task in found]
        last = max((e["step"] + 1 for entries in seeds.values() for e in entries.get(task, ())), default=0)
        if ends and (not len(steps) or steps[-1] < last):  # not of --eval-every
            axes[0].plot(last, np.mean(ends), "o", color=COLORS[k], ms=5, label=None if len(steps) else method)
        steps, values = curve(seeds, task, lambda e, t: e.get("loss", {}).get(t))
        if len(steps):
            draw_curve(axes[1], steps, smoothed(values), k, method)
    axes[0].set(title=task, ylabel="score on validation")
    axes[1].set(xlabel="step", ylabel="training loss")
    logarithmic(axes[1])


def weights_and_norms(axes, tasks, logs, results, share):
    """A projected method's effective weights, from its log, and gradient norms, of which it has fifths.

    share: what the rows have of a gradient, 1 / T with --combine mean. Its length is that of the whole."""
    norms = [next(iter(found.values()))["conflicts"]["fifths"]["norms"] for found in results.values() if found]
    end = max((e["step"] + 1 for seed in logs.values() for e in next(iter(seed.values()))), default=1)
    for k, task in enumerate(tasks):
        steps, values = curve(logs, task, lambda e, t: e.get("effective", {}).get(t))
        if len(steps):
            draw_curve(axes[0], steps, smoothed(values) * share, k, task)
        values = np.array([x[task] for x in norms]) / share  # (seeds, fifths)
        if values.size:
            middles = (np.arange(values.shape[1]) + 0.5) * end / values.shape[1]
            draw_curve(axes[1], middles, values, k, task)
    axes[0].axhline(1, color="grey", lw=0.8)
    axes[0].set(xlabel="step", ylabel="effective weight (joint: 1)")
    axes[1].set(xlabel="step", ylabel="length of the gradient")
    for axis in axes:
        logarithmic(axis)


def conflict_rates(axis, results):
    """How often pairs conflict, by layer and factor."""
    blocks = [next(iter(found.values()))["conflicts"]["blocks"] for found in results.values() if found]
    for k, factor in enumerate("AB"):
        rates = {}
        for name, (rate, *_) in ((n, x) for found in blocks for n, x in found.items()):
            layer = re.search(r"\.(\d+)\.", name)
            if layer and name.endswith("." + factor):
                rates.setdefault(int(layer[1]), []).append(100 * rate)
        layers = sorted(rates)
        if layers:
            axis.plot(layers, [np.mean(rates[n]) for n in layers], "os"[k], color=COLORS[k], label=f"factor {factor}")
            axis.set_xticks(layers)
    axis.axhline(50, color="grey", lw=0.8)
    axis.set(xlabel="layer", ylabel="pairs in conflict, %", ylim=(0, 100))
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False, fontsize=8)


def draw(out, method=""):
    """The figure of a run. Raises BadInput: no run there, a method that it has not."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    if not (out / "settings.json").exists():
        raise BadInput(f"{out} has no settings.json: it is no out folder of train.py")
    about = read_json(out / "settings.json")
    logs, tasks = logs_of(out, about), about["tasks"]
    if not logs:
        raise BadInput(f"{out}: nothing has been logged there yet")
    methods = [m for m in logs if m in about["methods"]]
    projected = [m for m in methods if about["methods"][m]["project"]]
    if method and method not in projected:
        raise BadInput(
            f"--method {method}: {out} has no such projected method; it has {', '.join(projected) or 'none'}"
        )
    method = method or ("ortho" if "ortho" in projected else (projected or [""])[0])
    results = {m: results_of(out, about, m) for m in methods}
    rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "plot"})
    figure = Figure(figsize=(2.7 * max(3, len(tasks)), 7.2 if method else 5.0), layout="constrained")
    parts = figure.subfigures(2, 1, height_ratios=[2, 1.15]) if method else [figure]
    axes = parts[0].subplots(2, len(tasks), sharex=True, squeeze=False)
    for column, task in zip(axes.T, tasks, strict=True):
        score_and_loss(column, task, logs, results, methods)
    for axis in axes[:, 1:].flat:
        axis.set_ylabel("")
    if about["settings"].get("holdout"):
        axes[0, 0].set_ylabel("score on held-out rows")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    parts[0].legend(handles, labels, loc="outside upper center", ncols=len(methods), frameon=False)
    if method:
        below = parts[1].subplots(1, 3)
        share = 1 / len(tasks) if about["settings"].get("combine") == "mean" else 1
        weights_and_norms(below[:2], tasks, logs[method], results[method], share)
        if about["settings"].get("balance") or about["methods"][method].get("balance"):  # the rows are scaled ones
            below[0].set_ylabel("weight after balancing")
            below[1].set_ylabel("length after balancing")
        handles, labels = below[0].get_legend_handles_labels()
        title = f"{method}: what the projection does"
        parts[1].legend(handles, labels, loc="outside upper center", ncols=len(tasks), frameon=False, title=title)
        conflict_rates(below[2], results[method])
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the out folder of a run")
    parser.add_argument("--method", default="", help="the projected method of the third row [ortho, or the first]")
    parser.add_argument("--file", type=Path, help="where to write [OUT/plot.svg]")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("matplotlib"):
        parser.error("needs matplotlib, not installed; run pip install -r requirements-dev.txt")
    try:
        path, figure = args.file or args.out / "plot.svg", draw(args.out, args.method)
        kinds = figure.canvas.get_supported_filetypes()
        if path.suffix[1:] not in kinds:
            raise BadInput(
                f"--file {path}: matplotlib writes {', '.join(kinds)}, not {path.suffix or 'without a suffix'}"
            )
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    except (BadInput, OSError) as e:
        print(f"plot.py: {e}", file=sys.stderr)
        return 2
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
