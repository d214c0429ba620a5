"""Files from strangers: mutate small valid ones at random, load them, and expect BadInput or a correct load.

    python tests/fuzz.py --count 100000 --seed 0        all kinds in turn; ends with a table
    python tests/fuzz.py --seed 0 --only 1234           that case alone, with its traceback and its files

A case fails if anything but BadInput comes out, or a BadInput that is not one printable line naming the file; if what
was loaded is not what the file says; if it takes more than SECONDS of processor time; if it kills the process; if the
process would grow by more than GROWTH, torch's and tokenizers' memory included; and, looked at in every fourth case as
it takes so long, if Python's allocations (read buffers, parsed JSON, modules) pass 3 times the files' size + CONSTANT.
"""

import argparse
import contextlib
import json
import math
import mmap
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import tracemalloc
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

try:
    import safetensors
    import safetensors.torch
except ImportError:
    print("fuzz.py: needs safetensors, not installed; run pip install -r requirements-dev.txt", file=sys.stderr)
    sys.exit(2)

sys.path.insert(0, str(Path(__file__).parents[1]))

from glue import encode, load_tokenizer  # noqa: E402
from lora import add_lora  # noqa: E402
from model import FAMILIES, Config, Encoder, MultiTaskModel, load_encoder  # noqa: E402
from support.checkpoint import (  # noqa: E402
    DTYPES,
    BadInput,
    load_adapter,
    read_safetensors,
    save_adapter,
    write_safetensors,
)

SECONDS, CONSTANT, GROWTH, PART = 5, 16 << 20, 128 << 20, 10_000
MESSAGE = {"tokenizer": 10**6}  # characters; 1000 for the others: what `tokenizers` says quotes the file
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"

# ---------------------------------------------------------------------------------------------------------------------
# Small valid files


def tiny(family):
    """Our own random model of that family, with LoRA nowhere."""
    torch.manual_seed(0)
    segments = 0 if family == "distilbert" else 2
    config = Config(family, 11, 4, 1, 2, 6, 12, 1, "gelu", 0.1, 0.1, 0.1, 0.02, segments)
    return MultiTaskModel(Encoder(config, pooler=family == "bert"), {"rte": 2}).eval()


def seeds(folder):
    """Write them, {kind: [folder]}."""
    for family in ("bert", "roberta", "distilbert"):
        model, at = tiny(family), folder / family
        at.mkdir(parents=True)
        keys = FAMILIES[family][1]
        raw = {keys.get(field, field): value for field, value in vars(model.encoder.config).items()}
        (at / "config.json").write_text(json.dumps(raw, indent=1))
        dtype = torch.float16 if family == "roberta" else torch.float32
        tensors = {n: t.to(dtype) for n, t in model.encoder.state_dict().items()}
        write_safetensors(at / WEIGHTS, {**tensors, "more": torch.zeros(2, dtype=torch.int64)})
        if family == "roberta":
            add_lora(model.encoder, targets=["query", "value"], r=2)
            save_adapter(model, at / "adapter", "rte", "roberta-base")
            config = json.loads((at / "adapter/adapter_config.json").read_text())
            config |= {"rank_pattern": {"self.query": 2}, "alpha_pattern": {"layer.0.attention.self.query": 16}}
            (at / "adapter/adapter_config.json").write_text(json.dumps(config))
    (folder / "sharded").mkdir()
    (folder / "sharded/config.json").write_bytes((folder / "bert/config.json").read_bytes())
    names = list(tensors := read_safetensors(folder / "bert" / WEIGHTS))
    where = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for part in set(where.values()):
        write_safetensors(folder / "sharded" / part, {n: tensors[n] for n in names if where[n] == part})
    (folder / "sharded" / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    (folder / "types").mkdir()
    types = {name: torch.arange(6).to(dtype).view(2, 3) for name, dtype in DTYPES.items()}
    write_safetensors(folder / "types" / WEIGHTS, {**types, "empty": torch.zeros(2, 0), "scalar": torch.tensor(1.5)})
    for i, tokenizer in enumerate(tokenizers()):
        (folder / f"tokenizer{i}").mkdir()
        tokenizer.save(str(folder / f"tokenizer{i}/tokenizer.json"))


def tokenizers():
    """WordPiece as BERT's, byte-level BPE as RoBERTa's, Unigram as XLM-R's."""
    pieces = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "##b", "ab", "."])}
    bert = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    bert.normalizer, bert.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    bert.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    bert.enable_padding(length=16)
    bert.enable_truncation(16)
    roberta = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "Ġ": 4, "ab": 5}, [("a", "b")]))
    roberta.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    roberta.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    roberta.add_special_tokens(["<s>", "</s>"])
    xlm = Tokenizer(models.Unigram([("<s>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], 2))
    xlm.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(" {2,}", " ")])
    xlm.pre_tokenizer = pre_tokenizers.Metaspace()
    xlm.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", 0), ("</s>", 1)])
    return bert, roberta, xlm


# ---------------------------------------------------------------------------------------------------------------------
# Mutations

ABSURD = [
    "-1",
    "0",
    "1",
    "2.5",
    "1e400",
    "-1e400",
    "NaN",
    "1000000000000",
    "9" * 30,
    "9" * 400,
    "9" * 5000,
    "null",
    "true",
    '"x"',
    '""',
    '"' + "y" * 5000 + '"',
    r'"\ud800"',
    r'"\n\u0000"',
    '"../../x"',
    '"(a+)+b"',
    "[]",
    "{}",
    "[[[1]]]",
    "[-1,-1]",
    "[" * 400 + "]" * 400,
    "[" * 10**5,
    '{"a":' * 300 + "1" + "}" * 300,
]


def nodes(value, path=()):
    """The paths of all values inside, down to 20 levels."""
    if len(path) == 20:
        return [path]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [deeper for key, child in items for deeper in nodes(child, (*path, key))]


def mutate_json(text, rng):
    """Another value somewhere, a key twice, another name, one left out. Numbers json can't write go in as text."""
    value = json.loads(text)
    path = rng.choice(nodes(value)[1:] or [()])
    if not path:
        return rng.choice(ABSURD)
    parent, texts = value, {}
    for key in path[:-1]:
        parent = parent[key]
    how = rng.choice(["absurd"] * 4 + ["twice", "rename", "drop", "swap", "near"])
    old = parent[path[-1]]
    if how == "drop":
        del parent[path[-1]]
    elif how == "swap":
        other = value
        for key in rng.choice(nodes(value)):
            other = other[key]
        parent[path[-1]] = json.loads(json.dumps(other))
    elif how == "near" and type(old) in (int, float):
        parent[path[-1]] = old + rng.choice([-8, -1, 1, 8, 2**31, 2**63])
    elif how in ("twice", "rename") and isinstance(parent, dict):
        texts["@key@"] = json.dumps(path[-1]) if how == "twice" else rng.choice([x for x in ABSURD if x[0] == '"'])
        parent["@key@"] = old if how == "twice" else parent.pop(path[-1])
    else:
        texts["@value@"], parent[path[-1]] = rng.choice(ABSURD), "@value@"
    text = json.dumps(value)
    for mark, raw in texts.items():
        text = text.replace(f'"{mark}"', raw)
    return text


def mutate_bytes(data, rng):
    data, (i, j) = bytearray(data), sorted(rng.choices(range(len(data) + 1), k=2))
    how = rng.randrange(6)
    if how == 0:
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif how == 1:
        del data[i:]
    elif how == 2:
        data[i:i] = rng.randbytes(rng.randint(1, 40))
    elif how == 3:
        data[j:j] = data[i:j]
    elif how == 4:
        del data[i : min(j, i + rng.randint(1, 40))]
    else:
        size = rng.choice([0, 2, max(len(data) - 8, 0), len(data), 2**31, 2**40, 2**63, 2**64 - 1])
        data[:8] = size.to_bytes(8, "little")
    return bytes(data)


def mutate(data, is_json, rng):
    if rng.random() < 0.3:
        return mutate_bytes(data, rng)
    if is_json:
        return mutate_json(data, rng).encode()
    length = int.from_bytes(data[:8], "little")
    if rng.random() < 0.2:  # other numbers
        i = rng.randrange(8 + length, len(data))
        return data[:i] + rng.randbytes(1) + data[i + 1 :]
    if rng.random() < 0.3:  # bytes of the header alone, its length right again
        head = mutate_bytes(data[8 : 8 + length], rng)
    else:
        head = mutate_json(data[8 : 8 + length], rng).encode()
    return len(head).to_bytes(8, "little") + head + data[8 + length :]


# ---------------------------------------------------------------------------------------------------------------------
# Loads, each with a look at what came out


def weights(folder, _):
    encoder = load_encoder(folder)
    c = encoder.config
    ids = torch.arange(min(4, c.max_length))[None] % c.vocab_size
    assert encoder(ids).shape == (*ids.shape, c.hidden_size)
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in encoder.parameters())


def types(folder, _):
    tensors = read_safetensors(folder / WEIGHTS)
    data = (folder / WEIGHTS).read_bytes()
    assert sum(t.numel() * t.itemsize for t in tensors.values()) <= len(data)
    with contextlib.suppress(safetensors.SafetensorError):  # stricter about JSON than Python is
        theirs = safetensors.torch.load(data)
        raw = lambda t: t.reshape(-1).view(torch.uint8).tolist()  # noqa: E731
        assert tensors.keys() == theirs.keys()
        assert all(raw(t) == raw(theirs[n]) and t.shape == theirs[n].shape for n, t in tensors.items())


def adapter(folder, model):
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        layers = load_adapter(model, folder, "rte")
    except BadInput:
        assert {name: p.requires_grad for name, p in model.named_parameters()} == before  # untouched
        raise
    tensors = read_safetensors(folder / ADAPTER)
    for path, layer in layers.items():
        model.encoder.set_submodule(path, layer.base)
        stem = f"base_model.model.{model.encoder.config.prefix}{path}.lora_"
        for x, name in (layer.A, f"{stem}A.weight"), (layer.B, f"{stem}B.weight"):
            torch.testing.assert_close(x.data, tensors[name].float(), rtol=0, atol=0, equal_nan=True)
        assert math.isfinite(layer.scale) and 0 <= layer.dropout < 1 and layer.r == len(layer.A)
    model.requires_grad_(True)


def tokens(folder, _):
    tokenizer = load_tokenizer(folder)
    with contextlib.suppress(BadInput):  # a vocabulary without its [UNK], say: only the first text meets it
        encoded = encode(tokenizer, [("ab a.",), ("a", "b")], 12)
        assert len(encoded) == 2 and all(len(ids) == len(types) <= 12 for ids, types in encoded)


KINDS = {  # the seeds' folders, the file that changes, the load
    "weights": (["bert", "roberta", "distilbert"], WEIGHTS, weights),
    "config": (["bert", "roberta", "distilbert"], "config.json", weights),
    "index": (["sharded"], f"{WEIGHTS}.index.json", weights),
    "safetensors": (["types"], WEIGHTS, types),
    "adapter config": (["roberta/adapter"], "adapter_config.json", adapter),
    "adapter": (["roberta/adapter"], ADAPTER, adapter),
    "tokenizer": (["tokenizer0", "tokenizer1", "tokenizer2"], "tokenizer.json", tokens),
}


class Fuzz:
    """The seeds in a folder, and what happened so far: {kind: [tried, loaded, refused, worst seconds, worst bytes]}."""

    def __init__(self, folder, seed=0, limit=math.inf):
        self.folder, self.seed, self.model = Path(folder), seed, tiny("roberta")
        self.limit = limit  # seconds of processor time
        seeds(self.folder)
        self.table = {kind: [0, 0, 0, 0.0, 0] for kind in KINDS}
        self.whole = {}  # the valid content of every file that changes
        for folders, file, load in KINDS.values():
            for name in folders:
                self.whole[name, file] = (self.folder / name / file).read_bytes()
                load(self.folder / name, self.model)  # the seeds are valid; and what is imported late is imported now

    def case(self, number, keep=False):
        """Case `number` of this seed. Returns None, or what went wrong."""
        rng = random.Random(f"{self.seed} {number}")
        kind = list(KINDS)[number % len(KINDS)]
        folders, file, load = KINDS[kind]
        name = rng.choice(folders)
        data = self.whole[name, file]
        for _ in range(rng.choice([1, 1, 1, 2])):
            with contextlib.suppress(ValueError, RecursionError, TypeError, AttributeError, LookupError):  # no JSON now
                data = mutate(data, file.endswith(".json"), rng)
        path = self.folder / name / file
        path.write_bytes(data)
        size = sum(p.stat().st_size for p in path.parent.iterdir())
        try:
            return self.attempt(kind, load, path, size, traced=keep or rng.random() < 0.25)
        finally:
            if not keep:
                path.write_bytes(self.whole[name, file])

    def attempt(self, kind, load, path, size, traced):
        row, wrong = self.table[kind], None
        row[0] += 1
        if traced:
            tracemalloc.start()
        begin = time.process_time()
        try:
            load(path.parent, self.model)
            row[1] += 1
        except BadInput as e:
            row[2] += 1
            said = str(e)
            if not said.isprintable() or str(path.parent) not in said or len(said) > MESSAGE.get(kind, 1000):
                wrong = f"a bad message: {said[:2000]!r}"
        except KeyboardInterrupt:
            raise
        except BaseException:  # pyo3's PanicException is no Exception
            wrong = traceback.format_exc()
        seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        row[3], row[4] = max(row[3], seconds), max(row[4], peak)
        if wrong is None and seconds > self.limit:
            wrong = f"{seconds:.1f} seconds"
        if wrong is None and peak > 3 * size + CONSTANT:
            wrong = f"{peak} bytes allocated for files of {size}"
        return wrong and f"{kind}: {wrong}"

    def run(self, numbers, now=lambda number: None, report=0):
        """Those cases up to the first failure: (number, what went wrong), or None. now(number) is told each."""
        begin = time.time()
        for done, number in enumerate(numbers, 1):
            now(number)
            if wrong := self.case(number, keep=len(numbers) == 1):
                return number, wrong
            if report and done % report == 0:
                print(f"{number + 1}, {done / (time.time() - begin):.0f} a second", flush=True)
        return None


def listing(table):
    """A table {kind: [tried, loaded, refused, worst seconds, worst bytes]} as text."""
    lines = [f"{'kind':<15}{'tried':>8}{'loaded':>8}{'refused':>8}{'worst s':>9}{'worst MB':>9}"]
    for kind, (tried, loaded, refused, seconds, peak) in table.items():
        lines.append(f"{kind:<15}{tried:>8}{loaded:>8}{refused:>8}{seconds:>9.2f}{peak / 1e6:>9.2f}")
    return "\n".join(lines)


def child(args, numbers, folder, current, report):
    """Some of the cases, in a process that may die of them; its table goes to `report`. Returns the exit status."""
    torch.set_num_threads(1)
    if args.only is None:  # where `tokenizers` panics, it says so there too
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    fuzz = Fuzz(folder, args.seed, SECONDS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else None
    if pages:
        resource.setrlimit(resource.RLIMIT_AS, (pages * mmap.PAGESIZE + GROWTH,) * 2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def now(number):
        current[:8] = number.to_bytes(8, "little")
        signal.setitimer(signal.ITIMER_VIRTUAL, 4 * SECONDS)  # processor time; then SIGVTALRM ends the process

    failed = fuzz.run(numbers, now, report=5000)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    report.write_text(json.dumps({"table": fuzz.table, "grown": grown}))
    if failed:
        print(f"\ncase {failed[0]} of seed {args.seed} failed (--seed {args.seed} --only {failed[0]})\n{failed[1]}")
    return 1 if failed else 0


def forked(args, numbers, folder):
    """`child` in a process of its own: (exit status, what it reports or None)."""
    current, report = mmap.mmap(-1, 8), folder / "report.json"
    report.unlink(missing_ok=True)
    shutil.rmtree(folder / "files", ignore_errors=True)
    if not (pid := os.fork()):
        status = 1
        try:
            status = child(args, numbers, folder / "files", current, report)
        except BaseException:
            traceback.print_exc(file=sys.stdout)
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if status < 0:
        number = int.from_bytes(current[:8], "little")
        print(f"case {number} of seed {args.seed} ended the process: {signal.Signals(-status).name}")
    return status, json.loads(report.read_text()) if report.exists() else None


def main():
    parser = argparse.ArgumentParser(description="Mutated files: a clean BadInput or a correct load, every time.")
    parser.add_argument("--count", type=int, default=100_000, help="number of the last case, plus one [%(default)s]")
    parser.add_argument("--first", type=int, default=0, help="the first case; those before are left out [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="of the damage [%(default)s]")
    parser.add_argument("--only", type=int, help="one case; its files are kept")
    args = parser.parse_args()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # each file is written twice
    folder, begin = Path(tempfile.mkdtemp(prefix="fuzz", dir=memory)), time.time()
    numbers = range(args.first, args.count) if args.only is None else [args.only]
    table, grown, status = {kind: [0, 0, 0, 0.0, 0] for kind in KINDS}, 0, 0
    for i in range(0, len(numbers), PART):  # a process grows, and GROWTH is meant for one file
        status, said = forked(args, numbers[i : i + PART], folder)
        for kind, row in (said["table"] if said else {}).items():
            table[kind] = [a + b for a, b in zip(table[kind][:3], row[:3], strict=True)] + [
                max(a, b) for a, b in zip(table[kind][3:], row[3:], strict=True)
            ]
        grown = max(grown, said["grown"] if said else 0)
        if status:
            break
    print(f"\n{listing(table)}\na process of {PART:,} cases grew by {grown:.0f} MiB at most")
    print(f"{time.time() - begin:.0f} s in all")
    if args.only is None:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"the files are in {folder}/files")
    sys.exit(1 if status else 0)


if __name__ == "__main__":
    main()
