"""Everything that touches disk: checkpoints in, adapters in and out, and every write atomic.

    find_checkpoint     a local folder or a Hub id -> a folder with config.json, tokenizer.json and weights
    read_weights        model.safetensors, a sharded index, or pytorch_model.bin -> {name: tensor}
    read_safetensors, write_safetensors
    save_adapter, load_adapter      PEFT's adapter folders (adapter_config.json, adapter_model.safetensors)
    save_masks, load_masks          LoRI's masks, beside them

Bad files are the user's, not a bug's: every one of them raises `BadInput` with one line that says what is wrong where.
"""

import contextlib
import json
import math
import os
import re
from pathlib import Path

import torch
from torch.nn import functional as F

from lora import LoRALinear, lora_layers, replace_module


class BadInput(ValueError):
    """Something the user gave can't be used; the message is one line that says what, and what to do."""


class HubError(BadInput):
    """The Hub could not be reached, or did not have what was asked of it."""


# ---------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`; when the block ends well, it replaces `path` in one step."""
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
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path):
    """The JSON object in `path`. Raises BadInput: no such file, not JSON, not an object."""
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
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
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the reference reader's own limit


def read_header(path):
    """The header of a safetensors file: ({name: (dtype, shape, begin, end)}, metadata, offset of the data).

    Every claim in the header is checked against the file's size before anything is allocated. Raises BadInput.
    """
    path = Path(path)

    def bad(what):
        return BadInput(f"{path} is not a complete safetensors file: {what}")

    def unique(pairs):
        if len(dict(pairs)) < len(pairs):
            raise bad("its header has a key twice")
        return dict(pairs)

    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise bad(f"a header of {length} bytes in a file of {size}")
            header = json.loads(f.read(length).decode(), object_pairs_hook=unique)
    except FileNotFoundError:
        raise BadInput(f"{path.parent} has no {path.name}") from None
    except OSError as e:
        raise BadInput(f"{path} can't be read: {e.strerror}") from None
    except BadInput:
        raise
    except (ValueError, RecursionError):  # not UTF-8, not JSON, a number of 5000 digits, 5000 brackets
        raise bad("its header is not JSON") from None
    if not isinstance(header, dict):
        raise bad("its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise bad("its __metadata__ is not names and texts")

    entries = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = DTYPES[entry["dtype"]], entry["shape"], entry["data_offsets"]
            whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in [*shape, begin, end])
        except (KeyError, TypeError, ValueError):
            raise bad(f"tensor {name!r} has no readable dtype, shape and offsets") from None
        whole = whole and math.prod(n or 1 for n in shape) < 2**60  # beyond, torch refuses even an empty one
        if not whole or end - begin != math.prod(shape) * dtype.itemsize:
            raise bad(f"tensor {name!r} of shape {shape} can't lie in bytes {begin} to {end}")
        entries[name] = (dtype, shape, begin, end)
    covered = 0
    for name, (_, _, begin, end) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != covered:
            raise bad(f"tensor {name!r} begins at byte {begin} instead of {covered}")
        covered = end
    if covered != size - 8 - length:
        raise bad(f"its tensors take {covered} bytes, the file has {size - 8 - length} (truncated?)")
    return entries, metadata, 8 + length


def read_safetensors(path):
    """{name: tensor} of a safetensors file. The tensors share one buffer. Raises BadInput on any damage."""
    entries, _, start = read_header(path)
    with open(path, "rb") as f:
        f.seek(start)
        data = bytearray(os.fstat(f.fileno()).st_size - start)
        f.readinto(data)
    tensors = {}
    for name, (dtype, shape, begin, end) in entries.items():
        if begin == end:  # torch.frombuffer refuses empty buffers
            tensors[name] = torch.empty(shape, dtype=dtype)
        elif begin % dtype.itemsize:  # legal, but not where a tensor may lie in memory
            tensors[name] = torch.frombuffer(data[begin:end], dtype=dtype).view(shape)
        else:
            tensors[name] = torch.frombuffer(data, dtype=dtype, count=math.prod(shape), offset=begin).view(shape)
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


def looks_like_path(name):
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def find_checkpoint(path_or_id, revision="main"):
    """The folder that holds a checkpoint: the local folder of that name, or the Hub's, downloaded or from its cache.

    Raises BadInput for a folder that isn't there, HubError for all that can go wrong with the Hub.
    """
    folder = os.path.expanduser(path_or_id)
    if os.path.isdir(folder):
        return Path(folder)
    if looks_like_path(str(path_or_id)) or os.path.exists(folder):
        raise BadInput(f"there is no model folder {path_or_id}")

    # Imported here, not above: HF_HUB_OFFLINE and its like are read at import, after train.py has set them.
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub import errors as hub

    def download(*names):
        """The first of `names` that the repository has; None where it has none."""
        for name in names:
            try:
                return Path(hf_hub_download(path_or_id, name, revision=revision))
            except hub.LocalEntryNotFoundError:
                if not constants.HF_HUB_OFFLINE:
                    raise
            except hub.EntryNotFoundError:
                continue
        return None

    try:
        config = download("config.json")
        if config is None:
            offline = "is not in the local cache, and the Hub is offline" if constants.HF_HUB_OFFLINE else "has none"
            raise HubError(f"no config.json for model {path_or_id!r}: the repository {offline}")
        download("tokenizer.json")
        weights = download("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        if weights is None:
            raise HubError(f"model {path_or_id!r} has no model.safetensors and no pytorch_model.bin")
        if weights.name.endswith(".index.json"):
            for shard in shards(weights):
                download(shard)
        return config.parent
    except hub.GatedRepoError:
        raise HubError(f"model {path_or_id!r} is gated: ask for access on its page and set HF_TOKEN") from None
    except hub.RepositoryNotFoundError:
        raise HubError(f"no model {path_or_id!r} on the Hub, or it is private (then set HF_TOKEN)") from None
    except hub.RevisionNotFoundError:
        raise HubError(f"model {path_or_id!r} has no revision {revision!r}") from None
    except hub.HFValidationError:
        raise BadInput(f"{path_or_id!r} is neither a folder nor a Hub id") from None
    except BadInput:
        raise
    except Exception as e:  # no network, a proxy, a full disk: classes of several packages
        reason = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        raise HubError(f"model {path_or_id!r} can't be had from the Hub: {reason}") from None


def shards(index):
    """The file names in a sharded checkpoint's index. A name that leads out of the folder is refused."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise BadInput(f"{index} has no weight_map")
    files = sorted(set(weight_map.values()))
    for file in files:
        if not re.fullmatch(r"[\w.-]+", file) or file.startswith("."):
            raise BadInput(f"{index} names a file that is none of its folder: {file!r}")
    return files


def read_weights(folder):
    """{name: tensor} of a checkpoint folder, in the file's own names and dtypes. Raises BadInput."""
    folder = Path(folder)
    if (folder / "model.safetensors").exists():
        return read_safetensors(folder / "model.safetensors")
    if (folder / "model.safetensors.index.json").exists():
        tensors = {}
        for shard in shards(folder / "model.safetensors.index.json"):
            tensors |= read_safetensors(folder / shard)
        return tensors
    pickled = folder / "pytorch_model.bin"
    if not pickled.exists():
        raise BadInput(f"{folder} has no weights: neither model.safetensors, nor an index, nor pytorch_model.bin")
    try:
        tensors = torch.load(pickled, map_location="cpu", weights_only=True)
    except Exception as e:  # torch.load has no error of its own for a damaged or a malicious file
        raise BadInput(f"{pickled} is damaged, or holds more than tensors ({type(e).__name__})") from None
    if not isinstance(tensors, dict) or not all(isinstance(n, str) for n in tensors) or not all(
        isinstance(t, torch.Tensor) and t.layout == torch.strided for t in tensors.values()
    ):  # fmt: skip
        raise BadInput(f"{pickled} should hold a dictionary of names and tensors")
    return tensors


# ---------------------------------------------------------------------------------------------------------------------
# Adapter folders, as peft writes and reads them: names are "base_model.model." + the path in the Hugging Face task
# model, so the encoder's own paths (which are the Hugging Face ones) get the family's prefix, and a head's get none.

ROOT = "base_model.model."
VARIANTS = (  # settings of peft that change what its layers compute, or which layers there are
    "use_dora", "fan_in_fan_out", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication",
    "alora_invocation_tokens", "use_qalora", "use_bdlora", "arrow_config", "kasa_config", "velora_config",
    "monteclora_config",
)  # fmt: skip


def short_targets(model, layers):
    """What to write as target_modules: last names ("query") where they say it exactly, else whole paths."""
    short = sorted({path.rpartition(".")[2] for path in layers})
    linear = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, LoRALinear))]
    matched = {n.removesuffix(".base") for n in linear if n.removesuffix(".base").rpartition(".")[2] in short}
    prefix = model.encoder.config.prefix
    return short if matched == {"encoder." + path for path in layers} else sorted(prefix + path for path in layers)


def save_adapter(model, folder, task, base="", metadata=None):
    """Write `task`'s adapter as a folder that `peft` loads: the shared A and B of every LoRA layer and the task's head.

    model: a MultiTaskModel; base: what to name as the base model; metadata: {str: str} for the weight file's header.
    """
    prefix, layers = model.encoder.config.prefix, lora_layers(model.encoder)
    if len({layer.rslora for layer in layers.values()}) != 1:
        raise ValueError("save_adapter: no LoRA layers, or some with rslora and some without")
    tensors = {}
    for path, layer in layers.items():
        tensors[f"{ROOT}{prefix}{path}.lora_A.weight"] = layer.A.detach().float()
        tensors[f"{ROOT}{prefix}{path}.lora_B.weight"] = layer.B.detach().float()
    head = model.heads[task].state_dict()
    tensors |= {ROOT + name: tensor.float() for name, tensor in head.items()}
    first = next(iter(layers.values()))
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS", "base_model_name_or_path": str(base), "r": first.r,
        "lora_alpha": first.alpha, "lora_dropout": first.dropout, "use_rslora": first.rslora, "bias": "none",
        "inference_mode": True, "target_modules": short_targets(model, layers),
        "modules_to_save": model.heads[task].saved,
        "rank_pattern": {prefix + path: m.r for path, m in layers.items() if m.r != first.r},
        "alpha_pattern": {prefix + path: m.alpha for path, m in layers.items() if m.alpha != first.alpha},
    }  # fmt: skip
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / "adapter_model.safetensors", tensors, {"task": task, **(metadata or {})})
    write_text(folder / "adapter_config.json", json.dumps(config, indent=1) + "\n")
    return folder


def pattern(config, key, path, default):
    """peft's rank_pattern / alpha_pattern: the value whose key, a regex, matches the end of `path`, or the default."""
    for name, value in (config.get(key) or {}).items():
        if re.fullmatch(rf"(.*\.)?({name})", path):
            return value
    return default


def load_adapter(model, folder, task=None):
    """Insert an adapter folder's LoRA layers into `model.encoder` and fill them, and the head of `task`, if given.

    Reads what `save_adapter` and `peft` write: plain and rsLoRA scaling, any linear layers, rank and alpha patterns.
    Everything is checked before the model is touched. Returns {path: LoRALinear}. Raises BadInput; ValueError where the
    encoder has LoRA layers already.
    """
    if lora_layers(model.encoder):
        raise ValueError("load_adapter: the encoder has LoRA layers already")
    folder = Path(folder)
    if not folder.is_dir():
        raise BadInput(f"there is no adapter folder {folder}")
    config = read_json(folder / "adapter_config.json")
    where = f"adapter {folder}"
    if config.get("peft_type") != "LORA":
        raise BadInput(f"{where} is of peft_type {config.get('peft_type')!r}; only LORA adapters can be loaded")
    for key in VARIANTS:
        if config.get(key):
            raise BadInput(f"{where} uses {key}, which plain LoRA layers can't hold")
    if config.get("init_lora_weights") not in (None, True, False, "gaussian", "orthogonal", "eva"):
        raise BadInput(f"{where} belongs to changed base weights (init_lora_weights={config['init_lora_weights']!r})")
    if config.get("bias", "none") != "none":
        raise BadInput(f"{where} trained biases (bias={config['bias']!r}); only bias='none' can be loaded")
    tensors = {}
    for name, tensor in read_safetensors(folder / "adapter_model.safetensors").items():
        if not name.startswith(ROOT) or not tensor.is_floating_point():
            raise BadInput(f"{where}: tensor {name!r} of type {tensor.dtype} is no adapter tensor ({ROOT}…)")
        tensors[name.removeprefix(ROOT)] = tensor.float()

    # Which layers: what the file holds decides; target_modules may be a list, a regex or "all-linear".
    prefix, modules, factors = model.encoder.config.prefix, dict(model.encoder.named_modules()), {}
    for name in [n for n in tensors if n.endswith((".lora_A.weight", ".lora_B.weight"))]:
        stem, factor = name.removesuffix(".weight").rsplit(".lora_", 1)
        path = stem.removeprefix(prefix)
        if not isinstance(modules.get(path), torch.nn.Linear):
            raise BadInput(f"{where} adapts {stem!r}, which is no linear layer of this encoder")
        factors.setdefault(path, {})[factor] = tensors.pop(name)
    if not factors:
        raise BadInput(f"{where} holds no LoRA tensors")
    dropout, sizes = config.get("lora_dropout", 0.0), {}
    for path, found in factors.items():
        base, name = modules[path], prefix + path
        try:
            rank = pattern(config, "rank_pattern", name, config.get("r", 8))
            alpha = pattern(config, "alpha_pattern", name, config.get("lora_alpha", 8))
            usable = rank == int(rank) >= 1 and abs(alpha) < 1e9 and 0 <= dropout < 1
        except (TypeError, ValueError, OverflowError, AttributeError, re.error):
            raise BadInput(f"{where}: r, lora_alpha, lora_dropout and their patterns can't be read") from None
        if not usable:
            raise BadInput(f"{where} has r={rank!r}, lora_alpha={alpha!r}, lora_dropout={dropout!r}")
        for factor, shape in (("A", (rank, base.in_features)), ("B", (base.out_features, rank))):
            if factor not in found:
                raise BadInput(f"{where} has no lora_{factor} for {name}")
            if tuple(found[factor].shape) != shape:
                raise BadInput(f"{where}: lora_{factor} of {name} is {tuple(found[factor].shape)}, should be {shape}")
        sizes[path] = int(rank), alpha

    # The rest: the head's tensors. Whatever else belongs inside the encoder would be lost, so it is refused.
    head = {} if task is None else model.heads[task].state_dict()
    if missing := sorted(head.keys() - tensors.keys()):
        raise BadInput(f"{where} has no head for {task}: {missing[0]} is missing (modules_to_save lists it?)")
    for name, tensor in head.items():
        if tensors[name].shape != tensor.shape:
            raise BadInput(f"{where}: {name} is {tuple(tensors[name].shape)}, {task} needs {tuple(tensor.shape)}")
    of_heads = () if model.encoder.has_pooler else f"{prefix}pooler."  # BERT's, where each task trains its own
    for name in sorted(tensors.keys() - head.keys()):
        inside = name.startswith(prefix) and not name.startswith(of_heads)
        if inside or name in model.encoder.state_dict():
            raise BadInput(f"{where} has {name!r} trained besides LoRA and the head, which can't be loaded")

    if head:
        model.heads[task].load_state_dict({name: tensors[name] for name in head})
    model.encoder.requires_grad_(False)
    for path, (rank, alpha) in sizes.items():
        layer = LoRALinear(modules[path], rank, alpha, dropout, rslora=bool(config.get("use_rslora")))
        layer.A.data.copy_(factors[path]["A"])
        layer.B.data.copy_(factors[path]["B"])
        replace_module(model.encoder, path, layer)
    return lora_layers(model.encoder)


# ---------------------------------------------------------------------------------------------------------------------
# Masks of LoRI: beside the adapter, a bit per entry of B

MASKS = "masks.safetensors"


def save_masks(folder, masks):
    """Write masks into an adapter's folder, atomically, as masks.safetensors; peft does not look at it.

    Per path uint8 (ceil(out * r / 8),): entry i of the flattened mask is bit i % 8 of byte i // 8. The header's
    metadata has the shapes: {"shapes": '{path: [out, r]}'}.
    """
    packed = {}
    for path, mask in masks.items():
        bits = F.pad(mask.detach().cpu().flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
        packed[path] = (bits << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)  # (ceil(out * r / 8),)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shapes = json.dumps({path: list(mask.shape) for path, mask in masks.items()}, separators=(",", ":"))
    write_safetensors(folder / MASKS, packed, {"shapes": shapes})


def load_masks(folder):
    """The masks that `save_masks` wrote; whether they fit a model `lori.check_masks` says. Raises BadInput."""
    path = Path(folder) / MASKS
    _, metadata, _ = read_header(path)
    packed, masks = read_safetensors(path), {}
    try:
        shapes = json.loads(metadata["shapes"])
        if shapes.keys() != packed.keys() or not packed:
            raise ValueError
        for name, (out, r) in shapes.items():
            count = out * r
            bits = (packed[name][:, None] >> torch.arange(8, dtype=torch.uint8) & 1).flatten().bool()
            whole = packed[name].dtype == torch.uint8 and packed[name].shape == (-(-count // 8),)
            if not whole or bits[count:].any():
                raise ValueError
            masks[name] = bits[:count].view(out, r)
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError, RecursionError):
        raise BadInput(f"{path} holds no masks: shapes and bits do not fit") from None
    return masks
