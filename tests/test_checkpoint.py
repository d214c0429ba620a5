"""support/checkpoint.py against the `safetensors` library and `peft`, and against damaged and hostile files."""

import copy
import json
import os
import re
import sys
import warnings
from pathlib import Path

import peft
import pytest
import safetensors.torch
import torch
from tiny import FAMILIES, batch, make, one_line, run, tiny

from lora import add_lora, lora_layers
from model import MultiTaskModel, load_encoder
from support import checkpoint
from support.checkpoint import (
    DTYPES,
    BadInput,
    atomic_write,
    load_adapter,
    load_state,
    read_header,
    read_json,
    read_safetensors,
    read_weights,
    save_adapter,
    save_state,
    write_safetensors,
    write_text,
)
from support.hub import find_checkpoint, looks_like_path


def refused(function, *arguments, naming=None):
    """The one line that BadInput says; it names the file or folder."""
    with pytest.raises(BadInput) as error:
        function(*arguments)
    message = one_line(error)
    assert str(arguments[0] if naming is None else naming) in message
    return message


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_atomic_write(tmp_path):
    path = tmp_path / "results.json"
    write_text(path, "old, ü\n")
    assert path.read_bytes() == "old, ü\n".encode()
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as temporary:
        assert temporary.parent == tmp_path and temporary != path
        temporary.write_text("half")
        assert path.read_text(encoding="utf-8") == "old, ü\n"
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "old, ü\n"
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]
    write_text(path, "new")
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_failed_write_of_tensors_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"x": torch.arange(3)})
    old = path.read_bytes()
    for tensors, metadata in ({"x": torch.zeros(2, dtype=torch.complex64)}, None), ({"x": torch.zeros(2)}, {"n": 1}):
        with pytest.raises(TypeError):
            write_safetensors(path, tensors, metadata)
    with pytest.raises(NotImplementedError):  # no data to write, found when the header is written already
        write_safetensors(path, {"x": torch.zeros(2, device="meta")})
    assert path.read_bytes() == old and [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_text_is_written_as_it_is(tmp_path):
    write_text(tmp_path / "x.tsv", "a\nb\r\n")
    assert (tmp_path / "x.tsv").read_bytes() == b"a\nb\r\n"
    with pytest.raises(UnicodeEncodeError):
        write_text(tmp_path / "x.tsv", "new \ud800")
    assert (tmp_path / "x.tsv").read_bytes() == b"a\nb\r\n" and len(list(tmp_path.iterdir())) == 1


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Or a power cut could leave the name and not the content."""
    synced, fsync = [], os.fsync

    def note(file):
        synced.append((os.fstat(file).st_ino, (tmp_path / "x").exists()))
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    with atomic_write(tmp_path / "x") as temporary:
        temporary.write_text("new")
        inode = temporary.stat().st_ino
    assert synced == [(inode, False)] and (tmp_path / "x").read_text() == "new"


def test_read_json(tmp_path):
    path = tmp_path / "config.json"
    assert "has no config.json" in refused(read_json, path, naming=tmp_path)
    for content in b"", b"{", b"[1]", b"null", b"\xff\xfe{", b"[" * 10**5, b'{"n": ' + b"9" * 5000 + b"}":
        path.write_bytes(content)
        assert "JSON" in refused(read_json, path)
    path.write_text('{"a": "ü"}', encoding="utf-8")
    assert read_json(path) == {"a": "ü"}
    refused(read_json, tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8).tolist()


def identical(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape
        assert bits(tensor) == bits(theirs[name])


def every_dtype():
    """Random bytes in every type and shape: NaNs, infinities and negative zeros among them."""
    g, tensors = torch.Generator().manual_seed(0), {}
    for name, dtype in DTYPES.items():
        for shape in (), (1,), (0,), (3, 0, 2), (5,), (3, 4), (2, 1, 3, 2):
            count = torch.Size(shape).numel() * dtype.itemsize
            data = torch.randint(0, 2 if dtype == torch.bool else 256, (count,), dtype=torch.uint8, generator=g)
            tensors[f"{name}.ü {shape}"] = data.view(dtype).reshape(shape)
    return tensors


def test_the_library_reads_what_we_write(tmp_path):
    path, tensors = tmp_path / "x.safetensors", every_dtype()
    write_safetensors(path, tensors, {"task": "rte"})
    identical(safetensors.torch.load_file(path), tensors)
    with safetensors.safe_open(path, "pt") as f:
        assert f.metadata() == {"format": "pt", "task": "rte"}
    assert read_header(path)[1] == {"format": "pt", "task": "rte"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0
    identical(read_safetensors(path), tensors)
    write_safetensors(path, {})
    assert safetensors.torch.load_file(path) == read_safetensors(path) == {}


def test_we_read_what_the_library_writes(tmp_path):
    path, tensors = tmp_path / "x.safetensors", every_dtype()
    safetensors.torch.save_file(tensors, path, {"task": "rte"})
    identical(read_safetensors(path), tensors)
    assert read_header(path)[1] == {"task": "rte"}
    safetensors.torch.save_file(tensors, path)
    assert read_header(path)[1] == {}


def test_transposed_and_shared_and_trained_tensors_are_written_as_they_look(tmp_path):
    x = torch.arange(12.0).reshape(3, 4)
    tensors = {"t": x.T, "step": x[:, ::2], "same": x, "wide": x[:1].expand(3, 4), "p": torch.nn.Parameter(x)}
    write_safetensors(tmp_path / "x.safetensors", tensors)
    identical(safetensors.torch.load_file(tmp_path / "x.safetensors"), {n: t.detach() for n, t in tensors.items()})


def write_raw(path, header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_unaligned_offsets(tmp_path):
    """Legal and read by the library: a header of odd length, and a float that begins at byte 1."""
    path = tmp_path / "x.safetensors"
    data = torch.tensor([1.5, -2.5])
    write_raw(path, {"b": entry("U8", [1], 0, 1), "f": entry("F32", [2], 1, 9)}, b"\x07" + bytes(bits(data)))
    identical(read_safetensors(path), {"b": torch.tensor([7], dtype=torch.uint8), "f": data})
    assert read_safetensors(path)["f"].data_ptr() % 4 == 0  # moved to where a float may lie
    identical(read_safetensors(path), safetensors.torch.load_file(path))


F = entry("F32", [2], 0, 8)
DAMAGE = {  # what is wrong: (header, bytes of data)
    "an empty header": (b"", 0),
    "no JSON": (b"{'x': 1}", 0),
    "no UTF-8": (b'{"\xff": {}}', 0),
    "a list": ([], 0),
    "deep brackets": (b"[" * 10**5, 0),
    "long number": (b'{"x": ' + b"9" * 5000 + b"}", 0),
    "an overlap": ({"a": F, "b": entry("F32", [2], 4, 12)}, 12),
    "the same bytes twice": ({"a": F, "b": F}, 8),
    "a hole": ({"a": F, "b": entry("F32", [2], 12, 20)}, 20),
    "a hole in front": ({"a": entry("F32", [2], 4, 12)}, 12),
    "trailing bytes": ({"a": F}, 9),
    "too few bytes": ({"a": F}, 7),
    "no bytes": ({"a": F}, 0),
    "bytes alone": ({}, 4),
    "an empty tensor inside another": ({"a": F, "e": entry("F32", [0], 4, 4)}, 8),
    "unknown dtype": ({"a": entry("F33", [2], 0, 8)}, 8),
    "dtype of another size": ({"a": entry("F64", [2], 0, 8)}, 8),
    "no dtype": ({"a": {"shape": [2], "data_offsets": [0, 8]}}, 8),
    "dtype of a list": ({"a": entry([], [2], 0, 8)}, 8),
    "no shape": ({"a": {"dtype": "F32", "data_offsets": [0, 8]}}, 8),
    "an entry of a number": ({"a": 1}, 8),
    "negative shape": ({"a": entry("F32", [-2], 0, 8)}, 8),
    "two negatives": ({"a": entry("F32", [-1, -2], 0, 8)}, 8),
    "a shape of a float": ({"a": entry("F32", [2.0], 0, 8)}, 8),
    "a shape of text": ({"a": entry("F32", "2", 0, 8)}, 8),
    "a shape of a dict": ({"a": entry("F32", {}, 0, 4)}, 4),
    "a true shape": ({"a": entry("F32", [True, 2], 0, 8)}, 8),
    "a huge shape": ({"a": entry("F32", [2**40, 2**40], 0, 8)}, 8),
    "shape overflow": ({"a": entry("U8", [2**64], 0, 0)}, 0),
    "overflow to 0": ({"a": entry("U8", [2**62, 4], 0, 0)}, 0),
    "a huge empty shape": ({"a": entry("U8", [0, 2**63], 0, 0)}, 0),
    "a huge empty product": ({"a": entry("U8", [2**62, 2**62, 0], 0, 0)}, 0),
    "huge offsets": ({"a": entry("U8", [2**50], 0, 2**50)}, 8),
    "backward offsets": ({"a": entry("F32", [2], 8, 0)}, 8),
    "one offset": ({"a": {**F, "data_offsets": [0]}}, 8),
    "three offsets": ({"a": {**F, "data_offsets": [0, 8, 8]}}, 8),
    "a name twice": (
        b'{"a": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},'
        b' "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}',
        1,
    ),
    "a key twice": (b'{"a": {"dtype": "U8", "dtype": "I8", "shape": [1], "data_offsets": [0, 1]}}', 1),
    "metadata of numbers": ({"__metadata__": {"n": 1}, "a": F}, 8),
    "metadata of a list": ({"__metadata__": []}, 0),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_files(what, tmp_path):
    path = tmp_path / "x.safetensors"
    header, count = DAMAGE[what]
    write_raw(path, header, bytes(count))
    assert refused(read_header, path) == refused(read_safetensors, path)
    if "twice" not in what or what == "the same bytes twice":  # of a key twice, the library takes the last
        with pytest.raises((safetensors.SafetensorError, TypeError)):
            safetensors.torch.load_file(path)


def test_truncated_anywhere(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.arange(3), "b": torch.zeros(2, 2)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        refused(read_safetensors, path)


def test_garbage_and_what_is_no_file(tmp_path):
    path = tmp_path / "x.safetensors"
    assert "has no x.safetensors" in refused(read_header, path, naming=tmp_path)
    refused(read_header, tmp_path)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        path.write_bytes(bytes(torch.randint(0, 256, (100,), generator=g).tolist()))
        refused(read_header, path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 100_000_001, 93])
def test_header_length_is_checked_before_anything_is_read(length, tmp_path, monkeypatch):
    """A sparse file of 200 MB whose header would be larger than the limit, and small ones that lie."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + b"{}" + b" " * 90)
    if length == 100_000_001:
        os.truncate(path, 200_000_000)
    monkeypatch.setattr(checkpoint.json, "loads", lambda *_, **__: pytest.fail("the header was read"))
    assert str(length) in refused(read_header, path)


def test_claims_are_checked_before_anything_is_allocated(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_raw(path, {"a": entry("U8", [2**44], 0, 2**44)}, bytes(8))
    for name in "empty", "frombuffer":
        monkeypatch.setattr(torch, name, lambda *_, **__: pytest.fail("a tensor was made"))
    monkeypatch.setattr(checkpoint, "bytearray", lambda *_: pytest.fail("memory was taken"), raising=False)
    refused(read_safetensors, path)


# ---------------------------------------------------------------------------------------------------------------------
# Weights of a folder


def test_no_weights(tmp_path):
    assert "no weights" in refused(read_weights, tmp_path)


def test_shards(tmp_path):
    write_safetensors(tmp_path / "model-1.safetensors", {"a": torch.ones(2)})
    write_safetensors(tmp_path / "model-2.safetensors", {"b": torch.zeros(3)})
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    write_text(tmp_path / "model.safetensors.index.json", json.dumps(index))
    identical(read_weights(tmp_path), {"a": torch.ones(2), "b": torch.zeros(3)})
    (tmp_path / "model-2.safetensors").unlink()
    assert "model-2.safetensors" in refused(read_weights, tmp_path)


ELSEWHERE = [
    "../secret.safetensors",
    "{}/secret.safetensors",
    "sub/../../secret.safetensors",
    "..",
    "sub/x",
    ".hidden",
    "",
    "a\\b",
    "x\n",
    "~/x",
]


@pytest.mark.parametrize("name", ELSEWHERE)
def test_an_index_leads_nowhere_else(name, tmp_path, monkeypatch):
    write_safetensors(tmp_path / "secret.safetensors", {"a": torch.ones(2)})
    folder = tmp_path / "model"
    folder.mkdir()
    name = name.replace("{}", str(tmp_path))
    write_text(folder / "model.safetensors.index.json", json.dumps({"weight_map": {"a": name}}))
    monkeypatch.setattr(checkpoint, "read_safetensors", lambda path: pytest.fail(f"{path} was opened"))
    assert repr(name) in refused(read_weights, folder)


@pytest.mark.parametrize("weight_map", [None, [], {"a": 1}, {"a": None}], ids=str)
def test_bad_index(weight_map, tmp_path):
    write_text(tmp_path / "model.safetensors.index.json", json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refused(read_weights, tmp_path)


def test_damaged_pickle(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(200)}, path)
    identical(read_weights(tmp_path), {"a": torch.ones(200)})
    whole = path.read_bytes()
    for content in b"", b"nonsense", whole[:300], whole[:-30]:
        path.write_bytes(content)
        refused(read_weights, tmp_path, naming=path)
    for content in (
        [torch.ones(2)],
        {"a": 1},
        {"a": {"b": torch.ones(2)}},
        {1: torch.ones(2)},
        torch.ones(2),
    ):
        torch.save(content, path)
        assert "dictionary of names and tensors" in refused(read_weights, tmp_path, naming=path)
    torch.save({"a": torch.ones(2, 2).to_sparse()}, path)  # which torch 2.6 does not load at all
    assert re.search("dictionary of names and tensors|more than tensors", refused(read_weights, tmp_path, naming=path))


# ---------------------------------------------------------------------------------------------------------------------
# Adapters. `base` makes a checkpoint folder; `reference(base)` the transformers task model on it, and so on.

KINDS = [*FAMILIES, "bert without pooler"]
TARGETS = {"distilbert": ["q_lin", "v_lin"]}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def family_of(kind):
    return kind.split()[0]


def base(kind, folder):
    family = family_of(kind)
    task = "ForMaskedLM" if kind == "bert without pooler" else "ForSequenceClassification"
    make(tiny(family), task).save_pretrained(folder)
    return folder


def reference(kind, folder, labels):
    task = make(tiny(family_of(kind), vocab_size=20), "ForSequenceClassification")
    return type(task).from_pretrained(folder, num_labels=labels, ignore_mismatched_sizes=True).eval()


def fill(parameters, seed=0):
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=g) * 0.2)


def ours(folder, tasks, **lora):
    """Our model on that checkpoint, with LoRA and heads that look trained."""
    model = MultiTaskModel(load_encoder(folder), tasks)
    if lora:
        add_lora(model.encoder, **lora)
        fill(p for p in model.parameters() if p.requires_grad)
    return model.eval()


def in_peft(kind, folder, adapter, labels):
    """The adapter as peft loads it; nothing may be missing, nothing may be left over."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = peft.PeftModel.from_pretrained(reference(kind, folder, labels), adapter).eval()
    assert not [w for w in caught if "adapter" in str(w.message).lower() or "key" in str(w.message).lower()], caught
    return model


LORA = {
    "default": {},
    "rsLoRA": {"r": 3, "alpha": 5, "rslora": True},
    "all-linear": {"targets": "all-linear", "r": 2},
    "one layer": {"layers": [1]},
    "dense": {"targets": ["dense"]},
    "down": {"targets": ["output.dense"], "dropout": 0.1},
    "one path": {"targets": ["encoder.layer.0.attention.self.key"]},
}


@pytest.mark.parametrize("how", LORA)
def test_peft_loads_what_we_save(kind, how, tmp_path):
    options = dict(LORA[how])
    if kind == "distilbert" and "targets" in options and how != "all-linear":
        options["targets"] = {"dense": ["lin1"], "down": ["ffn.lin2"]}.get(how, ["transformer.layer.0.attention.k_lin"])
    folder = base(kind, tmp_path / "base")
    model = ours(folder, {"sts": 1, "mnli": 3}, **{"r": 4, "alpha": 8, **options})
    inputs = batch(tiny(family_of(kind)), pairs=family_of(kind) == "bert")
    for task, labels in ("sts", 1), ("mnli", 3):
        saved = save_adapter(model, tmp_path / task, task, str(folder), {"seed": "0"})
        assert sorted(p.name for p in saved.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
        theirs = in_peft(kind, folder, saved, labels)
        adapted = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.lora.Linear)]
        assert len(adapted) == len(lora_layers(model.encoder))
        whole = [n for n, m in theirs.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)]
        whole = tuple(n.removeprefix("base_model.model.") for n in whole)  # what peft would train on and save again
        assert all(name.startswith(whole) for name in model.heads[task].state_dict())
        with torch.no_grad():
            logits = model(task, *inputs)
        torch.testing.assert_close(logits, run(theirs, *inputs), rtol=0, atol=1e-4)
        with theirs.disable_adapter():  # the adapter and its head do something
            assert (run(theirs, *inputs) - logits).abs().max() > 1e-2


def test_save_and_load_is_the_same_to_the_bit(kind, tmp_path):
    folder = base(kind, tmp_path / "base")
    model = ours(folder, {"rte": 2, "mnli": 3}, targets="all-linear", r=3, alpha=7, rslora=True, dropout=0.2)
    save_adapter(model, tmp_path / "rte", "rte")
    again = ours(folder, {"rte": 2})
    layers = load_adapter(again, tmp_path / "rte", "rte")
    assert layers == lora_layers(again.encoder) and not any(m.training for m in again.modules())
    identical(again.encoder.state_dict(), model.encoder.state_dict())
    identical(again.heads["rte"].state_dict(), model.heads["rte"].state_dict())
    inputs = batch(tiny(family_of(kind)))
    with torch.no_grad():
        assert torch.equal(again("rte", *inputs), model("rte", *inputs))
    for path, layer in layers.items():
        was = model.encoder.get_submodule(path)
        assert (layer.r, layer.alpha, layer.dropout, layer.rslora) == (was.r, was.alpha, was.dropout, was.rslora)
    trainable = {n for n, p in again.encoder.named_parameters() if p.requires_grad}
    assert trainable == {f"{path}.{factor}" for path in layers for factor in "AB"}
    assert read_header(tmp_path / "rte" / "adapter_model.safetensors")[1]["task"] == "rte"

    with pytest.raises(ValueError, match="already"):
        load_adapter(again, tmp_path / "rte")
    alone = ours(folder, {})  # without a head: LoRA alone
    load_adapter(alone, tmp_path / "rte")
    identical(alone.encoder.state_dict(), model.encoder.state_dict())


PATTERNS = {  # of whole names, as peft matches their ends; a rank's may be a regex, the tensors say it as well
    "target_modules": "all-linear",
    "rank_pattern": {r"layer\.0\.attention\..*": 9, r"layer\.1\..*\.(value|v_lin)": 2, "lin1": 3},
    "alpha_pattern": {"layer.1.attention.self.query": 5, "layer.1.attention.q_lin": 5, "dense": 3, "lin2": 3},
}
SHORT_PATTERNS = {  # the first that fits counts, in the file's order: peft sorts them when it saves
    "rank_pattern": {"query": 5, "q_lin": 5},
    "alpha_pattern": {"attention.q_lin": 1, "attention.self.query": 1, "lin": 3, "q_lin": 2, "query": 2, "uery": 3},
}
PEFT = {
    "plain": {},
    "rsLoRA": {"use_rslora": True, "r": 3, "lora_alpha": 5},
    "all-linear": {"target_modules": "all-linear"},
    "some layers": {"layers_to_transform": [1]},
    "one layer": {"layers_to_transform": 0},
    "regex": {"target_modules": r".*layer\.1\..*\.(query|key|q_lin|k_lin)"},
    "patterns": PATTERNS,
    "short patterns": SHORT_PATTERNS,
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.5},
    "head named": {"modules_to_save": ["classifier"]},
}


def from_peft(kind, folder, adapter, labels=3, **options):
    """An adapter folder that peft wrote, with a B that does something, and the peft model."""
    model = reference(kind, folder, labels)
    options = {"target_modules": TARGETS.get(family_of(kind), ["query", "value"]), "r": 4, "lora_alpha": 8, **options}
    if kind == "bert without pooler":
        options["modules_to_save"] = ["classifier", "pooler"]
    if kind == "distilbert":  # peft would find pre_classifier as a "classifier", but fails to with "all-linear"
        options["modules_to_save"] = ["pre_classifier", "classifier"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="SEQ_CLS", **options))
    fill(p for p in wrapped.parameters() if p.requires_grad)
    wrapped.eval().save_pretrained(adapter)
    return wrapped


@pytest.mark.parametrize("how", PEFT)
def test_we_load_what_peft_saves(kind, how, tmp_path):
    folder = base(kind, tmp_path / "base")
    theirs = from_peft(kind, folder, tmp_path / "adapter", **PEFT[how])
    model = ours(folder, {"mnli": 3})
    inputs = batch(tiny(family_of(kind)), pairs=family_of(kind) == "bert")
    with torch.no_grad():
        before = model("mnli", *inputs)
        layers = load_adapter(model, tmp_path / "adapter", "mnli")
        logits = model("mnli", *inputs)
    torch.testing.assert_close(logits, run(theirs, *inputs), rtol=0, atol=1e-4)
    assert (before - logits).abs().max() > 1e-2
    adapted = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.Linear)]
    assert sorted((m.r["default"], m.scaling["default"]) for m in adapted) == sorted(
        (m.r, m.scale) for m in layers.values()
    )

    save_adapter(model, tmp_path / "again", "mnli", str(folder))  # and back: peft -> ours -> peft
    torch.testing.assert_close(run(in_peft(kind, folder, tmp_path / "again", 3), *inputs), logits, rtol=0, atol=1e-4)


@pytest.fixture
def bert(tmp_path):
    """(checkpoint folder, adapter folder of ours for rte)."""
    folder = base("bert", tmp_path / "base")
    adapter = tmp_path / "rte"
    save_adapter(ours(folder, {"rte": 2}, r=4), adapter, "rte")
    return folder, adapter


def untouched(folder, adapter, tasks=None, task="rte"):
    """What load_adapter says when it refuses; it changes nothing."""
    model = ours(folder, tasks or {"rte": 2})
    before, trainable = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    message = refused(load_adapter, model, adapter, task, naming=adapter)
    identical(model.state_dict(), before)
    assert [p.requires_grad for p in model.parameters()] == trainable
    return message


BAD_CONFIG = [
    ({"peft_type": "IA3"}, "'IA3'"),
    ({"peft_type": None}, "None"),
    ({"use_dora": True}, "use_dora"),
    ({"bias": "all"}, "'all'"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"init_lora_weights": "pissa"}, "'pissa'"),
    ({"init_lora_weights": ["x"]}, "init_lora_weights"),
    ({"r": 3}, "(4, 24)"),
    ({"r": 0}, "r=0"),
    ({"r": 2.5}, "r=2.5"),
    ({"r": "4"}, "r='4'"),
    ({"r": None}, "r=None"),
    ({"r": 10**400}, "lora_A"),
    ({"lora_alpha": float("nan")}, "nan"),
    ({"lora_alpha": "8"}, "lora_alpha"),
    ({"lora_alpha": 10**400}, "lora_alpha=1000"),
    ({"lora_dropout": 1.5}, "lora_dropout=1.5"),
    ({"lora_dropout": []}, "lora_dropout"),
    ({"rank_pattern": ["query"]}, "rank_pattern and alpha_pattern must be objects"),
    ({"alpha_pattern": "query"}, "rank_pattern and alpha_pattern must be objects"),
    ({"rank_pattern": {"query": 2}}, "(2,"),
    ({"rank_pattern": {"query": "4"}}, "r='4'"),
    ({"alpha_pattern": {"query": "4"}}, "lora_alpha='4'"),
    ({"alpha_pattern": {r"layer\.1\..*": 4}}, r"alpha_pattern has the key 'layer\\.1\\..*'; only plain names"),
    ({"alpha_pattern": {"": 4}}, "alpha_pattern has the key ''"),
]


@pytest.mark.parametrize("change, word", BAD_CONFIG, ids=lambda x: str(x)[:40])
def test_adapter_configs_that_cannot_be_loaded(bert, change, word):
    folder, adapter = bert
    config = read_json(adapter / "adapter_config.json")
    write_text(adapter / "adapter_config.json", json.dumps({**config, **change}))
    assert word in untouched(folder, adapter)


def test_adapter_tensors_that_cannot_be_loaded(bert):
    folder, adapter = bert
    path = adapter / "adapter_model.safetensors"
    tensors = read_safetensors(path)
    stem = "base_model.model.bert.encoder.layer.0.attention.self.query.lora_"
    assert stem + "A.weight" in tensors

    def said(change, drop=(), **options):
        write_safetensors(path, {n: t for n, t in {**tensors, **change}.items() if n not in drop})
        return untouched(folder, adapter, **options)

    assert "lora_B" in said({}, [stem + "B.weight"]) and "lora_A" in said({}, [stem + "A.weight"])
    assert "(4, 23)" in said({stem + "A.weight": torch.zeros(4, 23)})
    assert "int64" in said({stem + "A.weight": torch.zeros(4, 24, dtype=torch.int64)})
    assert "'bert.x' of type torch.float32 is not a floating-point tensor named" in said({"bert.x": torch.zeros(1)})
    assert "bert.encoder.layer.9" in said({stem.replace("0", "9") + "A.weight": torch.zeros(4, 24)})
    assert "word_embeddings" in said({"base_model.model.bert.embeddings.word_embeddings.weight": torch.zeros(61, 24)})
    assert "pooler" in said({"base_model.model.bert.pooler.dense.bias": torch.zeros(24)})  # ours is the pretrained one
    assert "lora_embedding_A" in said(
        {"base_model.model.bert.embeddings.word_embeddings.lora_embedding_A": torch.zeros(4, 61)}
    )
    assert "classifier.bias is missing" in said({}, ["base_model.model.classifier.bias"])
    assert "(2, 24)" in said({}, tasks={"rte": 3}) and "no LoRA" in said({}, [n for n in tensors if "lora" in n])
    write_safetensors(path, tensors)
    path.write_bytes(path.read_bytes()[:-1])
    untouched(folder, adapter)
    path.unlink()
    assert "has no adapter_model.safetensors" in untouched(folder, adapter)
    (adapter / "adapter_config.json").unlink()
    assert "has no adapter_config.json" in untouched(folder, adapter)
    assert "no adapter folder" in untouched(folder, adapter / "nowhere")


def test_lora_inside_roberta_s_head_is_refused(tmp_path):
    """peft adapts the head's linear layers if it is told to, instead of training them; our heads are trained whole."""
    folder = base("roberta", tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["query", "classifier.dense"], modules_to_save=["out_proj"])
    model = peft.get_peft_model(reference("roberta", folder, 2), config)
    model.save_pretrained(tmp_path / "adapter")
    assert "'classifier.dense'" in untouched(folder, tmp_path / "adapter")


def test_nothing_to_save(bert, tmp_path):
    folder, _ = bert
    model = ours(folder, {"rte": 2})
    with pytest.raises(ValueError, match="no LoRA"):
        save_adapter(model, tmp_path / "new", "rte")
    layers = add_lora(model.encoder)
    next(iter(layers.values())).rslora = True
    with pytest.raises(ValueError, match="rslora"):
        save_adapter(model, tmp_path / "new", "rte")
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Where a training was interrupted


@pytest.fixture
def state(tmp_path):
    """(path, tensors, info) of a saved state."""
    path, info = tmp_path / "state.safetensors", {"step": 3, "seconds": 0.1 + 0.2, "who": ["ü", None, True]}
    save_state(path, every_dtype(), info)
    return path, every_dtype(), info


def test_a_state_comes_back_to_the_bit(state):
    path, tensors, info = state
    found, again = load_state(path)
    identical(found, tensors)
    assert again == info
    identical(safetensors.torch.load_file(path), tensors)
    save_state(path, {}, 4)
    assert load_state(str(path)) == ({}, 4) and [p.name for p in path.parent.iterdir()] == [path.name]


def damaged(path):
    message = refused(load_state, path)
    assert message.startswith(f"{path} is damaged: ") and message.count(str(path)) == 1
    assert message.endswith("; delete it and this training starts over")
    return message


def test_a_state_of_which_anything_has_changed(state):
    path, tensors, info = state
    whole = path.read_bytes()
    start = 8 + int.from_bytes(whole[:8], "little")
    for at in range(start, len(whole)):  # every byte of the tensors
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        assert "its checksum does not match" in damaged(path)
    for length in 0, 7, start - 1, start, len(whole) - 1:
        path.write_bytes(whole[:length])
        assert "not a safetensors file that can be read" in damaged(path)
    for old, new in (b'step\\": 3', b'step\\": 4'), (b'"F64', b'"I64'), (b"[3,4]", b"[4,3]"), (b"(5,)", b"(6,)"):
        assert old in whole[:start]
        path.write_bytes(whole.replace(old, new))
        damaged(path)
    write_safetensors(path, tensors, {"info": "{}"})  # whole, but by someone else
    assert "its checksum does not match" in damaged(path)
    path.write_bytes(whole)
    assert load_state(path)[1] == info


def test_a_state_that_is_missing_or_cannot_be_read(tmp_path):
    path = tmp_path / "state.safetensors"
    assert refused(load_state, path, naming=tmp_path) == f"{tmp_path} has no state.safetensors"
    path.symlink_to(path)  # there, but who knows what is in it: nothing to delete
    assert "can't be read" in refused(load_state, path) and "delete" not in refused(load_state, path)
    path.unlink()
    path.mkdir()
    assert "not a regular file" in damaged(path)


def test_an_interrupted_save_leaves_the_state_before_it(state, monkeypatch):
    path, tensors, info = state

    def fail(_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        save_state(path, {"x": torch.ones(2)}, {"step": 4})
    identical(load_state(path)[0], tensors)
    assert load_state(path)[1] == info and [p.name for p in path.parent.iterdir()] == [path.name]


# ---------------------------------------------------------------------------------------------------------------------
# Where a checkpoint is


def test_local_folders(tmp_path, monkeypatch):
    assert find_checkpoint(tmp_path) == find_checkpoint(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert find_checkpoint(f"~/{tmp_path.name}") == tmp_path
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    assert find_checkpoint("mine") == Path("mine") and find_checkpoint("./mine") == Path("mine")


def test_what_looks_like_a_path_never_asks_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # so importing it fails
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for name in tmp_path / "x", "./x", "../x", "/x", "~/x/y/z", "~nobody/x", "a/b/c", "file", "./" + "x" * 300:
        refused(find_checkpoint, name)
    assert [looks_like_path(x) for x in ("roberta-base", "google/bert", "a/b/c", "./a", "~", "..")] == [False] * 2 + [
        True
    ] * 4
