"""Two tasks that contradict each other on real text, and want the same of it otherwise: a folder in GLUE's layout.

    python experiments/flipped.py FOLDER --glue GLUE --share 0.5 --seed 0

A construction, not GLUE. Both tasks ask whether two texts mean the same, of the same mixture: MRPC's sentences, whose
labels are left alone, and QQP's questions, of which half open with "what" or "how". Task A ("mrpc") has their labels;
task B ("qqp") has the labels of these questions turned:

    --share 0     of none: A and B are one task, from different rows
    --share 0.5   of those whose first question opens with "what" or "how"
    --share 1     of all

The rows are the same at every share. A and B train on rows of their own, and are scored on the same texts.
"""

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.checkpoint import BadInput  # noqa: E402
from support.hub import read_splits  # noqa: E402
from support.toy import write_glue  # noqa: E402

TRAIN, VALIDATION = (1800, 1800), (300, 300)  # rows of MRPC, of QQP; for each task
NAMES = {"mrpc": ("sentence1", "sentence2"), "qqp": ("question1", "question2")}  # A, B


def marked(row):
    """Whether the first text opens with "what" or "how"."""
    return row[0].lower().startswith(("what ", "how "))


def draw(rng, rows, count, halves=False):
    """`count` of the rows, which go; with `halves`, as many that are marked as not."""
    groups = [[r for r in rows if marked(r)], [r for r in rows if not marked(r)]] if halves else [list(rows)]
    drawn = []
    for group in groups:
        if len(group) < count // len(groups):
            raise BadInput(f"{count // len(groups)} rows wanted, {len(group)} there: is this the whole of GLUE?")
        drawn += rng.sample(group, count // len(groups))
    for row in drawn:
        rows.remove(row)
    return drawn


def turned(row, share):
    """A row of QQP as task B has it."""
    return (*row[:2], 1 - row[2] if share == 1 or (share == 0.5 and marked(row)) else row[2])


def make(glue, share, seed):
    """{task: {split: [(text, text, label)]}}"""
    rng, rows = random.Random(seed), {}
    for task, columns in NAMES.items():
        for split, data in read_splits(task, glue).items():
            if split in ("train", "validation"):
                rows[task, split] = sorted(set(zip(*(data[name] for name in (*columns, "label")), strict=True)))
    tasks = {task: {} for task in NAMES}
    for split, (of_mrpc, of_qqp) in (("train", TRAIN), ("validation", VALIDATION)):
        for task in NAMES:
            if split == "validation" and task == "qqp":
                continue  # the same texts as A's
            plain = draw(rng, rows["mrpc", split], of_mrpc)
            questions = draw(rng, rows["qqp", split], of_qqp, halves=True)
            order = rng.sample(range(of_mrpc + of_qqp), of_mrpc + of_qqp)
            for name in NAMES if split == "validation" else (task,):
                there = plain + [turned(row, share if name == "qqp" else 0) for row in questions]
                tasks[name][split] = [there[i] for i in order]
    return tasks


def named(tasks):
    """The same with rows as {column: value}, as `write_glue` wants them."""
    columns = {task: (*names, "label") for task, names in NAMES.items()}
    return {
        task: {split: [dict(zip(columns[task], row, strict=True)) for row in rows] for split, rows in splits.items()}
        for task, splits in tasks.items()
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--glue", default="nyu-mll/glue", help="GLUE folder or Hub id [nyu-mll/glue]")
    parser.add_argument("--share", type=float, choices=(0, 0.5, 1), default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    try:
        tasks = make(args.glue, args.share, args.seed)
        write_glue(args.folder, named(tasks), "two tasks made of MRPC and QQP, not GLUE")
    except (BadInput, OSError) as e:
        print(f"flipped.py: {e}", file=sys.stderr)
        return 2
    for task, splits in tasks.items():
        for split, rows in splits.items():
            print(f"{task} {split}: {len(rows)} rows, {sum(r[2] for r in rows) / len(rows):.3f} labelled 1")


if __name__ == "__main__":
    sys.exit(main())
