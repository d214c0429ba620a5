"""LoRI: h = W0 x + b + scale * (B ⊙ M) A x, with A a frozen random projection and M a sparse 0/1 mask on B.

Zhang et al. 2025, arXiv 2504.07448. A, half of LoRA's parameters where a layer is square, is not trained at all, and of
B only its largest tenth. Adapters whose A are drawn independently are nearly orthogonal, so LoRI adds them up;
adapters on one A with sparse masks can be trained one after the other.

    freeze_A(model, seed=task_seed)                     LoRI-D: only B trains; the usual loop
    masks = magnitude_masks(model, sparsity=0.9)        B's largest entries; then LoRI-S starts over on the same A:
    for layer in lora_layers(model).values(): torch.nn.init.zeros_(layer.B)
    masked = MaskedB(model, masks)
    optimizer = torch.optim.AdamW(masked.parameters(), lr=5e-3)
    merged = merge([adapter(a), adapter(b)])            what two models learned, as one adapter

Works on any module with `LoRALinear` layers. Masks are {path: bool (out, r)}, adapters {path: (A, B, scale)}: plain
data. Choices that are ours, since the released code leaves them to chance: A is seeded; a mask has exactly k entries.
Needs torch and lora.py alone (inside a package: `from .lora import`). To save: `lora.peft_adapter`.
Apache-2.0; from the reference implementation of Ortho-LoRA (arXiv 2601.09684) and LoRI (arXiv 2504.07448).
"""

import math

import torch
from torch import nn
from torch.nn.utils import parametrize

from lora import LoRALinear, lora_layers

# ---------------------------------------------------------------------------------------------------------------------
# LoRI-D: a frozen random A


def layers_of(model):  # {path: LoRALinear}, at least one
    if layers := lora_layers(model):
        return layers
    raise ValueError("the model has no LoRA layers")


@torch.no_grad()
def draw_A(model, seed):
    """Redraw every A of `model` from `seed` alone, the same on every device: U(-1/sqrt(in), 1/sqrt(in)).

    That is Kaiming-uniform with a = sqrt(5), as in the released code, of variance 1 / (3 in): A A' is near I/3.
    One seed per task for adapters to be merged; one for all where tasks follow each other on a shared A. Raises
    ValueError, as all of this file but `insert` does, where `model` has no LoRA layers."""
    generator = torch.Generator().manual_seed(seed)  # on the CPU, and apart from the global one
    for layer in layers_of(model).values():
        bound = 1 / math.sqrt(layer.A.shape[1])
        A = torch.empty(layer.A.shape, dtype=torch.float32, device="cpu")  # (r, in), whatever the defaults are
        layer.A.copy_(A.uniform_(-bound, bound, generator=generator))


def freeze_A(model, seed):
    """`draw_A`, and train no A any more."""
    draw_A(model, seed)
    for layer in layers_of(model).values():
        layer.A.requires_grad_(False).grad = None  # an optimizer that knows A would still step along its last gradient


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def top_k_mask(values, k, allowed=None):
    """True at exactly k entries of `values`: those of largest magnitude; of equal ones, the first.

    values: any shape; allowed: bool, the same shape, what may be chosen (default: everything). Returns bool, the same
    shape. Raises ValueError: k < 1, fewer than k entries allowed, nothing but zeros to choose from, a NaN or infinity.
    """
    size = values.detach().abs().flatten()
    if not size.isfinite().all():
        raise ValueError("a value is not finite")
    if allowed is not None:
        size[~allowed.flatten()] = -1  # after every other
    free = int((size >= 0).sum())
    if k < 1:
        raise ValueError(f"k = {k} of {size.numel()} entries: a mask needs at least one")
    if k > free:
        raise ValueError(f"{k} of {size.numel()} entries wanted, but only {free} are free")
    if size.max() == 0:
        raise ValueError("all that may be chosen are zero: train B first")
    mask = torch.zeros_like(size, dtype=torch.bool)
    mask[size.argsort(descending=True, stable=True)[:k]] = True
    return mask.view(values.shape)


def magnitude_masks(model, sparsity=0.9, exclude=None):
    """Where |B| is largest: {path: bool (out, r)}, with exactly k = round((1 - sparsity) N) entries true.

    All N entries of all B are compared with one another, so some B may get many and some none.
    exclude: masks, or a list of them, from which the new one is to be disjoint. N counts their entries, too.
    Raises ValueError: sparsity outside [0, 1), a k of 0, too few entries left, B all zero.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity {sparsity} is outside [0, 1)")
    B = {path: layer.B.detach() for path, layer in layers_of(model).items()}  # (out, r) each
    free = {path: torch.ones_like(b, dtype=torch.bool) for path, b in B.items()}
    for masks in [exclude] if isinstance(exclude, dict) else exclude or []:
        check_masks(model, masks)
        for path, mask in masks.items():
            free[path] &= ~mask.to(free[path].device)
    values, allowed = (torch.cat([x.flatten() for x in of.values()]) for of in (B, free))  # (N,)
    try:
        mask = top_k_mask(values, round((1 - sparsity) * len(values)), allowed)
    except ValueError as e:
        raise ValueError(f"no mask of sparsity {sparsity}: {e}") from None
    parts = mask.split([b.numel() for b in B.values()])
    return {path: part.view_as(B[path]) for path, part in zip(B, parts, strict=True)}


def check_masks(model, masks):
    """Raise ValueError unless `masks` has one bool (out, r) for each LoRA layer of `model`, and nothing else."""
    shapes = {path: (layer.base.out_features, layer.r) for path, layer in layers_of(model).items()}
    if stray := sorted(masks.keys() ^ shapes.keys()):
        there, missing = ("a mask", "LoRA layer") if stray[0] in masks else ("a LoRA layer", "mask")
        raise ValueError(f"masks of another model: {stray[0]} is {there}, but there is no such {missing}")
    for path, shape in shapes.items():
        if tuple(masks[path].shape) != shape or masks[path].dtype != torch.bool:
            found = f"{tuple(masks[path].shape)} of {masks[path].dtype}"
            raise ValueError(f"masks of another model: that of {path} is {found}, not {shape} of torch.bool")


def overlap(masks_a, masks_b):
    """The share of a's active entries that are active in b. Random masks of one tenth: 0.1. ValueError: other paths."""
    if {path: mask.shape for path, mask in masks_a.items()} != {path: mask.shape for path, mask in masks_b.items()}:
        raise ValueError("overlap: the masks are of different models")
    shared = sum(int((mask & masks_b[path].to(mask.device)).sum()) for path, mask in masks_a.items())
    return shared / max(1, sum(int(mask.sum()) for mask in masks_a.values()))


# ---------------------------------------------------------------------------------------------------------------------
# LoRI-S: train the active entries of B, and no others


class ScatterB(nn.Module):
    """B out of its active entries, (n,) -> (out, r): all others are what they were when this was made.

    By index, not by mask: neither pass has to count entries, so nothing waits for the device.
    """

    def __init__(self, B, mask):
        super().__init__()
        self.register_buffer("fixed", B.detach().clone())  # (out, r)
        self.register_buffer("index", mask.flatten().nonzero().squeeze(1).to(B.device))  # (n,)

    def forward(self, active):
        return self.fixed.flatten().scatter(0, self.index, active).view_as(self.fixed)

    def right_inverse(self, B):  # (out, r) -> (n,), which register_parametrization calls
        return B.detach().flatten()[self.index]


class MaskedB:
    """Train only the entries of every B where its mask is true.

        masked = MaskedB(model, masks)
        optimizer = torch.optim.AdamW(masked.parameters(), lr=5e-3)    # a new one, as of OrthoLoRA: shapes differ
        ...
        masked.remove()                                                # B is a plain parameter again

    While it lasts, `layer.B` is computed: a fixed part, and the active entries scattered into it. These, one flat
    vector (n,) per layer, are all that there is to train, so no optimizer can move another entry, whatever its weight
    decay or momentum, and its state is n numbers, not out * r. B need not be zero: what is not active keeps its value,
    what is active starts from its own. `lora.blocks` and `lora_parameters` would give the computed B, which can't be
    trained: for `OrthoLoRA` each of `parameters()` is a block. State dicts hold the vectors
    (`...parametrizations.B.original`), fixed parts and indices.
    Raises ValueError: masks of another model; a model that is masked already; layers that share a B.
    """

    def __init__(self, model, masks):
        check_masks(model, masks)
        self.layers = lora_layers(model)
        found = self.layers.values()
        if any(parametrize.is_parametrized(layer, "B") for layer in found) or len({x.B for x in found}) < len(found):
            raise ValueError("MaskedB: the model is masked already, remove() that first; or layers share a B")
        self.was_trained = {path: layer.B.requires_grad for path, layer in self.layers.items()}
        for path, layer in self.layers.items():
            layer.B.requires_grad_(bool(masks[path].any())).grad = None  # its gradient has the old shape
            parametrize.register_parametrization(layer, "B", ScatterB(layer.B, masks[path]))

    def parameters(self):
        """The vectors of active entries, (n,) each; none for a layer without any."""
        return [v for layer in self.layers.values() if (v := layer.parametrizations.B.original).numel()]

    def remove(self):
        """Make every B a plain `nn.Parameter` with its current value, trainable if it was before."""
        for path, layer in self.layers.items():
            if parametrize.is_parametrized(layer, "B"):  # not removed before
                layer.__class__ = type("Masked", type(layer).__bases__, dict(vars(type(layer))))  # a deepcopy shares it
                parametrize.remove_parametrizations(layer, "B", leave_parametrized=True)
                layer.B.requires_grad_(self.was_trained[path]).grad = None


def trained_scalars(model):
    """How many distinct numbers of the LoRA layers are trained, as they stand: all A and B for LoRA, all B after
    `freeze_A`, the active entries of B under `MaskedB`: Sum r (in + out), N = sum r out, round((1 - sparsity) N)."""
    parameters = {id(p): p for layer in layers_of(model).values() for p in layer.parameters()}
    return sum(p.numel() for p in parameters.values() if p.requires_grad)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters as data: {path: (A (r, in), B (out, r), scale)}, with delta = scale * B A


def adapter(model):
    """What the LoRA layers of `model` hold now, as a copy."""
    return {path: (m.A.detach().clone(), m.B.detach().clone(), m.scale) for path, m in layers_of(model).items()}


@torch.no_grad()
def insert(model, adapter):
    """Make `adapter` the LoRA layers of `model`, of whatever rank and scale, in place. Returns {path: LoRALinear}.

    At each of its paths there is a plain `nn.Linear`, or a LoRA layer, which a new one replaces: same base, same
    dropout, its factors frozen where those were. Raises ValueError before anything is changed: a path or a shape that
    the model does not have, a LoRA layer that the adapter has nothing for, a model under `MaskedB`.
    """
    modules, bases, new = dict(model.named_modules()), {}, {}
    if stray := sorted(lora_layers(model).keys() - adapter.keys()):
        raise ValueError(f"adapter of other targets: it has nothing for the LoRA layer {stray[0]}")
    for path, (A, B, _) in adapter.items():
        old = modules.get(path)
        if not path or not isinstance(old, (LoRALinear, nn.Linear)):
            raise ValueError(f"adapter of another model: {path or 'the model itself'} is no linear layer in it")
        if parametrize.is_parametrized(old, "B"):
            raise ValueError(f"insert: {path} is under MaskedB; remove() that first")
        base = old.base if isinstance(old, LoRALinear) else old
        if (B.shape[0], A.shape[1]) != (base.out_features, base.in_features) or not A.shape[0] == B.shape[1] > 0:
            found, shape = f"A {tuple(A.shape)} and B {tuple(B.shape)}", tuple(base.weight.shape)
            raise ValueError(f"adapter of another model: {found} for {path}, whose weight is {shape}")
        bases[path] = base
    for path, base in bases.items():
        (A, B, scale), old = adapter[path], modules[path]
        new[path] = layer = LoRALinear(base, len(A), scale * len(A), getattr(old, "dropout", 0.0))
        layer.scale = scale  # to the bit
        layer.A.copy_(A)
        layer.B.copy_(B)
        if isinstance(old, LoRALinear):
            layer.A.requires_grad_(old.A.requires_grad)
            layer.B.requires_grad_(old.B.requires_grad)
        model.set_submodule(path, layer)
    return new


def check_adapters(adapters):
    """Raise ValueError unless there is one, and all are of the same layers: paths and weight shapes."""
    if not adapters:
        raise ValueError("there are no adapters")
    for t, other in enumerate(adapters[1:], 1):
        if stray := sorted(other.keys() ^ adapters[0].keys()):
            raise ValueError(f"adapters of different targets: {stray[0]} is in only one of adapters 0 and {t}")
        for path, (A, B, _) in other.items():
            shape, first = [(b.shape[0], a.shape[1]) for a, b, _ in ((A, B, 1), adapters[0][path])]
            if shape != first:
                raise ValueError(f"adapters of different bases: {path} is {first} in adapter 0, {shape} in {t}")


def merge(adapters, weights=None, how="cat"):
    """One adapter out of T, with weights w_t. Its scale is 1; s_t is adapter t's.

    how: "cat"     A' = [w_1 s_1 A_1; ...; w_T s_T A_T], B' = [B_1 ... B_T]: the delta is sum_t w_t s_t B_t A_t exactly,
                   the rank the sum of the ranks, which may differ
         "linear"  A' = sum_t sqrt(w_t s_t) A_t, B' = sum_t sqrt(w_t s_t) B_t, of equal ranks: the same delta and, on
                   top, T (T - 1) cross terms sqrt(w_t s_t w_u s_u) B_t A_u that nobody trained
    weights: default 1 / T each, the mean of the deltas. That is our choice, there is no published rule: the released
    scripts give each of three or four adapters 0.3 to 0.5. Formulas: those of peft's `add_weighted_adapter`.
    Raises ValueError: no adapters, different layers, a wrong number of weights; "linear" with different ranks or with
    a negative weight.
    """
    check_adapters(adapters)
    weights = [1 / len(adapters)] * len(adapters) if weights is None else [float(w) for w in weights]
    if len(weights) != len(adapters):
        raise ValueError(f"merge: {len(adapters)} adapters, but {len(weights)} weights")
    if how not in ("cat", "linear"):
        raise ValueError(f"merge: how must be cat or linear, not {how!r}")
    merged = {}
    for path in adapters[0]:
        A, B, scales = zip(*(other[path] for other in adapters), strict=True)
        strengths = [w * s for w, s in zip(weights, scales, strict=True)]
        if how == "cat":
            A = torch.cat([c * a for c, a in zip(strengths, A, strict=True)])  # (sum of r_t, in)
            B = torch.cat(B, dim=1)  # (out, sum of r_t)
        else:
            if len({len(a) for a in A}) > 1:
                ranks = ", ".join(str(len(a)) for a in A)
                raise ValueError(f"merge: linear needs equal ranks, {path} has {ranks}; use cat")
            if min(strengths) < 0:
                raise ValueError(f"merge: linear takes roots, no weight × scale may be negative: {strengths}; use cat")
            A, B = (sum(math.sqrt(c) * x for c, x in zip(strengths, X, strict=True)) for X in (A, B))
        merged[path] = (A, B, 1.0)
    return merged


def delta_cosines(adapters):
    """Cosines between the deltas of T adapters, all layers as one vector: (T, T), float64, on the CPU.

    From the factors alone, <D_s, D_t> = scale_s scale_t tr(B_s' B_t A_t A_s'), with no (out, in) matrix. It vanishes
    for independent A as `in` grows, since then A_t A_s' does; on a shared A it is near that of the B. A zero delta is
    at no angle to anything: 0, with itself too. Ranks may differ. Raises ValueError: no adapters, different layers.
    """
    check_adapters(adapters)
    inner = torch.zeros(len(adapters), len(adapters), dtype=torch.float64, device="cpu")
    for path in adapters[0]:
        A = torch.cat([scale * A.detach().cpu().double() for A, _, scale in (x[path] for x in adapters)])  # (R, in)
        B = torch.cat([x[path][1].detach().cpu().double() for x in adapters], dim=1)  # (out, R)
        ranks = torch.tensor([len(x[path][0]) for x in adapters], device="cpu")  # their sum is R
        owner = torch.eye(len(adapters), dtype=torch.float64, device="cpu").repeat_interleave(ranks, 0)  # (R, T)
        inner += owner.T @ ((B.T @ B) * (A @ A.T)) @ owner
    norms = inner.diagonal().clamp(min=0).sqrt()
    product = norms[:, None] * norms  # (T, T)
    return torch.where(product == 0, 0.0, inner / product)
