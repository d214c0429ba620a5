"""lori.py against sums written out, `peft`'s own merging, and dense training with its entries put back."""

import copy
import itertools
import json
import math

import peft
import pytest
import safetensors.torch
import torch
import transformers as hf
from tiny import batch, make, one_line, run, tiny
from torch import nn

from lora import LoRALinear, add_lora, lora_layers, lora_parameters, peft_adapter, per_task
from lori import (
    MaskedB,
    adapter,
    delta_cosines,
    draw_A,
    freeze_A,
    insert,
    magnitude_masks,
    merge,
    overlap,
    top_k_mask,
    trained_scalars,
)
from ortholora import OrthoLoRA, project_conflicting


class Mlp(nn.Module):
    """Two blocks of two projections: `block.N.up` and `block.N.down`."""

    def __init__(self):
        super().__init__()
        pair = [{"up": nn.Linear(10, 14), "down": nn.Linear(14, 10)} for _ in range(2)]
        self.block = nn.ModuleList(nn.ModuleDict(layers) for layers in pair)

    def forward(self, x):
        for layers in self.block:
            x = layers["down"](torch.tanh(layers["up"](x)))
        return x


def mlp(r=3, seed=0, zero=False):
    """LoRA on all four, A frozen, B random unless `zero`: N = 2 * (42 + 30) = 144 entries at r = 3."""
    torch.manual_seed(seed)
    model = Mlp()
    add_lora(model, "all-linear", r=r, alpha=2 * r)
    freeze_A(model, seed)
    if not zero:
        for layer in lora_layers(model).values():
            nn.init.normal_(layer.B)
    return model


def factors(model):
    return {path: layer.B.detach().clone() for path, layer in lora_layers(model).items()}


def random_adapter(shapes, rank, seed, scale=2.0, dtype=torch.float64):
    """shapes: {path: (out, in)}."""
    g = torch.Generator().manual_seed(seed)
    some = {}
    for path, (out, width) in shapes.items():
        A = torch.randn(rank, width, generator=g, dtype=dtype) / math.sqrt(width)
        some[path] = A, torch.randn(out, rank, generator=g, dtype=dtype), scale
    return some


SHAPES = {"a": (9, 12), "b": (5, 7)}


def deltas(some):
    """{path: (out, in)}, formed, in float64."""
    return {path: s * (B.double() @ A.double()) for path, (A, B, s) in some.items()}


def weighted_sum(adapters, weights):
    formed = [deltas(some) for some in adapters]
    return {path: sum(w * d[path] for w, d in zip(weights, formed, strict=True)) for path in formed[0]}


def close(ours, theirs, tolerance):
    """Relative to the size of what is expected."""
    assert ours.keys() == theirs.keys()
    for path, expected in theirs.items():
        assert (ours[path] - expected).norm() <= tolerance * expected.norm()


def says(words, function, *arguments, kind=ValueError, **options):
    """It refuses with one line, with these words in it."""
    with pytest.raises(kind) as error:
        function(*arguments, **options)
    assert words in one_line(error)


# ---------------------------------------------------------------------------------------------------------------------
# What is trained


@pytest.fixture
def roberta_base():
    """roberta-base out of its configuration: no weights, the factors alone are real."""
    with torch.device("meta"):
        encoder = hf.RobertaModel(hf.RobertaConfig(vocab_size=50265, max_position_embeddings=514))
    torch.manual_seed(0)
    for layer in add_lora(encoder, r=8, alpha=16).values():
        layer.A, layer.B = (nn.Parameter(torch.randn(p.shape)) for p in (layer.A, layer.B))
    return encoder


def test_counts_of_roberta_base(roberta_base):
    """12 layers, query and value, 768 to 768: 24 * 8 * (768 + 768); half of it; a tenth of that."""
    assert trained_scalars(roberta_base) == 294_912
    freeze_A(roberta_base, 0)
    assert trained_scalars(roberta_base) == 147_456
    masked = MaskedB(roberta_base, magnitude_masks(roberta_base))
    assert trained_scalars(roberta_base) == 14_746
    assert sum(p.numel() for p in masked.parameters()) == 14_746
    assert sum(p.numel() for p in roberta_base.parameters() if p.requires_grad) == 14_746
    masked.remove()
    assert trained_scalars(roberta_base) == 147_456


def test_counts_of_llama_3_8b():
    """All seven projections of 32 blocks at r = 32; per block in + out and out, written out."""
    sizes = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (4096, 14336), (4096, 14336), (14336, 4096)]
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleList(nn.Linear(i, o, bias=False) for i, o in sizes) for _ in range(32))
        add_lora(model, "all-linear", r=32)
    assert trained_scalars(model) == 83_886_080
    freeze_A(model, 0)
    assert trained_scalars(model) == 44_040_192


def test_optimizer_state(roberta_base):
    """AdamW holds two numbers per trained one (and a step count per tensor), whatever is trained."""

    def state(parameters):
        parameters = [p for p in parameters if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        tensors = [x for entry in optimizer.state.values() for name, x in entry.items() if name != "step"]
        steps = [entry["step"] for entry in optimizer.state.values()]
        return sum(x.numel() for x in tensors), sum(x.numel() * x.element_size() for x in tensors + steps)

    entries, size = {}, {}
    entries["LoRA"], size["LoRA"] = state(lora_parameters(roberta_base))
    freeze_A(roberta_base, 0)
    entries["LoRI-D"], size["LoRI-D"] = state(lora_parameters(roberta_base))
    masked = MaskedB(roberta_base, magnitude_masks(roberta_base))
    entries["LoRI-S"], size["LoRI-S"] = state(masked.parameters())
    assert entries == {"LoRA": 2 * 294_912, "LoRI-D": 2 * 147_456, "LoRI-S": 2 * 14_746}
    assert size["LoRI-S"] < 0.101 * size["LoRI-D"] and size["LoRI-D"] < 0.501 * size["LoRA"]


def test_draw_A():
    """U(-1/sqrt(in), 1/sqrt(in)): variance 1 / (3 in), a fourth moment of 9/5 squared variances, as a uniform one's."""
    model = nn.Sequential(nn.Linear(400, 8), nn.Linear(100, 8, dtype=torch.bfloat16))
    first, second = add_lora(model, "all-linear", r=300).values()
    nn.init.ones_(first.B)
    state = torch.get_rng_state()
    draw_A(model, 7)
    assert torch.equal(state, torch.get_rng_state())
    A = first.A.detach().clone()
    assert first.A.requires_grad and first.B.requires_grad and (first.B == 1).all()
    assert 0.0499 < A.abs().max() <= 0.05 and abs(A.var() * 1200 - 1) < 0.02 and abs(A.mean()) < 1e-3
    assert abs(A.pow(4).mean() / A.var() ** 2 - 1.8) < 0.05
    torch.testing.assert_close(A @ A.T, torch.eye(300) / 3, rtol=0, atol=0.1)
    assert second.A.dtype == torch.float32 and abs(second.A.var() * 300 - 1) < 0.03
    assert abs(torch.corrcoef(torch.stack([A[:, :100].flatten(), second.A.flatten()]))[0, 1]) < 0.03
    torch.manual_seed(99)
    draw_A(model, 7)
    assert torch.equal(A, first.A)
    draw_A(model, 8)
    assert abs(torch.corrcoef(torch.stack([A.flatten(), first.A.flatten()]))[0, 1]) < 0.02


def test_draw_A_whatever_the_defaults_are():
    """The same numbers under another default device and dtype, and in a float64 model."""
    model = nn.Sequential(nn.Linear(6, 5))
    layer = add_lora(model, "all-linear")["0"]
    draw_A(model, 7)
    A = layer.A.detach().clone()
    nn.init.zeros_(layer.A)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):  # as "cuda" would be one, and nothing is there to be copied from
            draw_A(model, 7)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(A, layer.A)
    draw_A(model.double(), 7)
    assert torch.equal(A.double(), layer.A)


def test_freeze_A():
    model, twin = mlp(), mlp()
    for layer in lora_layers(model).values():
        layer.A.requires_grad_(True).grad = torch.ones_like(layer.A)
    freeze_A(model, 7)
    draw_A(twin, 7)
    for layer, drawn in zip(lora_layers(model).values(), lora_layers(twin).values(), strict=True):
        assert torch.equal(layer.A, drawn.A)
        assert not layer.A.requires_grad and layer.A.grad is None and layer.B.requires_grad


# ---------------------------------------------------------------------------------------------------------------------
# Masks


def largest(values, k, allowed=None):
    """Positions, by sorting pairs (-|v|, position) as Python does."""
    order = sorted((-abs(v), i) for i, v in enumerate(values) if allowed is None or allowed[i])
    return sorted(i for _, i in order[:k])


@pytest.mark.parametrize("k", [1, 2, 7, 29, 30])
def test_top_k_with_ties(k):
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        values = torch.randint(-3, 4, (6, 10), generator=g).to([torch.float32, torch.bfloat16, torch.float64][seed % 3])
        allowed = torch.zeros(60, dtype=torch.bool)
        allowed[torch.randperm(60, generator=g)[:30]] = True
        assert top_k_mask(values, k).flatten().nonzero().flatten().tolist() == largest(values.flatten().tolist(), k)
        mask = top_k_mask(values, k, allowed.view(6, 10))
        assert mask.shape == values.shape and mask.dtype == torch.bool
        assert mask.flatten().nonzero().flatten().tolist() == largest(values.flatten().tolist(), k, allowed.tolist())
    assert top_k_mask(torch.ones(4, 5), 3).nonzero().tolist() == [[0, 0], [0, 1], [0, 2]]
    close_by = torch.tensor([1.0, 1 + 1e-12], dtype=torch.float64)  # the same in float32
    assert top_k_mask(close_by, 1).tolist() == [False, True]


def test_top_k_refuses():
    says("k = 0 of 4", top_k_mask, torch.ones(4), 0)
    says("5 of 4 entries wanted, but only 4", top_k_mask, torch.ones(4), 5)
    says("2 of 3 entries wanted, but only 1", top_k_mask, torch.ones(3), 2, torch.tensor([False, True, False]))
    says("zero", top_k_mask, torch.tensor([0.0, 1.0]), 1, torch.tensor([True, False]))
    says("not finite", top_k_mask, torch.tensor([0.0, math.nan]), 1)


@pytest.mark.parametrize("sparsity", [0, 0.5, 0.9, 0.97])
def test_masks_hold_the_largest_of_all(sparsity):
    """N = 144, compared as one list, in the order of the layers where they are equal."""
    model = mlp()
    with torch.no_grad():
        lora_layers(model)["block.1.up"].B.mul_(4)  # so that the layers get unequal shares
        lora_layers(model)["block.0.down"].B.round_()  # ties
    masks = magnitude_masks(model, sparsity)
    assert list(masks) == list(lora_layers(model))
    assert all(
        mask.shape == layer.B.shape for mask, layer in zip(masks.values(), lora_layers(model).values(), strict=True)
    )
    values = [v for layer in lora_layers(model).values() for v in layer.B.flatten().tolist()]
    mask = [m for path in masks for m in masks[path].flatten().tolist()]
    assert [i for i, m in enumerate(mask) if m] == largest(values, sum(mask))
    assert sum(mask) == {0: 144, 0.5: 72, 0.9: 14, 0.97: 4}[sparsity]
    if sparsity == 0.97:
        assert masks["block.1.up"].sum() == 4 and not masks["block.1.down"].any()


def test_exclude():
    model = mlp()
    first = magnitude_masks(model, 0.7)
    second = magnitude_masks(model, 0.7, exclude=first)
    third = magnitude_masks(model, 0.7, exclude=[first, second])
    for a, b in itertools.combinations((first, second, third), 2):
        assert overlap(a, b) == overlap(b, a) == 0
    assert [sum(int(m.sum()) for m in masks.values()) for masks in (first, second, third)] == [43] * 3  # of N = 144
    B = torch.cat([b.flatten() for b in factors(model).values()]).abs()
    lines = [torch.cat([m.flatten() for m in masks.values()]) for masks in (first, second, third)]
    assert B[lines[0]].min() > B[lines[1]].max() and B[lines[1]].min() > B[lines[2]].max()
    says("43 of 144 entries wanted, but only 15 are free", magnitude_masks, model, 0.7, exclude=[first, second, third])


def test_overlap():
    a = {"x": torch.tensor([[True, True], [False, True]]), "y": torch.tensor([[True, False]])}
    b = {"x": torch.tensor([[True, False], [True, False]]), "y": torch.tensor([[False, False]])}
    assert overlap(a, b) == 1 / 4 and overlap(b, a) == 1 / 2 and overlap(a, a) == 1
    says("different models", overlap, a, {"x": a["x"]})
    says("different models", overlap, a, {**a, "y": a["x"]})


def test_masks_refused():
    model = mlp()
    for sparsity in 1, 1.5, -0.1, math.nan:
        says(f"sparsity {sparsity} is outside [0, 1)", magnitude_masks, model, sparsity)
    says("no mask of sparsity 0.997: k = 0 of 144 entries", magnitude_masks, model, 0.997)
    says("zero", magnitude_masks, mlp(zero=True))
    for function in magnitude_masks, lambda model: draw_A(model, 0), lambda model: freeze_A(model, 0):
        says("no LoRA layers", function, nn.Linear(2, 2))
    good = magnitude_masks(model)
    other = {path.replace("up", "gate"): mask for path, mask in good.items()}
    fewer = {path: mask for path, mask in good.items() if "down" in path}
    wider = magnitude_masks(mlp(r=4))
    numbers = {path: mask.float() for path, mask in good.items()}
    for use in (lambda m: MaskedB(model, m)), (lambda m: magnitude_masks(model, exclude=m)):
        says("block.0.gate is a mask, but there is no such LoRA layer", use, other)
        says("block.0.up is a LoRA layer, but there is no such mask", use, fewer)
        says("block.0.up is (14, 4) of torch.bool, not (14, 3) of torch.bool", use, wider)
        says("torch.float32", use, numbers)
    assert not [m for m in model.modules() if "Parametrized" in type(m).__name__]


# ---------------------------------------------------------------------------------------------------------------------
# Masked training

OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=0.1),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=0.01),
}


def train(model, optimizer, begin, end):
    for step in range(begin, end):
        g = torch.Generator().manual_seed(step)
        x, y = torch.randn(8, 10, generator=g), torch.randn(8, 10, generator=g)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()


def start(zero):
    """(a model, masks that another model's B gives)."""
    masks = magnitude_masks(mlp(seed=4), 0.8)
    return mlp(seed=1, zero=zero), masks


@pytest.mark.parametrize("zero", [True, False], ids=["from zero", "from a trained B"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_200_steps_move_the_active_entries_alone(name, zero):
    """Inactive: the same bits. Active: where dense training goes, its other gradients cut and entries put back."""
    model, masks = start(zero)
    dense, before = copy.deepcopy(model), factors(model)
    masked = MaskedB(model, masks)
    train(model, OPTIMIZERS[name](masked.parameters()), 0, 200)
    for path, layer in lora_layers(model).items():
        assert torch.equal(layer.B[~masks[path]], before[path][~masks[path]])
        assert (layer.B[masks[path]] != before[path][masks[path]]).all()

    for layer in lora_layers(dense).values():
        assert layer.B.requires_grad and not layer.A.requires_grad

    def cut(*_):
        for path, layer in lora_layers(dense).items():
            layer.B.grad[~masks[path]] = 0

    def put_back(*_):
        for path, layer in lora_layers(dense).items():
            layer.B.data[~masks[path]] = before[path][~masks[path]]

    optimizer = OPTIMIZERS[name]([layer.B for layer in lora_layers(dense).values()])
    optimizer.register_step_pre_hook(cut)
    optimizer.register_step_post_hook(put_back)
    train(dense, optimizer, 0, 200)
    for path, layer in lora_layers(dense).items():
        torch.testing.assert_close(layer.B[masks[path]], lora_layers(model)[path].B[masks[path]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero", [True, False], ids=["from zero", "from a trained B"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_save_load_and_resume(name, zero, tmp_path):
    """100 steps, everything to disk and into a model that knows neither factors nor masks, 100 more: as 200 at once."""
    whole, masks = start(zero)
    before, masked = factors(whole), MaskedB(whole, masks)
    optimizer = OPTIMIZERS[name](masked.parameters())
    train(whole, optimizer, 0, 100)
    torch.save({"model": whole.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state")
    train(whole, optimizer, 100, 200)

    again = mlp(seed=77)
    masked = MaskedB(again, {path: mask.flip(0) for path, mask in masks.items()})  # as many, elsewhere
    optimizer = OPTIMIZERS[name](masked.parameters())
    state = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    train(again, optimizer, 100, 200)
    masked.remove()
    for path, layer in lora_layers(again).items():
        assert torch.equal(layer.B, lora_layers(whole)[path].B)
        assert torch.equal(layer.B[~masks[path]], before[path][~masks[path]])


def test_disjoint_tasks_in_sequence():
    """The second task, on the same B and with entries of its own, leaves the first one's to the bit."""
    model, first = start(zero=True)
    second = magnitude_masks(mlp(seed=6), 0.8, exclude=first)
    masked = MaskedB(model, first)
    train(model, OPTIMIZERS["adamw"](masked.parameters()), 0, 20)
    masked.remove()
    after_first = factors(model)
    masked = MaskedB(model, second)
    train(model, OPTIMIZERS["adamw"](masked.parameters()), 20, 40)
    masked.remove()
    for path, B in factors(model).items():
        assert torch.equal(B[first[path]], after_first[path][first[path]]) and (B[first[path]] != 0).all()
        assert (B[second[path]] != 0).all() and (B[~first[path] & ~second[path]] == 0).all()


@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_is_the_dense_one_s(autocast):
    model, masks = start(zero=False)
    dense = copy.deepcopy(model)
    masked = MaskedB(model, masks)
    for m in model, dense:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = m(torch.linspace(-1, 1, 40).view(4, 10))
        assert out.dtype == (torch.bfloat16 if autocast else torch.float32)
        out.float().square().sum().backward()
    for vector, (path, layer) in zip(masked.parameters(), lora_layers(dense).items(), strict=True):
        assert vector.dtype == torch.float32 and torch.equal(vector.grad, layer.B.grad[masks[path]])


def test_a_masked_model_is_an_ordinary_one():
    model, masks = start(zero=False)
    paths, B, x = list(lora_layers(model)), factors(model), torch.randn(2, 10)
    with torch.no_grad():
        y = model(x)
        masked = MaskedB(model, masks)
        assert torch.equal(model(x), y) and list(lora_layers(model)) == paths
    assert all(torch.equal(layer.B, B[path]) for path, layer in lora_layers(model).items())
    assert model.eval().block[0]["up"].training is False and model.train().block[0]["up"].training is True
    with torch.inference_mode():
        assert torch.equal(model(x), y)

    twin, twin_masked = copy.deepcopy((model, masked))
    with torch.no_grad():
        for vector in masked.parameters():
            vector.add_(1)
    for path, layer in lora_layers(model).items():
        assert torch.equal(layer.B, B[path] + masks[path]) and torch.equal(lora_layers(twin)[path].B, B[path])
        torch.testing.assert_close(layer.delta(), layer.scale * layer.B @ layer.A)
        torch.testing.assert_close(layer.merged().weight, layer.base.weight + layer.delta())
        assert torch.equal(adapter(model)[path][1], layer.B)
    with torch.no_grad():
        twin_masked.parameters()[0].zero_()
    assert (lora_layers(twin)[paths[0]].B[masks[paths[0]]] == 0).all()
    twin.load_state_dict(model.state_dict())
    assert all(torch.equal(layer.B, lora_layers(twin)[path].B) for path, layer in lora_layers(model).items())
    assert twin.double().block[0]["up"].B.dtype == torch.float64
    says("masked already", MaskedB, model, masks)
    shares = mlp(zero=True)
    for layer in shares.block:
        layer["up"].B = shares.block[0]["up"].B
    says("layers share a B", MaskedB, shares, masks)
    says("MaskedB", insert, model, adapter(mlp()))
    with pytest.raises(ValueError, match="MaskedB"), per_task(model, [1, 1]):
        pass
    assert all(layer.tasks is None for layer in lora_layers(model).values())


def test_remove():
    model, masks = start(zero=False)
    layers = lora_layers(model)
    layers["block.1.up"].B.requires_grad_(False)
    masks["block.0.down"][:] = False  # a layer that trains nothing
    names, B = list(model.state_dict()), factors(model)
    masked = MaskedB(model, masks)
    assert [len(p) for p in masked.parameters()] == [int(m.sum()) for m in masks.values() if m.any()]
    assert all(p.requires_grad for p in masked.parameters())
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in trainable} == {id(p) for p in masked.parameters()}
    train(model, torch.optim.AdamW(trainable), 0, 2)
    assert torch.nn.utils.clip_grad_norm_(trainable, 1.0) > 0
    now = factors(model)
    masked.remove()
    assert list(model.state_dict()) == names and all(type(layer) is LoRALinear for layer in layers.values())
    for path, layer in layers.items():
        assert type(layer.B) is nn.Parameter and layer.B.requires_grad == (path != "block.1.up")
        assert layer.B.grad is None and torch.equal(layer.B, now[path])
        assert torch.equal(layer.B, B[path]) == (path == "block.0.down")
    train(model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), 0, 1)
    assert not torch.isclose(layers["block.0.up"].B, now["block.0.up"]).any()


def test_remove_twice_is_to_remove():
    model, masks = start(zero=False)
    masked, x = MaskedB(model, masks), torch.randn(3, 10)
    y = model(x)
    torch.nn.utils.parametrize.remove_parametrizations(lora_layers(model)["block.0.up"], "B")  # by hand
    for _ in range(2):
        masked.remove()
        assert lora_layers(model).keys() == masks.keys() and torch.equal(model(x), y)


@pytest.mark.parametrize("first", [0, 1], ids=["the original first", "the copy first"])
def test_remove_leaves_a_copy_masked(first):
    """A deepcopy has the same class, and torch takes B out of the class."""
    model, masks = start(zero=False)
    pairs = [(model, MaskedB(model, masks))]
    pairs.append(copy.deepcopy(pairs[0]))
    x = torch.randn(3, 10)
    y = model(x)
    for k in (first, 1 - first):
        pairs[k][1].remove()
        assert all(torch.equal(m(x), y) for m, _ in pairs)
        assert {type(layer) for layer in lora_layers(pairs[k][0]).values()} == {LoRALinear}
    assert all(type(layer.B) is nn.Parameter for m, _ in pairs for layer in lora_layers(m).values())


def test_ortho_lora_projects_the_active_entries():
    """Each vector is a block: what the textbook makes of the dense gradients' active entries."""
    model, masks = start(zero=False)
    dense = copy.deepcopy(model)
    masked, g, rows = MaskedB(model, masks), torch.Generator().manual_seed(3), []
    ortho = OrthoLoRA([[p] for p in masked.parameters()], num_tasks=2)
    same = torch.randn(3, 10, generator=g)
    for task, y in enumerate((9, -9)):  # to be far up, and far down: a conflict
        x = same + 0.1 * torch.randn(3, 10, generator=g)
        (model(x) - y).square().sum().backward()
        ortho.collect(task)
        dense.zero_grad()
        (dense(x) - y).square().sum().backward()
        rows.append([layer.B.grad[masks[path]] for path, layer in lora_layers(dense).items()])
    conflicts = ortho.project().conflicts
    assert conflicts.any()
    for vector, *pair in zip(masked.parameters(), *rows, strict=True):
        expected = project_conflicting(torch.stack(pair), [[1], [0]]).sum(0)
        torch.testing.assert_close(vector.grad, expected, rtol=1e-5, atol=1e-6 * torch.stack(pair).abs().max().item())


# ---------------------------------------------------------------------------------------------------------------------
# Adapters as data


def test_insert():
    model = mlp()
    held, x = adapter(model), torch.randn(3, 10)
    with torch.no_grad():
        y = model(x)
        lora_layers(model)["block.0.up"].B.zero_()  # the adapter is a copy
        assert (held["block.0.up"][1] != 0).any() and not torch.equal(model(x), y)
        lora_layers(model)["block.0.up"].dropout = 0.25
        layers = insert(model, held)
        assert torch.equal(model.eval()(x), y) and list(layers) == list(lora_layers(model)) == list(held)
    assert layers["block.0.up"].dropout == 0.25 and not layers["block.0.up"].A.requires_grad
    assert layers["block.0.up"].B.requires_grad and held["block.0.up"][1].requires_grad is False

    torch.manual_seed(0)
    plain = nn.ModuleDict({"a": nn.Linear(12, 9), "b": nn.Linear(7, 5), "c": nn.Linear(3, 3)})
    for rank, scale in (2, 1 / 3), (6, 0.1), (1, -0.7):  # into plain layers, then into LoRA's; 6 * 0.1 / 6 is not 0.1
        some = random_adapter(SHAPES, rank, 0, scale, torch.float32)
        insert(plain, some)
        assert {p: (m.r, m.scale) for p, m in lora_layers(plain).items()} == {p: (rank, scale) for p in SHAPES}
        assert not plain["a"].base.weight.requires_grad and isinstance(plain["a"].base, nn.Linear)
        for path, (A, B, _) in some.items():
            x = torch.randn(4, A.shape[1])
            torch.testing.assert_close(plain[path](x), plain[path].base(x) + scale * x @ A.T @ B.T)


def test_another_parametrization_is_no_mask():
    model = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(12, 9)), "b": nn.Linear(7, 5)})
    layers = insert(model, random_adapter(SHAPES, 2, 0, 1.0, torch.float32))
    x = torch.randn(4, 12)
    torch.testing.assert_close(layers["a"](x), layers["a"].base(x) + x @ layers["a"].delta().T)
    nn.utils.parametrizations.orthogonal(layers["a"], "A")
    masked = MaskedB(model, {path: torch.ones_like(layer.B, dtype=torch.bool) for path, layer in layers.items()})
    says("masked already", MaskedB, model, {p: torch.ones(m.B.shape, dtype=torch.bool) for p, m in layers.items()})
    masked.remove()


def test_insert_refuses():
    model, held = mlp(), adapter(mlp(seed=1))
    before = factors(model)
    A, B, scale = held["block.1.up"]
    says("nothing for the LoRA layer block.1.up", insert, model, {p: v for p, v in held.items() if p != "block.1.up"})
    says("nowhere is no linear layer", insert, model, {**held, "nowhere": (A, B, scale)})
    says("block is no linear layer", insert, model, {**held, "block": (A, B, scale)})
    for bad in (A[:, 1:], B, 1.0), (A, B[1:], 1.0), (A[1:], B, 1.0):
        says("for block.1.up, whose weight is (14, 10)", insert, model, {**held, "block.1.up": bad})
    assert all(torch.equal(layer.B, before[path]) for path, layer in lora_layers(model).items())
    plain = nn.ModuleDict({"a": nn.Linear(10, 14), "b": nn.Linear(3, 3)})
    says("for b, whose weight is (3, 3)", insert, plain, {"a": (A, B, scale), "b": (A, B, scale)})
    says("for b, whose weight is (3, 3)", insert, plain, {"a": (A, B, scale), "b": (A[:0, :3], B[:3, :0], 1.0)})
    assert plain["a"].weight.requires_grad  # nothing was frozen
    for itself in (nn.Linear(10, 14), LoRALinear(nn.Linear(10, 14), 2, 4)):
        says("the model itself is no linear layer in it", insert, itself, {"": (A, B, scale)})
        assert all(p.requires_grad for name, p in itself.named_parameters() if "base" not in name)


# ---------------------------------------------------------------------------------------------------------------------
# Merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [None, [0.5, 0.4, 0.6], [1, -0.5, 0]], ids=str)
def test_cat_is_the_weighted_sum(weights, dtype):
    some = [random_adapter(SHAPES, rank, rank, scale, dtype) for rank, scale in ((2, 2.0), (5, 0.3), (3, -1.5))]
    merged = merge(some, weights)
    assert all(A.shape[0] == B.shape[1] == 10 and scale == 1 and A.dtype == dtype for A, B, scale in merged.values())
    close(deltas(merged), weighted_sum(some, weights or [1 / 3] * 3), 1e-6 if dtype == torch.float32 else 1e-14)


def test_linear_has_cross_terms():
    some = [random_adapter(SHAPES, 4, seed, scale) for seed, scale in ((1, 2.0), (2, 0.5), (3, 1.0))]
    weights, expected = [0.5, 0.7, 0.2], {}
    for path in SHAPES:
        roots = [math.sqrt(w * x[path][2]) for w, x in zip(weights, some, strict=True)]
        pairs = itertools.product(zip(roots, some, strict=True), repeat=2)
        expected[path] = sum(p * q * x[path][1] @ y[path][0] for (p, x), (q, y) in pairs)
    merged = merge(some, weights, "linear")
    close(deltas(merged), expected, 1e-14)
    assert all(len(A) == 4 and scale == 1 for A, _, scale in merged.values())
    assert (deltas(merged)["a"] - weighted_sum(some, weights)["a"]).norm() > 0.5 * expected["a"].norm()


CASES = [("cat", (4, 4, 4), False), ("cat", (2, 5, 3), False), ("cat", (4, 6, 2), True), ("linear", (4, 4, 4), False)]


@pytest.mark.parametrize("how, ranks, rslora", CASES)
def test_merging_as_in_peft(how, ranks, rslora):
    """peft's `add_weighted_adapter` of the same adapters, and its logits. It keeps use_rslora for the merged adapter,
    so the sum of 12 ranks comes out scaled by sqrt(12): there the scaling is set to what its formula means, 1."""
    config = tiny("bert")
    base = make(config, "ForSequenceClassification").double()
    theirs, ours, names, weights = None, [], [], [0.4, 0.9, 0.3]
    for t, rank in enumerate(ranks):
        names.append(f"task{t}")
        lora = peft.LoraConfig(r=rank, lora_alpha=3 * t + 4, target_modules=["query", "value"], use_rslora=rslora)
        if theirs is None:
            theirs = peft.get_peft_model(copy.deepcopy(base), lora, names[0], autocast_adapter_dtype=False)
        else:
            theirs.add_adapter(names[t], lora)
        model = copy.deepcopy(base)
        add_lora(model, ["query", "value"], r=rank, alpha=3 * t + 4, rslora=rslora)
        g = torch.Generator().manual_seed(t)
        with torch.no_grad():
            for path, layer in lora_layers(model).items():
                layer.A.copy_(torch.randn(layer.A.shape, generator=g) * 0.3)
                layer.B.copy_(torch.randn(layer.B.shape, generator=g) * 0.3)
                module = theirs.base_model.model.get_submodule(path)
                module.lora_A[names[t]].weight.copy_(layer.A)
                module.lora_B[names[t]].weight.copy_(layer.B)
        ours.append(adapter(model))
    theirs.add_weighted_adapter(names, weights, "merged", combination_type=how)
    theirs.set_adapter("merged")
    for module in theirs.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            assert math.isclose(module.scaling["merged"], math.sqrt(sum(ranks)) if rslora else 1)
            module.scaling["merged"] = 1.0

    merged = merge(ours, weights, how)
    inputs = batch(config, pairs=True)
    insert(base, merged)
    logits = run(base, *inputs)
    tolerance = 1e-6 if how == "linear" else 1e-12  # peft keeps linear's roots in float32
    torch.testing.assert_close(logits, run(theirs.eval(), *inputs), rtol=tolerance, atol=tolerance)
    assert (logits - run(insert_one(base, ours[0]), *inputs)).abs().max() > 1e-2
    for path, delta in deltas(merged).items():
        peft_delta = theirs.base_model.model.get_submodule(path).get_delta_weight("merged")
        assert (delta - peft_delta).norm() <= tolerance * delta.norm()


def insert_one(model, some):
    insert(model, some)
    return model


def test_merge_refuses():
    one, two, three = (random_adapter(SHAPES, rank, rank) for rank in (2, 2, 3))
    for how in "cat", "linear":
        says("no adapters", merge, [], None, how)
        says("2 adapters, but 1 weights", merge, [one, two], [1], how)
        says("different targets: b is in only one of adapters 0 and 1", merge, [one, {"a": two["a"]}], None, how)
        wider = {**two, **random_adapter({"b": (5, 8)}, 2, 0)}
        says("different bases: b is (5, 7) in adapter 0, (5, 8) in 1", merge, [one, wider], None, how)
    says("how must be cat or linear, not 'ties'", merge, [one, two], None, "ties")
    says("linear needs equal ranks, a has 2, 3", merge, [one, three], None, "linear")
    says("no weight × scale may be negative", merge, [one, two], [1, -0.5], "linear")
    says(": [-1.0]; use cat", merge, [{path: (A, B, -1.0) for path, (A, B, _) in one.items()}], None, "linear")
    says("no adapters", delta_cosines, [])
    says("different targets", delta_cosines, [one, {"a": two["a"]}])


# ---------------------------------------------------------------------------------------------------------------------
# Cosines between deltas


def test_delta_cosines_are_those_of_the_formed_deltas():
    some = [random_adapter(SHAPES, rank, rank, scale) for rank, scale in ((2, 2.0), (5, 0.3), (3, -1.5))]
    some.append({path: (A, 0 * B, s) for path, (A, B, s) in some[0].items()})  # no delta
    rows = [torch.cat([d.flatten() for d in deltas(x).values()]) for x in some]
    expected = torch.stack([torch.stack([torch.cosine_similarity(a, b, dim=0) for b in rows]) for a in rows])
    with torch.device("meta"):  # as "cuda" would be one
        cosines = delta_cosines(some)
    assert cosines.shape == (4, 4) and cosines.dtype == torch.float64
    torch.testing.assert_close(cosines, expected, rtol=1e-12, atol=1e-12)
    assert (cosines[3] == 0).all() and (cosines[:, 3] == 0).all()
    some[1]["a"][1][0, 0] = math.nan  # a broken adapter does not pass for an orthogonal one
    assert delta_cosines(some)[0, 1].isnan()


def test_independent_projections_are_nearly_orthogonal():
    """The same B, so on one A the cosine is 1. Of independent A's it has mean 0 and deviation 1 / sqrt(r in)."""

    def on(width, seed):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(width, 64))
        layer = add_lora(model, "all-linear", r=8)["0"]
        draw_A(model, seed)
        nn.init.normal_(layer.B)
        return adapter(model)

    assert delta_cosines([on(4096, 1), on(4096, 1)])[0, 1] > 1 - 1e-9
    narrow, wide = (delta_cosines([on(width, seed) for seed in range(8)]).fill_diagonal_(0) for width in (16, 4096))
    assert wide.abs().max() < 4 / math.sqrt(8 * 4096)  # 0.022
    assert narrow.abs().max() > 0.1  # and at toy width it is not 0


# ---------------------------------------------------------------------------------------------------------------------
# On disk


@pytest.fixture
def lori_s():
    """A tiny RoBERTa with a trained-looking LoRI-S adapter under its masks: (model, masks)."""
    model = make(tiny("roberta"), "ForSequenceClassification")
    add_lora(model.base_model, r=5, alpha=10)
    freeze_A(model, 3)
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.B)
    masks = magnitude_masks(model.base_model)
    for layer in lora_layers(model).values():
        nn.init.zeros_(layer.B)
    for vector in MaskedB(model.base_model, masks).parameters():
        nn.init.normal_(vector)
    return model, masks


def test_peft_loads_a_lori_adapter(lori_s, tmp_path):
    """While it is masked still: B goes out whole, its zeros included."""
    model, masks = lori_s
    tensors, config = peft_adapter(model)
    safetensors.torch.save_file(tensors, tmp_path / "adapter_model.safetensors", {"format": "pt"})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    base, inputs = make(tiny("roberta"), "ForSequenceClassification"), batch(tiny("roberta"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).eval()
    logits = run(model, *inputs)
    torch.testing.assert_close(run(theirs, *inputs), logits, rtol=0, atol=1e-5)
    with theirs.disable_adapter():
        assert (run(theirs, *inputs) - logits).abs().max() > 1e-2
    for path, mask in masks.items():
        B = theirs.base_model.model.get_submodule("roberta." + path).lora_B["default"].weight
        assert torch.equal(B != 0, mask)
