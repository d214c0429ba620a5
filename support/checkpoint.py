"""Files: checkpoints in, adapters and states in and out, and every write atomic.

    atomic_write, write_text        a file is there whole, or as it was before
    read_json
    read_safetensors, write_safetensors
    read_weights                    model.safetensors, a sharded index, or pytorch_model.bin -> {name: tensor}
    save_adapter, load_adapter      PEFT's adapter folders (adapter_config.json, adapter_model.safetensors)
    save_state, load_state          where a training was interrupted, under a checksum

Bad files are the user's, not a bug's: every one of them raises `BadInput` with one line that says what is wrong where.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import reprlib
import zipfile
import zlib
from pathlib import Path

import torch

from lora import LoRALinear, lora_layers, peft_adapter


class BadInput(ValueError):
    """Something the user gave can't be used; the message is one line that says what, and what to do."""


SHORT = reprlib.Repr()
SHORT.maxstring = SHORT.maxlong = SHORT.maxother = 200


def shown(value):
    """repr, but of 300 characters at most, and of anything: a message is one line whatever a file holds."""
    text = SHORT.repr(value)
    return text if len(text) <= 300 else text[:300] + "…"


def reason(error):
    """What an error began with, in one line."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def as_bad_input(what):
    """What `tokenizers` raises becomes BadInput; so does a panic of its Rust code, which is no Exception."""
    try:
        yield
    except BaseException as e:
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        raise BadInput(f"{what}: {reason(e)}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; when the block ends well, it replaces `path` in one step.

    Whatever goes wrong, `path` stays as it was and the temporary file goes.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with open(temporary, "rb") as f:
            os.fsync(f.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text):
    """Write a text file, atomically: UTF-8, line ends as they are in `text`."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="")


def require_file(path):
    """`path`, which must be a file: a device never ends, and a pipe never begins. Raises BadInput."""
    if path.exists() and not path.is_file():
        raise BadInput(f"{path} is not a regular file")
    return path


MAX_JSON = 10_000_000  # bytes, of a file or a header: parsed, they take up to 30 times as much


def parse_json(text):
    """json.loads, but a key that an object has twice, of which every reader takes its own, raises ValueError."""

    def unique(pairs):
        found = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"the key {shown(key)} is there twice")
            found[key] = value
        return found

    return json.loads(text, object_pairs_hook=unique)


def read_json(path):
    """The JSON object in `path`. Raises BadInput: no such file, not JSON, not an object, a key twice, too large."""
    path = require_file(Path(path))
    try:
        if path.stat().st_size > MAX_JSON:
            raise ValueError(f"it has more than {MAX_JSON} bytes")
        value = parse_json(path.read_bytes().decode())
    except FileNotFoundError:
        raise BadInput(f"{path.parent} has no {path.name}") from None
    except (OSError, ValueError, RecursionError) as e:
        raise BadInput(f"{path} can't be read as JSON: {e}") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path} should hold a JSON object, not {type(value).__name__}")
    return value


# ---------------------------------------------------------------------------------------------------------------------
# safetensors: 8 bytes of header length N (little-endian), N bytes of JSON, then the tensors' raw bytes

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_header(path):
    """The header of a safetensors file: ({name: (dtype, shape, begin, end)}, metadata, offset of the data).

    Every claim in the header is checked against the file's size before anything is allocated. Raises BadInput.
    """
    path = require_file(Path(path))

    def bad(what):
        return BadInput(f"{path} is not a safetensors file that can be read: {what}")

    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_JSON):
                raise bad(f"a header of {length} bytes in a file of {size}")
            header = parse_json(f.read(length).decode())
    except FileNotFoundError:
        raise BadInput(f"{path.parent} has no {path.name}") from None
    except OSError as e:
        raise BadInput(f"{path} can't be read: {e.strerror}") from None
    except BadInput:
        raise
    except (ValueError, RecursionError) as e:  # not UTF-8, not JSON, a number of 5000 digits, 5000 brackets
        raise bad(f"its header is not JSON: {e}") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("its __metadata__ is not names and texts")

    entries = {}
    for name, entry in header.items():
        if not name.isprintable():  # messages print it: no line break, no half of a character
            raise bad(f"tensor {shown(name)} has no printable name")
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in [*shape, begin, end])
        except (KeyError, TypeError, ValueError):
            raise bad(f"tensor {shown(name)} is described by {shown(entry)}, which can't be read") from None
        whole = whole and len(shape) <= 64 and all(n < 2**60 for n in shape)  # 64: torch's own limit
        whole = whole and math.prod(n or 1 for n in shape) < 2**60  # beyond, torch refuses even an empty one
        if not whole or end - begin != math.prod(shape) * dtype.itemsize:
            raise bad(f"tensor {shown(name)} of shape {shown(shape)} can't lie in bytes {shown(begin)} to {shown(end)}")
        entries[name] = (dtype, shape, begin, end)
    covered = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != covered:
            raise bad(f"tensor {shown(name)} begins at byte {shown(begin)} instead of {covered}")
        covered = end
    if covered != size - 8 - length:
        raise bad(f"its tensors take {covered} bytes, the file has {size - 8 - length} (truncated?)")
    return entries, metadata, 8 + length


def read_safetensors(path):
    """{name: tensor} of a safetensors file. Raises BadInput on any damage."""
    entries, _, start = read_header(path)
    tensors = {}
    with open(path, "rb") as f:
        for name, (dtype, shape, begin, end) in entries.items():
            if begin == end:  # torch.frombuffer refuses empty buffers
                tensors[name] = torch.empty(shape, dtype=dtype)
                continue
            data = bytearray(end - begin)  # its own, so aligned wherever it lies in the file
            f.seek(start + begin)
            f.readinto(data)
            tensors[name] = torch.frombuffer(data, dtype=dtype).view(shape)
    return tensors


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor}, atomically. `metadata`: {str: str}, beside the "format": "pt" that older readers want.

    Raises TypeError: metadata that is no text, a tensor of a type that DTYPES has no name for.
    """
    names = {dtype: name for name, dtype in DTYPES.items()}
    if not all(isinstance(text, str) for text in (metadata or {}).values()):
        raise TypeError(f"metadata must be texts, not {metadata}")
    header, offset = {"__metadata__": {"format": "pt", **(metadata or {})}}, 0
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # widest first: aligned
    for name, tensor in ordered:
        if tensor.dtype not in names:
            raise TypeError(f"tensor {name!r} is of type {tensor.dtype}")
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as f:
        f.write(len(head).to_bytes(8, "little") + head)
        for _, tensor in ordered:
            f.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)


# ---------------------------------------------------------------------------------------------------------------------
# Published checkpoints


def shards(index):
    """The file names in a sharded checkpoint's index. A name that leads out of the folder is refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise BadInput(f"{index} has no weight_map")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.-]{1,200}", file) or file.startswith("."):
            raise BadInput(f"{index} names {shown(file)}, which is no plain file name in its folder")
    return files


def read_weights(folder):
    """{name: tensor} of a checkpoint folder, in the file's own names and dtypes. Raises BadInput."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    if (folder / "model.safetensors.index.json").exists():
        tensors = {}
        inside = [Path(os.path.realpath(folder))]
        if inside[0].parent.name == "snapshots":  # the Hub's cache, where every file is a link to ../../blobs
            inside.append(inside[0].parents[1] / "blobs")
        for shard in shards(folder / "model.safetensors.index.json"):
            if Path(os.path.realpath(folder / shard)).parent not in inside:
                raise BadInput(f"{folder / shard} is a link that leads out of its folder")
            tensors |= read_safetensors(folder / shard)
        return tensors
    pickled = folder / "pytorch_model.bin"
    if not pickled.exists():
        raise BadInput(f"{folder} has no weights: neither model.safetensors, nor an index, nor pytorch_model.bin")
    return read_pickle(pickled)


def read_pickle(path):
    """{name: tensor} of a pytorch_model.bin, in which nothing but tensors is unpickled. Raises BadInput.

    A pickle may claim more numbers than it holds (a stride of 0, a compressed archive): what it claims is looked at
    first, on the "meta" device, and may be twice the file's size, for weights that are tied.
    """
    size = require_file(path).stat().st_size
    for device in "meta", "cpu":
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    if sum(file.file_size for file in archive.infolist()) > size:
                        raise BadInput(f"{path} is compressed: it would take more memory than its {size} bytes")
            tensors = torch.load(path, map_location=device, weights_only=True)
        except BadInput:
            raise
        except Exception as e:  # torch.load has no error of its own for a damaged or a malicious file
            raise BadInput(f"{path} is damaged, or holds more than tensors ({type(e).__name__})") from None
        if (
            not isinstance(tensors, dict)
            or not all(isinstance(n, str) and n.isprintable() for n in tensors)
            or not all(
                type(t) in (torch.Tensor, torch.nn.Parameter)
                and t.layout == torch.strided
                and t.device.type == device
                and not t.is_nested
                and not t.is_quantized
                for t in tensors.values()
            )
        ):
            raise BadInput(f"{path} should hold a dictionary of names and tensors")
        if sum(t.numel() * t.itemsize for t in tensors.values()) > 2 * size:
            raise BadInput(f"{path} claims more numbers than its {size} bytes hold")
    return tensors


def weights_checksum(encoder):
    """Of all weights, in order: an int. An adapter is of use on these alone."""
    found = 0
    for p in encoder.parameters():
        found = zlib.crc32(p.detach().cpu().numpy().data, found)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Adapter folders, as peft writes and reads them: names are "base_model.model." + the path in the Hugging Face task
# model, so the encoder's own paths (which are the Hugging Face ones) get the family's prefix, and a head's get none.

ROOT = "base_model.model."
VARIANTS = (  # settings of peft that change what its layers compute, or which layers there are
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)


def save_adapter(model, folder, task, base="", metadata=None):
    """Write `task`'s adapter as a folder that `peft` loads: the shared A and B of every LoRA layer and the task's head.

    model: a MultiTaskModel; base: what to name as the base model; metadata: {str: str} for the weight file's header.
    Raises ValueError: no LoRA layers, or some with rslora and some without.
    """
    tensors, config = peft_adapter(model.encoder, model.encoder.config.prefix)
    head = model.heads[task]
    tensors |= {ROOT + name: tensor.float() for name, tensor in head.state_dict().items()}
    config |= {"task_type": "SEQ_CLS", "base_model_name_or_path": str(base), "modules_to_save": head.saved}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"task": task, **(metadata or {})})
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")
    return folder


def is_name(key):
    """Whether a pattern's key is a plain name. peft takes a regex, but matching a stranger's could take for ever."""
    return re.fullmatch(r"[\w.-]+", key) is not None


def find_named(pattern, path, default):
    """The value of the first key of `pattern` that is `path`, or its end from a dot on; else `default`."""
    parts = path.split(".")
    ends = {".".join(parts[i:]) for i in range(len(parts))}
    return next((value for key, value in pattern.items() if key in ends), default)


def read_adapter_config(folder):
    """adapter_config.json in `folder`. Raises BadInput for what plain LoRA layers can't hold, or hold differently."""
    config, where = read_json(folder / "adapter_config.json"), f"adapter {folder}"
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{where} is of peft_type {shown(config.get('peft_type'))}; only LORA adapters can be loaded")
    for key in VARIANTS:
        if config.get(key):
            raise BadInput(f"{where} uses {key}, which plain LoRA layers can't hold")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        kind = shown(config["init_lora_weights"])
        raise BadInput(f"{where} belongs to changed base weights (init_lora_weights={kind})")
    if config.get("bias", "none") != "none":
        raise BadInput(f"{where} trained biases (bias={shown(config['bias'])}); only bias='none' can be loaded")
    if config.get("use_rslora") not in (None, True, False):
        raise BadInput(f"{where}: use_rslora is {shown(config['use_rslora'])}, not true or false")
    if not all(isinstance(config.get(key) or {}, dict) for key in ("rank_pattern", "alpha_pattern")):
        raise BadInput(f"{where}: rank_pattern and alpha_pattern must be objects of names and numbers")
    if odd := [key for key in config.get("alpha_pattern") or () if not is_name(key)]:
        raise BadInput(f"{where}: alpha_pattern has the key {shown(odd[0])}; only plain names of layers can be read")
    return config


def load_adapter(model, folder, task=None):
    """Insert an adapter folder's LoRA layers into `model.encoder` and fill them, and the head of `task`, if given.

    Reads what `save_adapter` and `peft` write: plain and rsLoRA scaling, any linear layers, any ranks (those of r and
    rank_pattern; of A's rows, where that has regular expressions), an alpha_pattern of plain names. Everything is
    checked before the model is touched.
    Returns {path: LoRALinear}. Raises BadInput; ValueError where the encoder has LoRA layers already.
    """
    if lora_layers(model.encoder):
        raise ValueError("load_adapter: the encoder has LoRA layers already")
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"there is no adapter folder {folder}")
    config, where, tensors = read_adapter_config(folder), f"adapter {folder}", {}
    for name, tensor in read_safetensors(folder / "adapter_model.safetensors").items():
        if not name.startswith(ROOT) or not tensor.is_floating_point():
            kind = f"of type {tensor.dtype}"
            raise BadInput(f"{where}: tensor {shown(name)} {kind} is not a floating-point tensor named {ROOT}…")
        tensors[name.removeprefix(ROOT)] = tensor.float()

    # Which layers: what the file holds decides; target_modules may be a list, a regex or "all-linear".
    prefix, modules, factors = model.encoder.config.prefix, dict(model.encoder.named_modules()), {}
    for name in [n for n in tensors if n.endswith((".lora_A.weight", ".lora_B.weight"))]:
        stem, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
        path = stem.removeprefix(prefix)
        if not isinstance(modules.get(path), torch.nn.Linear):
            raise BadInput(f"{where} adapts {shown(stem)}, which is no linear layer of this encoder")
        if factor in factors.get(path, ()):
            raise BadInput(f"{where} has lora_{factor} of {path} twice, with {prefix} and without")
        factors.setdefault(path, {})[factor] = tensors.pop(name)
    if not factors:
        raise BadInput(f"{where} holds no LoRA tensors")
    dropout, sizes = config.get("lora_dropout", 0.0), {}
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    is_plain = all(map(is_name, ranks))
    for path, found in factors.items():
        base, name = modules[path], prefix + path
        for factor in "AB":
            if factor not in found:
                raise BadInput(f"{where} has no lora_{factor} for {name}")
        rank, alpha = find_named(ranks, name, config.get("r", 8)), find_named(alphas, name, config.get("lora_alpha", 8))
        if not is_plain:  # whatever rank_pattern's regexes match: A is (r, in)
            rank = next(iter(found["A"].shape), 0)
        numbers = type(rank) is int and type(alpha) in (int, float) and type(dropout) in (int, float)
        if not numbers or rank < 1 or not abs(alpha) < 1e9 or not 0 <= dropout < 1:
            said = f"r={shown(rank)}, lora_alpha={shown(alpha)}, lora_dropout={shown(dropout)}"
            raise BadInput(f"{where} has {said}; r must be a whole number from 1, alpha finite, dropout in [0, 1)")
        for factor, shape in (("A", (rank, base.in_features)), ("B", (base.out_features, rank))):
            if tuple(found[factor].shape) != shape:
                size, want = tuple(found[factor].shape), shown(shape)
                raise BadInput(f"{where}: lora_{factor} of {name} is {size}, should be {want}")
        sizes[path] = rank, alpha

    # The rest: the head's tensors. Whatever else belongs inside the encoder would be lost, so it is refused.
    head = {} if task is None else model.heads[task].state_dict()
    if missing := sorted(head.keys() - tensors.keys()):
        raise BadInput(f"{where} has no head for {task}: {missing[0]} is missing (does modules_to_save list it?)")
    for name, tensor in head.items():
        if tensors[name].shape != tensor.shape:
            raise BadInput(f"{where}: {name} is {tuple(tensors[name].shape)}, {task} needs {tuple(tensor.shape)}")
    of_heads = () if model.encoder.has_pooler else f"{prefix}pooler."  # BERT's, where each task trains its own
    own = model.encoder.state_dict().keys()
    for name in sorted(tensors.keys() - head.keys()):
        inside = name.startswith(prefix) and not name.startswith(of_heads)
        if inside or name in own:
            raise BadInput(f"{where} has {shown(name)} trained besides LoRA and the head, which can't be loaded")

    if head:
        model.heads[task].load_state_dict({name: tensors[name] for name in head})
    model.encoder.requires_grad_(False)
    for path, (rank, alpha) in sizes.items():
        layer = LoRALinear(modules[path], rank, alpha, dropout, rslora=bool(config.get("use_rslora")))
        found = factors.pop(path)
        layer.A.data.copy_(found["A"])
        layer.B.data.copy_(found["B"])
        model.encoder.set_submodule(path, layer)
    return lora_layers(model.encoder)


# ---------------------------------------------------------------------------------------------------------------------
# Where a training was interrupted


def checksum(tensors, info):
    """SHA-256 of names, types, shapes and contents, and of `info`, a string."""
    digest = hashlib.sha256(info.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_state(path, tensors, info):
    """Write {name: tensor} and `info`, whatever json writes, to one safetensors file with a checksum, atomically."""
    text = json.dumps(info)
    write_safetensors(path, tensors, {"info": text, "sha256": checksum(tensors, text)})


def load_state(path):
    """(tensors, info) of a file by `save_state`. Raises BadInput: it is missing, can't be read, or is damaged."""
    path, damage = Path(path), ""
    try:
        _, metadata, _ = read_header(path)
        tensors, info = read_safetensors(path), metadata.get("info", "")
        if checksum(tensors, info) != metadata.get("sha256"):
            damage = "its checksum does not match"
    except BadInput as e:
        damage = str(e).partition(f"{path} is ")[2]
        if not damage:  # it is not there, or can't be read, but may be whole
            raise
    if damage:
        raise BadInput(f"{path} is damaged: {damage}; delete it and this training starts over")
    return tensors, json.loads(info)
