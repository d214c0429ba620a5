"""Two changes to the method, tried and not kept unless they win: gradients are first turned into something else.

    python experiments/tries.py --attempt steps --methods ortho --seeds 0 --model MODEL --glue GLUE --out OUT …

The other flags are controls.py's. In the place of --balance, each task's row, (P,), becomes

    steps    the step that Adam would take for that task alone, m / (sqrt(v) + eps), with moments of its own. The sum of
             the projected steps is the adapter's step as it is, beside weight decay; only the heads are still
             AdamW's. (AdaTask, arXiv 2211.15055, has such moments, and no projection.) Nothing is clipped
    running  g_i times the tasks' mean of s over s_i, with s_i^2 the running mean of |g_i|^2, of decay 0.95: balance,
             without forgetting how much shorter than before a task's gradient is in this step
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import controls  # noqa: E402
import train  # noqa: E402
from support.checkpoint import BadInput  # noqa: E402

BETA1, BETA2, EPS, DECAY = 0.9, 0.999, 1e-8, 0.95


def steps():
    """A new function of rows, (T, P), in place, that remembers: Adam's step of every task."""
    m = v = n = 0

    def replace(rows):
        nonlocal m, v, n
        m, v, n = BETA1 * m + (1 - BETA1) * rows, BETA2 * v + (1 - BETA2) * rows.square(), n + 1
        rows.copy_(m / (1 - BETA1**n) / ((v / (1 - BETA2**n)).sqrt() + EPS))

    return replace


def running():
    """A new function of rows, (T, P), in place, that remembers: balance by running norms."""
    squares = n = 0

    def replace(rows):
        nonlocal squares, n
        squares, n = DECAY * squares + (1 - DECAY) * rows.square().sum(1), n + 1
        s = (squares / (1 - DECAY**n)).sqrt()  # (T,)
        rows.mul_((s.mean() / s.where(s > 0, torch.inf))[:, None])

    return replace


class Given(torch.optim.AdamW):
    """AdamW for the heads, the second group; the adapter's .grad is its step already."""

    @torch.no_grad()
    def step(self):
        lr, decay = self.param_groups[0]["lr"], self.param_groups[0]["weight_decay"]
        for p in self.param_groups[0]["params"]:
            p.mul_(1 - lr * decay).sub_(p.grad, alpha=lr)
            p.grad = None
        super().step()


def optimizer_of(method, trained, s):
    """train.py's, made into `Given`."""
    return Given(make_optimizer(method, trained, s).param_groups)


make_optimizer, balance = train.make_optimizer, train.balance


@dataclass
class Settings(controls.Settings):
    attempt: str = train.setting("", "in the place of --balance: steps or running", ["", "steps", "running"])


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--attempt", "--methods", "--seeds"):
        parser.add_argument(flag, default="")
    given, rest = parser.parse_known_args(argv)
    flags, attempt, plain = [], given.attempt, controls.Settings
    controls.Settings = Settings  # so that settings.json binds the flag
    try:
        if attempt:
            if given.methods not in ("joint", "pcgrad", "ortho") or "," in given.seeds:
                raise BadInput(
                    f"--attempt {attempt} remembers a step: give one method, joint, pcgrad or ortho, and one seed"
                )
            if any(word.partition("=")[0] in ("--balance", "--clip", "--save-every") for word in rest):
                raise BadInput(
                    "leave out --balance, --clip and --save-every: --attempt stands in the place of one, and sets two"
                )
            clip = "0" if attempt == "steps" else "1"
            flags = ["--balance", "--save-every", "1e9", "--clip", clip]  # what is remembered is not saved
            train.balance = {"steps": steps, "running": running}.get(attempt, lambda: balance)()
        if attempt == "steps":
            train.make_optimizer = optimizer_of
        return controls.main([*argv, *flags], argv, "experiments/tries.py", __doc__)
    except BadInput as e:
        print(f"tries.py: {e}", file=sys.stderr)
        return 2
    finally:
        controls.Settings, train.make_optimizer, train.balance = plain, make_optimizer, balance


if __name__ == "__main__":
    sys.exit(main())
