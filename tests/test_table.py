"""table.py against sums by hand: a training's conflicts, an out folder's results at any time, and its tables."""

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import results_of
from scipy import stats
from sklearn.metrics import accuracy_score

from glue import load_task
from support import runs, table

# ---------------------------------------------------------------------------------------------------------------------
# One training's conflicts


def seen(conflicts, cosines, removed, rate, effective, norms):
    """What a step's projection saw, two tasks."""
    pairs = [torch.tensor([[[0.0, x], [x, 0.0]] for x in values]) for values in (conflicts, cosines)]
    sizes = [[x * x / 2 for x in norms]] * 2  # of two blocks
    rest = [torch.tensor(x) for x in (removed, rate, effective, sizes)]
    return SimpleNamespace(
        **dict(zip(("conflicts", "cosines", "removed", "rate", "effective", "squares"), pairs + rest, strict=True))
    )


def watched(steps, change):
    """A watch of two tasks and two blocks over `steps`; of step k it saw the numbers that `change(k)` gives."""
    watch = runs.Watch(["a", "b"], ["A", "B"], steps, torch.device("cpu"))
    for k in range(steps):
        watch.see(k, torch.ones(2), torch.ones(2), seen(*change(k)))
    return watch


def test_conflicts_by_hand():
    # Ten steps, two to a fifth. The first block conflicts in every step, the second in half of them.
    def numbers(k):
        return [1.0, k % 2], [-0.5, 0.1], [[0.2, 0.4], [0.0, 0.2]], k / 10, [1.0 + k, 2.0], [3.0, 10.0 * k]

    found = table.statistics(watched(10, numbers), ["x.A", "x.B"])
    assert found["blocks"] == {"x.A": [1.0, -0.5, 0.3], "x.B": [0.5, 0.1, 0.1]}
    assert (found["rate"], found["cosine"], found["removed"]) == (0.75, -0.2, 0.2) and found["pairs"] == {"a-b": 0.75}
    assert found["fifths"] == {
        "rate": [0.05, 0.25, 0.45, 0.65, 0.85],
        "effective": {"a": [1.5, 3.5, 5.5, 7.5, 9.5], "b": [2.0] * 5},
        "norms": {"a": [3.0] * 5, "b": [5.0, 25.0, 45.0, 65.0, 85.0]},
    }


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 7])
def test_fifths_of_steps_that_five_does_not_divide(steps):
    # Each fifth is a mean over the steps that are in it, and there is none without a step.
    found = table.statistics(
        watched(steps, lambda k: ([1.0], [0.0], [[0.0, 0.0]], 1.0, [1.0, 3.0], [2.0, 2.0])), ["AB"]
    )
    for values, each in ((found["fifths"]["rate"], 1.0), (found["fifths"]["effective"]["b"], 3.0)):
        assert values == [each] * min(steps, 5)


# ---------------------------------------------------------------------------------------------------------------------
# An out folder by hand: its numbers in results.json, and in the tables

METHODS = {
    "single": {"own": True, "project": False, "source": ""},
    "joint": {"own": False, "project": False, "source": ""},
    "ortho": {"own": False, "project": True, "source": ""},
    "lora-merged": {"own": False, "project": False, "source": "single"},
}
SCORES = {  # of tasks a and b, with three seeds; the gap is 10 with every one
    "single": ([70, 90], [72, 92], [71, 91]),
    "joint": ([60, 80], [62, 82], [61, 81]),
    "ortho": ([65, 85], [67, 89], [66, 86]),  # gains 5, 6, 5
    "lora-merged": ([69, 89], [70, 90], [70, 88]),
}


def write_unit(
    folder, scores, seconds=0.1, parameters=10, memory=None, source="c0de", hardware="CPU, 1 thread", **more
):
    folder.mkdir(parents=True, exist_ok=True)
    tasks = {task: {"accuracy": score / 100, "score": float(score)} for task, score in scores.items()}
    result = {"adapter_parameters": parameters, "head_parameters": 2 * len(tasks), "tasks": tasks} | more
    timing = {"seconds_per_step": seconds, "peak_memory_bytes": memory, "source": source, "hardware": hardware}
    (folder / "timing.json").write_text(json.dumps(timing))
    (folder / "result.json").write_text(json.dumps(result))


def conflicts(rate):
    blocks = {f"encoder.layer.{i}.query.{factor}": [rate + i / 4, 0.0, 0.0] for i in (0, 1) for factor in "AB"}
    fifths = {"effective": {"a": [1.0, 1.5], "b": [2.0, 2.0]}, "norms": {"a": [2.0, 4.0], "b": [4.0, 4.0]}}
    return {"blocks": blocks, "pairs": {"a-b": rate}, "fifths": fifths}


@pytest.fixture
def by_hand(tmp_path):
    out = tmp_path / "by hand"
    out.mkdir()
    settings = {"steps": 100, "batch_size": 16, "lr": 5e-4, "rank": 8, "holdout": 0, "dtype": "fp32", "balance": False}
    facts = {"device": "cpu", "python": "3", "torch": "2", "numpy": "1"}
    majority = {"a": {"accuracy": 0.5, "score": 50.0}, "b": {"accuracy": 0.625, "score": 62.5}}
    about = {"settings": settings, "facts": facts, "model": "tiny", "glue": "toy", "demo": False, "tasks": ["a", "b"]}
    (out / "settings.json").write_text(json.dumps(about | {"majority": majority, "methods": METHODS}))
    for method, seeds in SCORES.items():
        for seed, (a, b) in enumerate(seeds):
            folder, more = out / method / f"seed{(10, 9, 0)[seed]}", {}
            if method == "ortho":
                more["conflicts"] = conflicts(0.25)
            if method == "lora-merged":
                more["cosines"] = [[1.0, (0.1, -0.3, 0.2)[seed]], [(0.1, -0.3, 0.2)[seed], 1.0]]
            if METHODS[method]["own"]:
                write_unit(folder / "a", {"a": a}, 0.05), write_unit(folder / "b", {"b": b}, 0.04)
            else:
                write_unit(folder, {"a": a, "b": b}, {"joint": 0.06, "ortho": 0.12}.get(method, 0.0), **more)
    return out


def test_results_by_hand(by_hand):
    table.write(by_hand)
    results = results_of(by_hand)
    assert list(results["methods"]) == list(METHODS) and results["seeds"] == [0, 9, 10]
    assert list(results["methods"]["single"]) == ["0", "9", "10"]  # by number
    entry = results["methods"]["single"]["10"]
    assert entry["tasks"] == {"a": {"accuracy": 0.7, "score": 70}, "b": {"accuracy": 0.9, "score": 90}}
    assert (entry["average"], entry["adapter_parameters"], entry["head_parameters"]) == (80.0, 20, 4)
    assert (
        results["methods"]["joint"]["9"]["average"] == 72
        and results["methods"]["joint"]["9"]["adapter_parameters"] == 10
    )
    assert results["methods"]["ortho"]["0"]["conflicts"] == conflicts(0.25)
    summary = results["summary"]
    assert summary["joint"] == {"mean": 71.0, "std": 1.0} and summary["single"] == {"mean": 81.0, "std": 1.0}
    assert summary["ortho"]["mean"] == pytest.approx(229 / 3)
    assert summary["ortho"]["std"] == pytest.approx(statistics.stdev([75, 78, 76]))
    assert summary["ortho"]["gap_recovered"] == "53 ± 6 %"  # gains 5, 6, 5 of 10: 53.3 ± 5.8


def test_table_by_hand(by_hand):
    text = table.write(by_hand)
    assert text == (by_hand / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[6:] == [  # ortho gains 5, 5, 5 of a and 5, 7, 5 of b; lengths and weights are those of the first fifth
        ["task", "single − joint", "ortho − joint", "length", "ortho's weight"],
        ["a", "10.0 ± 0.0", "5.0 ± 0.0", "2.00", "1.00"],
        ["b", "10.0 ± 0.0", "5.7 ± 1.2", "4.00", "2.00"],
    ]
    assert rows[:6] == [
        ["method", "a", "b", "average", "gap recovered", "adapter", "heads", "step time"],
        ["majority class", "50.0", "62.5", "56.2", "", "", "", ""],
        ["single", "71.0 ± 1.0", "91.0 ± 1.0", "81.0 ± 1.0", "—", "20", "4", "1.50"],
        ["joint", "61.0 ± 1.0", "81.0 ± 1.0", "71.0 ± 1.0", "—", "10", "4", "1.00"],
        ["ortho", "66.0 ± 1.0", "86.7 ± 2.1", "76.3 ± 1.5", "53 ± 6 %", "10", "4", "2.00"],
        ["lora-merged", "69.7 ± 0.6", "89.0 ± 1.0", "79.3 ± 0.6", "—", "10", "4", "—"],
    ]
    assert "## tiny on toy" in text and "mean ± standard deviation of 3 seeds, fp32 on CPU, 1 thread" in text
    # Each pair of tasks counts once, by its size: (0.1 + 0.3 + 0.2) / 3.
    assert "lora-merged: |cosine| between the merged deltas 0.200, at most 0.300" in text
    assert "drop from the task's own adapter: a 1.3 ± 0.6, b 2.0 ± 1.0" in text  # 1, 2, 1 and 1, 2, 3
    lines = text.splitlines()
    first = lines.index("layer  A                               B")
    assert lines[first + 1] == "    0  █████···············  25 %      █████···············  25 %"
    assert lines[first + 2] == "    1  ██████████··········  50 %      ██████████··········  50 %"
    assert "by task pair: a-b 25 %" in text and "weight: by what factor" in text


def test_balanced_gradients_have_no_lengths(by_hand):
    """With --balance all are made equally long, so neither length nor weight is that of the task's gradient."""
    about = json.loads((by_hand / "settings.json").read_text())
    about["settings"]["balance"] = True
    (by_hand / "settings.json").write_text(json.dumps(about))
    text = table.write(by_hand)
    assert "| task | single − joint | ortho − joint |" in text and "length:" not in text


def test_lengths_and_weights_of_a_mean(by_hand):
    """With --combine mean rows have a T-th of every gradient: lengths are of the whole, weights of what is added."""
    about = json.loads((by_hand / "settings.json").read_text())
    about["settings"]["combine"] = "mean"
    (by_hand / "settings.json").write_text(json.dumps(about))
    rows = [line.split() for line in table.write(by_hand).splitlines() if line.startswith(("| a ", "| b "))]
    assert [row[-4:-1:2] for row in rows] == [["4.00", "0.50"], ["8.00", "1.00"]]


@pytest.mark.parametrize("factors, of", [("AB", ""), ("A", " of A alone")])
def test_lengths_are_of_what_is_projected(by_hand, factors, of):
    about = json.loads((by_hand / "settings.json").read_text())
    about["settings"]["factors"] = factors
    (by_hand / "settings.json").write_text(json.dumps(about))
    assert f"length: of the task's gradient{of}, its loss's weight included" in table.write(by_hand)


def test_without_single_nothing_is_said_of_it(by_hand):
    assert "Where single is far above" in table.write(by_hand)
    shutil.rmtree(by_hand / "single")
    assert "Where single is far above" not in table.write(by_hand)


def test_the_columns_of_a_table_are_aligned(by_hand):
    lines = [line for line in table.write(by_hand).splitlines() if line.startswith("|")][:7]
    assert len({len(line) for line in lines}) == 1 and set(lines[1]) == set("|-:")
    assert {tuple(i for i, c in enumerate(line) if c == "|") for line in lines} == {
        tuple(i for i, c in enumerate(lines[0]) if c == "|")
    }


def test_memory_is_told_where_it_was_measured(by_hand):
    write_unit(by_hand / "joint/seed0", {"a": 61, "b": 81}, 0.06, memory=3 * 2**30)
    rows = [line.split("|")[1:-1] for line in table.write(by_hand).splitlines() if line.startswith("| ")]
    cells = {row[0].strip(): row[-1].strip() for row in rows}
    assert (cells["joint"], cells["ortho"]) == ("3,072 MiB", "—")


def test_settings_that_make_a_method_another_are_told(by_hand):
    about = json.loads((by_hand / "settings.json").read_text())
    assert "rank 8, on the validation" in table.write(by_hand)
    about["changed"] = {"balance": True, "unit": "all", "steps": 100, "dtype": "fp32", "merge_weight": 0.5}
    (by_hand / "settings.json").write_text(json.dumps(about))
    assert "rank 8, --balance, --unit all, --merge-weight 0.5, on the validation split" in table.write(by_hand)


def test_seeds_that_only_some_methods_have(by_hand):
    """The gap is held seed by seed, over those that all three have."""
    shutil.rmtree(by_hand / "joint/seed10")
    table.write(by_hand)
    results = results_of(by_hand)
    assert results["seeds"] == [0, 9, 10] and list(results["methods"]["joint"]) == ["0", "9"]
    text = (by_hand / "results.md").read_text()
    assert "of 3 seeds" in text and "| joint (2 seeds) |" in text and "| single          |" in text
    assert results["summary"]["ortho"]["gap_recovered"] == "+5.5 of +10.0"  # 6 and 5
    shutil.rmtree(by_hand / "joint")
    table.write(by_hand)
    assert "gap_recovered" not in results_of(by_hand)["summary"]["ortho"]


def test_gap_recovered_by_hand():
    single, joint = [80.0, 82.0, 81.0], [70.0, 72.0, 71.0]  # the gap is 10 with every seed
    assert table.gap_recovered(single, joint, [75.0, 78.0, 76.0]) == "53 ± 6 %"  # gains 5, 6, 5: 5.33 ± 0.58
    assert table.gap_recovered(single[:1], joint[:1], [75.0]) == "+5.0 of +10.0"
    assert table.gap_recovered(single[:2], joint[:2], [75.0, 77.0]) == "+5.0 of +10.0"
    # Gaps 3, 1, 2: mean 2, standard error 1 / sqrt 3 = 0.58: 3.5 of them, and t on two degrees of freedom is 4.3.
    assert table.gap_recovered([73.0, 73.0, 73.0], joint, joint) == "+0.0 of +2.0"
    assert table.gap_recovered([74.0, 74.0, 74.0], joint, joint) == "0 ± 0 %"  # 4, 2, 3: 5.2 of them
    assert table.gap_recovered(joint, single, joint) == "-10.0 of -10.0"


def test_t_is_scipys():
    assert list(table.T975) == [round(float(stats.t.ppf(0.975, n - 1)), 3) for n in range(3, 11)]


def test_a_gap_is_clear_where_scipy_says_so():
    """For 3 to 10 seeds: where the lower end of the paired 95 % interval is above 0."""
    draw = np.random.default_rng(0)
    told = {True: 0, False: 0}
    for n in (3, 4, 7, 10) * 50:
        gap = draw.normal(2, 2, n)
        clear = stats.ttest_1samp(gap, 0).confidence_interval(0.95).low > 0
        told[bool(clear)] += 1
        assert ("%" in table.gap_recovered(gap, np.zeros(n), np.ones(n))) == clear
    assert min(told.values()) > 20


# ---------------------------------------------------------------------------------------------------------------------
# At any time


def test_a_finished_run_is_gathered_again_to_the_byte(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    for name in ("results.json", "results.md"):
        (out / name).unlink()
    command = [sys.executable, "-m", "support.table", str(out)]
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}  # a terminal without the table's signs
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr
    for name in ("results.json", "results.md"):
        assert (out / name).read_bytes() == (finished[0] / name).read_bytes()
    assert done.stdout == (out / "results.md").read_text().encode("ascii", "replace").decode() + "\n"


def test_a_run_that_is_not_finished(finished, tmp_path):
    """An entry is there as soon as all of its trainings are, and every one that is there is whole."""
    out, whole = shutil.copytree(finished[0], tmp_path / "out"), finished[1]["methods"]
    for unit in ("single/seed0/mnli", "joint/seed1", "ortho/seed0", "ortho/seed1"):
        (out / unit / "result.json").unlink()
    text = table.write(out)
    results = results_of(out)
    there = {method: list(seeds) for method, seeds in results["methods"].items()}
    assert there == {"head": ["0", "1"], "single": ["1"], "joint": ["0"], "pcgrad": ["0", "1"]}
    assert all(results["methods"][m][seed] == whole[m][seed] for m in there for seed in there[m])
    assert "| ortho" not in text and "gap_recovered" not in results["summary"]["pcgrad"]  # no seed has all three
    for path in out.rglob("result.json"):
        path.unlink()
    assert table.write(out) == "No method is finished with any seed yet.\n" and results_of(out)["methods"] == {}


def test_settings_that_are_not_trains(tmp_path, capsys):
    (tmp_path / "settings.json").write_text("{}")
    assert table.main([str(tmp_path)]) == 2 and "no run of train.py" in capsys.readouterr().err


def test_settings_that_someone_has_edited(by_hand, capsys):
    about = json.loads((by_hand / "settings.json").read_text())
    for what in about.keys() & {"settings", "facts", "methods", "tasks", "majority", "demo"}:
        (by_hand / "settings.json").write_text(json.dumps({k: x for k, x in about.items() if k != what}))
        assert table.main([str(by_hand)]) == 2 and "no run of train.py" in capsys.readouterr().err


def test_a_merge_whose_source_is_of_other_seeds(by_hand):
    for seed in (10, 9, 0):
        (by_hand / f"single/seed{seed}").rename(by_hand / f"single/seed{seed + 1}00")
    text = table.write(by_hand)
    assert "| lora-merged" in text and "nan" not in text and "merged deltas" not in text


def test_the_picture_of_layers_without_a_number(by_hand):
    (by_hand / "ortho/seed9").rename(by_hand / "gone")
    (by_hand / "ortho/seed10").rename(by_hand / "gone too")
    result = json.loads((by_hand / "ortho/seed0/result.json").read_text())
    for block, row in (("pooler.dense.A", "other"), ("all", "  all")):
        result["conflicts"]["blocks"] = {block: [0.5, 0.0, 0.0]}
        (by_hand / "ortho/seed0/result.json").write_text(json.dumps(result))
        assert f"\n{row}  {'█' * 10}{'·' * 10}  50 %\n" in table.write(by_hand)


def test_no_run_there(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/settings.json").write_text("{")
    for name, says in (("nowhere", "no run is in it"), ("empty", "no run is in it"), ("damaged", "settings.json")):
        assert table.main([str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert not out and err.startswith("support.table: ") and err.count("\n") == 1 and says in err
    assert not (tmp_path / "nowhere").exists() and not list((tmp_path / "empty").iterdir())
    for arguments, status in (([], 2), (["--help"], 0)):
        assert table.main(arguments) == status and "python -m support.table OUT" in capsys.readouterr().out


def test_units_made_by_other_code_are_told_apart(finished, tmp_path):
    out = shutil.copytree(finished[0], tmp_path / "out")
    assert "NOTICE" not in table.write(out)
    before = (out / "results.json").read_bytes()
    path = out / "ortho/seed1/timing.json"
    timing = json.loads(path.read_text())
    path.write_text(json.dumps(timing | {"source": "0123456789abcdef"}))
    (notice,) = [line for line in table.write(out).splitlines() if line.startswith("NOTICE")]
    assert f"head, single, joint, pcgrad, ortho: code {timing['source']}, {timing['hardware']}" in notice
    assert f"ortho: code 0123456789abcdef, {timing['hardware']}" in notice
    path.write_text(json.dumps(timing | {"hardware": "an abacus"}))
    assert f"ortho: code {timing['source']}, an abacus" in table.write(out)
    assert (out / "results.json").read_bytes() == before  # which has no times in it


def test_results_have_no_times_and_no_folders(finished, finished_lori, demo):
    for out, results in (finished, finished_lori):
        text = json.dumps(results)
        assert str(out) not in text and str(demo) not in text and out.name not in text
        assert not any(word in text for word in ("seconds", "memory", "hardware", "resume", '"out"', '"jobs"'))
        for path in out.rglob("timing.json"):
            assert not any(f"{x}" in text for x in [json.loads(path.read_text())["seconds_per_step"]] if x)


def test_the_majority_class(finished, demo):
    majority = finished[1]["majority"]
    for task in ("sst2", "mnli"):
        train, scored = (load_task(task, demo / "glue", split).labels for split in ("train", "validation"))
        expected = accuracy_score(scored, np.full_like(scored, np.bincount(train).argmax()))
        assert majority[task] == {"accuracy": expected, "score": 100 * expected}
    assert majority["stsb"]["score"] == 0  # a constant correlates with nothing
