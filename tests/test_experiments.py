"""experiments/: continual.py by hand and against train.py, bench.py's measuring, reproduce.py end to end, small."""

import argparse
import itertools
import json
import os
import runpy
import shlex
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch

import bench
import bf16
import continual
import controls
import evaluate
import flipped
import lori
import merging
import ortholora
import plan
import premise
import reproduce
import train
import tries
from glue import inputs, score
from support import runs, table
from support.checkpoint import BadInput, read_safetensors, write_text
from support.toy import make_demo, write_glue

TASKS = ("sst2", "mrpc", "stsb")


@pytest.fixture
def flags(demo):
    """Of a run of a few seconds."""
    given = {"model": demo / "model", "glue": demo / "glue", "tasks": ",".join(TASKS), "dtype": "fp32"}
    given |= {"steps": 6, "batch-size": 4, "max-length": 32, "lr": 1e-2}
    return [f"--{name}={value}" for name, value in given.items()]


def result(out, method, seed=0):
    return json.loads((out / method / f"seed{seed}" / "result.json").read_text())


@pytest.mark.parametrize("script", [continual, controls, merging, premise, tries])
def test_a_script_that_has_train_pys_flags_speaks_for_itself(script, capsys):
    """Its --help has its own docstring, and a flag that there is not is told under its own name."""
    with pytest.raises(SystemExit, match="^(0|)$"):
        script.main(["--help"])
    assert script.__doc__ in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        script.main(["--methods=single", "--merge-weights=1", "--out=OUT", "--no-such-flag"])
    assert f"\n{Path(script.__file__).name}: error: unrecognized arguments: " in capsys.readouterr().err


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
    before = (out / "results.json").read_bytes()
    assert table.main([str(out)]) == 2 and (out / "results.json").read_bytes() == before


def test_results_of_a_shared_folder_are_written_by_one_at_a_time(tmp_path, flags, monkeypatch):
    """Else another process's results go missing, or its file is taken for what a killed one was writing."""
    written = []

    def write(path, text):
        if path.name in ("results.json", "losses.json"):
            with pytest.raises(BadInput, match="another process is at work"), runs.locked(path.parent):
                pass
            written.append(path.name)
        write_text(path, text)

    monkeypatch.setattr(continual, "write_text", write)
    monkeypatch.setattr(controls, "write_text", write)
    monkeypatch.setattr(controls, "losses", lambda s: {})
    monkeypatch.setattr(train, "main", lambda argv: None)
    assert not continual.main([*flags, "--methods=single", f"--out={tmp_path}"])
    assert not controls.main([*flags, "--methods=joint", f"--out={tmp_path}"])
    assert written == ["results.json", "losses.json"]


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
        (["--balance"], "--balance is between the tasks of one step"),
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


def test_what_project_promises_of_memory():
    """The formula; that project keeps to it is in test_ortholora.py."""
    parameters = [torch.nn.Parameter(torch.zeros(16, 10)) for _ in range(6)]
    ortho = bench.OrthoLoRA([[p] for p in parameters], 2)
    assert bench.promised(ortho) == 2 * 4 * 6 * 160 + 64 * 2**20 + 8 * 6 * 2 * 2 * 8


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
# controls.py


def gram_of(T=3, blocks=2, n=5, seed=0):
    g = torch.randn(blocks, T, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return g, g @ g.mT


def test_the_agreeing_sham_by_hand():
    """v_i <- v_i + <v_i, g_j> / |g_j|^2 g_j where the two agree, as if what it has gained so far had the other sign."""
    g, gram = gram_of()
    order = torch.tensor([[1, 2], [2, 0], [0, 1]])
    C = controls.agree(gram, order)
    for b, i in itertools.product(range(2), range(3)):
        weights = torch.eye(3, dtype=torch.float64)[i]
        for j in order[i].tolist():
            turned = sum(weights[k] * gram[b, k, j] * (1 if k == j else -1) for k in range(3))
            weights[j] += max(0.0, -turned / gram[b, j, j])
        assert torch.allclose(C[b, i], weights)
    two = torch.tensor([[[4.0, 1.0], [1.0, 1.0]]]).double()  # g_0 is twice as long, and they agree
    assert controls.agree(two, [[1], [0]]).tolist() == [[[1, 1], [0.25, 1]]]
    assert torch.equal(controls.projection_coefficients(two, [[1], [0]]), torch.eye(2)[None].double())


def test_the_shuffled_sham_has_its_own_lengths_and_anothers_angles():
    order = torch.tensor([[1, 2], [2, 0], [0, 1]])
    g = torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)  # A, B, A, B, ...
    g[3, 1] = 0.0
    C = controls.shuffled(g @ g.mT, order)
    for b in (b for b in range(8) if 3 not in (b, (b - 4) % 8)):
        other = g[(b - 4) % 8] * g[b].norm(dim=1, keepdim=True) / g[(b - 4) % 8].norm(dim=1, keepdim=True)
        assert torch.allclose(C[b], controls.projection_coefficients((other @ other.T)[None], order)[0])
    assert C.isfinite().all()


def test_the_late_sham_is_one_step_behind():
    late, order = controls.late(), torch.tensor([[1, 2], [2, 0], [0, 1]])
    grams = [gram_of(seed=seed)[1] for seed in range(3)]
    got = [late(gram, order) for gram in grams]
    assert torch.equal(got[0], torch.eye(3).double().expand(2, 3, 3))
    for before, C in zip(grams, got[1:], strict=False):
        assert torch.equal(C, controls.projection_coefficients(before, order))


def test_a_control_is_bound_and_changes_the_training_and_nothing_without_it(tmp_path, flags, capsys):
    outs = {name: tmp_path / name for name in ("plain", "none", "agree", "late")}
    ortho = [*flags, "--methods=ortho", "--per-task=loop", "--save-every=1e9"]
    assert not train.main([*ortho, f"--out={outs['plain']}"])
    assert not controls.main([*ortho, f"--out={outs['none']}"])
    for name in ("agree", "late"):
        assert not controls.main([*ortho, f"--control={name}", f"--out={outs[name]}"])
        assert json.loads((outs[name] / "settings.json").read_text())["settings"]["control"] == name
    logs = {name: (out / "ortho/seed0/log.jsonl").read_text() for name, out in outs.items()}
    assert logs["plain"] == logs["none"] and len(set(logs.values())) == 3
    first = {name: json.loads(text.splitlines()[0]) for name, text in logs.items()}
    assert set(first["late"]["effective"].values()) == {1.0} != set(first["agree"]["effective"].values())
    assert "control" not in train.Settings.__dataclass_fields__  # what was replaced is back
    assert ortholora.projection_coefficients is controls.projection_coefficients
    assert controls.main([*ortho, f"--out={outs['agree']}", "--resume"]) == 2  # without its control
    capsys.readouterr()
    again = [*ortho, "--control=agree", "--out", str(outs["agree"])]
    assert controls.main(again) == 2  # without --resume: it says the command that would go on
    assert f"python experiments/controls.py {shlex.join(again)} --resume" in capsys.readouterr().err.strip()
    (outs["none"] / "ortho" / "seed1").mkdir()  # of another process, which is at work on it
    assert not controls.main([*ortho, f"--out={outs['none']}", "--resume"])
    losses = json.loads((outs["none"] / "losses.json").read_text())["ortho"]["0"]
    encoder, _, (data, *_) = train.load(train.Settings(**train.parse(flags)))
    model = evaluate.load_tuned(encoder, outs["none"] / "ortho" / "seed0" / data.name, data.name).eval()
    with torch.no_grad():
        logits = torch.cat([model(data.name, *inputs([x], 0, torch.device("cpu"))) for x in data.validation])
    expected = torch.nn.functional.cross_entropy(logits, torch.as_tensor(data.validation_labels))
    assert losses[data.name]["loss"] == pytest.approx(expected.item(), rel=1e-5)
    share = np.unique(logits.argmax(1), return_counts=True)[1].max() / len(logits)
    assert losses[data.name]["commonest"] == pytest.approx(share)


@pytest.mark.parametrize(
    "more, words",
    [
        (["--control=agree", "--methods=joint"], "stands in for a projection"),
        (["--control=agree", "--sequential"], "which does not use what it replaces"),
        (["--control=late"], "one method, one seed, and --save-every"),
        (["--control=late", "--save-every=1e9", "--seeds=0,1"], "one method, one seed"),
        (["--jobs=2"], "a sham is put into one process"),
        (["--out="], "give --out FOLDER"),
        (["--control=early"], "'early' is none of"),
        (["--control=shuffled", "--unit=all"], "blocks that are an A or a B of square layers"),
        (["--control=shuffled", "--targets=all-linear"], "and the default --targets"),
        (["--control=agree", "--demo"], "the demo has workers and seeds of its own"),
    ],
)
def test_what_a_control_can_not_do_is_refused(more, words, tmp_path, flags, capsys):
    assert controls.main([*flags, "--methods=ortho", f"--out={tmp_path / 'out'}", *more]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# tries.py


def test_a_tasks_step_is_the_one_that_adam_takes_for_it_alone():
    """Three steps of torch's Adam at rate 1 on each row by itself: what it subtracts is the row."""
    grads, step = torch.randn(3, 2, 5) * torch.tensor([[1.0], [100.0]]), tries.steps()
    alone = [torch.nn.Parameter(torch.zeros(5)) for _ in range(2)]
    adam = torch.optim.Adam(alone, lr=1.0)
    for rows in grads:
        before = [p.detach().clone() for p in alone]
        for p, g in zip(alone, rows, strict=True):
            p.grad = g.clone()
        adam.step()
        step(rows)
        assert torch.allclose(rows, torch.stack([b - p for b, p in zip(before, alone, strict=True)]), atol=1e-5)


def test_running_balance_by_hand():
    """First norms 1 and 3: both become 2. Then 1 and 9, of which s is sqrt of (0.95 + 1, 0.95 * 9 + 81) / 1.95."""
    balance, rows = tries.running(), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    balance(rows)
    assert torch.allclose(rows, torch.tensor([[2.0, 0.0], [0.0, 2.0]]))
    rows = torch.tensor([[1.0, 0.0], [0.0, 9.0]])
    balance(rows)
    s = ((0.95 * torch.tensor([1.0, 9.0]) + torch.tensor([1.0, 81.0])) / 1.95).sqrt()
    assert torch.allclose(rows.norm(dim=1), s.mean() / s * torch.tensor([1.0, 9.0]))
    rows = torch.zeros(2, 2)
    tries.running()(rows)  # no gradient at all
    assert not rows.any()


def test_a_try_moves_the_adapter_by_the_projected_steps(tmp_path, flags, capsys):
    """One step, B = 0: Adam's first is g / |g| at every place, so B moves by the rate times the tasks' sum of signs."""
    one = [*flags, "--steps=1", "--warmup=0", "--weight-decay=0", "--lr=0.5", "--methods=joint", "--per-task=loop"]
    assert not tries.main([*one, "--attempt=steps", f"--out={tmp_path / 'steps'}"])
    (path, *_) = (tmp_path / "steps").rglob("adapter_model.safetensors")
    moved = [x for name, x in read_safetensors(path).items() if "lora_B" in name]
    assert torch.stack([x.abs().max() for x in moved]).max() == pytest.approx(1.5, abs=1e-3)  # three tasks agree
    assert json.loads((tmp_path / "steps/settings.json").read_text())["settings"]["attempt"] == "steps"
    assert not tries.main([*one, "--attempt=running", f"--out={tmp_path / 'running'}"])
    assert train.balance is tries.balance and train.make_optimizer is tries.make_optimizer
    one_of = "give one method, joint, pcgrad or ortho, and one seed"
    refused = {"--balance": "in the place of", "--seeds=0,1": one_of, "--methods=single": one_of, "--methods=": one_of}
    for more, words in refused.items():
        assert tries.main([*one, "--attempt=steps", more, f"--out={tmp_path / 'no'}"]) == 2
        assert words in capsys.readouterr().err and not (tmp_path / "no").exists()


# ---------------------------------------------------------------------------------------------------------------------
# merging.py


def test_a_merge_at_a_weight_is_what_train_makes_and_nothing_is_trained_twice(tmp_path, flags, capsys):
    own = [*flags, "--methods=single,lora-merged", "--own-a"]
    assert not train.main([*own, f"--out={tmp_path / 'plain'}", "--merge-weight=0.5"])
    assert not merging.main([*own, f"--out={tmp_path / 'out'}", "--merge-weights=0.5,2"])
    found = json.loads((tmp_path / "out/results.json").read_text())["methods"]
    plain = json.loads((tmp_path / "plain/results.json").read_text())["methods"]
    assert list(found) == ["single", "lora-merged at 0.5", "lora-merged at 2"]
    assert found["single"] == plain["single"] and found["lora-merged at 0.5"] == plain["lora-merged"]
    adapters = [
        {path.parent.name: path.read_bytes() for path in out.glob("lora-merged/seed0/*/adapter_model.safetensors")}
        for out in (tmp_path / "plain", tmp_path / "out/0.5", tmp_path / "out/2")
    ]
    assert adapters[0] == adapters[1] != adapters[2] and adapters[0].keys() == adapters[2].keys()
    logs = [path for path in tmp_path.rglob("out/**/log.jsonl")]
    before = [path.stat().st_mtime_ns for path in logs]
    assert logs and all("trained" in path.parts for path in logs)
    assert not merging.main([*own, f"--out={tmp_path / 'out'}", "--merge-weights=0.5,2", "--resume"])
    assert merging.main([*own, f"--out={tmp_path / 'plain'}", "--merge-weights=0.5,2"]) == 2  # train.py's
    assert "another run's settings.json" in capsys.readouterr().err
    assert [path.stat().st_mtime_ns for path in logs] == before


def test_an_interruption_ends_merging_and_its_own_command_goes_on(tmp_path, flags, monkeypatch, capsys):
    own = [*flags, "--methods=single,lora-merged", f"--out={tmp_path / 'out'}", "--merge-weights=0.5,2"]
    calls = mock.Mock(side_effect=[0, 130])
    monkeypatch.setattr(train, "main", calls)
    assert merging.main(own) == 130 and calls.call_count == 2
    monkeypatch.undo()
    (tmp_path / "out/trained").mkdir(parents=True, exist_ok=True)
    (tmp_path / "out/trained/settings.json").write_text("{}")
    assert merging.main(own) == 2
    assert "python experiments/merging.py" in (said := capsys.readouterr().err) and said.strip().endswith("--resume")


@pytest.mark.parametrize(
    "more, words",
    [
        (["--merge-weights=a"], "--merge-weights 'a' is not a list of numbers"),
        (["--merge-weights=1,0"], "above 0, and at most 1,000"),
        (["--methods=lora-merged"], "made from single, so name that too"),
        (["--lr=-1"], "--lr -1.0 is outside"),
    ],
)
def test_what_can_not_be_merged_is_refused(more, words, tmp_path, flags, capsys):
    own = ["--methods=single,lora-merged", "--merge-weights=1", f"--out={tmp_path / 'out'}", *more]
    assert merging.main([*flags, *own]) == 2
    error = capsys.readouterr().err.strip()
    assert words in error and "\n" not in error and not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------------------------------
# premise.py


def test_products_of_group_means_by_two_loops():
    G, T, n = 5, 3, 7
    x = torch.randn(G, T, n, dtype=torch.float64)
    c, without = premise.unbiased(torch.einsum("gin,hjn->gihj", x, x))
    for left_out in (None, *range(G)):
        groups = [g for g in range(G) if g != left_out]
        pairs = [(g, h) for g in groups for h in groups if g != h]
        expected = sum(x[g] @ x[h].T for g, h in pairs) / len(pairs)
        assert torch.allclose(c if left_out is None else without[left_out], expected)


def test_the_cosine_of_means_is_found_in_noise_with_its_error():
    """Two directions at 60°, drowned in each batch; over many trials the error that is said is the one that is made."""
    mean, found = torch.tensor([[2.0, 0.0], [1.0, 3**0.5]], dtype=torch.float64), []
    for seed in range(200):
        noise = torch.randn(8, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        x = mean + 0.5 * noise
        (described, *_) = premise.described(torch.einsum("gin,hjn->gihj", x, x), x.square().sum(2).mean(0))
        found.append((described["cosine"][0][1], described["error"][0][1]))
    values, errors = np.array(found).T
    assert values.mean() == pytest.approx(0.5, abs=0.02)
    assert np.sqrt((errors**2).mean()) == pytest.approx(values.std(), rel=0.2)


def test_premise_measures_at_fixed_points(tmp_path, flags, monkeypatch, capsys):
    monkeypatch.setattr(premise, "POINTS", (2,))
    monkeypatch.setattr(premise, "BATCHES", 2)
    monkeypatch.setattr(premise, "GROUPS", 4)
    assert not premise.main([*flags, f"--out={tmp_path}"])
    points = json.loads((tmp_path / "results.json").read_text())["methods"]["joint"]["0"]["points"]
    assert list(points) == ["2", "6"]
    for found in points.values():
        assert {"A", "B", "A and B", "A less B", "rate"} == found.keys()
        assert np.shape(found["B"]["cosine"]) == (3, 3) and 0 <= found["rate"] <= 1
        assert found["B"]["cosine"][0][0] in (None, 1.0)
    before = (tmp_path / "results.json").read_bytes()
    for more, words in (["", "has a results.json"], ["--jobs=2", "leave out --jobs"]):
        assert premise.main([*flags, f"--out={tmp_path}", *[more] * bool(more)]) == 2
        assert words in capsys.readouterr().err and (tmp_path / "results.json").read_bytes() == before


# ---------------------------------------------------------------------------------------------------------------------
# flipped.py


@pytest.fixture
def pairs(tmp_path, monkeypatch):
    """A GLUE of STS-B and QQP, made small: of 12 rows, scores 0, 1, 2, 2.5, 3, 3.4, 3.5, 4, … and labels 0, 1, 0, …"""
    monkeypatch.setattr(flipped, "QUARTER", {"train": 4, "validation": 3})
    scores, rows = [0, 1, 2, 2.5, 3, 3.4, 3.5, 4, 4.5, 5, 3, 3], {}
    for split in ("train", "validation"):
        for task, (first, second, label) in {"stsb": flipped.NAMES["mrpc"], "qqp": flipped.NAMES["qqp"]}.items():
            labels = scores if task == "stsb" else [n % 2 for n in range(12)]
            texts = ("A man", "A woman") if task == "stsb" else ("Is it", "Was it")
            rows.setdefault(task, {})[split] = [
                {first: f"{texts[0]} {split} {n}", second: f"{texts[1]} {n}", label: x} for n, x in enumerate(labels)
            ]
    write_glue(tmp_path / "glue", rows)
    return tmp_path / "glue"


def test_flipped_tasks_differ_on_the_questions_and_only_there(pairs):
    plain, turned = (flipped.make(str(pairs), share, 0) for share in (0, 1))
    assert plain["mrpc"] == turned["mrpc"]
    for split, quarter in flipped.QUARTER.items():
        a, same, other = (
            [tuple(row.values()) for row in rows]
            for rows in (plain["mrpc"][split], plain["qqp"][split], turned["qqp"][split])
        )
        assert a == same and [row[:2] for row in a] == [row[:2] for row in other] and len(set(a)) == 4 * quarter
        questions = [row[0].startswith("Is it") for row in a]
        assert [x[2] != y[2] for x, y in zip(a, other, strict=True)] == questions
        for row, question in zip(a, questions, strict=True):
            n = int(row[1].split()[-1])
            assert row[2] == (n % 2 if question else {True: 0, False: 1}[n < 4]) and (question or n not in (4, 5))
        assert all(sum(x) == 2 * quarter for x in (questions, [row[2] for row in a], [row[2] for row in other]))


def test_a_flipped_folder_is_one_that_train_py_reads(tmp_path, pairs, demo):
    assert not flipped.main([str(tmp_path / "out"), f"--glue={pairs}", "--share=1"])
    s = train.Settings(model=str(demo / "model"), glue=str(tmp_path / "out"), tasks="mrpc,qqp", max_length=32)
    _, _, (a, b) = train.load(s)
    tasks = flipped.make(str(pairs), 1, 0)
    assert a.train_labels.tolist() == [row["label"] for row in tasks["mrpc"]["train"]]
    assert b.validation_labels.tolist() == [row["label"] for row in tasks["qqp"]["validation"]]


def test_rows_held_out_of_both_flipped_tasks_are_the_same(pairs):
    whole, (a, b) = flipped.make(str(pairs), 1, 0), flipped.make(str(pairs), 1, 0, holdout=5).values()
    for task, splits in (("mrpc", a), ("qqp", b)):
        assert splits["validation"] + splits["train"] == whole[task]["train"] and len(splits["validation"]) == 5
    held = [[row["sentence1"] for row in a["validation"]], [row["question1"] for row in b["validation"]]]
    with pytest.raises(flipped.BadInput, match="--holdout 16: there are 16 training rows"):
        flipped.make(str(pairs), 1, 0, holdout=16)
    assert held[0] == held[1] and not set(held[0]) & {row["question1"] for row in b["train"]}


def test_too_few_rows_are_said(tmp_path, pairs, monkeypatch, capsys):
    monkeypatch.setattr(flipped, "QUARTER", {"train": 5, "validation": 3})
    assert flipped.main([str(tmp_path / "out"), f"--glue={pairs}"]) == 2
    error = capsys.readouterr().err
    assert "stsb train: 5 rows labelled 0 wanted, 4 there" in error and not (tmp_path / "out").exists()
    next((pairs / "qqp").glob("validation*")).unlink()
    monkeypatch.setattr(flipped, "QUARTER", {"validation": 3})
    assert flipped.main([str(tmp_path / "out"), f"--glue={pairs}"]) == 2
    assert "has no split 'validation'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# plan.py and reproduce.py


@pytest.fixture
def small(tmp_path, demo, monkeypatch):
    """reproduce.py with a small experiment on the demo's files; call it, and get the units' files."""

    def call(cells, *more):
        monkeypatch.setitem(reproduce.EXPERIMENTS, "small", ("A small one.", cells))
        arguments = ["reproduce.py", "small", "--model", str(demo / "model"), "--glue", str(demo / "glue"), *more]
        arguments += ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", arguments)
        reproduce.main()
        return {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("results/small/units/*")}

    return call


SMALL = "--tasks sst2,mrpc --steps 2 --batch-size 4 --max-length 32"


def test_reproduce_runs_what_is_missing_and_says_where_it_comes_from(tmp_path, small, capsys):
    rows = {"joint": "--methods joint", "ortho, agree": "--methods ortho --control agree --lr 1e-2"}
    cells = {"one": plan.Cell(SMALL, rows, range(2)), "other": plan.Cell(SMALL, rows, range(1))}
    assert not small(cells, "--minutes=0")
    found = small(cells, "--jobs=2", "--only=^one:")
    assert len(found) == 4 and set(found) == {f"one-{row}-seed{n}" for row in ("joint", "ortho-agree") for n in (0, 1)}
    unit = found["one-ortho-agree-seed1"]
    assert unit["command"].startswith("python experiments/controls.py --tasks sst2,mrpc") and str(tmp_path) not in str(
        unit
    )
    assert (
        "--control agree" in unit["command"] and "--seeds 1" in unit["command"] and "--model MODEL" in unit["command"]
    )
    assert {"commit", "source", "hardware", "torch", "seconds", "date", "majority"} <= unit.keys()
    run = json.loads((tmp_path / "runs/small/one-ortho-agree-seed1/results.json").read_text())
    assert run["settings"]["lr"] == 1e-2 and run["settings"]["control"] == "agree"
    entry, kept = run["methods"]["ortho"]["1"], unit["results"]["ortho"]
    assert kept["average"] == pytest.approx(entry["average"], abs=1e-4) and "blocks" not in kept["conflicts"]
    assert {"accuracy", "score", "loss", "commonest"} <= kept["tasks"]["sst2"].keys()
    facts = json.loads((tmp_path / "runs/small/one-ortho-agree-seed1/settings.json").read_text())["facts"]
    assert unit["checksums"].keys() == {"the weights of the model", "the data of sst2", "the data of mrpc"}
    assert unit["checksums"].items() <= facts.items()
    begun = tmp_path / "runs/small/one-joint-seed0/begun.json"  # elsewhere, so it starts over
    begun.write_text(begun.read_text().replace(torch.__version__, "1.13"))
    for seed in (0, 1):
        (tmp_path / f"results/small/units/one-joint-seed{seed}.json").unlink()
    files = {*tmp_path.glob("results/small/units/*"), *tmp_path.glob("runs/small/*/joint/*/log.jsonl")}
    before = {path: path.stat().st_mtime_ns for path in files}
    assert small(cells, "--only=^one:").keys() == found.keys()
    trained = {path for path in files if path.stat().st_mtime_ns != before[path]}
    assert trained == {begun.parent / "joint/seed0/log.jsonl"}


def test_the_demo_says_how_many_ran_at_a_time_and_one_begun_elsewhere_starts_over(tmp_path, monkeypatch):
    calls, folder = [], tmp_path / "runs" / "demo"

    def ran(command, **_):
        calls.append(command)
        if "train.py" in command:
            (folder / "results.json").write_text('{"seeds": [0]}')
            (folder / "results.md").write_text("a table")

    monkeypatch.setattr(reproduce.subprocess, "run", ran)
    monkeypatch.setattr(reproduce, "machine", lambda device: {"commit": "this", "date": "today"})
    args = mock.Mock(out=str(tmp_path / "runs"), results=str(tmp_path / "results"), jobs=5)

    def again():
        (folder / "old").touch() if folder.exists() else None
        reproduce.demo(args)
        return (folder / "old").exists()

    assert not again() and again()
    assert json.loads((tmp_path / "results/demo/results.json").read_text())["jobs"] == min(8, os.cpu_count())
    (folder / "begun.json").write_text("{}")
    assert not again() and "--resume" in calls[0]


def test_a_world_of_another_maker_or_half_made_is_made_anew(tmp_path, monkeypatch):
    made = []

    def make(command, **_):
        made.append(command)
        Path(command[command.index("support.toy") + 1]).mkdir()
        return mock.Mock(returncode=0)

    monkeypatch.setattr(reproduce.subprocess, "run", make)
    unit = reproduce.Unit("x", "one", plan.Cell("", {"a": ""}, range(1), "toy 0.5"), "a", 3)
    args = argparse.Namespace(out=tmp_path, model="m", glue="g")
    for times, change in ((1, None), (1, None), (2, lambda file: file.unlink()), (3, lambda file: file.write_text(""))):
        if change:
            change(tmp_path / "toy-0.5-3" / "made")
        assert reproduce.data_of(unit, args) == (f"{tmp_path}/toy-0.5-3/model", f"{tmp_path}/toy-0.5-3/glue")
        assert len(made) == times


def test_units_come_seed_by_seed():
    cell = plan.Cell(SMALL, {"a": "", "b": ""}, range(2))
    cells = {"x": cell, "y": plan.Cell(SMALL, {"c": ""}, range(7, 8))}
    reproduce.EXPERIMENTS["order"] = ("", cells)
    try:
        assert [(u.name, u.row, u.seed) for u in reproduce.units("order")] == [
            ("x", "a", 0), ("x", "b", 0), ("y", "c", 7), ("x", "a", 1), ("x", "b", 1),
        ]  # fmt: skip
    finally:
        del reproduce.EXPERIMENTS["order"]


def test_no_jobs_are_refused(small, capsys):
    with pytest.raises(SystemExit):
        small({}, "--jobs=0")
    assert "--jobs 0: at least one" in capsys.readouterr().err


def test_reproduce_runs_continual(small):
    rows = {"LoRA": "--methods single", "LoRI": "--methods lori-s"}
    cell = plan.Cell(SMALL + " --lr 1e-3", rows, range(1), script="experiments/continual.py")
    found = small({"sst2, mrpc": cell})
    assert np.shape(found["sst2-mrpc-LoRI-seed0"]["results"]["lori-s"]["matrix"][1]) == (2,)


def test_a_failing_unit_says_where_its_output_is(tmp_path, small):
    with pytest.raises(SystemExit, match=r"ended with 2; see .*output.txt"):
        small({"one": plan.Cell(SMALL + " --lr -1", {"joint": "--methods joint"}, range(1))})
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_products_in_float32_are_rounded_once_and_others_are_as_they_were(dtype):
    torch.manual_seed(0)
    a, b, c = (torch.randn(5, 4, 6, dtype=dtype), torch.randn(5, 6, 3, dtype=dtype), torch.randn(3, dtype=dtype))
    layer, x = torch.nn.Linear(6, 3).to(dtype), a.clone().requires_grad_()

    def products():
        x.grad = layer.weight.grad = None
        layer(x).square().sum().backward()
        return [a[0] @ b[0], a @ b, torch.addmm(c, a[0], b[0], alpha=2), layer(x).detach(), x.grad, layer.weight.grad]

    plain, replaced = products(), bf16.replace()
    ours = products()
    other = torch.float64 if dtype == torch.float32 else torch.float32
    with pytest.raises(RuntimeError, match="dtype"):  # torch still refuses
        a[0] @ b[0].to(other)
    del replaced
    exact = [a[0].double() @ b[0].double(), a.double() @ b.double(), c.double() + 2 * (a[0].double() @ b[0].double())]
    for said, true in zip(ours, exact, strict=False):
        assert said.dtype == dtype
        torch.testing.assert_close(said, true.to(dtype), rtol=1e-6, atol=1e-6)  # bf16's next number is 4e-3 away
    for said, before in zip(ours, plain, strict=True):
        assert said.dtype == before.dtype
        torch.testing.assert_close(said, before, rtol=1e-2 * (dtype == torch.bfloat16), atol=0)
    assert all(map(torch.equal, products(), plain))  # gone


@pytest.mark.parametrize("words", [[], ["--help"], ["nowhere.py"]])
def test_without_a_script_bf16_says_what_it_wants(words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bf16.py", *words])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(bf16.__file__, run_name="__main__")
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.startswith("bf16.py: give a script") and said.count("\n") == 1


def test_a_unit_in_bf16_says_how_it_was_multiplied(small, monkeypatch):
    monkeypatch.setattr(reproduce, "slow_in_bf16", lambda: True)
    cells = {n: plan.Cell(f"{SMALL} --dtype {n}", {"joint": "--methods joint"}, range(1)) for n in ("bf16", "fp32")}
    found = small(cells)
    assert found["bf16-joint-seed0"]["processor"].endswith("products of bf16 in float32")
    assert not found["fp32-joint-seed0"]["processor"].endswith("in float32")
    losses = [unit["results"]["joint"]["tasks"]["sst2"]["loss"] for unit in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)


def test_a_unit_in_bf16_is_multiplied_by_torch_where_it_can(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(reproduce, "slow_in_bf16", lambda: False)
    monkeypatch.setattr(reproduce, "machine", lambda device: {"processor": "one", "date": "today"})
    monkeypatch.setattr(reproduce.subprocess, "run", lambda words, **_: ran.extend(words) or mock.Mock(returncode=0))
    monkeypatch.setattr(reproduce, "gathered", lambda unit, folder, about: about)
    unit = reproduce.Unit("x", "one", plan.Cell(f"{SMALL} --dtype bf16", {"a": ""}, range(1)), "a", 0)
    reproduce.run(unit, mock.Mock(model="m", glue="g", out=tmp_path / "runs", results=tmp_path))
    assert json.loads(unit.path(tmp_path).read_text())["processor"] == "one"
    assert "bf16" in ran and not [word for word in ran if word.endswith("bf16.py")]


def test_every_flag_of_the_plan_is_its_scripts():
    for name in plan.EXPERIMENTS:
        files = [str(unit) for unit in reproduce.units(name)]
        assert len(set(files)) == len(files)
        for unit in {(u.name, u.row): u for u in reproduce.units(name)}.values():
            script, *words = [*reproduce.words(unit, "m", "g"), "--out=o"]
            if "continual" in script:
                continual.check(continual.Settings(**continual.parse(words)))
                continue
            if "merging" in script:
                merging.parse(words)
                continue
            plain, train.Settings = train.Settings, tries.Settings if "tries" in script else controls.Settings
            try:
                s = train.Settings(**train.parse(words))
            finally:
                train.Settings = plain
            train.check(s)
            controls.check(s, {"model", "glue"})


def test_every_contrast_is_of_rows_that_the_plan_has():
    for experiment, pairs in plan.ACROSS.items():
        assert all(row in plan.EXPERIMENTS[experiment][1][cell].rows for _, *ends in pairs for cell, row in ends)
    assert len(plan.CONTRASTS) <= 4
    for c in plan.CONTRASTS:
        cell = plan.EXPERIMENTS[c.experiment][1][c.cell]
        assert {c.row, c.base} <= cell.rows.keys() and len(cell.seeds) >= 5


# The numbers of one tiny run. Units stand in experiments/results that were made by this code: whoever changes what it
# computes changes these, and has to run them again, or take the change back.

TINY = {
    "single": [0.81947, 2.6002, 0.74326, 1.6952, 2.4181, 17.998],
    "joint": [0.71623, 0.80058, 2.4176, 17.989],
    "pcgrad": [0.71441, 0.78504, 2.4483, 18.421, 7.2032, 2.1838, 1.0226],
    "ortho": [0.71556, 0.79832, 2.4173, 18.01, 6.1712, 4.2992, 1.0918],
    "lori-d": [0.82249, 2.6195, 0.74663, 1.7648, 2.5327, 19.029],
    "balance": [0.71385, 0.78106, 2.5209, 19.089, 1.0077, 1.2285, 1.3068],
    "agree": [0.71831, 0.81598, 2.4214, 17.857, 3.9519, 1.1361, 1.0],
    "late": [0.7163, 0.8013, 2.4154, 17.956, 1.0037, 1.0, 1.0001],
}


def tiny_runs(folder):
    """{method or sham: {"loss": of the last step by task, "norm": the gradient's, "effective": weights}}, 4 steps each.

    The encoder is as good as random, so that no pretraining's rounding is in it.
    """
    toy, found = make_demo(folder / "toy", rows=60, steps=1, quiet=True), {}
    flags = ["--tasks=sst2,mrpc,stsb", "--steps=4", "--batch-size=4", "--max-length=32", "--lr=3e-2", "--device=cpu"]
    flags += [f"--model={toy}/model", f"--glue={toy}/glue", "--dtype=fp32", "--per-task=loop"]
    for name in ("single", "joint", "pcgrad", "ortho", "lori-d", "balance", "agree", "late"):
        method = [f"--methods={name if name in train.METHODS else 'ortho'}", f"--out={folder / name}"]
        more = {"balance": ["--balance"], "agree": ["--control=agree"], "late": ["--control=late", "--save-every=1e9"]}
        assert not controls.main([*flags, *method, *more.get(name, [])])
        logs = [path.read_text().splitlines() for path in sorted((folder / name).rglob("log.jsonl"))]
        last = [json.loads(lines[-1]) for lines in logs]
        found[name] = [x for entry in last for x in (*entry["loss"].values(), entry["grad_norm"])]
        found[name] += last[0].get("effective", {}).values()
    return found


def test_a_tiny_run_is_what_it_was_when_the_published_ones_were_made(tmp_path):
    found = tiny_runs(tmp_path)
    assert found.keys() == TINY.keys()
    for name, numbers in TINY.items():
        assert found[name] == pytest.approx(numbers, rel=2e-3), name
