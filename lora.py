"""LoRA by hand: h = W0 x + b + scale * B A x, with W0 and b frozen, A (r, in) and B (out, r) trained.

Hu et al. 2021, arXiv 2106.09685. Needs torch alone and works on any module that calls `nn.Linear` layers inside, a
`transformers` model included (not where a layer's weight is read past its forward, as torch's fused attention does):

    layers = add_lora(model, targets=["query", "value"], r=8, alpha=16)    # freezes the model; {path: LoRALinear}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-4)
    ...
    merge_lora(model)                                                      # plain nn.Linear again, W0 + scale * B A
"""

import contextlib
import math
import re

import torch
from torch import nn
from torch.nn import functional as F


class LoRALinear(nn.Module):
    """A frozen `nn.Linear` and its low-rank update: W0 x + b + scale * B A dropout(x).

    A: (r, in), Kaiming-uniform with a = sqrt(5), so U(-1/sqrt(in), 1/sqrt(in)); B: (out, r), zero: training starts from
    the base layer exactly. scale = alpha / r, or alpha / sqrt(r) with `rslora` (arXiv 2312.03732).
    Raises ValueError: a rank below 1, a dropout outside [0, 1).
    """

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False):
        super().__init__()
        if r < 1 or not 0 <= dropout < 1:
            raise ValueError(f"LoRA needs r >= 1 and 0 <= dropout < 1, got r={r}, dropout={dropout}")
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # what trains is never in half precision
        like = {"device": base.weight.device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.tasks = None  # while `per_task` lasts: (every task's A, every task's B, sizes)
        self.train(base.training)

    def forward(self, x):  # (..., in) -> (..., out)
        A, B, sizes = self.tasks or (self.A, self.B, None)
        low = linear(F.dropout(x, self.dropout, self.training), A.to(x.dtype), sizes)  # (..., r)
        return self.base(x) + linear(self.scale * low, B.to(x.dtype), sizes)

    def delta(self):
        """The change of W0: scale * B A, (out, in)."""
        return self.scale * self.B @ self.A

    @torch.no_grad()
    def merged(self):
        """A plain `nn.Linear` with weight W0 + scale * B A, in the base's dtype. This layer is left as it is."""
        linear = nn.Linear(self.base.in_features, self.base.out_features, self.base.bias is not None, device="meta")
        linear.weight = nn.Parameter((self.base.weight + self.delta()).to(self.base.weight.dtype), requires_grad=False)
        linear.bias = self.base.bias
        return linear.train(self.training)

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"


def linear(x, W, sizes=None):
    """x W': (..., n) and (m, n) -> (..., m). Given sizes, W is (T, m, n), and the first sizes[0] of x meet W[0], ..."""
    if sizes is None:
        return F.linear(x, W)
    if len(set(sizes)) > 1:
        return torch.cat([F.linear(part, w) for part, w in zip(x.split(sizes), W.unbind(), strict=True)])
    return torch.bmm(x.reshape(len(sizes), -1, x.shape[-1]), W.mT).view(*x.shape[:-1], -1)


FAMILIES = (("query", "value"), ("q_lin", "v_lin"), ("q_proj", "v_proj"))  # BERT and RoBERTa; DistilBERT; Llama and kin


def replace_module(module, path, new):
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, new)


def add_lora(module, targets=None, r=8, alpha=16, dropout=0.0, layers=None, rslora=False):
    """Freeze `module` (give it the encoder, not the heads) and replace its target layers by `LoRALinear`.

    targets: names; each `nn.Linear` whose path is one of them, or ends in "." and one of them, is replaced, as peft
    matches; "all-linear" means every one; None means query and value under the names of the model's family.
    layers: only these layer numbers (the first number in the path). Returns {path: LoRALinear}.
    Raises ValueError before anything is changed: no target, a target or layer that matches nothing, a module that has
    LoRA, a rank or dropout that LoRALinear refuses.
    """
    if isinstance(module, nn.Linear):
        raise ValueError("the module is a linear layer itself; wrap it: LoRALinear(module, r, alpha)")
    # nn.MultiheadAttention reads its out_proj's weight and never calls it, so LoRA there would do nothing
    bypassed = nn.modules.linear.NonDynamicallyQuantizableLinear
    linear = {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, bypassed)}
    names = sorted({path.rpartition(".")[2] for path in linear})
    if lora_layers(module):
        raise ValueError("the module has LoRA layers already")
    if targets is None:
        targets = next((family for family in FAMILIES if set(family) <= set(names)), None)
        if targets is None:
            raise ValueError(f"no query and value layers known here; give targets out of {', '.join(names) or 'none'}")

    def hit(path, target):
        return target == "all-linear" or path == target or path.endswith("." + target)

    def number(path):
        found = re.search(r"(?:^|\.)(\d+)\.", path)
        return int(found[1]) if found else None

    targets = [targets] if isinstance(targets, str) else list(targets)
    matched = [path for path in linear if any(hit(path, target) for target in targets)]
    for target in targets or [""]:
        if not any(hit(path, target) for path in matched):
            raise ValueError(f"target {target!r} matches no linear layer; there are {', '.join(names) or 'none'}")
    there = {number(path) for path in matched} - {None}
    if layers is not None and not (layers and set(layers) <= there):
        raise ValueError(f"layers {sorted(layers)}: the targets are in layers {sorted(there)}")
    chosen = [path for path in matched if layers is None or number(path) in layers]
    new = {path: LoRALinear(linear[path], r, alpha, dropout, rslora) for path in chosen}
    module.requires_grad_(False)
    for path, layer in new.items():
        replace_module(module, path, layer)
    return new


def lora_layers(model):
    """{path: LoRALinear} of all there are in `model`."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model):
    """Every A and B: A1, B1, A2, B2, ..."""
    return [factor for layer in lora_layers(model).values() for factor in (layer.A, layer.B)]


def blocks(model, unit="tensor", factors="AB"):
    """The trainable factors as blocks for `OrthoLoRA`: what is projected as one vector.

    unit: "tensor" each A and each B alone; "factor" all A, all B; "all" everything at once (PCGrad).
    factors: "A" or "B" for these alone; the other's gradients then just add up.
    """
    A, B = ([getattr(layer, f) for layer in lora_layers(model).values()] if f in factors else [] for f in "AB")
    A, B = ([p for p in found if p.requires_grad] for found in (A, B))
    if unit == "tensor":
        return [[p] for p in lora_parameters(model) if any(p is x for x in A + B)]
    if unit == "factor":
        return [found for found in (A, B) if found]
    if unit == "all":
        return [A + B] if A + B else []
    renamed = {"role": "; it is now called 'factor'", "joint": "; it is now called 'all'"}
    raise ValueError(f"unknown unit {unit!r}: tensor, factor or all{renamed.get(unit, '')}")


@contextlib.contextmanager
def per_task(model, sizes):
    """Every task's own gradient of A and B out of one backward pass over a batch that stacks the tasks' sequences.

        with per_task(model, sizes=[16, 16, 8]) as grads:     # the first 16 sequences are task 0's, ...
            loss = ...                                        # the sum of the tasks' losses
            loss.backward()                                   # in here: gradient checkpointing runs forward again
        grads[layer.A].grad                                   # (T, r, in): row t is task t's; layer.A.grad is untouched

    Each task gets its own view of the factors, A as (T, r, in), so that autograd keeps the gradients apart; values and
    cost are those of the one factor. Returns {factor: its view} of the trained ones, for `OrthoLoRA.collect_stacked`;
    for a factor that is in none of its blocks, factor.grad = view.grad.sum(0) is left to the caller.
    The first dimension of what a layer is given must be the stacked one, of sum(sizes).
    """
    layers, grads = lora_layers(model).values(), {}

    def view(factor):
        own = factor.detach().expand(len(sizes), *factor.shape)
        if factor.requires_grad:
            grads[factor] = own.requires_grad_()
        return own

    for layer in layers:
        layer.tasks = view(layer.A), view(layer.B), list(sizes)
    try:
        yield grads
    finally:
        for layer in layers:
            layer.tasks = None


def merge_lora(model):
    """Replace every `LoRALinear` in `model` by its `merged()` layer, in place (copy the model first to keep it)."""
    for path, layer in lora_layers(model).items():
        replace_module(model, path, layer.merged())
    return model
