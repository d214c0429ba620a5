"""model.py against `transformers`: random configurations of all families, saved in every format that is published."""

import json
import math

import pytest
import torch
import transformers
from safetensors.torch import save_file
from tiny import FAMILIES, batch, make, one_line, run, tiny

from model import ACTIVATIONS, Config, Encoder, Head, MultiTaskModel, load_encoder, read_config
from support.checkpoint import BadInput

# ---------------------------------------------------------------------------------------------------------------------
# Encoder


def hidden_difference(encoder, reference, *inputs):
    """The largest difference of hidden states at the positions that are no padding."""
    with torch.no_grad():
        ours = encoder(*inputs)
    theirs = run(reference.base_model, *inputs)
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    return (ours - theirs)[inputs[1].bool()].abs().max().item()


def parity(folder, reference):
    encoder = load_encoder(folder)
    config = reference.config
    assert not encoder.training and all(p.dtype == torch.float32 for p in encoder.parameters())
    inputs = [
        batch(config),
        batch(config, (1,), seed=1),
        batch(config, (1, 1), seed=2),
        batch(config, (20, 19), seed=3),
    ]
    if getattr(config, "type_vocab_size", 0) > 1:
        inputs += [batch(config, pairs=True, seed=4), batch(config, (2, 25), pairs=True, seed=5)]
    for each in inputs:
        assert hidden_difference(encoder, reference, *each) < 1e-5
    return encoder


def save_bin(model, folder, rename=lambda name: name):
    model.config.save_pretrained(folder)
    torch.save({rename(n): t for n, t in model.state_dict().items()}, folder / "pytorch_model.bin")


def old_name(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def save_old(model, folder):
    model.config.save_pretrained(folder)
    tensors = {old_name(n): t.clone().contiguous() for n, t in model.state_dict().items()}
    save_file(tensors, folder / "model.safetensors")


FORMATS = {  # what it is: (task class, weights of which type, how it is saved)
    "bare": ("Model", torch.float32, lambda m, folder: m.save_pretrained(folder)),
    "masked": ("ForMaskedLM", torch.float32, lambda m, folder: m.save_pretrained(folder)),
    "classifier": ("ForSequenceClassification", torch.float32, lambda m, folder: m.save_pretrained(folder)),
    "sharded": ("Model", torch.float32, lambda m, folder: m.save_pretrained(folder, max_shard_size="9KB")),
    "sharded masked": ("ForMaskedLM", torch.float32, lambda m, folder: m.save_pretrained(folder, max_shard_size="9KB")),
    "pickled": ("Model", torch.float32, save_bin),
    "pickled masked": ("ForMaskedLM", torch.float32, save_bin),
    "float16": ("Model", torch.float16, lambda m, folder: m.save_pretrained(folder)),
    "bfloat16": ("ForMaskedLM", torch.bfloat16, lambda m, folder: m.save_pretrained(folder)),
    "pickled float16": ("Model", torch.float16, save_bin),
    "gamma and beta": ("ForMaskedLM", torch.float32, save_old),
    "pickled gamma and beta": ("Model", torch.float32, lambda m, folder: save_bin(m, folder, old_name)),
}


@pytest.mark.parametrize("how", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_in_every_format(family, how, tmp_path):
    task, dtype, save = FORMATS[how]
    model = make(tiny(family), task).to(dtype)
    save(model, tmp_path)
    written = {p.name for p in tmp_path.iterdir()}
    assert ("model.safetensors.index.json" in written) == ("sharded" in how)
    assert ("pytorch_model.bin" in written) == ("pickled" in how)
    parity(tmp_path, model.float())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_those_of_transformers(name):
    x = torch.linspace(-6, 6, 101)
    torch.testing.assert_close(ACTIVATIONS[name](x), transformers.activations.ACT2FN[name](x))


SHAPES = [
    {"width": 12, "layers": 1, "heads": 1, "inner": 7, "act": "relu"},
    {"width": 64, "layers": 3, "heads": 8, "inner": 100, "act": "gelu_new", "vocab_size": 211, "positions": 77},
    {"width": 6, "layers": 5, "heads": 3, "inner": 24, "act": "gelu", "pad": 5},
    {"width": 32, "layers": 2, "heads": 2, "inner": 32, "act": "silu", "pad": 2, "positions": 28},
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: s["act"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_of_sizes_and_activations(family, shape, tmp_path):
    model = make(tiny(family, **shape))
    model.save_pretrained(tmp_path)
    encoder = parity(tmp_path, model)
    width, layers, act = shape["width"], shape["layers"], shape["act"]
    assert (encoder.config.hidden_size, encoder.config.num_hidden_layers, encoder.config.hidden_act) == (
        width,
        layers,
        act,
    )


def test_layer_norm_epsilon_and_segments_come_from_the_file(tmp_path):
    model = make(tiny("bert", layer_norm_eps=0.3, type_vocab_size=3))
    model.save_pretrained(tmp_path)
    encoder = parity(tmp_path, model)
    ids, mask, _ = batch(model.config)
    assert hidden_difference(encoder, model, ids, mask, torch.full_like(ids, 2)) < 1e-5


@pytest.mark.parametrize("pad", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_longest_sequence(family, pad, tmp_path):
    """RoBERTa's position table has pad_id + 1 rows that no token uses."""
    model = make(tiny(family, positions=30, pad=pad))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    longest = 29 - pad if "roberta" in family else 30
    assert encoder.config.max_length == longest
    assert hidden_difference(encoder, model, *batch(model.config, (longest, 2))) < 1e-5
    with pytest.raises(ValueError, match=f"{longest + 1} tokens.*{longest} positions"):
        encoder(*batch(model.config, (longest + 1,)))


def test_types_where_there_is_one_only(tmp_path):
    """Some tokenizers number the sentences of a pair, whatever the model: RoBERTa has one type, and no use for it."""
    config = tiny("roberta")
    make(config).save_pretrained(tmp_path)
    ids, mask, _ = batch(config)
    ours = load_encoder(tmp_path).eval()
    assert torch.equal(ours(ids, mask, torch.ones_like(ids)), ours(ids, mask))


def test_padding_changes_nothing(tmp_path):
    model = make(tiny("roberta"))
    model.save_pretrained(tmp_path)
    encoder = load_encoder(tmp_path)
    ids, mask, _ = batch(model.config, (5,))
    wide = torch.nn.functional.pad(ids, (0, 9), value=1), torch.nn.functional.pad(mask, (0, 9))
    with torch.no_grad():
        torch.testing.assert_close(encoder(*wide)[:, :5], encoder(ids, mask), rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lengths", [(9,), (7, 3, 5)])  # without padding, and with it
def test_first_tokens_alone(family, lengths):
    """What the last layer leaves out changes no number and no gradient of what is kept."""
    torch.manual_seed(0)
    config = tiny(family)
    encoder = Encoder(read_config(config.to_dict()), pooler=family == "bert").eval()
    ids, mask, types = batch(config, lengths)
    mask = None if mask.all() else mask
    whole = encoder(ids, mask, types)
    for count in (1, 3):
        part = encoder(ids, mask, types, tokens=count)
        assert part.shape[1] == count
        torch.testing.assert_close(part, whole[:, :count], rtol=0, atol=1e-6)
    weights = [m.weight for m in encoder.modules() if isinstance(m, torch.nn.Linear)]
    ours, theirs = (
        torch.autograd.grad(x[:, 0].square().sum(), weights, retain_graph=True, allow_unused=True)
        for x in (encoder(ids, mask, types, tokens=1), whole)
    )
    assert sum(g is not None for g in ours) == 6 * config.num_hidden_layers  # all but a pooler
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_extra_tensors_are_ignored(tmp_path):
    """Old files have position numbers as a tensor, RoBERTa's a pooler that nobody uses, and task models a head."""
    model = make(tiny("roberta"), "ForMaskedLM")
    tensors = {name: t.clone() for name, t in model.state_dict().items()}
    tensors["roberta.embeddings.position_ids"] = torch.arange(30)
    assert "lm_head.dense.weight" in tensors
    model.config.save_pretrained(tmp_path)
    save_file(tensors, tmp_path / "model.safetensors")
    parity(tmp_path, model)


def test_pooler(tmp_path):
    """BERT's pooler is the checkpoint's, where it has one; RoBERTa's is never used."""
    torch.manual_seed(0)
    for task, there in ("Model", True), ("ForSequenceClassification", True), ("ForMaskedLM", False):
        model = make(tiny("bert"), task)
        model.save_pretrained(tmp_path / task)
        encoder = load_encoder(tmp_path / task)
        assert encoder.has_pooler == there
        hidden = torch.randn(2, 3, 24)
        summary = model.base_model.pooler(hidden) if there else hidden[:, 0]
        torch.testing.assert_close(encoder.summary(hidden), summary)
    model = make(tiny("roberta"))
    model.save_pretrained(tmp_path / "roberta")
    assert "pooler.dense.weight" in model.state_dict() and not load_encoder(tmp_path / "roberta").has_pooler


def test_loading_says_nothing(tmp_path, capfd):
    make(tiny("bert"), "ForMaskedLM").save_pretrained(tmp_path)
    capfd.readouterr()
    load_encoder(tmp_path)
    assert capfd.readouterr() == ("", "")


def encoder_of(family, **others):
    torch.manual_seed(0)
    return Encoder(read_config(tiny(family, **others).to_dict()), pooler=family == "bert")


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_active_in_training_alone(family):
    names = (
        ("dropout", "attention_dropout")
        if family == "distilbert"
        else ("hidden_dropout_prob", "attention_probs_dropout_prob")
    )
    inputs = batch(tiny(family))
    for rates, active in ((0.0, 0.0), False), ((0.4, 0.0), True), ((0.0, 0.4), True):
        encoder = encoder_of(family, **dict(zip(names, rates, strict=True))).eval()
        quiet = encoder(*inputs)
        assert torch.equal(quiet, encoder(*inputs))
        encoder.train()
        assert torch.equal(quiet, encoder(*inputs)) != active
        assert torch.equal(encoder(*inputs), encoder(*inputs)) != active


# ---------------------------------------------------------------------------------------------------------------------
# Heads


def copied(reference, encoder, task="task"):
    """Our model with every weight of the head taken over by name: our names are those of `transformers`."""
    model = MultiTaskModel(encoder, {task: reference.config.num_labels}).eval()
    weights = reference.state_dict()
    model.heads[task].load_state_dict({name: weights[name] for name in model.heads[task].state_dict()})
    return model


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits(family, labels, tmp_path):
    reference = make(tiny(family, num_labels=labels), "ForSequenceClassification")
    reference.save_pretrained(tmp_path)
    model = copied(reference, load_encoder(tmp_path))
    inputs = batch(reference.config, pairs=family == "bert")
    with torch.no_grad():
        logits = model("task", *inputs)
    assert logits.shape == (4, labels)
    torch.testing.assert_close(logits, run(reference, *inputs), rtol=0, atol=1e-5)
    # Nothing of the reference stays unused, and nothing of ours is invented.
    ours = {reference.base_model_prefix + "." + n for n in model.encoder.state_dict()} | set(
        model.heads["task"].state_dict()
    )
    assert ours == set(reference.state_dict())


def test_logits_of_bert_without_a_pooler(tmp_path):
    make(tiny("bert"), "ForMaskedLM").save_pretrained(tmp_path)
    reference = type(make(tiny("bert"), "ForSequenceClassification")).from_pretrained(tmp_path, num_labels=3).eval()
    model = copied(reference, load_encoder(tmp_path))
    inputs = batch(reference.config, pairs=True)
    with torch.no_grad():
        torch.testing.assert_close(model("task", *inputs), run(reference, *inputs), rtol=0, atol=1e-5)


def test_every_task_has_a_head_of_its_own():
    model = MultiTaskModel(encoder_of("roberta").eval(), {"a": 2, "b": 1}).eval()
    model.add_head("c", 3)
    inputs = batch(tiny("roberta"))
    assert [model(task, *inputs).shape[1] for task in "abc"] == [2, 1, 3]
    for task in "abc":
        model.zero_grad()
        model(task, *inputs).sum().backward()
        touched = {t for t in "abc" if any(p.grad is not None for p in model.heads[t].parameters())}
        assert touched == {task} and all(p.grad is not None for p in model.heads[task].parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_heads_start_as_in_transformers(family):
    """N(0, initializer_range²) weights and zero biases."""
    config = read_config(tiny(family, width=96, heads=4, initializer_range=0.5).to_dict())
    for name, p in Head(config, 40).named_parameters():
        if name.endswith("bias"):
            assert (p == 0).all()
        else:  # at least 3840 draws: the standard error of the deviation is 0.5 / sqrt(2 * 3840) < 0.006
            assert abs(p.std() - 0.5) < 0.03 and abs(p.mean()) < 0.04


@pytest.mark.parametrize("family", FAMILIES)
def test_dropout_is_where_transformers_has_it(family, tmp_path):
    """With one seed both draw the same masks, as long as they draw them in the same places, shapes and order. (Not
    those of the attention weights, which are drawn inside a fused kernel here.)"""
    rates = (
        {"dropout": 0.2, "attention_dropout": 0.0, "seq_classif_dropout": 0.4}
        if family == "distilbert"
        else {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.0, "classifier_dropout": 0.4}
    )
    reference = make(tiny(family, **rates), "ForSequenceClassification")
    reference.save_pretrained(tmp_path)
    model, inputs = copied(reference, load_encoder(tmp_path)).train(), batch(reference.config)
    whole = lambda: model.heads["task"](model.encoder.summary(model.encoder(*inputs)))  # noqa: E731  the last layer, too
    logits = []
    for each in whole, lambda: run(reference.train(), *inputs):
        torch.manual_seed(7)
        with torch.no_grad():
            logits.append(each())
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    with torch.no_grad():
        assert (logits[0] - model.eval()("task", *inputs)).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_an_encoder_of_another_dtype(tmp_path, dtype):
    """A head reads it in its own: float32 beside bf16, as in training, and float64 where all is."""
    reference = make(tiny("roberta"), "ForSequenceClassification")
    reference.save_pretrained(tmp_path)
    model, inputs = copied(reference, load_encoder(tmp_path)).eval(), batch(reference.config)
    model.encoder.to(dtype)
    model.heads.to(torch.promote_types(dtype, torch.float32))
    logits = model("task", *inputs)
    assert logits.dtype == torch.promote_types(dtype, torch.float32)
    expected = run(reference.eval().double(), *inputs)
    torch.testing.assert_close(logits.double(), expected, rtol=0, atol=1e-9 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_head_dropout(family):
    """Before the last layer, at the classifier's own rate p: the mean is Wx + b, the variance p/(1-p) Σ (w_i x_i)²."""
    p, key = 0.3, "seq_classif_dropout" if family == "distilbert" else "classifier_dropout"
    config = read_config(tiny(family, **{key: p}).to_dict())
    torch.manual_seed(0)
    head, x = Head(config, 1), torch.randn(1, 24)
    with torch.no_grad():
        torch.nn.init.normal_(head.out.weight)
        seen = x if family == "bert" else torch.relu(head.pre_classifier(x))
        draws = head.train()(x.expand(20_000, -1))
        assert torch.equal(head.eval()(x), head(x))
        variance = p / (1 - p) * (head.out.weight * seen).square().sum()
        assert abs(draws.mean() - head(x)) < 5 * math.sqrt(variance / 20_000)
        assert abs(draws.var() / variance - 1) < 0.05


# ---------------------------------------------------------------------------------------------------------------------
# config.json

# As published: bert-base-uncased, roberta-base, distilbert-base-uncased, without the keys that nobody reads.
BERT_BASE = {
    "model_type": "bert",
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 0,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": 30522,
}
ROBERTA_BASE = {
    **BERT_BASE,
    "model_type": "roberta",
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 514,
    "pad_token_id": 1,
    "type_vocab_size": 1,
    "vocab_size": 50265,
}
DISTILBERT_BASE = {
    "model_type": "distilbert",
    "activation": "gelu",
    "attention_dropout": 0.1,
    "dim": 768,
    "dropout": 0.1,
    "hidden_dim": 3072,
    "initializer_range": 0.02,
    "max_position_embeddings": 512,
    "n_heads": 12,
    "n_layers": 6,
    "pad_token_id": 0,
    "qa_dropout": 0.1,
    "seq_classif_dropout": 0.2,
    "sinusoidal_pos_embds": False,
    "vocab_size": 30522,
}


def test_published_configs():
    common = {
        "hidden_size": 768,
        "num_attention_heads": 12,
        "intermediate_size": 3072,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.1,
        "attention_probs_dropout_prob": 0.1,
        "initializer_range": 0.02,
    }
    assert read_config(BERT_BASE) == Config(
        "bert",
        vocab_size=30522,
        num_hidden_layers=12,
        max_position_embeddings=512,
        classifier_dropout=0.1,
        pad_token_id=0,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
        **common,
    )
    assert read_config(ROBERTA_BASE) == Config(
        "roberta",
        vocab_size=50265,
        num_hidden_layers=12,
        max_position_embeddings=514,
        classifier_dropout=0.1,
        pad_token_id=1,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
        **common,
    )
    assert read_config(DISTILBERT_BASE) == Config(
        "distilbert",
        vocab_size=30522,
        num_hidden_layers=6,
        max_position_embeddings=512,
        classifier_dropout=0.2,
        pad_token_id=0,
        type_vocab_size=0,
        layer_norm_eps=1e-12,
        **common,
    )
    assert [read_config(c).max_length for c in (BERT_BASE, ROBERTA_BASE, DISTILBERT_BASE)] == [512, 512, 512]
    assert read_config({**BERT_BASE, "classifier_dropout": 0.25}).classifier_dropout == 0.25
    assert read_config({**BERT_BASE, "classifier_dropout": None}).classifier_dropout == 0.1


@pytest.mark.parametrize("raw", [BERT_BASE, ROBERTA_BASE, DISTILBERT_BASE], ids=lambda raw: raw["model_type"])
def test_nothing_is_guessed(raw):
    optional = {
        "initializer_range",
        "position_embedding_type",
        "qa_dropout",
        "seq_classif_dropout",
        "sinusoidal_pos_embds",
    }
    for key in raw.keys() - optional - {"model_type"}:
        with pytest.raises(BadInput) as error:
            read_config({k: v for k, v in raw.items() if k != key}, where="folder/config.json")
        assert one_line(error) == f"folder/config.json has no {key}"


HUGE = 10**400  # legal JSON, too large for a float
BAD_VALUES = [
    ("model_type", "gpt2"),
    ("model_type", None),
    ("model_type", ["bert"]),
    ("model_type", {}),
    ("hidden_size", 0),
    ("hidden_size", -768),
    ("hidden_size", 768.0),
    ("hidden_size", "768"),
    ("hidden_size", None),
    ("hidden_size", True),
    ("hidden_size", [768]),
    ("hidden_size", HUGE),
    ("hidden_size", 769),
    ("num_attention_heads", 0),
    ("num_attention_heads", 7),
    ("num_hidden_layers", 10**6),
    ("vocab_size", 10**12),
    ("max_position_embeddings", 0),
    ("pad_token_id", -1),
    ("pad_token_id", None),
    ("pad_token_id", 30522),
    ("hidden_act", "tanhshrink"),
    ("hidden_act", 3),
    ("hidden_act", ["gelu"]),
    ("hidden_dropout_prob", 1.5),
    ("hidden_dropout_prob", -0.1),
    ("hidden_dropout_prob", math.nan),
    ("hidden_dropout_prob", HUGE),
    ("layer_norm_eps", "1e-12"),
    ("layer_norm_eps", math.inf),
    ("type_vocab_size", -1),
    ("classifier_dropout", "no"),
    ("classifier_dropout", 2),
    ("initializer_range", "wide"),
    ("initializer_range", -1),
    ("initializer_range", None),
    ("position_embedding_type", "relative_key"),
    ("is_decoder", True),
]


@pytest.mark.parametrize("key, value", BAD_VALUES, ids=lambda x: repr(x)[:20])
def test_absurd_values_are_named(key, value):
    with pytest.raises(BadInput) as error:
        read_config({**BERT_BASE, key: value}, where="folder/config.json")
    message = one_line(error)
    assert message.startswith("folder/config.json") and key in message and str(value)[:50] in message


def test_roberta_with_more_padding_than_positions():
    with pytest.raises(BadInput) as error:
        read_config({**ROBERTA_BASE, "max_position_embeddings": 2})
    assert "max_position_embeddings" in one_line(error)


# ---------------------------------------------------------------------------------------------------------------------
# Weights that don't fit


@pytest.fixture
def saved(tmp_path):
    """A BERT folder, and a way to write its weights anew."""
    model = make(tiny("bert"))
    model.save_pretrained(tmp_path)
    tensors = {n: t.clone() for n, t in model.state_dict().items()}
    return tmp_path, tensors, lambda changed: save_file(changed, tmp_path / "model.safetensors")


def refused(folder):
    with pytest.raises(BadInput) as error:
        load_encoder(folder)
    message = one_line(error)
    assert str(folder) in message
    return message


def test_missing_and_misshapen_tensors(saved):
    folder, tensors, write = saved
    for name in "embeddings.word_embeddings.weight", "encoder.layer.1.output.LayerNorm.bias", "pooler.dense.bias":
        write({n: t for n, t in tensors.items() if n != name})
        assert repr(name) in refused(folder)
    name = "encoder.layer.0.intermediate.dense.weight"
    write({**tensors, name: tensors[name].T.contiguous()})
    assert repr(name) in refused(folder) and "(24, 40)" in refused(folder) and "(40, 24)" in refused(folder)
    write({**tensors, name: tensors[name].to(torch.int8)})
    assert repr(name) in refused(folder) and "int8" in refused(folder)
    write(tensors)
    load_encoder(folder)


def test_config_of_another_size(saved):
    folder, _, _ = saved
    raw = json.loads((folder / "config.json").read_text())
    for key, value, name in [
        ("num_hidden_layers", 3, "encoder.layer.2."),
        ("vocab_size", 62, "word_embeddings"),
        ("intermediate_size", 41, "intermediate.dense.weight"),
    ]:
        (folder / "config.json").write_text(json.dumps({**raw, key: value}))
        assert name in refused(folder)


def test_config_that_is_no_config(saved):
    folder, _, _ = saved
    for text, word in ("{", "JSON"), ("[]", "list"), ('{"model_type": "t5"}', "'t5'"), ("\udcff", "JSON"):
        (folder / "config.json").write_bytes(text.encode(errors="surrogateescape"))
        assert word in refused(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refused(folder)


def test_weights_missing_or_truncated(saved):
    folder, _, _ = saved
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for length in 0, 5, 100, len(whole) // 2, len(whole) - 1:
        weights.write_bytes(whole[:length])
        assert "model.safetensors" in refused(folder)
    weights.unlink()
    assert "no weights" in refused(folder)
