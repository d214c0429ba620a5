"""LoRA by hand: h = W0 x + b + scale * B A x, with W0 and b frozen, A (r, in) and B (out, r) trained.

Hu et al. 2021, arXiv 2106.09685. Needs torch alone. For any module that calls its `nn.Linear` layers and doesn't read
their weights; T5 reads its `wo`'s, nn.TransformerEncoder in eval its own (see torch.backends.mha.set_fastpath_enabled):

    layers = add_lora(model, targets=["query", "value"], r=8, alpha=16)    # freezes the model; {path: LoRALinear}
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=5e-4)         # train; then
    {n: p for n, p in model.named_parameters() if p.requires_grad}         # to save: what is trained (no frozen A); or
    tensors, config = peft_adapter(model)                                  # what peft's files hold; or
    merge_lora(model).save_pretrained(folder)                              # plain nn.Linear again, W0 + scale * B A

Never call `save_pretrained` with the layers still in: it loses the target layers' base weights.
Apache-2.0; from the reference implementation of Ortho-LoRA (arXiv 2601.09684) and LoRI (arXiv 2504.07448).
"""

import contextlib
import math

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
        if isinstance(r, (float, bool)) or r < 1 or not 0 <= dropout < 1:
            raise ValueError(f"LoRA needs an integer r >= 1 and 0 <= dropout < 1, got r={r}, dropout={dropout}")
        self.base = base.requires_grad_(False)
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        dtype = torch.promote_types(base.weight.dtype, torch.float32)  # what trains is never in half precision
        like = {"device": base.weight.device, "dtype": dtype}
        self.A = nn.Parameter(torch.empty(r, base.in_features, **like))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, **like))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.tasks = None  # within `per_task`: every task's A (T, r, in) and B (T, out, r), and sizes
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
        """A new `nn.Linear`: W0 + scale * B A, in the base's dtype, under autocast, too. ValueError: no plain base."""
        if type(self.base).forward is not nn.Linear.forward or not self.base.weight.is_floating_point():
            raise ValueError(f"a {type(self.base).__name__} of {self.base.weight.dtype} can't be merged into")
        plain = nn.Linear(self.base.in_features, self.base.out_features, device="meta")
        weight = self.base.weight.to(self.B.dtype, copy=True).addmm_(self.B, self.A, alpha=self.scale)
        plain.weight = nn.Parameter(weight.to(self.base.weight.dtype), requires_grad=False)
        plain.bias = self.base.bias
        return plain.train(self.training)

    def extra_repr(self):
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, rslora={self.rslora}"


def linear(x, W, sizes=None):
    """x W': (..., n) and (m, n) -> (..., m). Given sizes, W is (T, m, n), and the first sizes[0] of x meet W[0], ..."""
    if sizes is None:
        return F.linear(x, W)
    if len(x) != sum(sizes):
        raise ValueError(f"per_task: a layer was given {tuple(x.shape)}; its first dimension is not sum({sizes})")
    if len(set(sizes)) > 1:
        return torch.cat([F.linear(part, w) for part, w in zip(x.split(sizes), W.unbind(), strict=True)])
    return torch.bmm(x.reshape(len(sizes), -1, x.shape[-1]), W.mT).view(*x.shape[:-1], -1)


FAMILIES = (("query", "value"), ("q_lin", "v_lin"), ("q_proj", "v_proj"))  # BERT and RoBERTa; DistilBERT; Llama and kin


def matching(module, plain, target):
    """The paths in `plain` that `target` names, as in peft: a whole path, its end after a dot, or all-linear."""
    if target != "all-linear":
        return [path for path in plain if path == target or path.endswith("." + target)]
    output = getattr(module, "get_output_embeddings", lambda: None)()
    heads = () if isinstance(output, nn.Module) else ("classifier", "score", "qa_outputs")
    return [path for path, m in plain.items() if m is not output and path.split(".")[0] not in heads]


def add_lora(module, targets=None, r=8, alpha=16, dropout=0.0, layers=None, rslora=False):
    """Freeze `module` (give it the encoder, not the heads) and replace its target layers by `LoRALinear`.

    targets: names, as in peft: an `nn.Linear` is meant if its path is one of them, or ends in a dot and one of them;
    "all-linear": every one but the output layer, or else a top-level classifier, score or qa_outputs; None: query and
    value by their family's names. layers: only these, by a path's first number. A tied layer is replaced at one path.
    Returns {path: LoRALinear}. ValueError, changing nothing: targets or layers missing, LoRA already, bad r or dropout.
    """
    if isinstance(module, nn.Linear):
        raise ValueError("the module is a linear layer itself; wrap it: LoRALinear(module, r, alpha)")
    if lora_layers(module):
        raise ValueError("the module has LoRA layers already")
    # nn.MultiheadAttention reads its out_proj's weight and never calls it: a LoRALinear has none
    bypassed = nn.modules.linear.NonDynamicallyQuantizableLinear
    plain = {path: m for path, m in module.named_modules() if isinstance(m, nn.Linear) and not isinstance(m, bypassed)}
    number = {path: next((int(n) for n in path.split(".")[:-1] if n.isdecimal()), None) for path in plain}
    names = sorted({path.rpartition(".")[2] for path in plain})
    known = next((family for family in FAMILIES if set(family) <= set(names)), None)
    targets = known if targets is None else [targets] if isinstance(targets, str) else list(targets)
    if not targets:
        raise ValueError(f"no targets given, and none known by default; linear layers: {', '.join(names) or 'none'}")
    matched = set()
    for target in targets:
        if not (paths := matching(module, plain, target)):
            raise ValueError(f"target {target!r} matches no linear layer; their names: {', '.join(names) or 'none'}")
        matched.update(paths)
    there = {number[path] for path in matched} - {None}
    if layers is not None and not set() < (layers := set(layers)) <= there:
        raise ValueError(f"layers {sorted(layers)}: the targets are in layers {sorted(there)}")
    chosen = [path for path in plain if path in matched and (layers is None or number[path] in layers)]
    new = {path: LoRALinear(plain[path], r, alpha, dropout, rslora) for path in chosen}
    module.requires_grad_(False)
    for path, layer in new.items():
        module.set_submodule(path, layer)
    return new


def lora_layers(model):
    """{path: LoRALinear} of all there are in `model`."""
    return {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}


def lora_parameters(model):
    """Every A and B (one that layers share, once): A1, B1, A2, B2, ..."""
    return list(dict.fromkeys(factor for layer in lora_layers(model).values() for factor in (layer.A, layer.B)))


def blocks(model, unit="tensor", factors="AB"):
    """The trainable factors, shared ones once, as blocks for `OrthoLoRA`: what is projected as one vector.

    unit: "tensor" each A and each B alone; "factor" all A, all B; "all" everything at once (PCGrad).
    factors: "A", "B" or "AB", which are projected at all. Raises ValueError: another unit, other factors.
    """
    if unit not in ("tensor", "factor", "all") or factors not in ("A", "B", "AB"):
        raise ValueError(f"blocks: unit={unit!r} must be tensor, factor or all, and factors={factors!r} A, B or AB")
    found = [[getattr(layer, name) for layer in lora_layers(model).values()] for name in factors]  # [[A1, ...], ...]
    if unit == "tensor":
        found = [[p] for p in dict.fromkeys(sum(zip(*found, strict=True), ()))]  # [[A1], [B1], [A2], ...]
    elif unit == "all":
        found = [sum(found, [])]
    return [trained for block in found if (trained := [p for p in dict.fromkeys(block) if p.requires_grad])]


@contextlib.contextmanager
def per_task(model, sizes):
    """Every task's own gradient of A and B out of one backward pass over a batch that stacks the tasks' sequences.

        with per_task(model, sizes=[16, 16, 8]) as views:     # the first 16 sequences are task 0's, ...
            loss = ...                                        # the sum of the tasks' losses
            loss.backward()                                   # in here: gradient checkpointing runs forward again
        views[layer.A].grad                                   # (T, r, in): row t is task t's; layer.A.grad is untouched

    Each task gets its own view of the factors, A as (T, r, in), without a copy. Yields {factor: its view} of those that
    train, for `OrthoLoRA.collect_stacked`; for a factor in no block the caller adds view.grad.sum(0) to .grad. Layers
    get sum(sizes) as their first dimension. ValueError: under `lori.MaskedB`.
    """
    layers = lora_layers(model).values()
    if not all(factor.is_leaf for factor in lora_parameters(model)):
        raise ValueError("per_task: a factor is computed, as under MaskedB: its view trains nothing; use collect()")
    views = {p: p.detach().expand(len(sizes), *p.shape).requires_grad_(p.requires_grad) for p in lora_parameters(model)}
    for layer in layers:
        layer.tasks = views[layer.A], views[layer.B], list(sizes)
    try:
        yield {p: view for p, view in views.items() if p.requires_grad}
    finally:
        for layer in layers:
            layer.tasks = None


def merge_lora(model):
    """Replace every `LoRALinear` in `model` by its `merged()` layer, in place (copy the model first to keep it).

    Raises ValueError at the first layer that can't be merged (those before it are), or where the model is one itself.
    """
    for path, layer in lora_layers(model).items():
        model.set_submodule(path, layer.merged())
    return model


def peft_adapter(model, prefix=""):
    """What peft's two files hold, for any model with LoRA layers: (the tensors, the config).

        tensors, config = peft_adapter(model)
        safetensors.torch.save_file(tensors, "folder/adapter_model.safetensors", {"format": "pt"})
        json.dump(config, open("folder/adapter_config.json", "w"))

    The tensors are float32 copies. The caller adds "base_model_name_or_path", "task_type" and "modules_to_save", and a
    head's tensors under "base_model.model." + name. prefix: where `model` stands in what peft gets, such as "bert.".
    Raises ValueError: no LoRA layers; some with rslora and some without; a prefix that does not end in a dot.
    """
    model = getattr(model, "_orig_mod", model)  # torch.compile's wrapper; of one inside, the name goes below
    model = model.module if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)) else model
    wrappers = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile's, and activation checkpointing's
    found = {p: prefix + ".".join(x for x in p.split(".") if x not in wrappers) for p, _ in model.named_modules()}
    layers = {found[path]: layer for path, layer in lora_layers(model).items()}
    if len({layer.rslora for layer in layers.values()}) != 1:
        raise ValueError(f"peft_adapter: {'only some LoRA layers use rslora' if layers else 'no LoRA layers'}")
    if prefix and not prefix.endswith("."):
        raise ValueError(f"peft_adapter: prefix {prefix!r} must end in a dot")
    tensors = {}
    for path, layer in layers.items():
        tensors[f"base_model.model.{path}.lora_A.weight"] = layer.A.detach().float().contiguous().clone()
        tensors[f"base_model.model.{path}.lora_B.weight"] = layer.B.detach().float().contiguous().clone()
    # A last name, as "query", stands for all modules of that name: it will do where these are just the LoRA layers.
    # What lies outside the prefix can't be seen: no head has a query, but a second tower may have a q_proj.
    short = {path.rpartition(".")[2] for path in layers}
    meant = {path for path in found.values() if path.rpartition(".")[2] in short}
    is_exact = meant == layers.keys() and (not prefix or any(short <= set(family) for family in FAMILIES[:2]))
    first = next(iter(layers.values()))
    config = {"peft_type": "LORA", "bias": "none", "inference_mode": True, "lora_dropout": first.dropout}
    config |= {"r": first.r, "lora_alpha": first.alpha, "use_rslora": first.rslora}
    config["target_modules"] = sorted(short if is_exact else layers)
    # A pattern means every path that ends in it, and the first that fits counts: all of them, the longest first.
    longest = sorted(layers.items(), key=lambda item: -len(item[0]))
    config["rank_pattern"] = {path: m.r for path, m in longest if len({m.r for m in layers.values()}) > 1}
    config["alpha_pattern"] = {path: m.alpha for path, m in longest if len({m.alpha for m in layers.values()}) > 1}
    return tensors, config
