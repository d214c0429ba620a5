"""lora.py against `peft`, on our encoder and on `transformers` models; and Ortho-LoRA over LoRA in foreign models."""

import copy
import json
import math
import warnings

import peft
import pytest
import safetensors.torch
import torch
import transformers as hf
from tiny import FAMILIES, batch, make, one_line, run, tiny
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

from lora import (
    LoRALinear,
    add_lora,
    blocks,
    lora_layers,
    lora_parameters,
    merge_lora,
    peft_adapter,
    per_task,
)
from model import Encoder, read_config
from ortholora import OrthoLoRA

TARGETS = {"distilbert": ["q_lin", "v_lin"]}


def llama(layers=2, **others):
    torch.manual_seed(0)
    sizes = {"vocab_size": 31, "hidden_size": 16, "intermediate_size": 24, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = hf.LlamaConfig(num_hidden_layers=layers, **sizes, **heads, **others)
    return hf.LlamaForCausalLM(config).eval()


def vit():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "image_size": 8, "patch_size": 4}
    config = hf.ViTConfig(num_hidden_layers=2, num_attention_heads=4, num_labels=3, **sizes)
    return hf.ViTForImageClassification(config).eval()


def task_model(family):
    """One of `transformers`' models with a head, and how to get its logits for a fixed input."""
    g = torch.Generator().manual_seed(0)
    if family == "llama":
        model, inputs = llama(), {"input_ids": torch.randint(0, 31, (2, 9), generator=g)}
    elif family == "vit":
        model, inputs = vit(), {"pixel_values": torch.randn(2, 3, 8, 8, generator=g)}
    else:
        model = make(tiny(family), "ForSequenceClassification")
        ids, mask, _ = batch(model.config)
        inputs = {"input_ids": ids, "attention_mask": mask}

    @torch.no_grad()
    def logits(of):
        return of.eval()(**inputs).logits

    return model, logits


def in_peft(model):
    """The paths at which a peft model has LoRA."""
    found = [n for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    return {path.removeprefix("base_model.model.") for path in found}


def randomize(layers, seed=0):
    """Trained factors, as it were: B is not zero any more."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in layers.values():
            layer.A.copy_(torch.randn(layer.A.shape, generator=g) * 0.2)
            layer.B.copy_(torch.randn(layer.B.shape, generator=g) * 0.2)


# ---------------------------------------------------------------------------------------------------------------------
# One layer


def test_forward_by_hand():
    """W0 = [[1, 2], [0, 1]], b = (1, 0), A = (1, -1), B = (2, 1)', alpha / r = 3: x = (1, 3) gives W0 x + b = (8, 3),
    A x = -2, so h = (8, 3) + 3 * (-4, -2) = (-4, -3), and delta = 3 B A = [[6, -6], [3, -3]]."""
    base = nn.Linear(2, 2)
    layer = LoRALinear(base, r=1, alpha=3)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        base.bias.copy_(torch.tensor([1.0, 0.0]))
        layer.A.copy_(torch.tensor([[1.0, -1.0]]))
        layer.B.copy_(torch.tensor([[2.0], [1.0]]))
    x = torch.tensor([[1.0, 3.0]])
    assert layer(x).tolist() == [[-4, -3]]
    assert layer.delta().tolist() == [[6, -6], [3, -3]]
    assert layer.merged()(x).tolist() == [[-4, -3]]
    assert layer.merged().weight.tolist() == [[7, -4], [3, -2]]


def test_scale():
    base = nn.Linear(4, 4)
    assert LoRALinear(base, 4, 6).scale == 1.5 and LoRALinear(base, 4, 6, rslora=True).scale == 3


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_merged(bias, dtype):
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(7, 5, bias=bias, dtype=dtype), 3, 6)
    randomize({"": layer})
    before = [p.clone() for p in layer.parameters()]
    merged, x = layer.merged(), torch.randn(11, 7, dtype=dtype)
    assert type(merged) is nn.Linear and merged.weight.dtype == dtype and (merged.bias is not None) == bias
    assert not merged.weight.requires_grad
    torch.testing.assert_close(merged.weight, (layer.base.weight + layer.scale * (layer.B @ layer.A)).to(dtype))
    tolerance = {torch.float32: 1e-6, torch.float64: 1e-14, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(merged(x), layer(x), rtol=0, atol=tolerance)
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


def test_start_and_gradients():
    """A ~ U(-1/√in, 1/√in): deviation 1/√(3 in). B = 0, so A's first gradient is exactly zero and B's is not."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(100, 50), r=64, alpha=16)
    assert layer.A.shape == (64, 100) and layer.B.shape == (50, 64) and (layer.B == 0).all()
    assert 0.0999 < layer.A.abs().max() <= 0.1 and abs(layer.A.std() - 1 / math.sqrt(300)) < 0.001
    layer(torch.randn(3, 100)).square().sum().backward()
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["A", "B"]
    assert (layer.A.grad == 0).all() and (layer.B.grad != 0).any()
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_dropout_is_on_the_update_alone():
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(6, 4), 2, 4, dropout=0.25)
    x = torch.randn(1, 6)
    assert torch.equal(layer.train()(x), layer.base(x))  # B = 0: what dropout does can't be seen
    randomize({"": layer})
    with torch.no_grad():
        update = layer.eval()(x) - layer.base(x)
        draws = layer.train()(x.expand(20_000, -1)) - layer.base(x)
        variance = 0.25 / 0.75 * (layer.delta() * x).square().sum(1)  # of each output
        assert ((draws.mean(0) - update).abs() < 5 * (variance / 20_000).sqrt()).all()
        assert ((draws.var(0) / variance - 1).abs() < 0.05).all()


@pytest.mark.parametrize(
    "r, dropout", [(0, 0), (-1, 0), (2.0, 0), (True, 0), (2, 1), (2, -0.1), (2, 1.5), (2, math.nan)]
)
def test_bad_rank_and_dropout(r, dropout):
    model = llama()
    for make_it in (lambda: LoRALinear(nn.Linear(2, 2), r, 1, dropout), lambda: add_lora(model, r=r, dropout=dropout)):
        with pytest.raises(ValueError) as error:
            make_it()
        assert f"r={r}, dropout={dropout}" in one_line(error)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# add_lora against peft


def adapted(family, targets, layers=None):
    """(paths in the encoder that peft adapts, that we adapt). peft gets the task-free model; our encoder the same."""
    reference = make(tiny(family, layers=3))
    config = peft.LoraConfig(target_modules=targets, layers_to_transform=layers)
    wrapped = peft.get_peft_model(copy.deepcopy(reference), config)
    theirs = in_peft(wrapped)
    ours = add_lora(reference, targets, layers=layers)
    assert set(lora_layers(reference)) == set(ours)
    encoder = Encoder(read_config(reference.config.to_dict()), pooler=hasattr(reference, "pooler"))
    assert add_lora(encoder, targets, layers=layers).keys() == ours.keys()
    return theirs, set(ours)


@pytest.mark.parametrize("layers", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_match_as_in_peft(family, layers):
    sets = [["query"], ["dense", "key"], ["output.dense"], ["attention.output.dense", "value"]]
    if family == "distilbert":
        sets = [["q_lin"], ["lin1", "out_lin"], ["attention.v_lin"]]
    for targets in sets:
        theirs, ours = adapted(family, targets, layers)
        assert theirs == ours and len(ours) >= len(targets) * len(layers or [0, 1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_and_whole_paths(family):
    theirs, ours = adapted(family, "all-linear")
    assert theirs == ours and len(ours) == 18 + (family != "distilbert")  # six a layer, and the pooler
    path = "transformer.layer.1.ffn.lin2" if family == "distilbert" else "encoder.layer.1.output.dense"
    assert adapted(family, [path]) == ({path}, {path})


@pytest.mark.parametrize("family, count", [("llama", 14), ("bert", 13), ("vit", 12)])
def test_all_linear_leaves_the_head_alone_as_peft_does(family, count):
    """Two layers of seven, of six and of six; BERT's pooler is no head."""
    model, _ = task_model(family)
    kind = None if family == "llama" else "SEQ_CLS"  # without it peft takes a classifier, too
    config = peft.LoraConfig(target_modules="all-linear", task_type=kind)
    theirs = in_peft(peft.get_peft_model(copy.deepcopy(model), config))
    assert add_lora(model, "all-linear").keys() == theirs and len(theirs) == count


def test_all_linear_knows_heads_by_their_place():
    """Top-level only; what `get_output_embeddings` returns goes before the names; a name can still be asked for."""

    class Model(nn.Module):
        def __init__(self, output=None):
            super().__init__()
            self.body = nn.ModuleDict({"classifier": nn.Linear(2, 2)})
            self.score = nn.ModuleList([nn.Linear(2, 2)])
            self.qa_outputs, self.out = nn.Linear(2, 2), nn.Linear(2, 2)
            self.get_output_embeddings = lambda: output and getattr(self, output)

    assert add_lora(Model(), "all-linear").keys() == {"body.classifier", "out"}
    assert add_lora(Model("out"), "all-linear").keys() == {"body.classifier", "score.0", "qa_outputs"}
    assert add_lora(Model(), ["all-linear", "qa_outputs"]).keys() == {"body.classifier", "qa_outputs", "out"}
    with pytest.raises(ValueError, match="'all-linear' matches no linear layer; their names: classifier"):
        add_lora(nn.ModuleDict({"classifier": nn.Linear(2, 2)}), "all-linear")


def test_default_targets():
    for model, stem, names in [
        (llama(), "model.layers.{}.self_attn", ("q_proj", "v_proj")),
        (make(tiny("distilbert")), "transformer.layer.{}.attention", ("q_lin", "v_lin")),
        (make(tiny("xlm-roberta")), "encoder.layer.{}.attention.self", ("query", "value")),
    ]:
        layers = add_lora(model)
        assert list(layers) == [f"{stem.format(i)}.{name}" for i in (0, 1) for name in names]
        assert all(
            (layer.r, layer.alpha, layer.dropout, layer.rslora) == (8, 16, 0, False) for layer in layers.values()
        )
    assert add_lora(nn.ModuleDict({name: nn.Linear(2, 2) for name in ("query", "value")})).keys() == {"query", "value"}


@pytest.mark.parametrize("family", FAMILIES)
def test_untouched_at_the_start(family):
    """B = 0: logits are those of the model without LoRA, to the bit; exactly A and B can be trained."""
    model = make(tiny(family), "ForSequenceClassification")
    inputs = batch(model.config)
    before = run(model, *inputs)
    layers = add_lora(model.base_model, "all-linear")
    assert torch.equal(run(model, *inputs), before)
    trainable = {n for n, p in model.base_model.named_parameters() if p.requires_grad}
    assert trainable == {f"{path}.{factor}" for path in layers for factor in "AB"}
    heads = [p for n, p in model.named_parameters() if not n.startswith(model.base_model_prefix)]
    assert heads and all(p.requires_grad for p in heads)
    assert not any(m.training for m in model.modules())


def test_layers_take_over_the_mode_they_are_put_in():
    model = llama()
    assert not any(m.training for m in add_lora(model).values())
    assert not any(m.training for m in merge_lora(model).modules())
    assert all(m.training for m in add_lora(model.train()).values())


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family", [*FAMILIES, "llama"])
def test_same_factors_same_logits_as_peft(family, rslora):
    if family == "llama":
        model, targets = llama(), ["q_proj", "v_proj", "down_proj"]
        ids = torch.randint(0, 31, (2, 9))
        inputs = ids, torch.ones_like(ids)
    else:
        model = make(tiny(family), "ForSequenceClassification")
        targets, inputs = TARGETS.get(family, ["query", "value"]), batch(model.config)
    config = peft.LoraConfig(r=4, lora_alpha=12, target_modules=targets, use_rslora=rslora, lora_dropout=0.3)
    reference = peft.get_peft_model(copy.deepcopy(model), config).eval()
    start = run(model, *inputs)
    layers = add_lora(model, targets, r=4, alpha=12, dropout=0.3, rslora=rslora)
    randomize(layers)
    theirs = {n.removeprefix("base_model.model."): m for n, m in reference.named_modules()}
    with torch.no_grad():
        for path, layer in layers.items():
            theirs[path].lora_A["default"].weight.copy_(layer.A)
            theirs[path].lora_B["default"].weight.copy_(layer.B)
            torch.testing.assert_close(layer.delta(), theirs[path].get_delta_weight("default"))
    ours, expected = run(model, *inputs), run(reference, *inputs)
    assert (expected - start).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)

    with pytest.raises(ValueError):  # where there is no place to put the merged one
        merge_lora(next(iter(lora_layers(model).values())))
    merged = merge_lora(copy.deepcopy(model))
    assert not lora_layers(merged) and lora_layers(model).keys() == layers.keys()
    assert merged.state_dict().keys() == reference.unload().state_dict().keys()
    torch.testing.assert_close(run(merged, *inputs), expected, rtol=0, atol=1e-5)


def test_autocast_rounds_no_merged_weight():
    layer = LoRALinear(nn.Linear(16, 16), 2, 4)
    randomize({"": layer})
    expected = layer.base.weight + layer.delta()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(layer.merged().weight, expected)


BAD_TARGETS = [
    ({"targets": ["querry"]}, ["'querry'", "query", "dense"]),
    ({"targets": ["query", "q_proj"]}, ["'q_proj'"]),
    ({"targets": ["uery"]}, ["'uery'"]),
    ({"targets": []}, ["query"]),
    ({"targets": ""}, ["query"]),
    ({"targets": ["LayerNorm"]}, ["'LayerNorm'"]),
    ({"layers": [0, 7]}, ["[0, 7]", "[0, 1]"]),
    ({"layers": []}, ["[]", "[0, 1]"]),
    ({"targets": ["pooler.dense"], "layers": [0]}, ["[0]", "[]"]),
]


@pytest.mark.parametrize("arguments, words", BAD_TARGETS, ids=str)
def test_what_matches_nothing_is_an_error_and_changes_nothing(arguments, words):
    model = make(tiny("bert"))
    names = list(model.state_dict())
    with pytest.raises(ValueError) as error:
        add_lora(model, **arguments)
    assert all(word in one_line(error) for word in words)
    assert list(model.state_dict()) == names and all(p.requires_grad for p in model.parameters())


def test_layer_numbers_are_whole_parts_of_a_path():
    stack = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(2, 2)}) for _ in range(11))
    assert set(add_lora(nn.ModuleDict({"v2": stack}), ["q"], layers=[1, 10])) == {"v2.1.q", "v2.10.q"}


def test_unknown_family_needs_targets():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    with pytest.raises(ValueError) as error:
        add_lora(model)
    assert "0, 2" in one_line(error)
    assert set(add_lora(model, ["2"])) == {"2"}
    with pytest.raises(ValueError, match="linear layers: none"):
        add_lora(nn.ReLU())
    with pytest.raises(ValueError, match=r"wrap it: LoRALinear\(module"):
        add_lora(model[0], ["0"])


def test_twice_is_an_error():
    model = llama()
    layers = add_lora(model)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, ["k_proj"])
    assert lora_layers(model) == layers


# ---------------------------------------------------------------------------------------------------------------------
# Blocks


def same(a, b):
    return [[id(p) for p in block] for block in a] == [[id(p) for p in block] for block in b]


def test_blocks():
    model = llama()
    one, two, three, four = add_lora(model).values()
    A, B = [one.A, two.A, three.A, four.A], [one.B, two.B, three.B, four.B]
    each = [p for pair in zip(A, B, strict=True) for p in pair]
    assert same([lora_parameters(model)], [each])
    assert same(blocks(model), [[p] for p in each]) and same(blocks(model, "tensor"), blocks(model))
    assert same(blocks(model, "factor"), [A, B]) and same(blocks(model, "all"), [A + B])
    for name, some in (("A", A), ("B", B)):
        assert same(blocks(model, factors=name), [[p] for p in some])
        assert same(blocks(model, "factor", name), [some]) and same(blocks(model, "all", name), [some])

    two.A.requires_grad_(False)  # a frozen factor is in no block
    A.pop(1)
    each.pop(2)
    assert same(blocks(model), [[p] for p in each])
    assert same(blocks(model, "factor"), [A, B]) and same(blocks(model, "all"), [A + B])
    assert same(blocks(model, factors="A"), [[p] for p in A])
    for p in A:
        p.requires_grad_(False)
    assert same(blocks(model, "factor"), [B]) and same(blocks(model, "all"), [B])
    units = ("tensor", "factor", "all")
    assert [blocks(model, unit, "A") for unit in units] == [[], [], []]
    for p in B:
        p.requires_grad_(False)
    assert [blocks(model, unit) for unit in units] == [[], [], []]
    assert [blocks(nn.Linear(2, 2), unit) for unit in units] == [[], [], []]  # nor is there one without LoRA


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["layer"], "'layer'"),
        (["tensor", "C"], "'C'"),
        (["all", ""], "''"),
        (["factor", "BA"], "'BA'"),
        (["tensor", ["A"]], "['A']"),
    ],
)
def test_blocks_refuses(arguments, words):
    with pytest.raises(ValueError) as error:
        blocks(llama(), *arguments)
    assert words in one_line(error)


# ---------------------------------------------------------------------------------------------------------------------
# Every task's gradient in one backward pass


def sequences(config, sizes, seed=0):
    """One batch per task, of `sizes` sequences."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(2, config.vocab_size, (size, 7), generator=g) for size in sizes]


@pytest.mark.parametrize("sizes", [[3, 3], [4], [1, 5, 2], [2, 2, 2, 2], [3, 0, 2]])
@pytest.mark.parametrize("frozen", ["", "A"])
def test_per_task_gradients_equal_the_loops(sizes, frozen):
    model = make(tiny("bert"))
    layers = add_lora(model, ["query", "value", "output.dense"], r=3, alpha=6)
    randomize(layers)
    for layer in layers.values():
        layer.A.requires_grad_(frozen != "A")
    loss = lambda out: out.last_hidden_state.square().sum()  # noqa: E731
    batches, factors = sequences(model.config, sizes), [p for p in lora_parameters(model) if p.requires_grad]
    apart = []  # (T, ...) for each factor
    for ids in batches:
        model.zero_grad()
        if len(ids):
            loss(model(input_ids=ids)).backward()
        apart.append([torch.zeros_like(p) if p.grad is None else p.grad for p in factors])
    expected = [torch.stack(task) for task in zip(*apart, strict=True)]
    model.zero_grad()
    with per_task(model, sizes) as grads:
        out = model(input_ids=torch.cat(batches))
        loss(out).backward()
    torch.testing.assert_close(out.last_hidden_state, model(input_ids=torch.cat(batches)).last_hidden_state)
    assert len(grads) == len(factors) and all(p.grad is None for p in factors)
    assert all(any(e[t].abs().max() > 1e-3 for e in expected) for t, size in enumerate(sizes) if size)
    for p, e in zip(factors, expected, strict=True):
        torch.testing.assert_close(grads[p].grad, e, rtol=1e-4, atol=1e-5 * max(1, e.abs().max().item()))


def test_per_task_under_gradient_checkpointing():
    module, x, found = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(5, 4), []
    randomize(add_lora(module, "all-linear", r=2))
    for forward in (module, lambda x: torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)):
        with per_task(module, [2, 3]) as grads:
            forward(x).square().sum().backward()
        found.append([view.grad for view in grads.values()])
    assert len(found[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_weight_that_is_read_past_its_layer_is_left_alone():
    module, x = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), torch.randn(2, 3, 8)
    before = module(x)  # in training mode: the fused path is not taken
    assert add_lora(module, "all-linear").keys() == {"linear1", "linear2"}
    torch.testing.assert_close(module(x), before)
    module.eval()
    with pytest.raises(AttributeError, match="LoRALinear.*weight"):  # so no adapter is left out without a word
        module(x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        torch.testing.assert_close(module(x), before)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    with pytest.raises(ValueError, match="'out_proj' matches no linear layer"):
        add_lora(nn.MultiheadAttention(8, 2), ["out_proj"])


def test_per_task_where_layers_share_a_factor():
    module, x = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), torch.randn(5, 4)
    layers = add_lora(module, "all-linear", r=2)
    randomize(layers)
    layers["2"].A = layers["0"].A
    module(x).square().sum().backward()
    expected = layers["0"].A.grad
    with per_task(module, [2, 3]) as grads:
        module(x).square().sum().backward()
    assert len(grads) == 3
    torch.testing.assert_close(grads[layers["0"].A].grad.sum(0), expected)


def test_a_factor_that_layers_share_is_listed_once():
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    one, two = add_lora(module, "all-linear", r=2).values()
    two.A = one.A
    assert same([lora_parameters(module)], [[one.A, one.B, two.B]])
    assert same(blocks(module), [[one.A], [one.B], [two.B]])
    assert same(blocks(module, "factor"), [[one.A], [one.B, two.B]])
    assert same(blocks(module, "all"), [[one.A, one.B, two.B]])


def test_targets_and_layers_can_be_iterators():
    found = add_lora(llama(), (name for name in ("q_proj", "v_proj")), layers=map(int, "1"))
    assert len(found) == 2 and all(".1." in path for path in found)
    with pytest.raises(ValueError, match="layers \\[\\]"):
        add_lora(llama(), layers=iter(()))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_what_is_no_plain_linear_layer_is_not_merged():
    packed = nn.Linear(3, 2)
    packed.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    for base, says in ((Doubled(3, 2), "a Doubled of torch.float32"), (packed, "a Linear of torch.int8")):
        module = nn.Sequential(base)
        layer = add_lora(module, "all-linear", r=1, alpha=1)["0"]
        with pytest.raises(ValueError, match=says):
            merge_lora(module)
        assert module[0] is layer


def test_per_task_of_rows_without_a_length_and_of_other_dtypes():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5, dtype=torch.bfloat16))
    layer = add_lora(module, "all-linear", r=2, alpha=2)["0"]
    randomize({"": layer})
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    with per_task(module, [2, 2]) as grads:
        y = module(x)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and grads[layer.B].grad.dtype == layer.B.dtype == torch.float32
    # dL/dB = scale * sum over rows of 1 (A x)'
    for t, rows in enumerate(x.split(2)):
        expected = (rows.float() @ layer.A.T).sum(0).expand(5, 2)
        torch.testing.assert_close(grads[layer.B].grad[t], expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("sizes", [[2, 2], [1, 3]])
@pytest.mark.parametrize("shape", [(6, 4, 3), (24, 3)])  # (length, batch, n); the tokens of all sequences in a row
def test_per_task_of_what_is_not_stacked_first_is_refused(shape, sizes):
    module = nn.Sequential(nn.Linear(3, 5))
    add_lora(module, "all-linear", r=2, alpha=2)
    with per_task(module, sizes), pytest.raises(ValueError, match="its first dimension is not sum"):
        module(torch.randn(shape))


def test_per_task_ends_with_its_block():
    module = nn.Sequential(nn.Linear(4, 4))
    layer = add_lora(module, "all-linear", r=2)["0"]
    with pytest.raises(ValueError), per_task(module, [2, 1]):
        module(torch.zeros(5, 4))  # not the 3 rows that were announced
    assert layer.tasks is None
    module(torch.ones(5, 4)).sum().backward()
    assert layer.B.grad is not None


# ---------------------------------------------------------------------------------------------------------------------
# Files


def load_in_peft(base, folder, tensors, config):
    """Write the two files, and let peft put them on a copy of `base`. It warns of what is missing: an error here."""
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return peft.PeftModel.from_pretrained(copy.deepcopy(base), folder)


SEVEN = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
VIT = ["q_proj", "v_proj"], ["fc1", "fc2", "k_proj", "o_proj", "q_proj", "v_proj"]
if not any(name.endswith("q_proj") for name, _ in task_model("vit")[0].named_modules()):  # transformers 5.0
    VIT = ["query", "value"], ["dense", "key", "query", "value"]
IN_PEFT = [  # family, targets, what target_modules says: None for whole paths
    ("llama", SEVEN, SEVEN),
    ("llama", "all-linear", SEVEN),
    ("llama", ["mlp.up_proj", "lm_head"], ["lm_head", "up_proj"]),
    ("bert", None, ["query", "value"]),
    ("bert", "all-linear", ["dense", "key", "query", "value"]),
    ("bert", ["attention.output.dense", "key"], None),
    ("vit", None, VIT[0]),
    ("vit", "all-linear", VIT[1]),
    ("roberta", None, ["query", "value"]),
    ("roberta", "all-linear", None),
    ("distilbert", None, ["q_lin", "v_lin"]),
]


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("family, targets, names", IN_PEFT, ids=str)
def test_peft_loads_the_adapter(family, targets, names, rslora, tmp_path):
    model, logits = task_model(family)
    base, before = copy.deepcopy(model), logits(model)
    layers = add_lora(model, targets, r=3, alpha=7, dropout=0.25, rslora=rslora)
    randomize(layers)
    tensors, config = peft_adapter(model)
    assert config["target_modules"] == (names or sorted(layers))
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    theirs = load_in_peft(base, tmp_path, tensors, config)
    assert in_peft(theirs) == layers.keys()
    assert (logits(model) - before).abs().max() > 1e-2  # the adapter does something
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)

    mine = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)  # what peft itself would write
    assert mine.keys() == tensors.keys() and all(torch.equal(mine[name], tensors[name]) for name in mine)
    read = theirs.peft_config["default"]
    assert (read.r, read.lora_alpha, read.lora_dropout, read.use_rslora, read.bias) == (3, 7, 0.25, rslora, "none")


@pytest.mark.parametrize("targets", [None, "all-linear", ["dense", "lin2"], ["query", "q_lin", "value"]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_peft_loads_an_encoder_s_adapter_into_a_task_model(family, targets, tmp_path):
    """Of the task model only the encoder is seen: RoBERTa's classifier.dense must not be meant by "dense"."""
    if isinstance(targets, list):
        there = {path.rpartition(".")[2] for path, _ in make(tiny(family)).named_modules()}
        targets = [name for name in targets if name in there]
    model, logits = task_model(family)
    base, prefix = copy.deepcopy(model), model.base_model_prefix + "."
    layers = add_lora(model.base_model, targets, r=3, alpha=7)
    randomize(layers)
    tensors, config = peft_adapter(model.base_model, prefix)
    theirs = load_in_peft(base, tmp_path, tensors, config)
    assert in_peft(theirs) == {prefix + path for path in layers}
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)
    last = {path.rpartition(".")[2] for path in layers}
    is_short = last <= {"query", "value", "q_lin", "v_lin"}
    assert config["target_modules"] == sorted(last if is_short else (prefix + path for path in layers))

    # with the trained head beside it, as a sequence classifier's adapter is kept
    heads = {n: p for n, p in model.state_dict().items() if not n.startswith(prefix)}
    tensors |= {"base_model.model." + name: 2 * tensor for name, tensor in heads.items()}
    saved = sorted({name.split(".")[0] for name in heads})
    theirs = load_in_peft(base, tmp_path, tensors, {**config, "task_type": "SEQ_CLS", "modules_to_save": saved})
    model.load_state_dict({name: 2 * tensor for name, tensor in heads.items()}, strict=False)
    assert in_peft(theirs) == {prefix + path for path in layers}
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_ranks_and_alphas_by_layer(rslora, tmp_path):
    model, logits = task_model("llama")
    base = copy.deepcopy(model)
    for i, (path, layer) in enumerate(add_lora(model, ["q_proj", "down_proj"], r=4, alpha=8).items()):
        model.set_submodule(path, LoRALinear(layer.base, (4, 2, 4, 6)[i], (8, 8, 3, 5)[i], rslora=rslora))
    randomize(lora_layers(model))
    tensors, config = peft_adapter(model)
    paths = list(lora_layers(model))
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 8, rslora)
    assert config["inference_mode"] and config["bias"] == "none"  # as `save_pretrained` of a peft model writes them
    assert config["rank_pattern"] == dict(zip(paths, (4, 2, 4, 6), strict=True))
    assert config["alpha_pattern"] == dict(zip(paths, (8, 8, 3, 5), strict=True))
    torch.testing.assert_close(logits(load_in_peft(base, tmp_path, tensors, config)), logits(model), rtol=0, atol=1e-5)
    tensors, config = peft_adapter(model.model, "model.")  # the patterns' keys get the prefix as well
    torch.testing.assert_close(logits(load_in_peft(base, tmp_path, tensors, config)), logits(model), rtol=0, atol=1e-5)


class Ends(nn.Module):
    """One path is the end of another, which peft's patterns mean as well; it comes first, in the alphabet, too."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"fc": nn.Linear(4, 4)})

    def forward(self, x):
        return self.fc(self.inner["fc"](x))


@pytest.mark.parametrize("what", ["r", "alpha"])
def test_a_pattern_means_no_longer_path(what, tmp_path):
    model, x = Ends(), torch.randn(3, 4)
    base = copy.deepcopy(model)
    layers = add_lora(model, ["fc"], r=2, alpha=4)
    model.fc = layers["fc"] = LoRALinear(model.fc.base, **{"r": 2, "alpha": 4} | {what: 3})
    randomize(layers)
    theirs = load_in_peft(base, tmp_path, *peft_adapter(model))
    torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)


def test_a_wrapper_is_no_part_of_a_path(tmp_path):
    """peft takes the tensors by name: those of another name would be left out, with a warning."""
    model, x = Ends(), torch.randn(3, 4)
    base, layers = copy.deepcopy(model), add_lora(model, ["fc"])
    randomize(layers)
    parallel = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(parallel)
    parallel.module = model
    for wrapped in (torch.compile(model), parallel, torch.compile(parallel), nn.DataParallel(model)):
        theirs = load_in_peft(base, tmp_path, *peft_adapter(wrapped))
        torch.testing.assert_close(theirs(x), model(x), rtol=0, atol=1e-5)
    within = nn.ModuleDict({"a": torch.compile(nn.ModuleDict({"q": nn.Linear(2, 2)}))})
    add_lora(within, ["q"])
    layer = nn.ModuleDict({"a": nn.ModuleDict({"q": torch.compile(LoRALinear(nn.Linear(2, 2), 2, 4))})})
    kept = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(2, 2)})})
    add_lora(kept, ["q"])
    apply_activation_checkpointing(kept, check_fn=lambda module: isinstance(module, LoRALinear))
    for module in (within, layer, kept):
        tensors, config = peft_adapter(module)
        assert config["target_modules"] == ["q"] and "base_model.model.a.q.lora_A.weight" in tensors


def test_an_adapter_of_one_tower_is_not_the_other_s(tmp_path):
    base = nn.ModuleDict({name: nn.ModuleDict({"q_proj": nn.Linear(2, 2)}) for name in ("encoder", "decoder")})
    model = copy.deepcopy(base)
    randomize(add_lora(model["encoder"], ["q_proj"]))
    theirs = load_in_peft(base, tmp_path, *peft_adapter(model["encoder"], "encoder."))
    assert in_peft(theirs) == {"encoder.q_proj"}


def test_the_adapter_s_tensors_are_copies_to_save(tmp_path):
    """float32 whatever the base is, contiguous, and no part of the model."""
    module = nn.ModuleDict({"q": nn.Linear(6, 5, dtype=torch.float64)})
    layer = add_lora(module, ["q"], r=2)["q"]
    layer.A = nn.Parameter(torch.randn(6, 2, dtype=torch.float64).T)
    for _ in range(2):  # transposed and float64, then as it mostly is: contiguous and float32
        tensors, config = peft_adapter(module)
        before = {name: tensor.clone() for name, tensor in tensors.items()}
        assert all(t.dtype == torch.float32 and t.is_contiguous() and not t.requires_grad for t in tensors.values())
        torch.testing.assert_close(
            tensors["base_model.model.q.lora_A.weight"], layer.A.detach().float(), rtol=0, atol=0
        )
        with torch.no_grad():
            layer.A.add_(1)
            layer.B.add_(1)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tensors.items())
        layer.A = nn.Parameter(layer.A.detach().contiguous())
        module.float()
    assert json.loads(json.dumps(config)) == config and config["target_modules"] == ["q"]


def test_short_names_are_those_of_lora_layers_alone():
    """peft matches by name whatever a module is, an embedding too."""
    module = nn.ModuleDict({"a": nn.ModuleDict({"q": nn.Linear(2, 2)}), "b": nn.ModuleDict({"q": nn.Embedding(2, 2)})})
    add_lora(module, ["q"])
    assert peft_adapter(module)[1]["target_modules"] == ["a.q"]


def test_peft_adapter_refuses():
    model = llama()
    with pytest.raises(ValueError, match="no LoRA layers"):
        peft_adapter(model)
    path, layer = next(iter(add_lora(model).items()))
    with pytest.raises(ValueError, match="'model' must end in a dot"):
        peft_adapter(model.model, "model")
    model.set_submodule(path, LoRALinear(layer.base, 8, 16, rslora=True))
    with pytest.raises(ValueError, match="only some LoRA layers use rslora"):
        peft_adapter(model)


@pytest.mark.parametrize("family", ["bert", "vit", "llama", "tied llama"])
def test_a_merged_model_is_saved_whole(family, tmp_path):
    model, logits = task_model(family.removeprefix("tied "))
    if family == "tied llama":
        model = llama(tie_word_embeddings=True)
    before, names = logits(model), list(model.state_dict())
    randomize(add_lora(model, "all-linear", r=3))
    expected = logits(model)
    merge_lora(model).save_pretrained(tmp_path)
    again, report = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()) and list(again.state_dict()) == names
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    if family == "tied llama":
        assert again.lm_head.weight is again.model.embed_tokens.weight


def test_what_trains_is_enough_to_save(tmp_path):
    """The docstring's first way: the trained parameters, heads too, into a model that is built and adapted again."""
    model, logits = task_model("bert")
    randomize(add_lora(model.base_model, r=3))
    with torch.no_grad():
        model.classifier.weight.add_(1)
    torch.save({n: p for n, p in model.named_parameters() if p.requires_grad}, tmp_path / "trained")
    again, _ = task_model("bert")
    add_lora(again.base_model, r=3)
    assert not again.load_state_dict(torch.load(tmp_path / "trained", weights_only=True), strict=False).unexpected_keys
    assert torch.equal(logits(again), logits(model))


# ---------------------------------------------------------------------------------------------------------------------
# Ortho-LoRA over LoRA in models that are not ours


@pytest.mark.parametrize("whose", ["ours", "peft"])
def test_ortho_lora_trains_a_causal_model(whose):
    """Two "tasks", texts that count up and texts that count down: what follows a token is the opposite."""
    model = llama()
    if whose == "ours":
        add_lora(model, r=4, alpha=16)
        pairs = blocks(model)
    else:
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj"]))
        pairs = [[p] for n, p in model.named_parameters() if "lora_" in n]
    parameters = [p for block in pairs for p in block]
    assert len(pairs) == 8 and {id(p) for p in parameters} == {id(p) for p in model.parameters() if p.requires_grad}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}

    start = torch.arange(0, 31, 4)[:, None]
    texts = [(start + step * torch.arange(12)) % 31 for step in (1, -1)]  # (8, 12) each
    loss = lambda task: model(input_ids=texts[task], labels=texts[task]).loss  # noqa: E731
    ortho = OrthoLoRA(pairs, num_tasks=2, generator=torch.Generator().manual_seed(0))
    optimizer = torch.optim.AdamW(parameters, lr=2e-2)
    with torch.no_grad():
        before = [loss(task).item() for task in range(2)]
    met = 0
    for _ in range(30):
        optimizer.zero_grad()
        for task in range(2):
            loss(task).backward()
            ortho.collect(task)
        conflicts = ortho.project()
        conflicts.check(model)
        met += conflicts.conflicts.sum().item()
        optimizer.step()
    with torch.no_grad():
        after = [loss(task).item() for task in range(2)]
    assert met > 0 and all(b < a - 0.1 for a, b in zip(before, after, strict=True)), (before, after)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
