"""experiments/: continual.py by hand and against train.py, bench.py's measuring, reproduce.py end to end, small."""

import argparse
import itertools
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "experiments"))

import bench  # noqa: E402
import continual  # noqa: E402
import report  # noqa: E402
import reproduce  # noqa: E402

import evaluate  # noqa: E402
import lori  # noqa: E402
import train  # noqa: E402
from glue import score  # noqa: E402
from support.checkpoint import read_safetensors  # noqa: E402

TASKS = ("sst2", "mrpc", "stsb")


@pytest.fixture
def flags(demo):
    """Of a run of a few seconds."""
    given = {"model": demo / "model", "glue": demo / "glue", "tasks": ",".join(TASKS), "dtype": "fp32"}
    given |= {"steps": 6, "batch-size": 4, "max-length": 32, "lr": 1e-2}
    return [f"--{name}={value}" for name, value in given.items()]


def result(out, method, seed=0):
    return json.loads((out / method / f"seed{seed}" / "result.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# continual.py


def test_forgetting_by_hand():
    """Task 0 falls from 80 to 65, task 1 rises from 60 to 62, the last one can't have been forgotten."""
    assert continual.forgetting([[80.0], [70.0, 60.0], [65.0, 62.0, 50.0]]) == pytest.approx((15 - 2) / 2)


def test_an_earlier_masks_entries_stay_to_the_bit_where_masks_are_disjoint(tmp_path, flags, monkeypatch):
    """What a task's mask holds after its own stage is there at the end; what is in no mask is zero, as B began."""
    kept, train_one = [], continual.train_one

    def watching(folder, method, seed, model, *others):
        before = {path: B.clone() for path, (_, B, _) in lori.adapter(model.encoder).items()}
        seconds = train_one(folder, method, seed, model, *others)
        if method == "lori-s":
            kept.append((before, {path: B for path, (_, B, _) in lori.adapter(model.encoder).items()}))
        return seconds

    monkeypatch.setattr(continual, "train_one", watching)
    assert not continual.main([*flags, "--methods=lori-s", "--disjoint", f"--out={tmp_path / 'out'}"])
    folders = [tmp_path / "out" / "lori-s" / "seed0" / task for task in TASKS]
    masks = [read_safetensors(folder / "masks.safetensors") for folder in folders]
    assert len(kept) == 3 and result(tmp_path / "out", "lori-s")["overlap"] == 0
    end = kept[-1][1]
    for stage, (before, after) in enumerate(kept):
        assert any(not torch.equal(before[path], after[path]) for path in after)  # it has learned something
        for path, mask in masks[stage].items():
            assert torch.equal(before[path][~mask], after[path][~mask])
            assert torch.equal(after[path][mask], end[path][mask])
    for path, B in end.items():
        assert not any((a[path] & b[path]).any() for a, b in itertools.combinations(masks, 2))
        assert not B[~(masks[0][path] | masks[1][path] | masks[2][path])].any()
    for folder in folders:  # one adapter, and the saved one is it
        tensors = read_safetensors(folder / "adapter_model.safetensors")
        saved = {name: x for name, x in tensors.items() if "lora_B" in name}
        assert len(saved) == len(end)
        assert all(any(torch.equal(x, B) for B in end.values()) for x in saved.values())


def test_the_matrix_is_of_the_tasks_seen_and_its_last_row_of_what_is_saved(tmp_path, flags):
    out = tmp_path / "out"
    assert not continual.main([*flags, "--seeds=0,1", f"--out={out}"])
    encoder, _, tasks = train.load(train.Settings(**train.parse(flags)))
    gathered = json.loads((out / "results.json").read_text())["methods"]
    for method, seed in itertools.product(continual.METHODS, (0, 1)):
        found = result(out, method, seed)
        assert [len(row) for row in found["matrix"]] == [1, 2, 3] and gathered[method][str(seed)] == found
        for data, expected in zip(tasks, found["matrix"][-1], strict=True):
            model = evaluate.load_tuned(encoder, out / method / f"seed{seed}" / data.name, data.name)
            predictions = evaluate.predict(model, data.name, data.validation)
            assert score(data.name, predictions, data.validation_labels)["score"] == pytest.approx(expected, abs=1e-6)
        assert found["average"] == pytest.approx(np.mean(found["matrix"][-1]))
        assert ("overlap" in found) == (method == "lori-s")


def test_the_first_task_is_trained_as_train_py_trains_it_alone(tmp_path, flags):
    """Plain LoRA: the same A, head and batches, so the same losses and gradient norms, and the same score."""
    assert not continual.main([*flags, "--methods=single", f"--out={tmp_path / 'in turn'}"])
    assert not train.main([*flags, "--methods=single", f"--out={tmp_path / 'alone'}", "--per-task=loop"])
    in_turn, alone = (tmp_path / name / "single" / "seed0" for name in ("in turn", "alone"))
    assert (in_turn / "sst2" / "log.jsonl").read_text() == (alone / "sst2" / "log.jsonl").read_text()
    found = json.loads((alone / "sst2" / "result.json").read_text())["tasks"]["sst2"]["score"]
    assert result(tmp_path / "in turn", "single")["matrix"][0][0] == pytest.approx(found, abs=1e-6)


def test_interrupted_anywhere_it_goes_on_to_the_same_bytes(tmp_path, flags, monkeypatch, capsys):
    whole, out = tmp_path / "whole", tmp_path / "out"
    wanted = [*flags, "--methods=single,lori-s", "--save-every=0"]
    assert not continual.main([*wanted, f"--out={whole}"])
    gradients, calls = train.gradients, itertools.count(1)

    def interrupting(*arguments):
        if next(calls) % 11 == 0:
            raise KeyboardInterrupt
        return gradients(*arguments)

    monkeypatch.setattr(train, "gradients", interrupting)
    statuses = [continual.main([*wanted, f"--out={out}"])]
    while statuses[-1] and len(statuses) < 20:
        statuses.append(continual.main([*wanted, f"--out={out}", "--resume"]))
    assert statuses == [130] * 5 + [None] if len(statuses) == 6 else statuses[-1] is None and len(statuses) > 3
    assert "to go on: python experiments/continual.py" in capsys.readouterr().err

    def files(folder):
        return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.stem != "timing"}

    assert files(out) == files(whole) and not list(out.rglob("state*"))


def test_what_is_finished_is_kept_and_a_run_without_resume_is_refused(tmp_path, flags, monkeypatch, capsys):
    out = tmp_path / "out"
    assert not continual.main([*flags, "--methods=single", f"--out={out}"])
    assert continual.main([*flags, "--methods=single", f"--out={out}"]) == 2
    assert "has a run in it" in capsys.readouterr().err
    assert continual.main([*flags, "--methods=single", "--lr=1e-3", f"--out={out}", "--resume"]) == 2
    assert "lr was 0.01 and is 0.001" in capsys.readouterr().err
    assert train.main([*flags, "--methods=single", f"--out={out}", "--resume", "--per-task=loop"]) == 2
    assert "disjoint" in capsys.readouterr().err  # nor is it taken for a run of train.py
    monkeypatch.setattr(continual, "run", None)
    assert not continual.main([*flags, "--methods=single", f"--out={out}", "--resume"])


@pytest.mark.parametrize(
    "more, words",
    [
        (["--methods=joint"], "unknown 'joint'; there are single, lori-d, lori-s"),
        (["--tasks=sst2"], "with one task there is nothing to forget"),
        (["--disjoint", "--methods=single"], "--disjoint is about lori-s's masks"),
        (["--disjoint", "--sparsity=0.5"], "3 masks of 1536 entries do not fit into the 3072 of B; raise --sparsity"),
        (["--jobs=2"], "leave out --jobs and torchrun"),
        (["--continual"], "--continual has moved"),
        (["--steps=0"], "--steps 0 is outside 1 to"),
        (["--balance"], "--balance"),
        (["--targets=nothing"], "--targets nothing"),
        (["--holdout=1000000"], "--holdout 1000000"),
        (["--resume", "--out="], "--resume needs --out"),
    ],
)
def test_bad_input_is_refused_in_one_line(more, words, tmp_path, flags, capsys):
    assert continual.main([*flags, f"--out={tmp_path / 'out'}", *more]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and error.startswith("continual.py: ")
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# bench.py


def test_the_peak_is_what_was_allocated_at_once():
    def run():
        a = torch.zeros(2**20)
        del a
        b, c = torch.zeros(2**18), torch.zeros(2**19)
        del b, c

    assert bench.peak_of(run, torch.device("cpu")) == 4 * 2**20


def test_project_keeps_its_promise_of_memory():
    """At shapes where two gradients are far more than 64 MiB, so that a third one would break it."""
    parameters = [torch.nn.Parameter(torch.zeros(16, 2**18)) for _ in range(6)]
    ortho = bench.OrthoLoRA([[p] for p in parameters], 2)
    peak = bench.peak_of(ortho.project, torch.device("cpu"), prepare=ortho.rows.normal_)
    P = 6 * 16 * 2**18
    assert bench.promised(ortho) == 2 * 4 * P + 64 * 2**20 + 8 * 6 * 2 * 2 * 8
    assert 4 * P <= peak <= bench.promised(ortho) < 3 * 4 * P


def test_shapes_of_a_7b_llama_have_forty_million_numbers():
    assert sum(a * b for a, b in bench.LLAMA_7B) == 16 * 32 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert len(bench.LLAMA_7B) == 2 * 7 * 32 and len(bench.ROBERTA_BASE) == 48


@pytest.mark.parametrize("what", ["project", "step", "memory", "padding"])
def test_every_bench_writes_its_numbers(what, tmp_path, demo, monkeypatch):
    small = ["--batch-size=2", "--length=16", "--rounds=1", "--tasks=2", "--num-tasks=2,3", "--tasks-named=sst2,mrpc"]
    files = [f"--model={demo / 'model'}", f"--glue={demo / 'glue'}", f"--out={tmp_path}", "--device=cpu", "--no-peers"]
    monkeypatch.setattr(bench, "MODES", {name: bench.MODES[name] for name in ("joint, loop", "ortho, loop")})
    monkeypatch.setattr(sys, "argv", ["experiments/bench.py", what, *small, *files, "--torchjd-up-to=0"])
    bench.main()
    (path,) = tmp_path.glob(f"bench-{what}*-cpu.json")
    written = json.loads(path.read_text())
    numbers = [x for r in written["results"] for x in r.values() if isinstance(x, (int, float))]
    assert len(written["results"]) >= 2 and numbers and all(np.isfinite(numbers))
    assert {"command", "hardware", "commit", "rounds"} <= written.keys() and path.with_suffix(".md").exists()


def test_waits_profiles_ten_steps_of_the_loop(demo, monkeypatch):
    """On a CPU there is nothing to count; that the loop runs, and is left after its fifteenth step, can be seen."""
    steps, gradients = [], train.gradients
    monkeypatch.setattr(bench, "MODES", {name: bench.MODES[name] for name in ("joint, loop", "ortho, stacked")})
    monkeypatch.setattr(train, "gradients", lambda *given: steps.append(given[0]) or gradients(*given))
    args = argparse.Namespace(model=demo / "model", tasks=2, batch_size=2, length=16, dtype="fp32", compile=False)
    rows, results, _ = bench.bench_waits(args, torch.device("cpu"))
    assert len(rows) == 1 + 2 and len(results) == 2 and steps == ["joint"] * 15 + ["ortho"] * 15
    assert all(set(r["waits"].values()) == {0} for r in results)


# ---------------------------------------------------------------------------------------------------------------------
# reproduce.py


def test_reproduce_chooses_rates_runs_seeds_and_goes_on(tmp_path, demo, monkeypatch, capsys):
    """A small experiment with rates to choose from, on the demo's files; a second call runs nothing again."""
    rows = {m: f"--methods {m}" for m in ("single", "joint", "ortho")}
    experiment = reproduce.Experiment(
        "small",
        rows | {"joint at 0.01": "--methods joint --lr 1e-2"},
        "--tasks sst2,mrpc --steps 2 --batch-size 4 --max-length 32",
        2,
        {"": (1e-3, 1e-1), "joint at 0.01": ()},
    )
    monkeypatch.setattr(reproduce, "HOLDOUT", 20)
    monkeypatch.setitem(reproduce.EXPERIMENTS, "main", experiment)
    arguments = ["reproduce.py", "main", "--model", str(demo / "model"), "--glue", str(demo / "glue"), "--jobs", "2"]
    arguments += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", arguments)
    reproduce.main()
    assert capsys.readouterr().out.count(" s\n") == 3 * 2 + 4 * 2
    path = tmp_path / "results" / "main" / "results.json"
    r = json.loads(path.read_text())
    assert {"command", "commit", "seeds", "hardware", "minutes"} <= r.keys()
    assert r["chosen"]["joint at 0.01"] == 0.01 and not r["held_out"].pop("joint at 0.01")
    for row, scores in r["held_out"].items():
        assert r["chosen"][row] == float(max(scores, key=scores.get))
    one = json.loads((tmp_path / "runs" / "main" / "ortho seed 1" / "results.json").read_text())
    assert one["settings"]["lr"] == r["chosen"]["ortho"] and one["seeds"] == [1] and one["settings"]["holdout"] == 0
    average = one["methods"]["ortho"]["1"]["average"]
    assert r["runs"]["ortho"]["ortho"]["1"]["average"] == pytest.approx(average, abs=1e-4)
    text = report.table(path)
    assert f"| {r['chosen']['ortho']:g} |" in text and "| ortho" in text and "commit" in text
    reproduce.main()
    assert " s\n" not in capsys.readouterr().out and report.table(path) == text


def test_reproduce_runs_continual_and_goes_on_where_a_run_was_interrupted(tmp_path, demo, monkeypatch, capsys):
    """One unit is finished, the call was not: the unit is kept, and the rest is run."""
    experiment = reproduce.Experiment(
        "small",
        {"LoRA: sst2,mrpc": "--methods single --lr 1e-3", "LoRI: sst2,mrpc": "--methods lori-d,lori-s --lr 1e-3"},
        "--tasks sst2,mrpc --steps 2 --batch-size 4 --max-length 32",
        2,
        script="experiments/continual.py",
    )
    monkeypatch.setitem(reproduce.EXPERIMENTS, "continual", experiment)
    arguments = ["reproduce.py", "continual", "--model", str(demo / "model"), "--glue", str(demo / "glue")]
    arguments += ["--jobs", "2", "--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", arguments)
    reproduce.main()
    path, folder = tmp_path / "results/continual/results.json", tmp_path / "runs/continual/LoRI: sst2,mrpc seed 1"
    first, kept = json.loads(path.read_text()), folder / "lori-d" / "seed1" / "result.json"
    assert np.shape(first["runs"]["LoRI: sst2,mrpc"]["lori-s"]["1"]["matrix"][1]) == (2,)
    assert re.search(r"^\| sst2, mrpc \| +LoRA \|", report.table(path), re.M)
    for name in ("commit.txt", "lori-s/seed1/result.json"):  # as if killed there
        (folder / name).unlink()
    before = kept.stat().st_mtime_ns
    capsys.readouterr()
    reproduce.main()
    assert capsys.readouterr().out.count(" s\n") == 1 and kept.stat().st_mtime_ns == before
    assert json.loads(path.read_text())["runs"] == first["runs"]


def test_a_failing_run_says_where_its_output_is(tmp_path):
    with pytest.raises(SystemExit, match=r"ended with 2; see .*output.txt"):
        reproduce.run(tmp_path / "x", "train.py", ["--model", str(tmp_path / "none"), "--glue", str(tmp_path)], 1)
    assert not (tmp_path / "x" / "commit.txt").exists()


def test_every_flag_of_an_experiment_is_its_scripts():
    for experiment in reproduce.EXPERIMENTS.values():
        parse, check = (
            (continual.parse, continual.check) if "continual" in experiment.script else (train.parse, train.check)
        )
        settings = continual.Settings if "continual" in experiment.script else train.Settings
        for row in experiment.rows.values():
            given = reproduce.chosen(f"{experiment.flags} {experiment.full} {row}")
            words = [word for flag, x in given.items() for word in ([flag] if x is True else [flag, x])]
            check(settings(**parse(words)))


def test_noise_measures_one_task_against_itself(demo, monkeypatch):
    """At B = 0 only B has a gradient; a task whose two batches are the same has cosine 1 with itself."""
    s = train.Settings(model=str(demo / "model"), glue=str(demo / "glue"), tasks="sst2,mrpc", steps=5, batch_size=8)
    s.max_length, s.dtype, s.per_task, s.lr, s.device = 32, "fp32", "loop", 0.0, "cpu"
    _, frozen, tasks = train.load(s)
    draw = reproduce.batches_of_steps
    monkeypatch.setattr(reproduce, "batches_of_steps", lambda tasks, seed, *others: draw(tasks, 0, *others))
    found = reproduce.measure(frozen, tasks, s)
    cosines, is_A = np.array(found["cosines"]), np.array([name.endswith(".A") for name in found["blocks"]])
    assert np.all(cosines[is_A] == 0) and np.allclose(report.on_diagonal(cosines[~is_A]), 1, atol=1e-5)
    assert np.all(np.abs(report.off_diagonal(cosines[~is_A])) < 0.9)
    assert np.shape(found["rates by time"]) == (reproduce.BINS, 2, 2)
