"""GLUE: nine tasks and the diagnostic set, as data, batches, scores and leaderboard files. It runs no model.

accuracy, f1, matthews, pearson, spearman      (predictions, labels) -> float
TASKS, score                                   a row for each task; its official metrics and their mean
load_task                                      the Hub's nyu-mll/glue, or a folder laid out like it -> Examples
load_tokenizer, encode, encode_for             texts -> token ids
load_data                                      a task, tokenized and ready to train on -> TaskData
rows_of_steps, batches_of_steps                which rows make a step; every task's, as tensors -> Batch
evaluation_batches, inputs                     which rows are scored together; token ids -> padded tensors
write_submission                               predictions -> the leaderboard's files
"""

import math
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from support.checkpoint import BadInput, as_bad_input, shown, write_text
from support.hub import read_splits

# ---------------------------------------------------------------------------------------------------------------------
# Metrics. Each takes predictions (n,) and labels (n,) and computes in float64. Where a denominator is zero (one class,
# a constant, a single example) the value is 0, so that a model that has learned nothing yet scores nothing.


def as_pair(predictions, labels):
    """Both as arrays (n,). Raises ValueError: not of one length, not flat (NumPy would broadcast), or empty."""
    predictions, labels = np.asarray(predictions), np.asarray(labels)
    if predictions.ndim != 1 or predictions.shape != labels.shape:
        raise ValueError(f"predictions {predictions.shape} and labels {labels.shape} must both be (n,)")
    if not len(labels):
        raise ValueError("there are no examples to score")
    return predictions, labels


def accuracy(predictions, labels):
    """The fraction of predictions that are right."""
    predictions, labels = as_pair(predictions, labels)
    return float((predictions == labels).mean())


def f1(predictions, labels):
    """F1 of class 1: 2 tp / (2 tp + fp + fn) = 2 tp / (predicted 1s + labelled 1s)."""
    predictions, labels = as_pair(predictions, labels)
    found = int(((predictions == 1) & (labels == 1)).sum())
    total = int((predictions == 1).sum() + (labels == 1).sum())
    return 2 * found / total if total else 0.0


def matthews(predictions, labels):
    """Matthews' correlation of K ≥ 1 classes: (c n − Σ p_k t_k) / √((n² − Σ p_k²) (n² − Σ t_k²)).

    c predictions of n are right; p_k of them say class k; t_k labels are class k.
    """
    predictions, labels = as_pair(predictions, labels)
    n, right = len(labels), int((predictions == labels).sum())
    classes, ids = np.unique(np.concatenate([predictions, labels]), return_inverse=True)
    p, t = (np.bincount(half, minlength=len(classes)) for half in ids.reshape(2, n))  # (K,) each
    spread = int(n * n - p @ p) * int(n * n - t @ t)  # Python's integers: the product outgrows int64
    return (right * n - int(p @ t)) / math.sqrt(spread) if spread else 0.0


def direction(values):
    """(n,) -> values - mean, scaled to length 1; zeros where all values are equal."""
    values = np.asarray(values, dtype=np.float64)
    values = values - values.mean() if np.ptp(values) else np.zeros(len(values))  # else rounding makes a constant vary
    return values / (np.linalg.norm(values) or 1.0)


def pearson(predictions, labels):
    """Pearson's correlation: the cosine of the two, each less its mean."""
    predictions, labels = as_pair(predictions, labels)
    return float(np.clip(direction(predictions) @ direction(labels), -1.0, 1.0))


def ranks(values):
    """(n,) -> ranks from 1 to n; equal values share the mean of theirs."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[group]


def spearman(predictions, labels):
    """Spearman's correlation: Pearson's, of the ranks."""
    predictions, labels = as_pair(predictions, labels)
    return pearson(ranks(predictions), ranks(labels))


METRICS = {metric.__name__: metric for metric in (accuracy, f1, matthews, pearson, spearman)}

# ---------------------------------------------------------------------------------------------------------------------
# The tasks


@dataclass(frozen=True)
class Task:
    name: str
    columns: tuple[str, ...]  # one text or two, by the Hub's column names
    labels: tuple[str, ...]  # names in the order of the Hub's ids; () is a regression, of scores from 0 to 5
    metrics: tuple[str, ...]
    writes: str  # what the leaderboard takes: "ids", "names" or "scores"
    test: dict[str, str]  # test split: its leaderboard file
    validation: tuple[str, ...] = ("validation",)

    @property
    def outputs(self):
        """The width of a head: one per class, or one for a regression."""
        return len(self.labels) or 1


ENTAILMENT = ("entailment", "not_entailment")
NLI = ("entailment", "neutral", "contradiction")
MATCHED = ("validation_matched", "validation_mismatched")
MNLI = {"test_matched": "MNLI-m.tsv", "test_mismatched": "MNLI-mm.tsv"}
MCC, ACC, F1, CORR = ("matthews",), ("accuracy",), ("f1", "accuracy"), ("pearson", "spearman")

# fmt: off
TASKS = {task.name: task for task in (
    Task("cola", ("sentence",),               ("unacceptable", "acceptable"),   MCC,  "ids",    {"test": "CoLA.tsv"}),
    Task("sst2", ("sentence",),               ("negative", "positive"),         ACC,  "ids",    {"test": "SST-2.tsv"}),
    Task("mrpc", ("sentence1", "sentence2"),  ("not_equivalent", "equivalent"), F1,   "ids",    {"test": "MRPC.tsv"}),
    Task("stsb", ("sentence1", "sentence2"),  (),                               CORR, "scores", {"test": "STS-B.tsv"}),
    Task("qqp",  ("question1", "question2"),  ("not_duplicate", "duplicate"),   F1,   "ids",    {"test": "QQP.tsv"}),
    Task("mnli", ("premise", "hypothesis"),   NLI,                              ACC,  "names",  MNLI, MATCHED),
    Task("qnli", ("question", "sentence"),    ENTAILMENT,                       ACC,  "names",  {"test": "QNLI.tsv"}),
    Task("rte",  ("sentence1", "sentence2"),  ENTAILMENT,                       ACC,  "names",  {"test": "RTE.tsv"}),
    Task("wnli", ("sentence1", "sentence2"),  ENTAILMENT[::-1],                 ACC,  "ids",    {"test": "WNLI.tsv"}),
    Task("ax",   ("premise", "hypothesis"),   NLI,                              MCC,  "names",  {"test": "AX.tsv"}, ()),
)}
TRAINED = [name for name, task in TASKS.items() if task.validation]
# fmt: on


def get_task(name):
    """The row of TASKS. Raises BadInput: no such task."""
    if name not in TASKS:
        raise BadInput(f"there is no task {name!r}; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def label_names(task):
    """What a label may be, in words."""
    return ", ".join(f"{i} {label}" for i, label in enumerate(task.labels)) or "scores from 0 to 5"


def as_labels(task, values, what):
    """`values` (n,) as the task's class ids (int64) or scores (float64); `what` is "prediction" or "label".

    Raises BadInput with the first that is none: not finite, no id of the task, a hidden label; ValueError if not flat.
    """
    values = np.asarray(values)
    if values.ndim != 1:
        raise ValueError(f"{task.name}: {what}s must be (n,), not {values.shape}")
    if values.dtype.kind not in ("iu" if task.labels else "iuf"):
        raise BadInput(f"{task.name}: {what}s are {values.dtype}, not {'class ids' if task.labels else 'numbers'}")
    low, high = (0, task.outputs - 1) if task.labels else (0, 5) if what == "label" else (-math.inf, math.inf)
    wrong = np.flatnonzero(~(np.isfinite(values) & (values >= low) & (values <= high)))
    if len(wrong):
        must = f"allowed: {label_names(task)}" if math.isfinite(high) else "it must be finite (has training diverged?)"
        raise BadInput(f"{task.name}: {what} {wrong[0]} is {values[wrong[0]]}; {must}")
    return values.astype(np.int64 if task.labels else np.float64)


def score(task, predictions, labels):
    """The task's official metrics, each in [−1, 1], and "score", their mean × 100.

    `task` is a name; predictions (n,) are class ids, for a regression floats. Raises BadInput: a prediction that is not
    finite or no class of the task, a hidden label.
    """
    task = get_task(task)
    predictions, labels = as_labels(task, predictions, "prediction"), as_labels(task, labels, "label")
    values = {name: METRICS[name](predictions, labels) for name in task.metrics}
    return values | {"score": 100 * sum(values.values()) / len(values)}


# ---------------------------------------------------------------------------------------------------------------------
# Tokens


def load_tokenizer(folder):
    """The tokenizer in folder/tokenizer.json. Raises BadInput: no such file, or a damaged one."""
    path = Path(os.path.expanduser(folder)) / "tokenizer.json"
    if not path.is_file():
        raise BadInput(f"{folder} has no tokenizer.json")
    with as_bad_input(f"{path} can't be read as a tokenizer"):
        return Tokenizer.from_file(str(path))


def encode(tokenizer, texts, max_length):
    """[(text,) or (text, text)] -> [(ids, type ids)], special tokens in, the longer text of a pair cut first.

    Raises BadInput where max_length leaves no room beside the special tokens. Leaves the tokenizer without padding and
    truncation.
    """
    special = max((tokenizer.num_special_tokens_to_add(len(text) == 2) for text in texts), default=0)
    if max_length <= special:
        raise BadInput(f"max length {max_length} has no room for text: {special} special tokens are added to it")
    tokenizer.no_padding()  # some published files pad all to 128, and cut there
    tokenizer.enable_truncation(max_length, strategy="longest_first")
    try:
        with as_bad_input("the tokenizer can't be used, tokenizer.json may be damaged"):
            encodings = tokenizer.encode_batch([text if len(text) == 2 else text[0] for text in texts])
    finally:
        tokenizer.no_truncation()
    return [(encoding.ids, encoding.type_ids) for encoding in encodings]


def encode_for(config, tokenizer, texts, max_length):
    """`encode`, for a model of that config. Raises BadInput where the model has no embedding for what comes out."""
    encoded = encode(tokenizer, texts, max_length)
    for row, (ids, types) in enumerate(encoded):
        known = max(ids, default=0) < config.vocab_size and max(types, default=0) < max(2, config.type_vocab_size)
        if not (0 < len(ids) <= max_length and known):
            made = f"of {shown(texts[row])} it makes {shown(ids)} of types {shown(types)}"
            raise BadInput(f"tokenizer.json does not fit the model, which knows {config.vocab_size} ids: {made}")
    return encoded


# ---------------------------------------------------------------------------------------------------------------------
# Data


@dataclass
class Examples:
    """One split of a task, as it is published."""

    task: str
    split: str
    texts: list[tuple[str, ...]] = field(repr=False)
    labels: np.ndarray = field(repr=False)  # (n,) int64 ids in the order of TASKS, float32 scores; −1 where hidden


def label_ids(task, values, names, where):
    """Labels as they stand in a dataset -> (n,) ids in the order of TASKS, int64, or scores, float32.

    `names` are the dataset's own label names in its id order: ids then go by name, whatever the order. Where it has
    none, an int is an id of ours and a string a name. Raises BadInput with the first label that is neither, or is −1.
    """
    if task.labels:
        ours = {label: i for i, label in enumerate(task.labels)}
        known = {i: ours.get(n) for i, n in enumerate(names)} if names else ours | {i: i for i in ours.values()}
        ids = [known.get(value) if isinstance(value, int | float | str) else None for value in values]
    else:
        ids = [v if isinstance(v, int | float) and 0 <= v <= 5 else None for v in values]
    if None in ids:
        row = ids.index(None)
        value = values[row]
        said = f"{value} {names[value]}" if names and value in range(len(names)) else repr(value)
        raise BadInput(f"{where}: row {row} has label {said}; allowed: {label_names(task)}")
    return np.array(ids, dtype=np.int64 if task.labels else np.float32)


def load_task(name, source="nyu-mll/glue", split="train"):
    """One split of a task, as Examples; `source` is a Hub id or a local folder.

    "validation" and "test" mean the first of MNLI's two. The labels of a test split are always hidden: MRPC's are
    public, and must never be selected on. Raises BadInput: no such folder, task, split or column, an empty split, a
    missing text, a label that the task doesn't have; HubError, a BadInput: the Hub can't be reached, or refuses.
    """
    task = get_task(name)
    named = {"validation": task.validation, "test": tuple(task.test)}
    split = (*named.get(split, ()), split)[0]
    splits = read_splits(name, source, (split,))
    if split not in splits:
        raise BadInput(f"{name} in {source} has no split {split!r}; it has {', '.join(splits)}")
    rows, hidden, where = splits[split], "test" in split, f"{name} {split} in {source}"
    for column in (*task.columns, *(() if hidden else ("label",))):
        if column not in rows.column_names:
            raise BadInput(f"{where} has no column {column!r}; it has {', '.join(rows.column_names)}")

    texts = list(zip(*(rows[column][:] for column in task.columns), strict=True))
    for row, columns in enumerate(texts):
        for column, text in zip(task.columns, columns, strict=True):
            if not isinstance(text, str):
                raise BadInput(f"{where}: row {row} has {text!r} in column {column!r} in place of text")
    if hidden:
        labels = np.full(len(rows), -1, dtype=np.int64 if task.labels else np.float32)
    else:
        labels = label_ids(task, rows["label"][:], getattr(rows.features["label"], "names", None), where)
    return Examples(name, split, texts, labels)


@dataclass(eq=False)
class TaskData:
    """One task, tokenized. Encoded: a list of (ids, type ids); labels: (n,)."""

    name: str
    train: list
    train_labels: np.ndarray
    validation: list  # what is scored: the validation split, or training rows held out
    validation_labels: np.ndarray
    weight: float = 1.0  # multiplies the loss

    @property
    def lengths(self):
        """Tokens of each training row: (n,)."""
        return np.array([len(ids) for ids, _ in self.train])

    @property
    def regression(self):
        return TASKS[self.name].outputs == 1

    def majority(self):
        """The most frequent training label, or the mean one: what there is to say without reading the sentence."""
        return float(self.train_labels.mean()) if self.regression else int(np.bincount(self.train_labels).argmax())

    def label_variance(self):
        """Divides the squared error: to guess the mean costs 1, near the ln 2 and ln 3 of blind guesses at classes."""
        return float(self.train_labels.var()) if np.ptp(self.train_labels) else 1.0


def load_data(name, source, tokenizer, config, max_length, holdout=0, weight=1.0):
    """One task's training rows, and the rows to score on: the validation split, or `holdout` training rows held out.

    config: the model's, for what its embeddings hold. Raises BadInput.
    """
    train = load_task(name, source, "train")
    encoded = encode_for(config, tokenizer, train.texts, max_length)
    if not holdout:
        validation = load_task(name, source, "validation")
        scored = encode_for(config, tokenizer, validation.texts, max_length)
        return TaskData(name, encoded, train.labels, scored, validation.labels, weight)
    if holdout >= len(encoded):
        raise BadInput(f"--holdout {holdout}: {name} has only {len(encoded)} training rows")
    rows = np.random.default_rng(zlib.crc32(name.encode())).permutation(len(encoded))
    held, kept = (([encoded[i] for i in part], train.labels[part]) for part in np.split(rows, [holdout]))
    return TaskData(name, *kept, *held, weight)


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def rows_of_steps(lengths, batch_size, seed, task, window=32, start=0):
    """Index arrays (batch_size,), one for each training step without end, the first for step `start`.

    Pass after pass over all n examples, each pass a new permutation: every `window` batches' worth of it is sorted by
    length and cut into batches, which come in random order. So a batch has alike lengths and needs little padding, and
    yet each pass has each example once; window=1 is plain shuffling. A batch may span two passes.

    The batches are a function of the arguments alone, so that every method sees the same ones, and a resumed run goes
    on from `start` without a sampler's state. lengths: (n,) tokens of each example.
    """
    lengths, n = np.asarray(lengths), len(lengths)

    def one_pass(epoch):  # (n,)
        generator = np.random.default_rng((seed, zlib.crc32(task.encode()), epoch))
        shuffled = generator.permutation(n)
        head = -epoch * n % batch_size  # rows that complete the batch which the epoch * n rows before left begun
        parts = [shuffled[:head]]
        for first in range(head, n, window * batch_size):
            part = shuffled[first : first + window * batch_size]
            part = part[lengths[part].argsort(kind="stable")]
            count = len(part) // batch_size
            whole = part[: count * batch_size].reshape(count, batch_size)
            parts += [whole[generator.permutation(count)].ravel(), part[count * batch_size :]]
        return np.concatenate(parts)

    epoch, skipped = divmod(start * batch_size, n)
    rest = one_pass(epoch)[skipped:]
    while True:
        while len(rest) < batch_size:
            epoch += 1
            rest = np.concatenate([rest, one_pass(epoch)])
        yield rest[:batch_size]
        rest = rest[batch_size:]


def evaluation_batches(encoded, batch_size):
    """Index arrays that cover `encoded` once: alike lengths together, to pad little; the longest first, so that what
    doesn't fit in memory shows at once."""
    order = np.argsort([-len(ids) for ids, _ in encoded], kind="stable")
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def to_device(array, device):
    """A tensor of it on the device; to a GPU from pinned memory, so that the copy waits for nothing."""
    x = torch.from_numpy(array)
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=device.type == "cuda")


def inputs(encoded, pad_id, device):
    """Encoded examples, b of them, right-padded to the longest (l), on the device.

    Returns ids (b, l) int64, mask (b, l) bool or None where nothing is padded, types (b, l) int64.
    """
    lengths = np.array([len(ids) for ids, _ in encoded])  # (b,)
    mask = np.arange(lengths.max()) < lengths[:, None]  # (b, l)
    ids, types = np.full(mask.shape, pad_id, dtype=np.int64), np.zeros(mask.shape, dtype=np.int64)  # (b, l)
    ids[mask] = [i for row, _ in encoded for i in row]  # row after row, as the mask runs
    types[mask] = [i for _, row in encoded for i in row]
    return to_device(ids, device), None if mask.all() else to_device(mask, device), to_device(types, device)


@dataclass
class Batch:
    """Sequences of one task, or of several stacked task by task, on the model's device."""

    tasks: list  # TaskData of each
    sizes: list  # how many sequences of each
    ids: torch.Tensor  # (sum of sizes, length)
    mask: torch.Tensor | None  # the same, true where there is a token; None where there is no padding
    types: torch.Tensor  # the same
    labels: list  # (size,) of each


def make_batch(tasks, rows, pad_id, device):
    """The Batch of rows[t], (size,) indices into tasks[t]'s training rows."""
    encoded = [data.train[i] for data, own in zip(tasks, rows, strict=True) for i in own]
    labels = [to_device(data.train_labels[own], device) for data, own in zip(tasks, rows, strict=True)]
    return Batch(tasks, [len(own) for own in rows], *inputs(encoded, pad_id, device), labels)


def batches_of_steps(tasks, seed, s, pad_id, device, start=0, rank=0, world=1):
    """Yields the batches of each step, one per task or, stacked, one for all: the same examples for every method.

    s has batch_size, window and per_task. Of `world` processes each takes an equal share of every task's batch, every
    world-th row, so that their lengths are alike. Raises ValueError where world does not divide batch_size.
    """
    if s.batch_size % world:
        raise ValueError(f"batch_size {s.batch_size} can't be shared out equally over {world} processes")
    streams = [rows_of_steps(data.lengths, s.batch_size, seed, data.name, s.window, start) for data in tasks]
    for drawn in zip(*streams, strict=True):
        rows = [own[rank::world] for own in drawn]  # (batch_size / world,) of each task
        if s.per_task == "stacked":
            yield [make_batch(tasks, rows, pad_id, device)]
        else:
            yield [make_batch([data], [own], pad_id, device) for data, own in zip(tasks, rows, strict=True)]


# ---------------------------------------------------------------------------------------------------------------------
# Leaderboard files


def write_submission(folder, task, predictions, split=None):
    """Write predictions (n,) for a test split, in its order, under the leaderboard's file name; returns the path.

    `task` is a name, `split` one of its test splits, the first if None. Class ids come out as the leaderboard wants
    them, names or ids; scores are clipped to [0, 5] and have 3 decimals. Raises BadInput: not a test split, a bad
    prediction, a folder that can't be written.
    """
    task = get_task(task)
    split = next(iter(task.test)) if split is None else split
    if split not in task.test:
        raise BadInput(f"{task.name} has no leaderboard file for {split!r}; it has them for {', '.join(task.test)}")
    predictions = as_labels(task, predictions, "prediction")
    texts = {"ids": str, "names": lambda i: task.labels[i], "scores": lambda x: f"{min(max(0.0, x), 5.0):.3f}"}
    lines = ["index\tprediction", *(f"{i}\t{texts[task.writes](x)}" for i, x in enumerate(predictions))]
    path = Path(folder) / task.test[split]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, "\n".join(lines) + "\n")
    except OSError as e:
        raise BadInput(f"{path} can't be written: {e.strerror or e}") from None
    return path
