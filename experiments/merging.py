"""A method's adapters, trained once and merged at several weights, to choose one by.

    python experiments/merging.py --methods lori-d,lori-d-merged --merge-weights 0.25,0.5,1 --out OUT …

The other flags are train.py's, and so are the runs: OUT/trained has the adapters, OUT/0.25, OUT/0.5, … their merges.
OUT/results.json has the scores of the adapters, and of all merges by names such as "lori-d-merged at 0.25".
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from support import runs  # noqa: E402
from support.checkpoint import BadInput, read_json, write_text  # noqa: E402


def parse(argv):
    """(own flags, train.py's other words). Raises BadInput."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--methods", "--merge-weights", "--out"):
        parser.add_argument(flag, default="")
    own, rest = parser.parse_known_args(argv)
    s = train.Settings(**train.parse([*rest, "--methods", own.methods, "--out", own.out], "merging.py", __doc__))
    train.check(s)
    own.methods, own.out = train.listed(s.methods, "methods"), s.out
    own.merge_weights = train.listed(own.merge_weights, "merge-weights", float)
    if not all(0 < weight <= 1e3 for weight in own.merge_weights):
        raise BadInput(f"--merge-weights {own.merge_weights}: each must be above 0, and at most 1,000")
    if runs.WORLD > 1:
        raise BadInput("leave out torchrun: the merges are made in one process")
    if not own.out:
        raise BadInput("give --out FOLDER")
    taken = [name for name in ("settings.json", "results.json") if (Path(own.out) / name).exists()]
    if taken and not (Path(own.out) / "trained").exists():
        raise BadInput(f"--out {own.out} has another run's {taken[0]}; choose another folder")
    return own, rest


def merge_at(weight, trained, own, rest):
    """Merge at a weight, by a run that finds the adapters there. Returns its exit status."""
    folder = Path(own.out) / f"{weight:g}"
    folder.mkdir(parents=True, exist_ok=True)
    for method in trained:
        if not (folder / method).exists():
            (folder / method).symlink_to(Path("..") / "trained" / method)
    flags = ["--methods", ",".join(own.methods), "--merge-weight", str(weight), "--out", str(folder), "--resume"]
    return train.main([*rest, *flags])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    again, runs.again = runs.again, lambda _, out, demo: again(argv, own.out, demo, "experiments/merging.py")
    try:
        own, rest = parse(argv)
        trained = [m for m in own.methods if not train.METHODS[m].source or train.METHODS[m].own]
        flags = ["--methods", ",".join(trained), "--out", str(Path(own.out) / "trained")]
        if status := train.main([*rest, *flags]):
            return status
        for weight in own.merge_weights:
            if status := merge_at(weight, trained, own, rest):
                return status
        found = read_json(Path(own.out) / "trained" / "results.json")
        for weight in own.merge_weights:
            merged = read_json(Path(own.out) / f"{weight:g}" / "results.json")["methods"]
            found["methods"] |= {f"{m} at {weight:g}": x for m, x in merged.items() if m not in trained}
        write_text(Path(own.out) / "results.json", json.dumps(found, indent=1) + "\n")
    except (BadInput, OSError) as e:
        print(f"merging.py: {e}", file=sys.stderr)
        return 2
    finally:
        runs.again = again


if __name__ == "__main__":
    sys.exit(main())
