"""Shams: what is left of Ortho-LoRA's gain if a step's own conflicts stay? train.py, with the projection replaced.

    python experiments/controls.py --methods ortho --control agree …      the other flags are train.py's
    python experiments/controls.py …                                      no sham: as train.py trains

They replace `ortholora.projection_coefficients`, and keep what it does to the lengths of gradients:

    agree     of the pairs that agree, instead: v_i = g_i; where <v_i, g_j> > 0: v_i <- v_i + <v_i, g_j> / |g_j|^2 g_j.
              The short gradient is raised most, and nothing is made orthogonal. For two tasks that agree as often as
              not, weights are as large as ortho's; for more, what is added is added to, and they are larger
    late      C of the step before, on this step's gradients; at the first step, the identity. It resolves what conflict
              two steps have in common, and not the batch's own
    shuffled  each block's lengths with the angles of the block half the depth away, A's of an A, B's of a B: as many
              conflicts, and weights alike. It resolves what conflict blocks have in common, and not the block's own

Where ortho is better than joint, and each sham as good as ortho, the weights suffice. A difference from a sham that is
not shown says nothing by itself: its interval does. Into OUT/losses.json goes what scores are too coarse to tell: each
adapter's loss on the validation split, and the share of its commonest prediction (near 1: it has collapsed).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import ortholora  # noqa: E402
import train  # noqa: E402
from evaluate import load_tuned, logits_of  # noqa: E402
from support import runs  # noqa: E402
from support.checkpoint import BadInput, read_json, write_text  # noqa: E402

projection_coefficients = ortholora.projection_coefficients


def agree(gram, order):
    """C of a Gram matrix whose products between tasks have the other sign."""
    turned = -gram
    turned.diagonal(dim1=1, dim2=2).neg_()
    return projection_coefficients(turned, order)


def late():
    """A new `late`: it begins with the identity, and then is one step behind."""
    before = []

    def coefficients(gram, order):
        before.append(projection_coefficients(gram, order))
        return before.pop(0) if len(before) > 1 else projection_coefficients(gram, order[:, :0])

    return coefficients


def shuffled(gram, order):
    """C of the blocks' lengths and the angles of others: block b of k has those of b - 2 round(k / 4), mod k.

    Blocks come by size, those of one size as given: A, B, A, B, ... of square layers, so that an A gets an A's.
    """
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    lengths = norms[:, :, None] * norms[:, None]  # (blocks, T, T)
    cosines = (gram / lengths).nan_to_num(0.0)  # of a zero gradient
    return projection_coefficients(cosines.roll(2 * round(len(gram) / 4), 0) * lengths, order)


@dataclass
class Settings(train.Settings):
    control: str = train.setting(
        "", "the sham in the projection's place: agree, late or shuffled", ["", "agree", "late", "shuffled"]
    )


def check(s, given):
    """What the shams can't do. Raises BadInput."""
    methods = train.listed(s.methods, "methods")
    if s.control and not all(train.METHODS[m].project for m in methods):
        raise BadInput(
            f"--control {s.control} with --methods {s.methods}: it stands in for a projection; give methods with one"
        )
    if s.control and s.sequential:
        raise BadInput(f"--control {s.control} with --sequential, which does not use what it replaces: leave one out")
    if s.control == "shuffled" and (
        s.unit != "tensor" or s.factors != "AB" or s.targets or not {"ortho", "balanced"} >= set(methods)
    ):
        raise BadInput(
            "--control shuffled is about blocks that are an A or a B of square layers: it needs --methods ortho or "
            "balanced, --unit tensor, --factors AB and the default --targets"
        )
    if s.demo or not {"model", "glue"} <= set(given):
        raise BadInput("give --model and --glue, and no --demo: the demo has workers and seeds of its own")
    if not s.out:
        raise BadInput("give --out FOLDER: losses.json goes there")
    if s.jobs > 1 or runs.WORLD > 1:
        raise BadInput("leave out --jobs and torchrun: a sham is put into one process; several can share an --out")
    if s.control == "late" and ("," in s.seeds + s.methods or s.save_every < 1e6):
        raise BadInput("--control late remembers a step: give one method, one seed, and --save-every 1e9")


# ---------------------------------------------------------------------------------------------------------------------
# Beside the scores


def validation_loss(model, data):
    """(mean loss, share of the commonest prediction) on the validation split.

    The loss is cross-entropy in nats, or squared error over the variance of the training labels, as in training.
    """
    logits, labels = logits_of(model, data.name, data.validation), torch.as_tensor(data.validation_labels)
    if data.regression:
        return F.mse_loss(logits[:, 0], labels.float()).item() / data.label_variance(), 0.0
    return F.cross_entropy(logits, labels).item(), logits.argmax(1).bincount().max().item() / len(labels)


def losses(s):
    """{method: {seed: {task: {"loss", "commonest"}}}} of the finished adapters in --out."""
    encoder, _, tasks = train.load(s)
    found = {}
    for method, finished in read_json(Path(s.out) / "results.json")["methods"].items():
        for seed in finished:
            folder = Path(s.out) / method / f"seed{seed}"
            for data in tasks:
                said = validation_loss(load_tuned(encoder, folder / data.name, data.name), data)
                entry = dict(zip(("loss", "commonest"), said, strict=True))
                found.setdefault(method, {}).setdefault(seed, {})[data.name] = entry
    return found


def main(argv=None, typed=None, script="experiments/controls.py", about=__doc__):
    """typed, script: the command as the user gave it, for the one that goes on. about: the script's --help."""
    argv = sys.argv[1:] if argv is None else argv
    plain, train.Settings = train.Settings, Settings  # so that the flag is parsed, and settings.json binds it
    again, runs.again = runs.again, lambda _, out, demo: again(typed or argv, out, demo, script)
    try:
        given = train.parse(argv, Path(script).name, about)
        s = Settings(**given)
        train.check(s)
        check(s, given)
        if s.control:
            ortholora.projection_coefficients = {"agree": agree, "late": late(), "shuffled": shuffled}[s.control]
        status = train.main(argv)
        if not status:
            with runs.locked(Path(s.out), wait=True):
                write_text(Path(s.out) / "losses.json", json.dumps(losses(s), indent=1) + "\n")
        return status
    except (BadInput, OSError) as e:
        print(f"{Path(script).name}: {e}", file=sys.stderr)
        return 2
    finally:
        train.Settings, ortholora.projection_coefficients, runs.again = plain, projection_coefficients, again


if __name__ == "__main__":
    sys.exit(main())
