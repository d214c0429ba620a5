"""glue.py against scikit-learn, scipy and transformers, and against the ways data can be wrong.

All data is made here: small parquet folders in the Hub's layout, and two tokenizers trained on a few sentences.
"""

import itertools
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import one_line
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

import glue
from glue import TASKS, accuracy, f1, matthews, pearson, score, spearman
from support.checkpoint import BadInput
from support.hub import HubError

ROOT = Path(glue.__file__).parent


@pytest.fixture(autouse=True)
def no_warnings_of_ours():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module="glue")
        yield


# ---------------------------------------------------------------------------------------------------------------------
# Metrics


def ours(metric, predictions, labels):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        value = metric(predictions, labels)
    assert isinstance(value, float) and -1 <= value <= 1
    return value


def reference(function, *args, **kwargs):
    """The reference's value, or 0 where it has none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = float(function(*args, **kwargs))
    return value if np.isfinite(value) else 0.0


def class_cases(rng, count):
    """Predictions and labels of 1 to 80 examples and 1 to 4 classes: random, all right, all wrong, constant."""
    for case in range(count):
        n, classes = int(rng.integers(1, 80)) if case % 5 else 1, int(rng.integers(1, 5))
        labels = rng.integers(0, classes, n)
        yield [rng.integers(0, classes, n), labels, 1 - labels % 2, np.full(n, case % 3)][case // 5 % 4], labels


def test_accuracy_and_matthews_are_scikit_learns():
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    for predictions, labels in class_cases(np.random.default_rng(0), 1000):
        assert ours(accuracy, predictions, labels) == pytest.approx(accuracy_score(labels, predictions), abs=1e-9)
        expected = reference(matthews_corrcoef, labels, predictions)
        assert ours(matthews, predictions, labels) == pytest.approx(expected, abs=1e-9)


def test_f1_is_scikit_learns():
    from sklearn.metrics import f1_score

    for predictions, labels in class_cases(np.random.default_rng(1), 1000):
        predictions, labels = predictions % 2, labels % 2
        expected = reference(f1_score, labels, predictions, zero_division=0)
        assert ours(f1, predictions, labels) == pytest.approx(expected, abs=1e-9)


def float_cases(rng, count):
    """Pairs of 2 to 80 floats: correlated, tied, opposite, a constant on either side, far from 0, scores, mixed."""
    for case in range(count):
        n = int(rng.integers(2, 80)) if case % 7 else 2
        x, noise = rng.normal(size=n), rng.normal(size=n)
        y = x + noise
        ties = rng.integers(0, 4, n).astype(float)
        yield [
            (x, y),
            (ties, np.round(y)),
            (x, -x),
            (np.full(n, 0.1 + 0.2), y),  # a mean of these rounds away from them
            (x, np.full(n, 1e6 / 3)),
            (x + 1e6, ties - 1e6),
            (np.clip(x + 2.5, 0, 5), np.clip(np.round(5 * y) / 5 + 2.5, 0, 5)),
            (x * np.float32(1e30), y * 1e-30),
            (ties, ties * 3),
            (np.where(ties > 0, 0.0, x), y),
        ][case % 10]


def test_pearson_and_spearman_are_scipys():
    from scipy.stats import pearsonr, spearmanr

    for x, y in float_cases(np.random.default_rng(2), 2000):
        assert ours(pearson, x, y) == pytest.approx(reference(lambda *a: pearsonr(*a)[0], x, y), abs=1e-9)
        assert ours(spearman, x, y) == pytest.approx(reference(lambda *a: spearmanr(*a)[0], x, y), abs=1e-9)


def test_ranks_are_scipys():
    from scipy.stats import rankdata

    rng = np.random.default_rng(3)
    for n in range(1, 200):
        values = rng.integers(0, 1 + n // 3, n) / 7
        assert np.array_equal(glue.ranks(values), rankdata(values))


def test_a_metric_of_one_example_is_finite():
    assert [ours(m, [1], [1]) for m in (accuracy, f1, matthews, pearson, spearman)] == [1, 1, 0, 0, 0]
    assert [ours(m, [0], [1]) for m in (accuracy, f1, matthews, pearson, spearman)] == [0, 0, 0, 0, 0]


def test_a_constant_correlates_with_nothing():
    """Its mean may round away from it, and two such roundings are of one direction."""
    rng = np.random.default_rng(4)
    for n in range(2, 200):
        a, b = (np.full(n, x) for x in rng.random(2) * 5)
        assert ours(pearson, a, b) == ours(spearman, a, b) == ours(pearson, a, rng.random(n)) == 0


def test_counts_of_a_large_task_do_not_overflow():
    labels = np.arange(400_000) % 2
    assert ours(matthews, labels, labels) == 1
    assert ours(matthews, 1 - labels, labels) == -1


@pytest.mark.parametrize("metric", glue.METRICS.values(), ids=glue.METRICS)
def test_a_metric_refuses_what_it_cannot_pair(metric):
    with pytest.raises(ValueError, match="no examples"):
        metric([], [])
    with pytest.raises(ValueError, match=r"\(n,\)"):
        metric(np.zeros(3), np.zeros(4))
    with pytest.raises(ValueError, match=r"\(n,\)"):  # would broadcast to (3, 3)
        metric(np.zeros((3, 1)), np.zeros(3))


def test_score_is_the_mean_of_the_official_metrics_in_percent():
    predictions, labels = np.array([1, 1, 0, 1]), np.array([1, 0, 0, 1])
    assert score("mrpc", predictions, labels) == {"f1": 0.8, "accuracy": 0.75, "score": pytest.approx(77.5)}
    assert score("cola", predictions, labels) == {"matthews": pytest.approx(3**-0.5), "score": pytest.approx(57.735027)}
    floats = np.array([0.5, 2.0, 4.5, 7.0], dtype=np.float32)  # a prediction may leave [0, 5]
    assert score("stsb", floats, np.array([0, 1, 2, 3.0]))["spearman"] == 1
    assert score("ax", [2, 0, 1], [2, 0, 1]) == {"matthews": 1, "score": 100}


@pytest.mark.parametrize(
    ("task", "predictions", "labels", "says"),
    [
        ("stsb", [1.0, np.nan], [1.0, 2.0], "stsb: prediction 1 is nan; it must be finite"),
        ("stsb", [1.0, -np.inf], [1.0, 2.0], "stsb: prediction 1 is -inf; it must be finite"),
        ("stsb", [1.0, 2.0], [1.0, -1.0], "stsb: label 1 is -1.0; allowed: scores from 0 to 5"),
        ("rte", [0, 2], [0, 1], "rte: prediction 1 is 2; allowed: 0 entailment, 1 not_entailment"),
        ("rte", [0, 1], [-1, -1], "rte: label 0 is -1; allowed: 0 entailment, 1 not_entailment"),
        ("rte", [0.2, 0.7], [0, 1], "rte: predictions are float64, not class ids"),
        ("sst3", [0], [0], "there is no task 'sst3'; the tasks are cola, sst2, mrpc"),
    ],
)
def test_score_refuses(task, predictions, labels, says):
    with pytest.raises(BadInput) as error:
        score(task, np.array(predictions), np.array(labels))
    assert one_line(error).startswith(says)


# ---------------------------------------------------------------------------------------------------------------------
# The table


def test_the_table_is_glue():
    assert list(TASKS) == ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli", "ax"]
    assert {name: task.outputs for name, task in TASKS.items() if task.outputs != 2} == {"stsb": 1, "mnli": 3, "ax": 3}
    assert all(metric in glue.METRICS for task in TASKS.values() for metric in task.metrics)
    files = [file for task in TASKS.values() for file in task.test.values()]
    stems = ["AX", "CoLA", "MNLI-m", "MNLI-mm", "MRPC", "QNLI", "QQP", "RTE", "SST-2", "STS-B", "WNLI"]
    assert sorted(files) == [f"{stem}.tsv" for stem in stems]
    assert [task.name for task in TASKS.values() if task.writes == "names"] == ["mnli", "qnli", "rte", "ax"]
    assert all((task.writes == "scores") == (not task.labels) for task in TASKS.values())


def test_rte_and_wnli_count_their_labels_from_opposite_ends():
    assert TASKS["rte"].labels == TASKS["qnli"].labels == ("entailment", "not_entailment")
    assert TASKS["wnli"].labels == ("not_entailment", "entailment")


# ---------------------------------------------------------------------------------------------------------------------
# Data


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """Keep what `datasets` converts out of the user's own cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets-cache")


def write(folder, task, split, rows, names=None, readme=False, suffix="parquet"):
    """One split of a GLUE folder: `rows` maps columns to values, `names` makes the labels a ClassLabel."""
    import datasets

    data = datasets.Dataset.from_dict(rows)
    if names:
        data = data.cast_column("label", datasets.ClassLabel(names=list(names)))
    path = folder / task / (f"{split}-00000-of-00001.parquet" if suffix == "parquet" else f"{split}.{suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    {"parquet": data.to_parquet, "csv": data.to_csv, "jsonl": data.to_json}[suffix](path)
    if readme:
        splits = [file.name.split("-")[0] for file in sorted((folder / task).iterdir())]
        files = "".join(f"\n  - {{split: {name}, path: {task}/{name}-*}}" for name in splits)
        (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: {task}\n  data_files:{files}\n---\n")
    return folder


def rows_of(task, labels, **changes):
    """Rows that fit a task's columns, with these labels."""
    texts = {c: [f"{c} number {i}" for i in range(len(labels))] for c in TASKS[task].columns}
    return {**texts, "label": labels, "idx": list(range(len(labels))), **changes}


@pytest.mark.parametrize("readme", [True, False], ids=["readme", "bare"])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_loads_from_a_folder(tmp_path, task, readme, capfd):
    row = TASKS[task]
    labels = list(range(len(row.labels))) if row.labels else [0.0, 2.5, 5.0]
    for split in ("train", *row.validation, *row.test):
        write(tmp_path, task, split, rows_of(task, labels), row.labels, readme)
    before = sorted(tmp_path.rglob("*"))
    capfd.readouterr()
    for split in ("train", *row.validation):
        examples = glue.load_task(task, str(tmp_path), split)
        assert (examples.task, examples.split, len(examples.texts)) == (task, split, len(labels))
        assert examples.texts[1] == tuple(f"{column} number 1" for column in row.columns)
        assert examples.labels.tolist() == labels
        assert examples.labels.dtype == (np.int64 if row.labels else np.float32)
    assert capfd.readouterr() == ("", "")  # no progress bars, no warnings
    assert sorted(tmp_path.rglob("*")) == before  # nothing left behind in the source


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_a_bare_folder_may_hold_csv_or_json(tmp_path, suffix):
    write(tmp_path, "sst2", "train", rows_of("sst2", [0, 1, 1]), suffix=suffix)
    examples = glue.load_task("sst2", tmp_path)
    assert examples.labels.tolist() == [0, 1, 1]
    assert examples.texts[2] == ("sentence number 2",)


def test_labels_go_by_name_whatever_the_datasets_order(tmp_path):
    """The same four words, in three orders: the ids that come out are the table's."""
    said = ["entailment", "not_entailment", "not_entailment", "entailment"]
    for number, order in enumerate([("entailment", "not_entailment"), ("not_entailment", "entailment")]):
        for task in ("rte", "wnli"):
            folder = tmp_path / str(number)
            write(folder, task, "train", rows_of(task, [order.index(word) for word in said]), order)
            labels = glue.load_task(task, folder).labels
            assert [TASKS[task].labels[i] for i in labels] == said
    order = ("contradiction", "unused", "entailment", "neutral")
    write(tmp_path, "mnli", "train", rows_of("mnli", [0, 2, 3]), order)
    assert glue.load_task("mnli", tmp_path).labels.tolist() == [2, 0, 1]


def test_labels_without_a_class_label_are_our_ids_and_strings_are_names(tmp_path):
    write(tmp_path, "wnli", "train", rows_of("wnli", [0, 1]))
    write(tmp_path, "rte", "train", rows_of("rte", ["not_entailment", "entailment"]))
    assert glue.load_task("wnli", tmp_path).labels.tolist() == [0, 1]
    assert glue.load_task("rte", tmp_path).labels.tolist() == [1, 0]


def test_labels_of_a_test_split_are_always_hidden(tmp_path):
    """MRPC's test labels are public. No one may select on them."""
    write(tmp_path, "mrpc", "test", rows_of("mrpc", [0, 1, 1]), TASKS["mrpc"].labels)
    write(tmp_path, "stsb", "test", rows_of("stsb", [0.0, 1.0]))
    write(tmp_path, "mnli", "test_mismatched", rows_of("mnli", [0, 1, 2]), TASKS["mnli"].labels)
    rows = rows_of("cola", [0, 0])
    del rows["label"]  # some copies have none
    write(tmp_path, "cola", "test", rows)
    for task, split, dtype in [
        ("mrpc", "test", np.int64),
        ("stsb", "test", np.float32),
        ("mnli", "test_mismatched", np.int64),
        ("cola", "test", np.int64),
    ]:
        labels = glue.load_task(task, tmp_path, split).labels
        assert set(labels.tolist()) == {-1} and labels.dtype == dtype
        with pytest.raises(BadInput, match="label 0 is -1"):
            score(task, np.zeros(len(labels), dtype=dtype), labels)
    for trick in ("all", "train+test", "test[:2]"):  # the loading library's own ways to say it
        with pytest.raises(BadInput, match="has no split"):
            glue.load_task("mrpc", tmp_path, trick)


def test_validation_and_test_mean_the_first_of_mnlis_two(tmp_path):
    for split in (*TASKS["mnli"].validation, *TASKS["mnli"].test):
        write(tmp_path, "mnli", split, rows_of("mnli", [0, 1]), TASKS["mnli"].labels)
    assert glue.load_task("mnli", tmp_path, "validation").split == "validation_matched"
    assert glue.load_task("mnli", tmp_path, "validation_mismatched").split == "validation_mismatched"
    assert glue.load_task("mnli", tmp_path, "test").split == "test_matched"


def test_every_split_has_its_own_names_of_labels(tmp_path):
    """Read together, all would get the first one's, and these labels would be swapped."""
    write(tmp_path, "cola", "train", rows_of("cola", [0, 1, 1]), ("unacceptable", "acceptable"))
    write(tmp_path, "cola", "validation", rows_of("cola", [1, 0, 0]), ("acceptable", "unacceptable"))
    labels = [glue.load_task("cola", tmp_path, split).labels.tolist() for split in ("train", "validation")]
    assert labels == [[0, 1, 1], [0, 1, 1]]


def test_a_file_is_told_by_what_is_in_it(tmp_path):
    """`datasets` takes one of the same path and time for the same: as out of an archive that sets all times alike."""
    for text in ("kind", "cruel", "a longer one"):
        write(tmp_path, "sst2", "train", {"sentence": [text], "label": [0]}, suffix="jsonl")
        os.utime(tmp_path / "sst2/train.jsonl", (10**9, 10**9))
        assert glue.load_task("sst2", tmp_path).texts == [(text,)]


@pytest.mark.parametrize("name", ["glue [v1]", "glue*", "gl?e"])
def test_a_folders_name_is_no_pattern(tmp_path, name):
    write(tmp_path / name, "sst2", "train", rows_of("sst2", [0, 1]))
    write(tmp_path / "glue-old", "sst2", "train", rows_of("sst2", [0, 1, 1]))
    write(tmp_path / "glue", "sst2", "train", rows_of("sst2", [0, 1, 1]))
    assert len(glue.load_task("sst2", tmp_path / name).texts) == 2


@pytest.mark.skipif(not os.geteuid(), reason="root reads everything")
def test_a_folder_beside_the_task_may_be_closed(tmp_path):
    write(tmp_path, "sst2", "train", rows_of("sst2", [0, 1]))
    (tmp_path / "lost+found").mkdir(mode=0)
    assert len(glue.load_task("sst2", tmp_path).texts) == 2
    with pytest.raises(BadInput, match="has no task 'rte'; it has sst2"):
        glue.load_task("rte", tmp_path)


def test_files_that_are_no_split_are_left_alone(tmp_path):
    """A backup, other rows, what is no table at all, a test split that can't be read beside the others."""
    folder = write(tmp_path, "rte", "train", rows_of("rte", [0, 1]), suffix="jsonl") / "rte"
    shutil.copy(folder / "train.jsonl", folder / "train.old.jsonl")
    shutil.copy(folder / "train.jsonl", folder / "train-dev.jsonl")
    shutil.copy(folder / "train.jsonl", folder / "train-00000-of-00001.old.jsonl")
    shutil.copy(folder / "train.jsonl", folder / "train (copy).jsonl")
    (folder / "._train.jsonl").write_bytes(b"\0\5\x16\7")
    (folder / "stats.json").write_text('{"rows": 2}')
    (folder / "test.csv").write_text("sentence1,sentence2\na,b\n")
    (folder / "validation.csv").write_text("nothing,of,it\n1")
    assert len(glue.load_task("rte", tmp_path).texts) == 2
    assert glue.load_task("rte", tmp_path, "test").texts == [("a", "b")]


@pytest.mark.parametrize(
    "names",
    [("train.json", "train.jsonl"), ("train.csv", "train-20240101.csv"), ("train-00000-of-00002.csv",)],
)
def test_files_that_are_no_whole_split_are_refused(tmp_path, names):
    """Two copies would be read as one split of twice the rows, and a shard alone as a whole one."""
    (tmp_path / "sst2").mkdir()
    for name in names:
        rows = "sentence,label\na,1\n" if name.endswith("csv") else '{"sentence": "a", "label": 1}\n'
        (tmp_path / "sst2" / name).write_text(rows)
    with pytest.raises(BadInput) as error:
        glue.load_task("sst2", tmp_path)
    said = f"train is {', '.join(sorted(names))}, not one file, or all of its -of-N"
    assert one_line(error) == f"task 'sst2' in {tmp_path} can't be read: {said}"
    (tmp_path / "sst2/test.csv").write_text("sentence\nb\n")
    assert glue.load_task("sst2", tmp_path, "test").texts == [("b",)]


def test_shards_are_one_split(tmp_path):
    (tmp_path / "sst2").mkdir()
    for i in range(2):
        (tmp_path / f"sst2/train-{i:05}-of-00002.csv").write_text(f"sentence,label\nrow {i},1\n")
    assert glue.load_task("sst2", tmp_path).texts == [("row 0",), ("row 1",)]


def test_a_csv_may_say_none(tmp_path):
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2/train.csv").write_text("sentence,label\nNone,1\nNA,0\nnull,1\n")
    assert glue.load_task("sst2", tmp_path).texts == [("None",), ("NA",), ("null",)]
    (tmp_path / "sst2/test.csv").write_text("sentence,label\nnan,\n")
    assert glue.load_task("sst2", tmp_path, "test").labels.tolist() == [-1]
    (tmp_path / "sst2/train.csv").write_text("sentence,label\n,1\n")
    with pytest.raises(BadInput, match="row 0 has None in column 'sentence' in place of text"):
        glue.load_task("sst2", tmp_path)
    (tmp_path / "sst2/validation.csv").write_text("sentence,label\na,1\nb,\n")
    with pytest.raises(BadInput, match="row 1 has label (None|nan); allowed"):
        glue.load_task("sst2", tmp_path, "validation")


@pytest.mark.parametrize(
    ("task", "rows", "names", "says"),
    [
        ("rte", rows_of("rte", [0, 7]), None, "row 1 has label 7; allowed: 0 entailment, 1 not_entailment"),
        ("rte", rows_of("rte", [0, -1]), TASKS["rte"].labels, "row 1 has label -1; allowed: 0 entailment"),
        ("rte", rows_of("rte", [0, 1]), ("entailment", "other"), "row 1 has label 1 other; allowed: 0 entailment"),
        ("rte", rows_of("rte", ["entailment", "maybe"]), None, "row 1 has label 'maybe'; allowed: 0 entailment"),
        ("rte", rows_of("rte", [1, None]), None, "row 1 has label None; allowed: 0 entailment"),
        ("rte", rows_of("rte", [0.5, 1.0]), None, "row 0 has label 0.5; allowed: 0 entailment"),
        ("stsb", rows_of("stsb", [5.0, 5.5]), None, "row 1 has label 5.5; allowed: scores from 0 to 5"),
        ("stsb", rows_of("stsb", [float("nan"), 5.0]), None, "row 0 has label nan; allowed: scores from 0 to 5"),
        ("stsb", rows_of("stsb", ["x", "y"]), None, "row 0 has label 'x'; allowed: scores from 0 to 5"),
        ("rte", rows_of("rte", [0], sentence2=[None]), None, "row 0 has None in column 'sentence2' in place of text"),
        ("rte", rows_of("rte", [0], sentence1=[3]), None, "row 0 has 3 in column 'sentence1' in place of text"),
        ("rte", rows_of("sst2", [0]), None, "has no column 'sentence1'; it has sentence, label, idx"),
        ("sst2", {"sentence": ["a"]}, None, "has no column 'label'; it has sentence"),
        ("sst2", {"sentence": [], "label": []}, None, "is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, task, rows, names, says):
    write(tmp_path, task, "train", rows, names)
    with pytest.raises(BadInput) as error:
        glue.load_task(task, tmp_path)
    message = one_line(error)
    assert message.startswith(f"{task} train in {tmp_path}") and says in message


def test_bad_folders_are_named(tmp_path, monkeypatch):
    def message(task, source, split="train"):
        with pytest.raises(BadInput) as error:
            glue.load_task(task, source, split)
        assert not isinstance(error.value, HubError)  # a folder is never asked of the Hub
        return one_line(error)

    for missing in (tmp_path / "none", "./none", "~/no/such/folder", "../none", "some/where/else"):
        assert message("rte", missing) == f"there is no GLUE folder {missing}; give another with --glue"
    monkeypatch.chdir(ROOT)
    assert message("rte", "glue.py") == "there is no GLUE folder glue.py; give another with --glue"
    assert message("foo", tmp_path).startswith("there is no task 'foo'; the tasks are cola")

    (tmp_path / "empty").mkdir()
    assert message("rte", tmp_path / "empty").startswith(f"task 'rte' in {tmp_path / 'empty'} can't be read: ")

    for readme in (False, True):
        folder = write(tmp_path / f"readme {readme}", "rte", "train", rows_of("rte", [0]), readme=readme)
        assert message("qnli", folder) == f"{folder} has no task 'qnli'; it has rte"
        assert message("rte", folder, "validation") == f"rte in {folder} has no split 'validation'; it has train"

    readme = folder / "README.md"  # the files elsewhere, a task that has none of its own
    readme.write_text(readme.read_text().replace("config_name: rte", "config_name: wnli"))
    assert message("qnli", folder) == f"{folder} has no task 'qnli'; it has rte, wnli"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("nothing of GLUE")
    assert message("qnli", tmp_path / "other") == (
        f"{tmp_path / 'other'} has no task 'qnli'; it has none in TASK/SPLIT.parquet, .json, .jsonl, .csv"
    )

    torn = write(tmp_path / "torn", "rte", "train", rows_of("rte", [0, 1]))
    file = torn / "rte" / "train-00000-of-00001.parquet"
    file.write_bytes(file.read_bytes()[:200])
    assert message("rte", torn).startswith(f"task 'rte' in {torn} can't be read: ")


@pytest.mark.parametrize(
    "failure",
    [
        ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub"),
        FileNotFoundError("no\nsuch"),
        RuntimeError(""),
        ValueError("Couldn't find cache for nyu-mll/glue for config 'rte'\nAvailable configs in the cache: ['cola']"),
    ],
)
def test_all_that_can_fail_at_the_hub_is_one_line(monkeypatch, failure, caplog, capfd):
    import datasets

    def fail(*args, **kwargs):
        logging.getLogger("library").error("Retrying in 1s [Retry 1/5].")
        print("Downloading data:  0%", file=sys.stderr)
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr("support.hub.ask_hub", lambda *_: None)
    with pytest.raises(HubError) as error:
        glue.load_task("rte")
    assert one_line(error).startswith("dataset 'nyu-mll/glue' can't be had from the Hub: ")
    assert not caplog.records and capfd.readouterr() == ("", "")
    logging.getLogger("ours").warning("heard again")
    assert [record.message for record in caplog.records] == ["heard again"]


def test_a_task_that_the_hubs_dataset_lacks_is_named(monkeypatch):
    import datasets

    def fail(*args, **kwargs):
        raise ValueError("BuilderConfig 'rte' not found. Available: ['cola', 'sst2']")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr("support.hub.ask_hub", lambda *_: None)
    with pytest.raises(BadInput) as error:
        glue.load_task("rte", "someone/glue")
    assert one_line(error) == "someone/glue has no task 'rte'; it has cola, sst2"


def test_settings_made_before_the_first_load_are_obeyed(tmp_path):
    """`import glue` doesn't import datasets, which reads HF_HUB_OFFLINE once; nothing is printed on the way."""
    code = """
import os, sys, glue
assert "datasets" not in sys.modules and "huggingface_hub" not in sys.modules
os.environ["HF_HUB_OFFLINE"] = "1"
try:
    glue.load_task("rte")
except glue.BadInput as error:
    print(error)
"""
    env = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_DATASETS_CACHE", "HF_HUB_CACHE"):
        env.pop(name, None)
    run = subprocess.run([sys.executable, "-c", code], env=env, cwd=tmp_path, capture_output=True, text=True)
    assert run.stderr == ""
    assert run.stdout.startswith("dataset 'nyu-mll/glue' can't be had from the Hub: ")
    assert "HF_HUB_OFFLINE" in run.stdout and run.stdout.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Tokens

SENTENCES = [
    "The drain is clogged with hair. It has to be cleaned.",
    "A man with a hard hat is dancing, isn't he?",
    "Naïve cafés — and 10,000 unaffordable résumés!",
    "no",
    "the cat sat on the mat " * 6,
]


def wordpiece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train_from_iterator(SENTENCES, trainers.WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def byte_bpe():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special, alphabet = ["<s>", "<pad>", "</s>", "<unk>"], pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(SENTENCES, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    return tokenizer


@pytest.fixture(scope="module", params=[wordpiece, byte_bpe])
def folder(request, tmp_path_factory):
    """A tokenizer.json with padding and truncation switched on inside, as some published ones have."""
    folder = tmp_path_factory.mktemp(request.param.__name__)
    tokenizer = request.param()
    tokenizer.enable_padding(length=128)
    tokenizer.enable_truncation(9, strategy="only_first")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


SINGLES = [(text,) for text in SENTENCES] + [("",)]
PAIRS = [(a, b) for a in (*SENTENCES, "") for b in SENTENCES]


@pytest.mark.parametrize("max_length", [5, 6, 7, 8, 13, 24, 64, 512])
def test_encoding_is_transformers(folder, max_length):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    tokenizer = glue.load_tokenizer(folder)
    for texts in (SINGLES, PAIRS):
        encoded = glue.encode(tokenizer, texts, max_length)
        for (ids, types), text in zip(encoded, texts, strict=True):
            options = {"truncation": "longest_first", "padding": False, "return_token_type_ids": True}
            expected = theirs(*text, max_length=max_length, **options)
            assert (ids, types) == (expected["input_ids"], expected["token_type_ids"])
            assert len(ids) <= max_length


def test_neither_padding_nor_truncation_is_left_from_the_file_or_from_us(folder):
    tokenizer = glue.load_tokenizer(folder)
    [(long, _)] = glue.encode(tokenizer, [(SENTENCES[4],)], 512)
    assert len(long) > 9
    glue.encode(tokenizer, PAIRS, 8)
    assert tokenizer.padding is None and tokenizer.truncation is None
    assert glue.encode(tokenizer, [], 8) == []


def test_a_length_without_room_for_text_is_refused(folder):
    tokenizer = glue.load_tokenizer(folder)
    special = tokenizer.num_special_tokens_to_add(True)
    with pytest.raises(BadInput) as error:
        glue.encode(tokenizer, PAIRS, special)
    assert one_line(error).startswith(f"max length {special} has no room for text")


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path):
    with pytest.raises(BadInput) as error:
        glue.load_tokenizer(tmp_path)
    assert one_line(error) == f"{tmp_path} has no tokenizer.json"
    path = tmp_path / "tokenizer.json"
    for damage in ('{"version": "1.0", "model": {"type"', "{}", ""):
        path.write_text(damage)
        with pytest.raises(BadInput) as error:
            glue.load_tokenizer(tmp_path)
        assert one_line(error).startswith(f"{path} can't be read as a tokenizer: ")


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def first(count, lengths, batch_size, seed=0, task="rte", **more):
    return list(itertools.islice(glue.rows_of_steps(lengths, batch_size, seed, task, **more), count))


@pytest.mark.parametrize("window", [1, 3, 32])
@pytest.mark.parametrize(("n", "batch_size"), [(10, 4), (7, 7), (5, 16), (1, 3), (64, 1), (300, 8)])
def test_the_batches_are_pass_after_pass_of_all_examples(n, batch_size, window):
    lengths = np.random.default_rng(0).integers(1, 50, n)
    drawn = first(-(-4 * n // batch_size), lengths, batch_size, window=window)
    assert {len(b) for b in drawn} == {batch_size}
    row = np.concatenate(drawn)
    for start in range(0, 4 * n, n):
        assert sorted(row[start : start + n]) == list(range(n))
    if n >= 64:
        assert not np.array_equal(row[:n], row[n : 2 * n])  # passes are shuffled apart
        assert not np.array_equal(row[:n], np.arange(n))


def test_batches_have_alike_lengths_and_come_in_random_order():
    lengths = np.random.default_rng(0).permutation(np.arange(1, 65))  # each length from 1 to 64 once
    drawn = first(8, lengths, 8, window=8)  # one pass, which is one window
    assert sorted(sorted(lengths[b].tolist()) for b in drawn) == [list(range(i, i + 8)) for i in range(1, 65, 8)]
    longest = [lengths[b].max() for b in drawn]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)
    spread = [np.ptp(lengths[b]) for b in first(8, lengths, 8, window=1)]
    assert min(spread) > 7  # plain shuffling has no such batch


def test_a_run_can_be_taken_up_at_any_step():
    lengths = np.random.default_rng(0).integers(1, 50, 50)
    one_by_one = first(60, lengths, 8, 3, "cola")
    for start in (0, 1, 6, 7, 29, 50):
        for a, b in zip(first(10, lengths, 8, 3, "cola", start=start), one_by_one[start:], strict=False):
            assert np.array_equal(a, b)


def test_seeds_and_tasks_shuffle_apart():
    lengths = np.ones(1000)
    draws = {(seed, task): first(1, lengths, 32, seed, task)[0] for seed in (0, 1) for task in ("rte", "mrpc")}
    assert len({draw.tobytes() for draw in draws.values()}) == 4


def test_the_draw_does_not_depend_on_the_process():
    """Python's hash of a string changes from run to run; a paired comparison across runs needs one that doesn't."""
    generator = np.random.default_rng((5, 0xDEBF4C09, 0))  # 0xdebf4c09 is the CRC-32 of "rte"
    shuffled, order = generator.permutation(100), generator.permutation(25)
    pieces = shuffled.reshape(25, 4)  # all of one length, and one window: nothing to sort
    assert first(25, np.ones(100), 4, 5, "rte", window=25)[7].tolist() == pieces[order[7]].tolist()


ENCODED = [([5, 6], [0, 1]), ([7], [0]), ([8, 9, 10, 11], [0, 0, 1, 1]), ([12, 13, 14], [0, 1, 1])]


def test_inputs_are_padded_to_their_own_longest():
    ids, mask, types = glue.inputs([ENCODED[3], ENCODED[1]], 99, torch.device("cpu"))
    assert ids.tolist() == [[12, 13, 14], [7, 99, 99]]
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    assert types.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert (ids.dtype, mask.dtype, types.dtype) == (torch.int64, torch.bool, torch.int64)
    ids, mask, types = glue.inputs(
        [ENCODED[0]] * 2, 99, torch.device("cpu")
    )  # alike: no mask, attention has less to do
    assert (ids.tolist(), mask, types.tolist()) == ([[5, 6]] * 2, None, [[0, 1]] * 2)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 4, 9])
def test_evaluation_visits_all_once_and_pads_little(batch_size):
    batches = list(glue.evaluation_batches(ENCODED, batch_size))
    assert max(map(len, batches)) <= batch_size
    assert np.concatenate(batches).tolist() == [2, 3, 0, 1]  # longest first


# ---------------------------------------------------------------------------------------------------------------------
# A task, ready to train on; a step's batches


SMALL = SimpleNamespace(vocab_size=320, type_vocab_size=2)  # of a model's config, what its embeddings hold


def test_training_rows_and_rows_to_score_on(folder, tmp_path):
    tokenizer = glue.load_tokenizer(folder)
    write(tmp_path, "rte", "train", rows_of("rte", [0, 1, 1, 1, 0, 1, 1]), TASKS["rte"].labels)
    write(tmp_path, "rte", "validation", rows_of("rte", [1, 0], sentence1=["a man", "no"]), TASKS["rte"].labels)
    train, validation = (glue.load_task("rte", tmp_path, split) for split in ("train", "validation"))
    data = glue.load_data("rte", tmp_path, tokenizer, SMALL, 16, weight=0.5)
    assert (data.name, data.weight, data.regression, data.majority()) == ("rte", 0.5, False, 1)
    assert data.train == glue.encode(tokenizer, train.texts, 16)
    assert data.validation == glue.encode(tokenizer, validation.texts, 16)
    assert data.train_labels.tolist() == [0, 1, 1, 1, 0, 1, 1] and data.validation_labels.tolist() == [1, 0]
    assert data.lengths.tolist() == [len(ids) for ids, _ in data.train]

    held = glue.load_data("rte", tmp_path, tokenizer, SMALL, 16, holdout=3)
    rows = sorted(zip(held.train + held.validation, [*held.train_labels, *held.validation_labels], strict=True))
    assert len(held.validation) == 3 and rows == sorted(zip(data.train, data.train_labels, strict=True))
    again = glue.load_data("rte", tmp_path, tokenizer, SMALL, 16, holdout=3)
    assert (held.train, held.validation) == (again.train, again.validation)  # the same rows for every seed and method
    with pytest.raises(BadInput) as error:
        glue.load_data("rte", tmp_path, tokenizer, SMALL, 16, holdout=7)
    assert one_line(error) == "--holdout 7: rte has only 7 training rows"


def test_a_regression_says_the_mean_label(folder, tmp_path):
    write(tmp_path, "stsb", "train", rows_of("stsb", [1.0, 5.0, 3.0]))
    write(tmp_path, "stsb", "validation", rows_of("stsb", [2.0, 2.0]))
    data = glue.load_data("stsb", tmp_path, glue.load_tokenizer(folder), SMALL, 16)
    assert data.regression and data.majority() == 3 and data.label_variance() == pytest.approx(8 / 3)
    for label in (2.0, 3.3):  # of the second, (37,) float32, the mean is another number
        data.train_labels = np.full(37, label, np.float32)
        assert data.label_variance() == 1  # what is divided by is not 0


@pytest.mark.parametrize("known", [{"vocab_size": 7}, {"type_vocab_size": 0}])
def test_a_tokenizer_of_another_model_is_refused(folder, known):
    tokenizer = glue.load_tokenizer(folder)
    if "type_vocab_size" in known:  # RoBERTa's one type is ignored, and so is a pair's 1; a third type is no one's
        tokenizer.post_processor = processors.TemplateProcessing("$A:2", "$A:0 $B:2", [])
    with pytest.raises(BadInput) as error:
        glue.encode_for(SimpleNamespace(**{**vars(SMALL), **known}), tokenizer, PAIRS, 16)
    assert one_line(error).startswith("tokenizer.json does not fit the model, which knows ")


def made_up(name, lengths, labels):
    """A task whose row i is the ids [100 i, 100 i + 1, ...], so that an id says its row."""
    encoded = [([100 * i + j for j in range(n)], [0] * n) for i, n in enumerate(lengths)]
    return glue.TaskData(name, encoded, np.array(labels), [], np.array([]))


def steps(per_task, rank=0, world=1, start=0, batch_size=4):
    rng = np.random.default_rng(0)
    tasks = [
        made_up("rte", rng.integers(1, 20, 30), rng.integers(0, 2, 30)),
        made_up("stsb", rng.integers(1, 20, 17), rng.random(17).astype(np.float32)),
    ]
    s = SimpleNamespace(batch_size=batch_size, window=3, per_task=per_task)
    drawn = glue.batches_of_steps(tasks, 5, s, 9999, torch.device("cpu"), start, rank, world)
    return tasks, list(itertools.islice(drawn, 12))


def rows_in(batch):
    """[(its task's name, its rows, its labels)] of a batch, by the ids in it."""
    rows = (batch.ids[:, 0] // 100).split(batch.sizes)
    return [(d.name, r.tolist(), y.tolist()) for d, r, y in zip(batch.tasks, rows, batch.labels, strict=True)]


def test_the_batches_of_a_step():
    tasks, loop = steps("loop")
    streams = zip(*(glue.rows_of_steps(data.lengths, 4, 5, data.name, 3) for data in tasks), strict=True)
    for step, drawn in zip(loop, streams, strict=False):
        expected = [
            (d.name, rows.tolist(), d.train_labels[rows].tolist()) for d, rows in zip(tasks, drawn, strict=True)
        ]
        assert [found for batch in step for found in rows_in(batch)] == expected
        assert [batch.tasks for batch in step] == [[data] for data in tasks]
        for batch, data, rows in zip(step, tasks, drawn, strict=True):
            ids, mask, types = glue.inputs([data.train[i] for i in rows], 9999, torch.device("cpu"))
            assert torch.equal(batch.ids, ids) and torch.equal(batch.types, types)
            assert batch.mask is None if mask is None else torch.equal(batch.mask, mask)
    tasks, stacked = steps("stacked")
    assert all(len(step) == 1 and step[0].tasks == tasks and step[0].sizes == [4, 4] for step in stacked)
    for (both,), each in zip(stacked, loop, strict=True):
        assert rows_in(both) == [found for batch in each for found in rows_in(batch)]
    for a, b in zip(steps("loop", start=5)[1], loop[5:], strict=False):
        assert [rows_in(x) for x in a] == [rows_in(x) for x in b]


@pytest.mark.parametrize("per_task", ["loop", "stacked"])
def test_processes_share_out_every_batch_equally(per_task):
    whole, shares = steps(per_task)[1], [steps(per_task, rank, 2)[1] for rank in (0, 1)]
    for all_of_it, *parts in zip(whole, *shares, strict=True):
        assert [batch.sizes for batch in parts[0]] == [batch.sizes for batch in parts[1]]
        for batch, one, other in zip(all_of_it, *parts, strict=True):
            for (name, rows, labels), (_, rows0, labels0), (_, rows1, labels1) in zip(
                rows_in(batch), rows_in(one), rows_in(other), strict=True
            ):
                assert len(rows0) == len(rows1) == 2 and name in TASKS
                assert sorted(zip(rows, labels, strict=True)) == sorted(
                    zip(rows0 + rows1, labels0 + labels1, strict=True)
                )
    with pytest.raises(ValueError, match="batch_size 4 .* 3 processes"):
        steps(per_task, 0, 3)


# ---------------------------------------------------------------------------------------------------------------------
# Leaderboard files


@pytest.mark.parametrize(
    ("task", "split", "predictions", "file", "cells"),
    [
        ("cola", None, [1, 0], "CoLA.tsv", ["1", "0"]),
        ("sst2", None, [1, 0], "SST-2.tsv", ["1", "0"]),
        ("mrpc", "test", [1, 0], "MRPC.tsv", ["1", "0"]),
        ("qqp", None, [1, 0], "QQP.tsv", ["1", "0"]),
        ("wnli", None, [1, 0], "WNLI.tsv", ["1", "0"]),
        ("stsb", None, [-0.3, 2.34567, 5.0004], "STS-B.tsv", ["0.000", "2.346", "5.000"]),
        ("mnli", None, [0, 1, 2], "MNLI-m.tsv", ["entailment", "neutral", "contradiction"]),
        ("mnli", "test_mismatched", [2, 0], "MNLI-mm.tsv", ["contradiction", "entailment"]),
        ("qnli", None, [0, 1], "QNLI.tsv", ["entailment", "not_entailment"]),
        ("rte", None, [0, 1], "RTE.tsv", ["entailment", "not_entailment"]),
        ("ax", None, [0, 1, 2], "AX.tsv", ["entailment", "neutral", "contradiction"]),
    ],
)
def test_submission(tmp_path, task, split, predictions, file, cells):
    path = glue.write_submission(tmp_path / "made" / "here", task, np.array(predictions), split)
    assert path == tmp_path / "made" / "here" / file
    lines = ["index\tprediction", *(f"{i}\t{cell}" for i, cell in enumerate(cells))]
    assert path.read_bytes() == ("\n".join(lines) + "\n").encode()
    assert [p.name for p in path.parent.iterdir()] == [file]


def test_a_bad_submission_writes_nothing(tmp_path):
    def message(task, predictions, split=None, folder=tmp_path / "out"):
        with pytest.raises(BadInput) as error:
            glue.write_submission(folder, task, np.array(predictions), split)
        return one_line(error)

    assert message("rte", [0, 2]).startswith("rte: prediction 1 is 2; allowed: 0 entailment")
    assert message("stsb", [np.nan]).startswith("stsb: prediction 0 is nan; it must be finite")
    assert message("mnli", [0], "test") == (
        "mnli has no leaderboard file for 'test'; it has them for test_matched, test_mismatched"
    )
    assert not (tmp_path / "out").exists()
    file = tmp_path / "file"
    file.write_text("")
    assert message("rte", [0], folder=file).startswith(f"{file / 'RTE.tsv'} can't be written: ")


def test_folders_of_one_name_and_readme_keep_their_own_rows(tmp_path):
    # `datasets` caches what a README names by the README alone: the second folder would be read as the first.
    for word in ("old", "new"):
        folder = tmp_path / word / "glue"
        (folder / "sst2").mkdir(parents=True)
        (folder / "sst2" / "train.jsonl").write_text('{"sentence": "' + word + '", "label": 1}')
        files = "- config_name: sst2\n  data_files:\n  - {split: train, path: sst2/train*}"
        (folder / "README.md").write_text(f"---\nconfigs:\n{files}\n---\n")
        assert glue.load_task("sst2", str(folder)).texts == [(word,)]
