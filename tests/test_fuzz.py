"""checkpoint.py and model.py against mutated files (fuzz.py, some of its cases), and what it and a reading found."""

import json
import os
import tracemalloc
import zipfile

import fuzz
import pytest
import torch

from glue import encode, load_tokenizer
from model import load_encoder
from support.checkpoint import (
    MAX_JSON,
    BadInput,
    load_adapter,
    read_header,
    read_json,
    read_safetensors,
    read_weights,
    write_safetensors,
)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """The folder of small valid files, shared: a test that changes one gets its own copy from `files`."""
    return fuzz.Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture
def files(tmp_path):
    fuzz.seeds(tmp_path)
    return tmp_path


def refused(function, *arguments, naming):
    """The one line that BadInput says."""
    with pytest.raises(BadInput) as error:
        function(*arguments)
    message = str(error.value)
    assert message.isprintable() and len(message) < 1000 and str(naming) in message
    return message


def test_mutated_files(valid):
    """100,000 in `python tests/fuzz.py`; here some of another seed."""
    valid.seed = 1
    assert valid.run(range(2800)) is None, fuzz.listing(valid.table)
    for kind, (tried, loaded, said, _, _) in valid.table.items():
        assert tried == 400 and loaded + said == tried and loaded and said, kind


# ---------------------------------------------------------------------------------------------------------------------
# What was found, and stays


def write_header(path, header, data=b""):
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + data)


def one(shape, end=0, name="a", dtype="U8"):
    return {name: {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}


HEADERS = {  # what was wrong before: (header, bytes of data)
    "a product that took minutes": (one([9] * 200_000), 0),
    "a product of long numbers": (one([int("9" * 4000)] * 500), 0),
    "more dimensions than torch works with": (one([1] * 65, 1), 1),
    "a message of a megabyte": (one([2], 1, name="y" * 10**6), 1),
    "a message of a long shape": (one([2] * 60, 1), 1),
    "a name of two lines": (one([1], 1, name="a\nb"), 1),
    "a name that can't be printed": (one([1], 1, name="\ud800"), 1),
    "a name that moves the cursor": (one([1], 1, name="\x1b[2J"), 1),
}


@pytest.mark.parametrize("what", HEADERS)
def test_headers(what, tmp_path):
    header, count = HEADERS[what]
    write_header(tmp_path / "x.safetensors", header, bytes(count))
    refused(read_header, tmp_path / "x.safetensors", naming=tmp_path / "x.safetensors")


def test_64_dimensions_are_read(tmp_path):
    write_header(tmp_path / "x.safetensors", one([1] * 64, 1), b"\x07")
    assert read_safetensors(tmp_path / "x.safetensors")["a"].flatten().tolist() == [7]


def test_memory_of_unaligned_tensors(tmp_path):
    """They were copied while the whole file was in memory."""
    n = 1 << 20
    header = {
        "b": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "h": {"dtype": "F16", "shape": [n], "data_offsets": [1, 2 * n + 1]},
    }
    write_header(tmp_path / "x.safetensors", header, bytes(2 * n + 1))
    tracemalloc.start()
    try:
        tensors = read_safetensors(tmp_path / "x.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 2.2 * n and tensors["h"].shape == (n,)
    finally:
        tracemalloc.stop()


JSON = {
    "a key twice": '{"a": 1, "a": 1}',
    "a key twice, deep": '{"x": [{"\\ud800": 1, "b": 2, "\\ud800": 3}]}',
    "a long key twice": '{{"{0}": 1, "{0}": 1}}'.format("y" * 10**5),
    "too large": " " * MAX_JSON + "{}",
    "a key twice after many": "{" + "".join(f'"{i}":1,' for i in range(10**5)) + '"a":1,"a":1}',
}


@pytest.mark.parametrize("what", JSON)
def test_json(what, tmp_path):
    (tmp_path / "config.json").write_text(JSON[what])
    message = refused(read_json, tmp_path / "config.json", naming=tmp_path / "config.json")
    assert "twice" not in what or "is there twice" in message


DEEP = json.loads("[" * 900 + "]" * 900)  # it can be read, but not shown: repr has less room
CONFIGS = [
    ("model_type", DEEP),
    ("model_type", "y" * 10**6),
    ("hidden_size", DEEP),
    ("hidden_size", 10**4000),
    ("hidden_size", {"y" * 10**6: 1}),
    ("hidden_size", "a\nb"),
    ("hidden_act", "y" * 10**6),
    ("is_decoder", DEEP),
    ("position_embedding_type", "\ud800"),
    ("num_hidden_layers", 1000),
    ("num_hidden_layers", 10**12),
    ("layer_norm_eps", float("nan")),
    ("layer_norm_eps", float("inf")),
    ("hidden_size", -4),
    ("vocab_size", True),
]


@pytest.mark.parametrize("key, value", CONFIGS, ids=lambda x: str(x)[:30] if x is not DEEP else "deep")
def test_configs(key, value, files):
    path = files / "bert/config.json"
    raw = json.loads(path.read_text())
    if value is DEEP:
        path.write_text(json.dumps({**raw, key: "@"}).replace('"@"', "[" * 900 + "]" * 900))
    else:
        path.write_text(json.dumps({**raw, key: value}))
    message = refused(load_encoder, files / "bert", naming=path)
    assert key in message or "JSON" in message


def test_sizes_are_compared_before_memory_is_taken(files):
    """config.json claims 400 TB and the layers of a hundred models; its weights are those of a tiny one."""
    path = files / "bert/config.json"
    raw = json.loads(path.read_text())
    load_encoder(files / "bert")  # what torch imports for the meta device is not what is measured
    path.write_text(json.dumps({**raw, "vocab_size": 10**7, "hidden_size": 10**7, "num_hidden_layers": 100}))
    tracemalloc.start()
    try:
        assert "(11, 4)" in refused(load_encoder, files / "bert", naming=files / "bert")
        assert tracemalloc.get_traced_memory()[1] < fuzz.CONSTANT
    finally:
        tracemalloc.stop()


# As keys of peft's patterns: some would take for ever to match, some to compile, and some are none.
REGEXES = [
    "(a+)+b",
    r"([\w.]+)+!",
    "(.|.)" * 40 + "!",
    ".*" * 20 + "!",
    "(?=(a*)*b)",
    "(" * 2000,
    "a" * 10**5 + "*",
    "\n",
]
ADAPTERS = [  # one change of adapter_config.json
    *({"alpha_pattern": {regex: 2}} for regex in REGEXES),
    {"alpha_pattern": {f"layer{i}.*": 2 for i in range(200_000)}},
    {"alpha_pattern": {"query": True}},
    {"alpha_pattern": {"query": DEEP}},
    {"rank_pattern": {"query": DEEP}},
    {"rank_pattern": {"query": -2}},
    {"rank_pattern": {"query": 2.0}},
    {"r": True},
    {"r": 2.0},
    {"r": 10**4000},
    {"lora_dropout": True},
    {"lora_alpha": 10**4000},
    {"use_rslora": "no"},
    {"use_rslora": 2},
    {"peft_type": "y" * 10**6},
    {"bias": ["y"] * 10**5},
    {"init_lora_weights": "y" * 10**6},
]


@pytest.mark.parametrize("change", ADAPTERS, ids=lambda change: str(change)[:40])
def test_adapter_configs(change, files):
    path = files / "roberta/adapter/adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "rank_pattern": {}, "alpha_pattern": {}, **change}))
    refused(load_adapter, fuzz.tiny("roberta"), path.parent, "rte", naming=path.parent)


MANY = {f"layer{i}": 2 for i in range(200_000)}


@pytest.mark.parametrize("ranks", [*({regex: 9} for regex in REGEXES), MANY], ids=lambda ranks: str(ranks)[:20])
def test_a_rank_pattern_is_no_matter(ranks, files):
    """The rank of a layer is that of its A; and names that no layer has are many, but soon looked up."""
    path = files / "roberta/adapter/adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(json.dumps({**raw, "rank_pattern": ranks, "alpha_pattern": MANY}))
    layers = load_adapter(fuzz.tiny("roberta"), path.parent, "rte")
    assert len(layers) == 2 and all(layer.r == 2 == len(layer.A) for layer in layers.values())


def test_adapter_with_many_tensors_of_nothing(files):
    path = files / "roberta/adapter/adapter_model.safetensors"
    empty = {f"base_model.model.x{i}": torch.zeros(0) for i in range(20_000)}
    write_safetensors(path, read_safetensors(path) | empty)
    model, calls = fuzz.tiny("roberta"), []
    real = model.encoder.state_dict
    model.encoder.state_dict = lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs)
    load_adapter(model, path.parent, "rte")  # they are nobody's, and ignored
    assert len(calls) < 10  # a large model's takes a millisecond


def test_adapter_with_a_layer_under_two_names(files):
    path = files / "roberta/adapter" / fuzz.ADAPTER
    tensors = read_safetensors(path)
    name = next(n for n in tensors if "lora_A" in n)
    write_safetensors(path, {**tensors, name.replace("roberta.", ""): torch.zeros_like(tensors[name])})
    assert "twice" in refused(load_adapter, fuzz.tiny("roberta"), path.parent, "rte", naming=path.parent)


TOKENIZERS = {  # what the first text meets: (number of the seed, where in the file, what is there then)
    "a vocabulary without [UNK]": (0, ("model", "unk_token"), "[NO]"),
    "a template's token without ids": (2, ("post_processor", "special_tokens"), {}),  # a panic in Rust: no Exception
    "a prefix longer than what is merged": (1, ("model", "continuing_subword_prefix"), "#" * 9),  # a panic in loading
}


@pytest.mark.parametrize("what", TOKENIZERS)
def test_tokenizers(what, files):
    number, (part, key), value = TOKENIZERS[what]
    path = files / f"tokenizer{number}/tokenizer.json"
    raw = json.loads(path.read_text())
    raw[part][key] = value
    path.write_text(json.dumps(raw))

    def use():
        return encode(load_tokenizer(path.parent), [("q",), ("a", "b")], 12)

    refused(use, naming="token")


# ---------------------------------------------------------------------------------------------------------------------
# An index that leads elsewhere, and pickles


def index(folder, *files):
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": dict(enumerate(files))}))


def test_links_that_lead_out_are_not_followed(tmp_path):
    folder = tmp_path / "model"
    index(folder, "part.safetensors")
    write_safetensors(tmp_path / "secret.safetensors", {"a": torch.ones(2)})
    for target in (
        "../secret.safetensors",
        tmp_path / "secret.safetensors",
        "../nowhere",
        "/dev/zero",
        "part.safetensors",
    ):
        (folder / "part.safetensors").symlink_to(target)
        refused(read_weights, folder, naming=folder / "part.safetensors")
        (folder / "part.safetensors").unlink()
    (folder / "sub").mkdir()
    write_safetensors(folder / "sub/part.safetensors", {"a": torch.ones(2)})
    (folder / "part.safetensors").symlink_to("sub/part.safetensors")
    refused(read_weights, folder, naming=folder)
    write_safetensors(folder / "other.safetensors", {"a": torch.ones(2)})
    (folder / "part.safetensors").unlink()
    (folder / "part.safetensors").symlink_to("other.safetensors")  # but one inside the folder is
    assert read_weights(folder)["a"].tolist() == [1, 1]
    index(folder, "y" * 5000)
    refused(read_weights, folder, naming=folder)


@pytest.mark.parametrize(
    "file", ["config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "tokenizer.json"]
)
@pytest.mark.parametrize("what", ["endless", "pipe"])
def test_what_is_no_file_is_not_read(files, file, what):
    """A device that never ends, a pipe that never begins."""
    folder = files / ("tokenizer0" if file == "tokenizer.json" else "bert")
    for name in ("model.safetensors", file):
        (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / file) if what == "pipe" else (folder / file).symlink_to("/dev/zero")
    refused(load_tokenizer if file == "tokenizer.json" else load_encoder, folder, naming=folder)


def test_links_of_the_hub_s_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "models--x/blobs", tmp_path / "models--x/snapshots/main"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    write_safetensors(blobs / "0123", {"a": torch.ones(2)})
    write_safetensors(tmp_path / "models--x/0123", {"a": torch.ones(2)})
    index(snapshot, "part.safetensors")
    (snapshot / "part.safetensors").symlink_to("../../blobs/0123")
    (tmp_path / "home").symlink_to(tmp_path / "models--x")  # a cache that is itself behind a link
    assert read_weights(snapshot).keys() == read_weights(tmp_path / "home/snapshots/main").keys() == {"a"}
    (snapshot / "part.safetensors").unlink()
    (snapshot / "part.safetensors").symlink_to("../../0123")
    refused(read_weights, snapshot, naming=snapshot)


class Trap:
    """Unpickled by anyone who trusts it, this runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_with_code_beside_a_whole_model(files):
    """The folder is right in all else, and the weights are all there: the code does not run in either format."""
    folder, sprung = files / "bert", files / "sprung"
    tensors = read_safetensors(folder / fuzz.WEIGHTS)
    (folder / fuzz.WEIGHTS).unlink()
    for new in True, False:
        torch.save({**tensors, "more": Trap(sprung)}, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        refused(load_encoder, folder, naming=folder / "pytorch_model.bin")
        assert not sprung.exists()
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=new)
        load_encoder(folder)
    torch.save(Trap(sprung), folder / "pytorch_model.bin")
    refused(load_encoder, folder, naming=folder / "pytorch_model.bin")
    assert not sprung.exists()
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert sprung.exists()  # so it would have


@pytest.mark.parametrize("new", [True, False])
def test_pickles_that_claim_more_than_they_hold(new, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    half = torch.ones(1, dtype=torch.float16)
    for tensor in half.as_strided((10**6, 10**6), (0, 0)), half.expand(10**6), torch.empty(4, device="meta"):
        torch.save({"a": tensor}, path, _use_new_zipfile_serialization=new)
        refused(read_weights, tmp_path, naming=path)
    x = torch.ones(1000)
    torch.save({"a": x, "tied": x}, path, _use_new_zipfile_serialization=new)
    assert read_weights(tmp_path)["tied"].shape == (1000,)
    torch.save({"a\nb": x}, path, _use_new_zipfile_serialization=new)
    refused(read_weights, tmp_path, naming=path)


def test_a_compressed_pickle(tmp_path):
    """torch.load inflates what torch.save never deflates."""
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.zeros(10**6)}, path)
    with zipfile.ZipFile(path) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for name, data in parts.items():
            small.writestr(name, data)
    assert path.stat().st_size < 20_000 and torch.load(path, weights_only=True)["a"].shape == (10**6,)
    assert "compressed" in refused(read_weights, tmp_path, naming=path)
