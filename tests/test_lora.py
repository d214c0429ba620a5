"""lora.py against `peft`, on our encoder and on `transformers` models; and Ortho-LoRA over LoRA in foreign models."""

import copy
import math

import peft
import pytest
import torch
import transformers as hf
from tiny import FAMILIES, batch, make, one_line, run, tiny
from torch import nn

from lora import LoRALinear, add_lora, blocks, lora_layers, lora_parameters, merge_lora, per_task, replace_module
from model import Encoder, read_config
from ortholora import OrthoLoRA

TARGETS = {"distilbert": ["q_lin", "v_lin"]}


def llama(layers=2):
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return hf.LlamaForCausalLM(config).eval()


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


@pytest.mark.parametrize("r, dropout", [(0, 0), (-1, 0), (2, 1), (2, -0.1), (2, 1.5), (2, math.nan)])
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
    theirs = {
        n.removeprefix("base_model.model.")
        for n, m in wrapped.named_modules()
        if isinstance(m, peft.tuners.lora.Linear)
    }
    ours = add_lora(reference, targets, layers=layers)
    assert set(lora_layers(reference)) == set(ours)
    encoder = Encoder(read_config(reference.config.to_dict()), pooler=hasattr(reference, "pooler"))
    assert add_lora(encoder, targets, layers=layers).keys() == ours.keys()
    return theirs, set(ours)


@pytest.mark.parametrize("layers", [None, [1], [0, 2]], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_targets_match_as_in_peft(family, layers):
    sets = (
        [["q_lin"], ["lin1", "out_lin"], ["attention.v_lin"]]
        if family == "distilbert"
        else [["query"], ["dense", "key"], ["output.dense"], ["attention.output.dense", "value"]]
    )
    for targets in sets:
        theirs, ours = adapted(family, targets, layers)
        assert theirs == ours and len(ours) >= len(targets) * len(layers or [0, 1, 2])


@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_and_whole_paths(family):
    theirs, ours = adapted(family, "all-linear")
    assert theirs == ours and len(ours) == 18 + (family != "distilbert")  # six a layer, and the pooler
    path = "transformer.layer.1.ffn.lin2" if family == "distilbert" else "encoder.layer.1.output.dense"
    assert adapted(family, [path]) == ({path}, {path})


def test_default_targets():
    for model, stem, names in [
        (llama(), "model.layers.{}.self_attn", ("q_proj", "v_proj")),
        (make(tiny("distilbert")), "transformer.layer.{}.attention", ("q_lin", "v_lin")),
        (make(tiny("xlm-roberta")), "encoder.layer.{}.attention.self", ("query", "value")),
    ]:
        assert list(add_lora(model)) == [f"{stem.format(i)}.{name}" for i in (0, 1) for name in names]


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

    merged = merge_lora(copy.deepcopy(model))
    assert not lora_layers(merged) and lora_layers(model).keys() == layers.keys()
    assert merged.state_dict().keys() == reference.unload().state_dict().keys()
    torch.testing.assert_close(run(merged, *inputs), expected, rtol=0, atol=1e-5)


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
    with pytest.raises(ValueError, match="out of none"):
        add_lora(nn.ReLU())


def test_twice_is_an_error():
    model = llama()
    layers = add_lora(model)
    with pytest.raises(ValueError, match="already"):
        add_lora(model, ["k_proj"])
    assert lora_layers(model) == layers


def test_replace_module():
    model = nn.Sequential(nn.Sequential(nn.ReLU()), nn.ReLU())
    new = nn.Tanh()
    replace_module(model, "0.0", new)
    assert model[0][0] is new
    replace_module(model, "1", new)
    assert model[1] is new


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
    assert same(blocks(model, "role"), [A, B]) and same(blocks(model, "joint"), [A + B])

    two.A.requires_grad_(False)  # a frozen factor is in no block
    A.pop(1)
    each.pop(2)
    assert same(blocks(model), [[p] for p in each])
    assert same(blocks(model, "role"), [A, B]) and same(blocks(model, "joint"), [A + B])
    for p in A:
        p.requires_grad_(False)
    assert same(blocks(model, "role"), [B]) and same(blocks(model, "joint"), [B])
    for p in B:
        p.requires_grad_(False)
    assert blocks(model) == blocks(model, "role") == blocks(model, "joint") == []
    with pytest.raises(ValueError, match="'layer'"):
        blocks(model, "layer")


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
        torch.testing.assert_close(
            grads[layer.B].grad[t], (rows.float() @ layer.A.T).sum(0).expand(5, 2), rtol=2e-2, atol=2e-2
        )


def test_per_task_ends_with_its_block():
    module = nn.Sequential(nn.Linear(4, 4))
    layer = add_lora(module, "all-linear", r=2)["0"]
    with pytest.raises(RuntimeError), per_task(module, [2, 1]):
        module(torch.zeros(5, 4))  # not the 3 rows that were announced
    assert layer.tasks is None
    module(torch.ones(5, 4)).sum().backward()
    assert layer.B.grad is not None


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
