"""Run a script with products of bf16 matrices made in float32, for a CPU where they are slow (no AVX-512, say).

    python experiments/bf16.py experiments/controls.py --dtype bf16 …      the flags are the script's

Where the CPU has them, kernels for bf16 sum in float32, too, and round once, at the end. So this is the same arithmetic
but for the order of the sums, which a machine chooses anyway, and far faster than what torch does without them.
reproduce.py runs its units so where torch has no such kernels, and they say so. In this process alone: not for --jobs.
"""

import runpy
import sys
import warnings
from pathlib import Path

import torch

PRODUCTS = {"mm": torch.mm, "addmm": torch.addmm, "bmm": torch.bmm}


def slow_in_bf16():
    """Whether torch has no kernels of its own for products in bf16 on this CPU."""
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def widened(product):
    """aten's `product` of the last two of some matrices: of bf16 ones in float32, then rounded. For a CPU alone."""

    def of(*matrices, **scalars):
        dtypes = {x.dtype for x in matrices}
        wide = [x.float() for x in matrices] if dtypes == {torch.bfloat16} else matrices
        # into a tensor that is given: another operator of aten, which is not replaced, and has torch's own errors
        return product(*wide, **scalars, out=wide[-1].new_empty(0)).to(matrices[-1].dtype)

    return of


def replace():
    """Replace aten's products until the library that is returned is gone."""
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")
        for name, product in PRODUCTS.items():
            library.impl(name, widened(product), "CPU")
    return library


if __name__ == "__main__":
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        print("bf16.py: give a script, and its flags: bf16.py experiments/controls.py …", file=sys.stderr)
        sys.exit(2)
    replaced = replace()
    script = Path(sys.argv[1]).resolve()
    sys.argv = sys.argv[1:]
    sys.path[0] = str(script.parent)  # where the script's own imports are
    runpy.run_path(str(script), run_name="__main__")
