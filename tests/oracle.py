"""What docs/recipes.md's code should write into .grad: PCGrad in plain float64 loops, with nothing of ours in it."""

import copy
import re
from pathlib import Path

import torch

import ortholora
from ortholora import OrthoLoRA

RECIPES = Path(__file__).parent.parent / "docs/recipes.md"


def recipe(title):
    """The Python blocks of one section, as they stand."""
    parts = re.split(r"^## ", RECIPES.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return re.findall(r"```python\n(.*?)```", dict(part.split("\n", 1) for part in parts)[title], re.DOTALL)


def pcgrad(grads, order):
    """One block: T vectors (n,), and whom each of them meets, in order. Returns the sum of what is left of them."""
    total = torch.zeros_like(grads[0])
    for g, others in zip(grads, order, strict=True):
        v = g.clone()
        for j in others:
            dot = float((v * grads[j]).sum())
            if dot < 0:
                v -= dot / float((grads[j] * grads[j]).sum()) * grads[j]
        total += v
    return total


def each_factor(model):
    """Ortho-LoRA's blocks, by name alone: LoRALinear's A and B, and what peft calls lora_."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [[p] for name, p in named if name.endswith((".A", ".B")) or "lora_" in name]


def gradients(model, losses, index, dtype):
    """Every task's gradients by `autograd.grad`, of a copy of the model in this dtype: [{parameter: float64}, ...]."""
    twin = copy.deepcopy(model) if dtype is None else copy.deepcopy(model).to(dtype)
    pairs = [(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True) if p.requires_grad]
    found = []
    for parts in losses(twin, index):
        sums = {p: torch.zeros(p.shape, dtype=torch.float64) for p, _ in pairs}
        for loss in parts if isinstance(parts, list) else [parts]:
            grads = torch.autograd.grad(loss, [q for _, q in pairs], allow_unused=True)
            for (p, _), g in zip(pairs, grads, strict=True):
                sums[p] += 0 if g is None else g.double()
        found.append(sums)
    return found


def distance(found, expected):
    """Largest difference over largest entry; infinite where something is not finite. No .grad counts as zero."""
    found = {p: torch.zeros_like(p) if found[p] is None else found[p] for p in expected}
    if not all(x.isfinite().all() for x in found.values()):
        return float("inf")
    differences = [float((found[p].double() - e).abs().max()) for p, e in expected.items()]
    return max(differences, default=0.0) / max((float(e.abs().max()) for e in expected.values()), default=1.0)


class Step:
    """What one `project` should have written, and how far off it was. Made right after it.

    model: as it is now, so at the parameters of this step. losses(model, index): for every task its loss, or a list of
    losses to be added up in float64, [] for a task that is absent. change(grads, parameters): what a recipe does to the
    tasks' rows. Held against gradients of the same model in its own precision (`error`, and `other_error` of what is in
    no block), so that the projection alone is compared, and, unless half, against those of a copy in float64
    (`error64`). `joint`: how far off the plain sum is.
    """

    def __init__(self, parameters, order, index, model, losses, blocks=each_factor, change=None, half=False):
        self.index, self.order = index, order.tolist()
        found = {p: None if p.grad is None else p.grad.clone() for p in model.parameters() if p.requires_grad}
        self.dtypes = {p.grad.dtype for p in parameters}
        for dtype in (torch.float64, None)[half:]:
            grads = gradients(model, losses, index, dtype)
            self.others = {p: sum(g[p] for g in grads) for p in found if p not in set(parameters)}
            units = blocks(model)
            if change is not None:
                change(grads, [p for unit in units for p in unit])
            self.projected, plain = {}, {}
            for unit in units:
                flat = [torch.cat([g[p].flatten() for p in unit]) for g in grads]
                for result, of_unit in (self.projected, pcgrad(flat, self.order)), (plain, sum(flat)):
                    parts = of_unit.split([p.numel() for p in unit])
                    result |= {p: part.view_as(p) for p, part in zip(unit, parts, strict=True)}
            assert self.projected.keys() == set(parameters)
            self.error, self.other_error = distance(found, self.projected), distance(found, self.others)
            self.error64 = max(self.error, self.other_error) if dtype else getattr(self, "error64", 0.0)
            self.joint = distance(plain, self.projected)


def watch(monkeypatch, model, mirror=list, **how):
    """From now on `from ortholora import OrthoLoRA` gives a class that holds every `project` against a `Step`.

    Returns the list that the steps are put in. model: a function, asked at every step; how: see `Step`. mirror: gives
    the model's parameters for those that were projected, where these are not the same.
    """
    steps = []

    class Watched(OrthoLoRA):
        def random_order(self):
            self.drawn = super().random_order()
            return self.drawn

        def project(self, order=None):
            conflicts = super().project(order)
            order = self.drawn if order is None else order
            steps.append(Step(mirror(self.parameters), order, len(steps), model(), **how))
            return conflicts

    monkeypatch.setattr(ortholora, "OrthoLoRA", Watched)
    return steps
