"""train.py from end to end on the small demo: what it prints, what it writes, and what it says to bad input."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import lora
import lori
import train
from glue import encode, load_task, load_tokenizer, score
from model import load_encoder
from support.checkpoint import Stopped, load_masks, read_header, read_safetensors, write_safetensors
from support.hub import HubError, hub_answers

ROOT = Path(__file__).parent.parent


@pytest.fixture
def run(demo, tmp_path, capsys):
    """run("--steps 3 …") trains on the small demo's files: (exit status, standard output, standard error)."""

    def run(text="", **paths):
        paths = {"model": demo / "model", "glue": demo / "glue", "out": tmp_path / "out"} | paths
        flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
        status = train.main(flags + ["--max-length", "32", "--batch-size", "4", "--dtype", "fp32"] + text.split())
        return status or 0, *capsys.readouterr()

    return run


def no_progress():
    """What `train` asks for, and writes nothing."""
    progress = train.Progress("", {}, every=0, active=False)
    progress.begin("method", 0)
    return progress


ALL = "--tasks sst2,mnli,stsb --methods head,single,joint,pcgrad,ortho --steps 5"


@pytest.fixture(scope="module")
def finished(demo, tmp_path_factory):
    """One run of everything, for the tests that look at what it left."""
    out = tmp_path_factory.mktemp("finished")
    flags = ["--model", str(demo / "model"), "--glue", str(demo / "glue"), "--out", str(out), "--max-length", "32"]
    assert not train.main([*flags, *ALL.split(), "--batch-size", "4", "--seeds", "0,1", "--lr", "5e-3"])
    return out, json.loads((out / "results.json").read_text())


# ---------------------------------------------------------------------------------------------------------------------
# The run


def test_results(finished):
    out, results = finished
    assert list(results["methods"]) == ["head", "single", "joint", "pcgrad", "ortho"]
    r = 8
    config = json.loads((Path(results["settings"]["model"]) / "config.json").read_text())
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    adapter = layers * 2 * r * (width + width)  # query and value, A and B
    for method, factor in (("head", 0), ("single", 3), ("joint", 1), ("pcgrad", 1), ("ortho", 1)):
        for seed in ("0", "1"):
            entry = results["methods"][method][seed]
            assert entry["adapter_parameters"] == factor * adapter
            scores = [entry["tasks"][task]["score"] for task in ("sst2", "mnli", "stsb")]
            assert entry["average"] == pytest.approx(np.mean(scores)) and np.isfinite(scores).all()
            assert ("conflicts" in entry) == (method in ("pcgrad", "ortho"))
    heads = {m: results["methods"][m]["0"]["head_parameters"] for m in results["methods"]}
    assert len(set(heads.values())) == 1 and heads["joint"] > 0
    conflicts = results["methods"]["ortho"]["0"]["conflicts"]
    assert len(conflicts["blocks"]) == layers * 4 and set(conflicts["pairs"]) == {"sst2-mnli", "sst2-stsb", "mnli-stsb"}
    assert list(results["methods"]["pcgrad"]["0"]["conflicts"]["blocks"]) == ["AB"]
    assert not any(path.name.startswith(".") for path in out.rglob("*"))  # no temporary file is left


def test_first_step_has_no_conflict_in_A(finished):
    # B = 0 at the first step, so A has no gradient: of 5 steps at most 4 can conflict.
    blocks = finished[1]["methods"]["ortho"]["0"]["conflicts"]["blocks"]
    assert all(rate <= 0.8 for name, (rate, _, _) in blocks.items() if name.endswith(".A"))


def test_table_and_files(finished):
    out, results = finished
    text = (out / "results.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [row.split("|")[1].strip() for row in rows] == [
        "method",
        rows[1].split("|")[1],
        "majority class",
        "head",
        "single",
        "joint",
        "pcgrad",
        "ortho",
    ]
    assert "two seeds" in rows[-1] and "±" in rows[-1]
    assert "layer" in text and "by task pair" in text
    timing = json.loads((out / "timing.json").read_text())
    assert timing["methods"]["joint"]["1"]["seconds_per_step"] > 0
    entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {e["method"] for e in entries} == set(results["methods"])
    assert all(0 <= e["conflict_rate"] <= 1 for e in entries if e["method"] == "ortho")


def test_same_command_same_bytes(run, tmp_path):
    texts = []
    for name in ("one", "two"):
        assert run(ALL, out=tmp_path / name)[0] == 0
        adapter = tmp_path / name / "ortho/seed0/sst2/adapter_model.safetensors"
        texts.append(((tmp_path / name / "results.json").read_bytes(), adapter.read_bytes()))
    assert texts[0] == texts[1]


def test_one_task_makes_all_methods_equal(run, tmp_path):
    # One task has nobody to conflict with: single, joint, PCGrad and Ortho-LoRA are one run, to the bit.
    assert run("--tasks mnli --methods single,joint,pcgrad,ortho --steps 4")[0] == 0
    folders = [tmp_path / "out" / method / "seed0/mnli" for method in ("single", "joint", "pcgrad", "ortho")]
    tensors = [read_safetensors(folder / "adapter_model.safetensors") for folder in folders]
    assert any(t.abs().max() > 0 for name, t in tensors[0].items() if "lora_B" in name)
    assert all(torch.equal(t[name], tensors[0][name]) for t in tensors for name in t)


def test_methods_start_from_the_same_numbers_and_differ_after(finished):
    out, _ = finished
    load = lambda m, s, t: read_safetensors(out / m / f"seed{s}" / t / "adapter_model.safetensors")  # noqa: E731
    joint, ortho, head = load("joint", 0, "sst2"), load("ortho", 0, "sst2"), load("head", 0, "sst2")
    name = next(n for n in joint if "lora_B" in n)
    assert not torch.equal(joint[name], ortho[name])
    assert not head[name].any()  # B = 0: head trains no factor
    other = load("joint", 0, "mnli")
    assert torch.equal(joint[name], other[name]) and joint["base_model.model.classifier.weight"].shape[0] == 2
    A = name.replace("lora_B", "lora_A")
    assert torch.equal(head[A], load("head", 0, "mnli")[A]) and not torch.equal(head[A], load("head", 1, "sst2")[A])


def test_it_learns(run, tmp_path):
    # A task that one word decides: no single step is enough, sixty are.
    words = ("kind", "cruel")
    rows = [{"sentence": f"the {words[i]} {noun}", "label": i} for i in range(2) for noun in ("dog", "car", "hat")]
    for split in ("train", "validation"):
        write_rows(tmp_path / "glue/sst2", rows, split)
    for method in ("joint", "ortho"):
        assert run(f"--tasks sst2 --methods {method} --steps 60 --lr 1e-2", glue=tmp_path / "glue")[0] == 0
        results = json.loads((tmp_path / "out/results.json").read_text())
        assert results["methods"][method]["0"]["tasks"]["sst2"]["accuracy"] == 1.0
        assert results["majority"]["sst2"]["accuracy"] == 0.5


@pytest.mark.parametrize(
    "flags, blocks",
    [
        ("--unit factor", ["A", "B"]),
        ("--unit all", ["AB"]),
        ("--unit factor --factors B", ["B"]),
        ("--sequential", None),
        (
            "--factors A --combine mean --task-weights 1,2 --optimizer sgd --rslora --targets all-linear --dropout 0.1",
            None,
        ),
    ],
)
def test_options(run, tmp_path, flags, blocks):
    assert run(f"--tasks sst2,stsb --methods ortho --steps 3 {flags}")[0] == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["methods"]["ortho"]["0"]["conflicts"]["blocks"]
    assert blocks is None or list(found) == blocks
    if "all-linear" in flags:
        assert all(name.endswith(".A") for name in found) and any(name.endswith("output.dense.A") for name in found)


def test_mean_is_the_sum_divided(demo):
    # With combine = mean every projected gradient is the sum's over T; heads keep theirs. One SGD step shows it.
    s = train.Settings(
        model=str(demo / "model"),
        glue=str(demo / "glue"),
        tasks="sst2,stsb",
        steps=1,
        batch_size=4,
        max_length=32,
        dtype="fp32",
        optimizer="sgd",
        clip=0.0,
        warmup=0.0,
        lr=0.1,
    )
    encoder, tasks = train.prepare(s, torch.device("cpu"))
    B = {}
    for combine in ("sum", "mean"):
        s.combine = combine
        with open(os.devnull, "w") as log:
            model = train.build("ortho", encoder, tasks, 0, s)
            train.train("ortho", model, tasks, 0, s, log, train.tqdm(disable=True), no_progress())
        B[combine] = [layer.B.detach() for layer in lora.lora_layers(model.encoder).values()]
    for a, b in zip(B["sum"], B["mean"], strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a / 2)


# ---------------------------------------------------------------------------------------------------------------------
# The same step by other means: one stacked batch, two processes, a compiled encoder


def adapters(out, methods, seed=0):
    """{method: all A, B and heads of an out folder as one vector}"""
    found = {}
    for method in methods:
        files = sorted((out / method / f"seed{seed}").glob("*/adapter_model.safetensors"))
        found[method] = torch.cat([t.flatten() for file in files for t in read_safetensors(file).values()])
    return found


def losses(out):
    lines = (out / "log.jsonl").read_text().splitlines()
    return [loss for line in lines for loss in json.loads(line)["loss"].values()]


def assert_same_run(one, other, methods):
    np.testing.assert_allclose(losses(one), losses(other), rtol=1e-4, atol=1e-6)  # a loss near 0 is rounding
    ours, theirs = adapters(one, methods), adapters(other, methods)
    for method in methods:
        assert (ours[method] - theirs[method]).norm() < 1e-4 * ours[method].norm()
        assert not torch.equal(ours[method], ours[methods[0]]) or method == methods[0]


SGD = "--tasks sst2,mnli,stsb --steps 5 --optimizer sgd --lr 0.05 --warmup 0"  # Adam would blow rounding up


compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")


@pytest.mark.parametrize(
    "flags",
    [
        "--task-weights 1,2,3",
        "--task-weights 1,1,2 --factors B --combine mean",
        "--balance",
        pytest.param("--compile", marks=compiler),
    ],
)
def test_stacked_is_the_loop(run, tmp_path, flags):
    # The demo's encoder has no dropout, so the two must agree.
    methods = ["joint", "ortho"] if "compile" in flags else ["single", "joint", "ortho", "lori-ortho"]
    for how, more in (("loop", flags if "compile" not in flags else ""), ("stacked", flags)):
        text = f"{SGD} --methods {','.join(methods)} --per-task {how} {more}"
        assert run(text, out=tmp_path / how)[0] == 0
        assert json.loads((tmp_path / how / "results.json").read_text())["settings"]["per_task"] == how
    assert_same_run(tmp_path / "loop", tmp_path / "stacked", methods)


@pytest.mark.parametrize("how", ["loop", "stacked"])
def test_compile_serves_every_method(run, tmp_path, monkeypatch, how):
    """Beyond a number of variants torch goes on uncompiled, with a warning that nobody reads; here it raises."""
    methods = ["head", "single", "joint", "pcgrad", "ortho", "lori-ortho", "lori-d", "lori-s"]
    flags = f"{SGD} --methods {','.join(methods)} --per-task {how}"
    assert run(flags, out=tmp_path / "plain")[0] == 0
    compile_ = torch.nn.Module.compile  # by the tracer alone: no C++ compiler, and seconds
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: compile_(self, backend="eager", **more))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        assert run(flags + " --compile", out=tmp_path / "compiled")[0] == 0
    assert_same_run(tmp_path / "plain", tmp_path / "compiled", methods)


def test_balance_changes_shared_adapters_alone(run, tmp_path):
    methods = ["single", "joint", "ortho"]
    for name, flag in ("plain", ""), ("balanced", "--balance"):
        assert run(f"{SGD} --methods {','.join(methods)} {flag}", out=tmp_path / name)[0] == 0
    plain, balanced = adapters(tmp_path / "plain", methods), adapters(tmp_path / "balanced", methods)
    assert [torch.equal(plain[m], balanced[m]) for m in methods] == [True, False, False]
    found = json.loads((tmp_path / "balanced/results.json").read_text())["methods"]
    assert found["joint"]["0"]["conflicts"]["removed"] == 0 < found["ortho"]["0"]["conflicts"]["removed"]


@pytest.mark.parametrize("size, how", [(5, "loop"), (1, "stacked"), (1, "loop")])  # shares of 3 and 2; of 1 and 0
def test_two_processes_are_one(run, demo, tmp_path, size, how):
    methods = ["joint", "ortho"]
    flags = f"{SGD} --methods {','.join(methods)} --batch-size {size} --per-task {how}"
    assert run(flags, out=tmp_path / "one")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "train.py", "--model", demo / "model", "--glue", demo / "glue", "--out", tmp_path / "two"]
    command += [*flags.split(), "--max-length", "32", "--dtype", "fp32"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("| ortho") == 1  # one process prints
    assert_same_run(tmp_path / "one", tmp_path / "two", methods)
    one, two = (json.loads((tmp_path / name / "results.json").read_text())["methods"] for name in ("one", "two"))
    for method in methods:
        for task in ("sst2", "mnli", "stsb"):
            assert one[method]["0"]["tasks"][task] == pytest.approx(two[method]["0"]["tasks"][task], abs=0.2)


def test_deterministic_is_asked_for_and_changes_nothing_on_a_cpu(run, tmp_path):
    try:
        for name, flag in ("plain", ""), ("asked", "--deterministic"):
            assert run(f"--tasks sst2,stsb --methods ortho,lori-d,lori-s --steps 3 {flag}", out=tmp_path / name)[0] == 0
            assert torch.are_deterministic_algorithms_enabled() == bool(flag)
    finally:
        torch.use_deterministic_algorithms(False)
    methods = ["ortho", "lori-s"]
    one, two = adapters(tmp_path / "plain", methods), adapters(tmp_path / "asked", methods)
    assert all(torch.equal(one[method], two[method]) for method in methods)


ODD = [
    "",
    " ",
    "word " * 10_000,
    "🙂🙃 👩‍👩‍👧‍👦",
    "שלום עולם مرحبا",
    "\x00\x07\x1b[31m\u202e\ufeff",
    "\n\t\r\n",
    "é" * 5000,
]


@pytest.mark.parametrize("labels", [[1] * 8, [0, 1] * 4])
def test_odd_sentences_and_one_class(run, tmp_path, labels):
    rows = [{"sentence": text, "label": label} for text, label in zip(ODD, labels, strict=True)]
    for split in ("train", "validation"):
        write_rows(tmp_path / "glue/sst2", rows, split)
    flags = "--tasks sst2 --methods joint,ortho --steps 4 --dtype bf16"
    assert run(flags, glue=tmp_path / "glue")[0] == 0
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert results["majority"]["sst2"]["accuracy"] == max(np.mean(labels), 1 - np.mean(labels))
    assert all(np.isfinite(list(map(float, losses(tmp_path / "out")))))


def test_one_example(run, tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / "glue/sst2", [{"sentence": "a kind dog", "label": 0}], split)
    assert run("--tasks sst2 --methods joint,ortho --steps 4", glue=tmp_path / "glue")[0] == 0


def test_no_mask_where_nothing_is_padded(demo):
    s = train.Settings(model=str(demo / "model"), glue=str(demo / "glue"), max_length=32, tasks="sst2", batch_size=2)
    encoder, tasks = train.prepare(s, torch.device("cpu"))
    model = train.build("joint", encoder, tasks, 0, s)
    seen = [parts[0] for _, parts in zip(range(60), train.draw(tasks, 0, s, model), strict=False)]
    assert {batch.mask is None for batch in seen} == {True, False}
    for batch in seen:
        assert (batch.mask is None) == bool((batch.ids != model.encoder.config.pad_token_id).all())


class Enough(Exception):
    pass


class TenSteps:
    """In the place of a run's progress: from after the first step, which is logged, over ten that are not."""

    steps = 0

    def enter(self):
        return {}, 1, 0.0

    def due(self):
        self.steps += 1
        if self.steps == 10:
            raise Enough


@pytest.mark.parametrize("how", ["loop", "stacked"])
@pytest.mark.parametrize("method, more", [("joint", {}), ("ortho", {}), ("ortho", {"balance": True})])
def test_no_step_waits_for_the_device(demo, monkeypatch, method, more, how):
    """On torch's meta device there are no numbers: whatever the host would wait for raises."""
    s = train.Settings(
        model=str(demo / "model"),
        glue=str(demo / "glue"),
        max_length=32,
        tasks="sst2,mnli,stsb",
        batch_size=4,
        steps=1000,
        per_task=how,
        **more,
    )
    encoder, tasks = train.prepare(s, torch.device("cpu"))
    model = train.build(method, encoder, tasks, 0, s).to("meta")
    monkeypatch.setattr("ortholora.full_float32", lambda device: contextlib.nullcontext())  # meta has no autocast
    bar = mock.Mock()
    with pytest.raises(Enough):
        train.train(method, model, tasks, 0, s, None, bar, TenSteps())
    assert bar.update.call_args_list == 11 * [mock.call(3)]  # at the start for the step before it, then for each


def test_a_frozen_weight_is_bf16_once_and_what_trains_is_not(demo):
    s = train.Settings(model=str(demo / "model"), glue=str(demo / "glue"), max_length=32, tasks="sst2", dtype="bf16")
    encoder, tasks = train.prepare(s, torch.device("cpu"))
    model = train.build("joint", encoder, tasks, 0, s)
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in encoder.parameters())  # the scores' encoder is as it was
    scorer = train.merged(model, encoder)
    assert all(p.dtype == torch.float32 for p in scorer.parameters()) and not lora.lora_layers(scorer)


def test_bf16_trains_and_scores(run, tmp_path):
    status, text, _ = run("--tasks sst2,stsb --methods joint,ortho --steps 3 --dtype bf16")
    assert status == 0 and "bf16" in text


def test_holdout_rows_are_scored_and_not_trained_on(demo, run, tmp_path):
    s = train.Settings(model=str(demo / "model"), glue=str(demo / "glue"), max_length=32, holdout=20)
    data = train.load_data("sst2", s, load_tokenizer(demo / "model"), load_encoder(demo / "model").config)
    everything = load_task("sst2", s.glue, "train")
    encoded = encode(load_tokenizer(demo / "model"), everything.texts, 32)
    assert len(data.test) == 20 and sorted(data.train + data.test) == sorted(encoded)
    assert run("--tasks sst2 --methods head --steps 1 --holdout 20")[0] == 0
    assert "20 held-out training rows" in (tmp_path / "out/results.md").read_text()


def test_estimate_and_progress_are_printed(run):
    _, text, err = run("--tasks sst2 --methods joint --steps 2")
    assert "about" in text and " to train on, " in text
    assert "joint seed 0" in err and "batch" in err


# ---------------------------------------------------------------------------------------------------------------------
# LoRI

LORI = "single,joint,lori-ortho,lori-d,lori-s,lora-merged,lori-d-merged,lori-s-merged"


@pytest.fixture(scope="module")
def lori_run(demo, tmp_path_factory):
    out = tmp_path_factory.mktemp("lori")
    flags = ["--model", str(demo / "model"), "--glue", str(demo / "glue"), "--out", str(out), "--max-length", "32"]
    flags += ["--tasks", "sst2,mnli", "--methods", LORI, "--steps", "6", "--batch-size", "4", "--lr", "5e-3", "--own-a"]
    assert not train.main(flags)
    return out, json.loads((out / "results.json").read_text())


def factors_of(folder):
    """{path: A}, {path: B} of an adapter folder."""
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    return [{n.split(".lora_")[0]: t for n, t in tensors.items() if f"lora_{f}" in n} for f in "AB"]


def test_lori_counts_and_masks(lori_run):
    out, results = lori_run
    count = {m: results["methods"][m]["0"]["adapter_parameters"] for m in results["methods"]}
    dense = count["lori-d"]
    assert dense == count["single"] // 2 == 2 * count["lori-ortho"]  # square layers: A and B are of one size
    assert count["lori-s"] == 2 * round(0.1 * dense / 2) and count["lori-s-merged"] == count["lori-s"]
    for task in ("sst2", "mnli"):
        A, B = factors_of(out / "lori-s/seed0" / task)
        masks = load_masks(out / "lori-s/seed0" / task)
        assert sum(int(m.sum()) for m in masks.values()) == round(0.1 * dense / 2)
        assert all(not B[f"base_model.model.bert.{path}"][~mask].any() for path, mask in masks.items())
        dense_A, dense_B = factors_of(out / "lori-d/seed0" / task)
        assert all(torch.equal(A[path], dense_A[path]) for path in A)  # the calibration's A
        assert any(not torch.equal(B[path], dense_B[path]) for path in B)
    assert not torch.equal(*(next(iter(factors_of(out / "lori-d/seed0" / t)[0].values())) for t in ("sst2", "mnli")))


def test_merged_is_the_mean_of_the_deltas(lori_run):
    out, results = lori_run
    for merged, own in (("lora-merged", "single"), ("lori-d-merged", "lori-d"), ("lori-s-merged", "lori-s")):
        A, B = factors_of(out / merged / "seed0/sst2")
        parts = [factors_of(out / own / "seed0" / task) for task in ("sst2", "mnli")]
        for path in A:
            delta = sum(2.0 * b[path] @ a[path] for a, b in parts) / 2  # scale 16 / 8
            torch.testing.assert_close(B[path] @ A[path], delta, atol=1e-7, rtol=1e-5)
        cosines = results["methods"][merged]["0"]["cosines"]
        a, b = (torch.cat([(b[p] @ a[p]).flatten() for p in a]) for a, b in parts)
        assert cosines[0][1] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5)


def test_merged_adapter_is_evaluated_and_loads(lori_run, run):
    out, results = lori_run
    status, text, _ = run(f"--evaluate {out / 'lori-s-merged/seed0'}")
    assert status == 0 and f"{results['methods']['lori-s-merged']['0']['tasks']['sst2']['score']:.1f}" in text
    assert "drop from the task's own adapter" in (out / "results.md").read_text()


def test_lori_ortho_trains_B_alone(lori_run):
    blocks = lori_run[1]["methods"]["lori-ortho"]["0"]["conflicts"]["blocks"]
    assert blocks and all(name.endswith(".B") for name in blocks)


@pytest.mark.parametrize("flags", ["", "--disjoint"])
def test_continual(run, tmp_path, flags):
    status, text, err = run(f"--tasks sst2,mnli,stsb --continual --steps 4 --lr 5e-3 {flags}")
    assert status == 0, err
    runs = json.loads((tmp_path / "out/results.json").read_text())["methods"]
    assert list(runs) == ["single", "lori-d", "lori-s"]
    for method, seeds in runs.items():
        matrix = seeds["0"]["matrix"]
        assert [len(row) for row in matrix] == [1, 2, 3]
        lost = [matrix[t][t] - matrix[2][t] for t in range(2)]
        assert seeds["0"]["forgetting"] == pytest.approx(np.mean(lost))
        assert ("overlap" in seeds["0"]) == (method == "lori-s")
    assert (runs["lori-s"]["0"]["overlap"] == 0) == bool(flags)
    assert "lora, after" in text and "forgetting" in text


def test_continual_keeps_earlier_entries_to_the_bit(demo, monkeypatch, tmp_path):
    s = train.Settings(
        model=str(demo / "model"),
        glue=str(demo / "glue"),
        tasks="sst2,mnli",
        steps=5,
        batch_size=4,
        max_length=32,
        dtype="fp32",
        continual=True,
        disjoint=True,
    )
    encoder, tasks = train.prepare(s, torch.device("cpu"))
    stages, used, merged = [], [], train.merged

    def spy(model, *rest):
        stages.append(lori.adapter(model.encoder))
        return merged(model, *rest)

    monkeypatch.setattr(train, "merged", spy)
    masked = lori.MaskedB
    monkeypatch.setattr(lori, "MaskedB", lambda model, masks: used.append(masks) or masked(model, masks))
    with open(os.devnull, "w") as log:
        train.run_sequence("lori-s", encoder, tasks, 0, s, tmp_path, log, train.tqdm(disable=True), no_progress())
    assert all(
        torch.equal(load_masks(tmp_path / "lori-s/seed0" / t)[path], used[i][path])
        for i, t in enumerate(("sst2", "mnli"))
        for path in used[i]
    )
    for path, mask in used[0].items():
        before, after = stages[0][path][1], stages[-1][path][1]  # B after the first task, and after the second
        assert torch.equal(before[mask], after[mask]) and not (mask & used[1][path]).any()
    assert any(not torch.equal(stages[0][path][1], stages[-1][path][1]) for path in used[0])


# ---------------------------------------------------------------------------------------------------------------------
# The gap


def test_gap_recovered_by_hand():
    single, joint = [80.0, 82.0, 81.0], [70.0, 72.0, 71.0]  # the gap is 10 with every seed
    assert train.gap_recovered(single, joint, [75.0, 78.0, 76.0]) == "53 ± 6 %"  # gains 5, 6, 5: 5.33 ± 0.58
    assert train.gap_recovered(single[:1], joint[:1], [75.0]) == "+5.0 of +10.0 points (one seed)"
    assert train.gap_recovered(single[:2], joint[:2], [75.0, 77.0]) == "+5.0 of +10.0 points (two seeds)"
    # Gaps 3, -1, 1: mean 1, standard error 2 / sqrt 3 = 1.15, twice which is more than 1.
    assert train.gap_recovered([73.0, 71.0, 72.0], joint, joint) == "+0.0 of +1.0 points (no gap to recover)"
    assert train.gap_recovered(joint, single, joint) == "-10.0 of -10.0 points (no gap to recover)"


def test_learning_rate_schedule():
    s = train.Settings(steps=100, warmup=0.1)
    rates = [train.lr_at(step, s) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0 and 0 < rates[-1] < 0.02
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert [train.lr_at(0, train.Settings(steps=1, warmup=w)) for w in (0.0, 1.0)] == [1.0, 1.0]


def test_regression_loss_of_the_mean_is_one(demo):
    s = train.Settings(model=str(demo / "model"), glue=str(demo / "glue"), max_length=32)
    data = train.load_data("stsb", s, load_tokenizer(demo / "model"), load_encoder(demo / "model").config)
    s.dtype, s.batch_size = "fp32", len(data.train)
    model = train.build("head", load_encoder(demo / "model", quiet=True), [data], 0, s)
    torch.nn.init.zeros_(model.heads["stsb"].out.weight)  # its bias is the mean label
    batch = next(train.draw([data], 0, s, model))[0]
    assert train.task_losses(model, batch, s)[0].item() == pytest.approx(1.0, abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def test_evaluate_gives_the_tables_numbers(finished, run):
    out, results = finished
    for method in ("single", "ortho", "head"):
        status, text, _ = run(f"--evaluate {out / method / 'seed1'}")
        assert status == 0
        for task, scores in results["methods"][method]["1"]["tasks"].items():
            row = next(line for line in text.splitlines() if f"| {task} " in line and "mismatched" not in line)
            assert row.split("|")[-2].strip() == f"{scores['score']:.1f}"
            for name, value in scores.items():
                assert name == "score" or f"{name} {value:.4f}" in row


def test_evaluate_needs_no_flags(finished, capsys):
    out, results = finished
    assert not train.main(["--evaluate", str(out / "ortho/seed0/sst2")])
    assert f"{results['methods']['ortho']['0']['tasks']['sst2']['score']:.1f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "change, says",
    [
        ({"base_model_name_or_path": None}, "give it with --model"),
        ({"max_length": "9" * 5000}, "--max-length '999"),
        ({"max_length": "4"}, "takes 8 to"),
    ],
)
def test_evaluate_of_a_strangers_adapter(finished, tmp_path, capsys, change, says):
    folder = shutil.copytree(finished[0] / "ortho/seed0/sst2", tmp_path / "adapter")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    write_safetensors(
        weights,
        read_safetensors(weights),
        read_header(weights)[1] | change if "max_length" in change else read_header(weights)[1],
    )
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert train.main(["--evaluate", str(folder)]) == 2
    err = capsys.readouterr().err.strip()
    assert says in err and "\n" not in err and len(err) < 1000


def test_peft_gives_the_tables_numbers(finished):
    out, results = finished
    folder, s = out / "ortho/seed0/mnli", results["settings"]
    base = AutoModelForSequenceClassification.from_pretrained(s["model"], num_labels=3)
    model = PeftModel.from_pretrained(base, str(folder)).eval()
    examples = load_task("mnli", s["glue"], "validation")
    encoded = encode(load_tokenizer(s["model"]), examples.texts, s["max_length"])
    with torch.inference_mode():
        predictions = [
            model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits.argmax().item()
            for ids, types in encoded
        ]
    assert score("mnli", predictions, examples.labels) == results["methods"]["ortho"]["0"]["tasks"]["mnli"]


def test_submission(finished, demo, tmp_path, capsys):
    out, _ = finished
    glue = tmp_path / "glue"
    shutil.copytree(demo / "glue", glue)
    shutil.rmtree(glue)  # the demo has no test split; make a folder without labels
    (glue / "sst2").mkdir(parents=True)
    rows = [{"idx": i, "sentence": text} for i, text in enumerate(["a kind dog", "the cruel doctor slept", "a car"])]
    for split in ("test", "validation"):
        labelled = [row | {"label": 1} for row in rows]
        (glue / "sst2" / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in labelled))
    flags = ["--evaluate", str(out / "ortho/seed0/sst2"), "--glue", str(glue), "--submit", str(tmp_path / "submission")]
    assert not train.main(flags)
    lines = (tmp_path / "submission/SST-2.tsv").read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 4
    assert all(line.split("\t")[1] in ("0", "1") for line in lines[1:])


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one clear line, exit status 2, nothing half-written


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--tasks sst3", "unknown task 'sst3'"),
        ("--tasks sst2,sst2", "give each task once"),
        ("--methods ortho,magic", "unknown method 'magic'"),
        ("--targets nothing", "target 'nothing' matches no linear layer"),
        ("--rank 0", "--rank 0"),
        ("--batch-size 0", "--batch-size 0"),
        ("--steps 0", "--steps 0"),
        ("--lr nan", "--lr nan"),
        ("--dropout 1", "--dropout 1.0"),
        ("--seeds 0,x", "--seeds '0,x'"),
        ("--seeds 1,1", "give each seed once"),
        ("--task-weights 1,2,3", "2 tasks need as many weights"),
        ("--max-length 9999", "--max-length 9999"),
        ("--holdout 9999", "--holdout 9999"),
        ("--tasks sst2,rte", "no task 'rte'"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device nothing", "--device nothing"),
        ("--submit here", "--submit needs --evaluate"),
        ("--sparsity 1", "--sparsity 1.0 is outside"),
        ("--sparsity -0.1", "--sparsity -0.1 is outside"),
        ("--methods lori-s", "lori-s is made from lori-d"),
        ("--methods lora-merged", "lora-merged is made from single"),
        ("--continual --tasks sst2", "--continual with one task"),
        ("--continual --methods ortho", "unknown method 'ortho'"),
        ("--disjoint", "--disjoint needs --continual"),
        ("--continual --disjoint --sparsity 0.3", "2 masks of --sparsity 0.3"),
        ("--tasks sst2 --methods single,lora-merged", "nothing to merge"),
        ("--methods lori-ortho --factors A", "--factors A: lori-ortho"),
        ("--methods single,head --balance", "--balance: no shared adapter"),
        ("--balance --task-weights 1,2", "leave out --task-weights"),
        ("--balance --factors A", "--balance with --factors A"),
        ("--glue ~nobody-of-that-name/glue", "no GLUE folder ~nobody"),
        ("--tasks sst2,mnli,stsb --continual --disjoint --granularity tensor --sparsity 0.6666667", "3 masks of 171"),
        ("--seeds 9223372036854775808", "2^63"),
        ("--demo", "--demo brings its own"),
        ("--evaluate nowhere", "--evaluate nowhere"),
    ],
)
def test_bad_setting(run, tmp_path, flags, says):
    status, text, err = run("--tasks sst2,mnli --steps 2 " + flags)
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and says in lines[0] and lines[0].startswith("train.py: ")
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(run):
    status, _, err = run("--tasks sst2 --device cuda")
    assert status == 2 and len(err.strip().splitlines()) == 1 and "--device cuda" in err


def test_bad_unit_is_argparse(run, capsys):
    with pytest.raises(SystemExit) as e:
        run("--unit everything")
    assert e.value.code == 2 and "everything" in capsys.readouterr().err


def without(name):
    return lambda folder: (folder / name).unlink()


def truncated(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def misshapen(folder):
    tensors = read_safetensors(folder / "model.safetensors")
    name = next(n for n in tensors if n.endswith("attention.self.query.weight"))
    write_safetensors(folder / "model.safetensors", tensors | {name: torch.zeros(3, 3)})


def other_type(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt5"}))


def unfit_tokenizer(folder):
    """One that puts a token around every text for which the model has no embedding."""
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["post_processor"]["sep"][1] = 999_999
    (folder / "tokenizer.json").write_text(json.dumps(raw))


@pytest.mark.parametrize(
    "damage, says",
    [
        (without("config.json"), "no config.json"),
        (without("tokenizer.json"), "no tokenizer.json"),
        (without("model.safetensors"), "no weights"),
        (truncated, "model.safetensors"),
        (misshapen, "(3, 3)"),
        (other_type, "model_type 'gpt5'"),
        (unfit_tokenizer, "does not fit the model"),
        (lambda folder: shutil.rmtree(folder), "there is no model folder"),
    ],
)
def test_bad_model_folder(run, demo, tmp_path, damage, says):
    shutil.copytree(demo / "model", tmp_path / "model")
    damage(tmp_path / "model")
    status, _, err = run("--tasks sst2 --steps 2", model=tmp_path / "model")
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and says in lines[0]
    assert not (tmp_path / "out").exists()


def write_rows(folder, rows, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize(
    "rows, says",
    [
        ([{"text": "a", "label": 0}], "no column 'sentence'"),
        ([{"sentence": "a", "label": 0}, {"sentence": "b", "label": 7}], "label 7"),
        ([{"sentence": "a", "label": -1}], "label -1"),
        ([{"sentence": "a", "label": [1]}], "label [1]"),
        ([], ""),
    ],
)
def test_bad_data(run, tmp_path, rows, says):
    write_rows(tmp_path / "glue/sst2", rows)
    write_rows(tmp_path / "glue/sst2", rows[:1], "validation")
    status, _, err = run("--tasks sst2 --steps 2", glue=tmp_path / "glue")
    lines = err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and says in lines[0] and "sst2" in lines[0]
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run("--tasks sst2 --steps 2", out=tmp_path / "file" / "out")
    assert status == 2 and len(err.strip().splitlines()) == 1 and "can't be written" in err


def test_divergence_is_named(run):
    status, _, err = run("--tasks sst2,stsb --methods ortho --steps 40 --lr 1000 --optimizer sgd --clip 0 --warmup 0")
    last = err.strip().splitlines()[-1]
    assert status == 1 and last.startswith("train.py: ") and "finite" in last or "nan" in last


# ---------------------------------------------------------------------------------------------------------------------
# Without the Hub

SMALL_DEMO = """
import functools, sys, train
from support import toy
train.make_demo = functools.partial(toy.make_demo, steps=5, rows=64, quiet=True)
sys.exit(train.main(sys.argv[1:]))
"""


def without_hub(tmp_path, *flags):
    """Run in a process of its own, with a Hub address where nobody listens and an empty cache."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SMALL_DEMO, *flags]
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)


def test_bare_command_falls_back_to_the_demo(tmp_path):
    done = without_hub(tmp_path, "--steps", "2", "--methods", "joint", "--seeds", "0")
    assert done.returncode == 0, done.stderr
    notices = [line for line in done.stdout.splitlines() if line.startswith("NOTICE")]
    assert "roberta-base" in notices[0] and "demo" in notices[1]
    assert "The demo: a toy grammar" in done.stdout and "| joint" in done.stdout
    assert json.loads((tmp_path / "runs/demo/results.json").read_text())["demo"] is True


@pytest.mark.parametrize("flags", [["--model", "roberta-base"], ["--glue", "nyu-mll/glue"], ["--tasks", "rte"]])
def test_no_fallback_where_something_was_asked_for(tmp_path, flags):
    done = without_hub(tmp_path, "--steps", "2", *flags)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == 2 and len(lines) == 1 and "Hub" in lines[0], done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_stopped_fallback_says_demo(monkeypatch, tmp_path, capsys):
    """Once the Hub answers again, the bare command would be another run."""

    def compare(s):
        raise Stopped(2) if s.demo else HubError("no Hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "compare", compare)
    monkeypatch.setattr(train, "make_demo", lambda folder: folder)
    assert train.main([]) == 130
    assert "python train.py --resume --out runs/demo --demo" in capsys.readouterr().err


def test_hub_that_never_answers_is_given_up(monkeypatch):
    with socket.socket() as s:  # listens, but never accepts: a connection that hangs
        s.bind(("127.0.0.1", 0))
        s.listen(1)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{s.getsockname()[1]}")
        begin = time.monotonic()
        assert not hub_answers(seconds=0.5)
        assert time.monotonic() - begin < 5


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    text, settings = capsys.readouterr().out, train.dataclasses.fields(train.Settings)
    assert e.value.code == 0 and all("--" + f.name.replace("_", "-") in text for f in settings)
