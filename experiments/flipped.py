"""Two tasks that contradict each other on real text, and want the same of it otherwise: a folder in GLUE's layout.

    python experiments/flipped.py FOLDER --glue GLUE --share 1 --seed 0
    … --holdout 500     so many training rows, the same of both tasks, in the validation split's place

A construction, not GLUE. Both tasks ask of the same rows whether two texts mean the same: half are STS-B's sentences
(yes from a score of 3.5 on, no up to 2.5, those between are left out), half are QQP's questions. Task A ("mrpc") has
these labels; task B ("qqp") has those of the questions turned for --share 1, and is the same as A for --share 0. In all
four quarters, sentences and questions, yes and no, there are equally many rows (about, with --holdout). Settings are
chosen with --holdout here and not train.py's, which draws rows task by task: what A held out would be mostly among what
B is trained on.
"""

import argparse
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from glue import load_task  # noqa: E402
from support.checkpoint import BadInput  # noqa: E402
from support.toy import write_glue  # noqa: E402

QUARTER = {"train": 2000, "validation": 250}  # rows
NAMES = {"mrpc": ("sentence1", "sentence2", "label"), "qqp": ("question1", "question2", "label")}  # A, B


def similar(score):
    """1 or 0 of a score of STS-B, from 0 to 5, or None for those between."""
    return 1 if score >= 3.5 else 0 if score <= 2.5 else None


def mixture(glue, split, rng):
    """[(text, text, label, is it a question)] in random order."""
    drawn, count = [], QUARTER[split]
    for source in ("stsb", "qqp"):
        data = load_task(source, glue, split)
        rows = sorted({(*texts, label) for texts, label in zip(data.texts, data.labels.tolist(), strict=True)})
        if source == "stsb":
            rows = [(*texts, similar(score)) for *texts, score in rows]
        for label in (0, 1):
            there = [(*row, source == "qqp") for row in rows if row[2] == label]
            if len(there) < count:
                raise BadInput(f"{source} {split}: {count} rows labelled {label} wanted, {len(there)} there")
            drawn += rng.sample(there, count)
    return rng.sample(drawn, len(drawn))


def make(glue, share, seed, holdout=0):
    """{task: {split: [{column: value}]}}"""
    rng, tasks = random.Random(seed), {task: {} for task in NAMES}
    mixtures = {split: mixture(glue, split, rng) for split in QUARTER}
    if not 0 <= holdout < len(mixtures["train"]):
        raise BadInput(f"--holdout {holdout}: there are {len(mixtures['train'])} training rows")
    if holdout:
        mixtures["validation"], mixtures["train"] = mixtures["train"][:holdout], mixtures["train"][holdout:]
    for split, rows in mixtures.items():
        for task, columns in NAMES.items():
            turn = share == 1 and task == "qqp"
            tasks[task][split] = [
                dict(zip(columns, (*texts, 1 - label if turn and question else label), strict=True))
                for *texts, label, question in rows
            ]
    return tasks


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where to write")
    parser.add_argument("--glue", default="nyu-mll/glue", help="GLUE folder or Hub id [nyu-mll/glue]")
    parser.add_argument("--share", type=float, choices=(0, 1), default=1, help="1: turn B's questions; 0: none [1]")
    parser.add_argument("--seed", type=int, default=0, help="of the rows that are drawn [0]")
    parser.add_argument("--holdout", type=int, default=0, help="training rows to score on [0: the validation split's]")
    args = parser.parse_args(argv)
    try:
        tasks = make(args.glue, args.share, args.seed, args.holdout)
        write_glue(args.folder, tasks, "two tasks made of STS-B and QQP, not GLUE")
    except (BadInput, OSError) as e:
        print(f"flipped.py: {e}", file=sys.stderr)
        return 2
    for task, splits in tasks.items():
        for split, rows in splits.items():
            print(f"{task} {split}: {len(rows)} rows, {sum(row['label'] for row in rows)} labelled 1")


if __name__ == "__main__":
    sys.exit(main())
