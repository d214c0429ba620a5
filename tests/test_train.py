"""train.py from end to end on the small demo: what it prints, what it writes, and what it says to bad input."""

import dataclasses
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import results_of, write_rows

import glue
import lora
import train
from glue import batches_of_steps
from model import Layer
from ortholora import OrthoLoRA, project_conflicting
from support import runs, toy
from support.checkpoint import read_safetensors, write_safetensors
from support.hub import HubError

ROOT = Path(__file__).parent.parent


def files_of(out):
    """{file: bytes} of all that the same command must write again: all but times."""
    files = [p for p in sorted(out.rglob("*")) if p.is_file() and p.name not in ("timing.json", "results.md")]
    return {str(path.relative_to(out)): path.read_bytes() for path in files}


def log_of(folder):
    """A unit's log: the lines with losses, and those with scores."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "scores" in line]


def adapters(out, methods, seed=0):
    """{method: all A, B and heads of an out folder as one vector}"""
    found = {}
    for method in methods:
        files = sorted((out / method / f"seed{seed}").glob("*/adapter_model.safetensors"))
        found[method] = torch.cat([t.flatten() for file in files for t in read_safetensors(file).values()])
    return found


def assert_refused(done, says, status=2):
    """One line on standard error that says `says`, after nothing on standard output but what was loaded."""
    lines = done[2].strip().splitlines()
    assert done[0] == status and len(lines) == 1 and lines[0].startswith("train.py: ") and says in lines[0], done[2]


# ---------------------------------------------------------------------------------------------------------------------
# The run


def test_results(finished, demo):
    out, results = finished
    assert list(results["methods"]) == ["head", "single", "joint", "pcgrad", "ortho"]
    r = 8
    config = json.loads((demo / "model/config.json").read_text())
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
    assert not list(out.rglob("state.safetensors"))


def test_first_step_has_no_conflict_in_A(finished):
    # B = 0 at the first step, so A has no gradient: of 5 steps at most 4 can conflict.
    blocks = finished[1]["methods"]["ortho"]["0"]["conflicts"]["blocks"]
    assert all(rate <= 0.8 for name, (rate, _, _) in blocks.items() if name.endswith(".A"))


def test_fifths_are_what_was_logged(finished):
    # Five steps, each logged: a fifth of the training is one step.
    out, results = finished
    for method in ("pcgrad", "ortho"):
        fifths, (logged, _) = results["methods"][method]["1"]["conflicts"]["fifths"], log_of(out / method / "seed1")
        assert [line["step"] for line in logged] == [0, 1, 2, 3, 4]
        assert fifths["rate"] == pytest.approx([line["conflict_rate"] for line in logged], abs=1e-6)
        assert all(0 <= rate <= 1 for rate in fifths["rate"])
        for task in ("sst2", "mnli", "stsb"):
            assert fifths["effective"][task] == pytest.approx([line["effective"][task] for line in logged], abs=1e-5)
            assert len(fifths["norms"][task]) == 5 and min(fifths["norms"][task]) > 0


def test_a_projection_gives_no_task_a_weight_below_one(finished, run, tmp_path):
    logged, _ = log_of(finished[0] / "ortho/seed0")
    weights = [w for line in logged for w in line["effective"].values()]
    assert min(weights) >= 1 - 1e-6 and max(weights) > 1.01
    # Balanced, joint's rows add up as they are scaled: nobody meets anybody.
    assert run("--tasks sst2,mnli,stsb --methods joint --balance --steps 3")[0] == 0
    logged, _ = log_of(tmp_path / "out/joint/seed0")
    assert len(logged) == 3 and all(set(line["effective"].values()) == {1.0} for line in logged)


def test_log(finished):
    logged, scores = log_of(finished[0] / "joint/seed0")
    assert not scores and all(line.keys() == {"step", "lr", "grad_norm", "loss"} for line in logged)
    s = train.Settings(steps=5, lr=5e-3)
    assert [line["lr"] for line in logged] == pytest.approx([s.lr * train.lr_at(step, s) for step in range(5)])


def test_same_command_same_bytes(run, tmp_path):
    for name in ("one", "two"):
        flags = "--tasks sst2,stsb --methods head,single,joint,pcgrad,ortho --steps 3 --dropout 0.2"
        assert run(flags, out=tmp_path / name)[0] == 0
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")
    assert len(files_of(tmp_path / "one")) == 2 + 5 * 2 * 2 + 6 * 2  # settings, results; adapters; results and logs


def test_one_task_makes_all_methods_equal(run, tmp_path):
    # One task has nobody to conflict with: single, joint, PCGrad and Ortho-LoRA are one run, to the bit.
    assert run("--tasks mnli --methods single,joint,pcgrad,ortho --steps 4 --dropout 0.2")[0] == 0
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
    first = [log_of(out / method / "seed0")[0][0]["loss"] for method in ("head", "joint", "pcgrad", "ortho")]
    first.append({task: log_of(out / "single/seed0" / task)[0][0]["loss"][task] for task in first[0]})
    assert all(losses == first[0] for losses in first)


def test_it_learns(run, tmp_path):
    # A task that one word decides: no single step is enough, sixty are.
    words = ("kind", "cruel")
    rows = [{"sentence": f"the {words[i]} {noun}", "label": i} for i in range(2) for noun in ("dog", "car", "hat")]
    for split in ("train", "validation"):
        write_rows(tmp_path / "glue/sst2", rows, split)
    assert run("--tasks sst2 --methods joint,ortho --steps 60 --lr 1e-2", glue=tmp_path / "glue")[0] == 0
    results = results_of(tmp_path / "out")
    for method in ("joint", "ortho"):
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
            "--factors A --combine mean --task-weights 1,2 --optimizer sgd --rslora --targets all-linear --dropout 0.1 "
            "--alpha 5 --rank 3",
            None,
        ),
    ],
)
def test_options(run, tmp_path, flags, blocks):
    assert run(f"--tasks sst2,stsb --methods ortho --steps 3 {flags}")[0] == 0
    found = results_of(tmp_path / "out")["methods"]["ortho"]["0"]["conflicts"]["blocks"]
    assert blocks is None or list(found) == blocks
    if "all-linear" in flags:
        assert all(name.endswith(".A") for name in found) and any(name.endswith("output.dense.A") for name in found)
        config = json.loads((tmp_path / "out/ortho/seed0/stsb/adapter_config.json").read_text())
        made = {"r": 3, "lora_alpha": 5.0, "use_rslora": True, "lora_dropout": 0.1}
        assert config.items() >= made.items()


# ---------------------------------------------------------------------------------------------------------------------
# One step


@pytest.fixture
def settings(demo):
    """settings(steps=3, …): the small demo's, for what is called below `main`."""
    paths = {"model": str(demo / "model"), "glue": str(demo / "glue")}
    return lambda **more: train.Settings(
        **{**paths, "tasks": "sst2,mnli,stsb", "batch_size": 4, "max_length": 32, "per_task": "loop", **more}
    )


def train_unit(method, frozen, tasks, s):
    """A built model, after `train.train` in a folder of nobody's."""
    model, unit = (
        train.build(method, frozen, tasks, 0, s),
        runs.Unit(Path("nowhere"), method, 0, tuple(t.name for t in tasks)),
    )
    train.train(unit, model, tasks, frozen, s, io.StringIO(), runs.Bar(0, True))
    return model


def test_mean_is_the_sum_divided(settings):
    # With combine = mean every projected gradient is the sum's over T; heads keep theirs. One SGD step shows it.
    s = settings(tasks="sst2,stsb", steps=1, optimizer="sgd", clip=0.0, warmup=0.0, lr=0.1)
    _, frozen, tasks = train.load(s)
    B, heads = {}, {}
    for s.combine in ("sum", "mean"):
        model = train_unit("ortho", frozen, tasks, s)
        B[s.combine] = [layer.B.detach() for layer in lora.lora_layers(model.encoder).values()]
        heads[s.combine] = torch.cat([p.detach().flatten() for p in model.heads.parameters()])
    for a, b in zip(B["sum"], B["mean"], strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(b, a / 2)
    assert torch.equal(heads["sum"], heads["mean"])


def first_step(method, tasks, frozen, s, step=0):
    """A step from where training starts, but with B not 0: the model, its .grad filled in, each task's loss, and each
    task's own gradient of every B, for a method that collects them."""
    model, own = train.build(method, frozen, tasks, 0, s).train(), []
    layers = lora.lora_layers(model.encoder).values()
    generator = torch.Generator().manual_seed(0)
    for layer in layers:  # else no loss depends on LoRA's dropout yet
        layer.B.data.copy_(torch.randn(layer.B.shape, generator=generator) / 10)
    ortho = train.projection(method, model, len(tasks), s)
    if ortho:
        collect = ortho.collect
        ortho.collect = lambda task: own.append(gradient_of_B(model)) or collect(task)
    stream = batches_of_steps(tasks, 0, s, model.encoder.config.pad_token_id, torch.device("cpu"))
    losses, _ = train.gradients(method, model, next(stream), ortho, train.seed_of(0, step), s)
    return model, losses, own


def gradient_of_B(model):
    return torch.cat([layer.B.grad.flatten() for layer in lora.lora_layers(model.encoder).values()])


@pytest.mark.parametrize("more", [{}, {"sequential": True}, {"combine": "mean"}, {"task_weights": "1,2,3"}], ids=str)
def test_a_step_of_ortho_is_the_textbooks(settings, more):
    """Out of each task's own gradients of B, taken without any option, in the order that the step's seed draws."""
    s, plain = settings(**more), settings()
    _, frozen, tasks = train.load(plain)
    _, _, own = first_step("ortho", tasks, frozen, plain)
    model, _, _ = first_step("ortho", train.load(s)[2], frozen, s)
    generator = torch.Generator().manual_seed(train.seed_of(0, 0))
    order = OrthoLoRA([[torch.nn.Parameter(torch.zeros(1))]], 3, generator=generator).random_order().tolist()
    layers = list(lora.lora_layers(model.encoder).values())
    weights = torch.tensor([[1.0], [2.0], [3.0]]) if s.task_weights else torch.ones(3, 1)
    share, differs = 1 / 3 if s.combine == "mean" else 1, 0.0
    for layer, g in zip(layers, torch.stack(own).double().split([x.B.numel() for x in layers], 1), strict=True):
        expected = share * project_conflicting(weights * g, order, s.sequential).sum(0)
        found = layer.B.grad.flatten().double()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * g.norm().item())
        without = project_conflicting(g, order).sum(0) if more else g.sum(0)  # had the option, or projection, no effect
        differs = max(differs, ((found - without).norm() / without.norm()).item())
    assert differs > 1e-2


@pytest.mark.parametrize("method, flag", [("balanced", {"balance": True}), ("pcgrad", {"unit": "all"})])
def test_a_method_is_ortho_with_its_flag(settings, method, flag):
    _, frozen, tasks = train.load(settings())
    cases = ((method, {}), ("ortho", flag), ("ortho", {}))
    named, flagged, plain = (gradient_of_B(first_step(m, tasks, frozen, settings(**more))[0]) for m, more in cases)
    assert torch.equal(named, flagged) and not torch.equal(named, plain)


def test_a_step_of_training_by_hand(settings, monkeypatch):
    """SGD at the full rate subtracts lr · g · clip / |g|, the norm being that of adapter and heads together."""
    s, grads, honest = settings(steps=1, optimizer="sgd", clip=0.1, warmup=0.0, lr=0.5), {}, train.gradients
    _, frozen, tasks = train.load(s)
    before = {name: p.detach().clone() for name, p in train.build("ortho", frozen, tasks, 0, s).named_parameters()}

    def noted(method, model, *rest):
        found = honest(method, model, *rest)
        grads.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        return found

    monkeypatch.setattr(train, "gradients", noted)
    model = train_unit("ortho", frozen, tasks, s)
    norm = torch.cat([g.flatten() for g in grads.values()]).norm()
    assert norm > 2 * s.clip and any(name.startswith("heads.") for name in grads)
    for name, p in model.named_parameters():
        step = s.lr * s.clip / norm * grads[name] if name in grads else 0
        torch.testing.assert_close(p.detach(), before[name] - step)


def test_the_frozen_encoder_drops_nothing_unless_asked_and_heads_do(settings):
    _, frozen, tasks = train.load(settings(tasks="sst2"))

    def loss(layers=0.0, heads=0.0, **more):  # the demo's checkpoint has no dropout, so it is given some
        s, log = settings(tasks="sst2", steps=1, **more), io.StringIO()
        model = train.build("joint", frozen, tasks, 0, s)
        for m in model.encoder.modules():
            if isinstance(m, Layer):
                m.dropout = layers
        model.heads["sst2"].dropout = heads
        unit = runs.Unit(Path("nowhere"), "joint", 0, ("sst2",))
        train.train(unit, model, tasks, frozen, s, log, runs.Bar(0, True))
        return json.loads(log.getvalue().splitlines()[0])["loss"]["sst2"]

    quiet = loss()
    assert loss(layers=0.5) == quiet and loss(layers=0.5, encoder_dropout=True) != quiet and loss(heads=0.5) != quiet


@pytest.mark.parametrize(
    "method, more",
    [
        ("single", {}),
        ("joint", {"task_weights": "1,2,3"}),
        ("ortho", {"task_weights": "1,2,3"}),
        ("ortho", {"balance": True}),
        ("ortho", {"factors": "B", "combine": "mean"}),
        ("ortho", {"factors": "A", "unit": "factor"}),
        ("lori-ortho", {}),
        ("joint", {"balance": True}),
    ],
)
def test_a_stacked_step_is_the_loops(settings, method, more):
    """Without dropout one pass over all tasks' sequences gives every gradient, that of no block's factor as well."""
    found = {}
    for how in ("loop", "stacked"):
        s = settings(per_task=how, **more)
        _, frozen, tasks = train.load(s)
        model, losses, _ = first_step(method, tasks, frozen, s)
        found[how] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None} | {"losses": losses}
    assert found["loop"].keys() == found["stacked"].keys() and len(found["loop"]) > 10
    for name, grad in found["loop"].items():
        assert (found["stacked"][name] - grad).norm() < 1e-5 * grad.norm(), name


def test_dropout_is_a_function_of_seed_step_rank_and_task(settings, monkeypatch):
    s = settings(dropout=0.2)
    _, frozen, tasks = train.load(s)

    def losses_of(method="ortho", tasks=tasks, **more):
        return first_step(method, tasks, frozen, s, **more)[1]

    _, losses, own = first_step("ortho", tasks, frozen, s)
    assert torch.equal(losses_of(), losses)
    joint, joint_losses, _ = first_step("joint", tasks, frozen, s)
    assert torch.equal(joint_losses, losses)
    torch.testing.assert_close(gradient_of_B(joint), sum(own))  # a task has the same mask in both ...
    for data, loss, grad in zip(tasks, losses, own, strict=True):
        model, (alone,), _ = first_step("single", [data], frozen, s)
        assert torch.equal(alone, loss) and torch.equal(gradient_of_B(model), grad)  # ... and alone

    assert (losses_of(step=1) != losses).all()
    monkeypatch.setattr(train, "RANK", 1)
    assert (losses_of() != losses).all()
    monkeypatch.setattr(train, "RANK", 0)
    s.dropout = 0.0
    assert (losses_of() != losses).all()


def test_each_task_has_dropout_of_its_own(settings, monkeypatch):
    """Two of the same lengths would else have the same masks, in every step."""
    s, seeds, honest = settings(dropout=0.2), [], train.task_losses
    _, frozen, tasks = train.load(s)
    monkeypatch.setattr(train, "task_losses", lambda *args: seeds.append(torch.initial_seed()) or honest(*args))
    first_step("joint", tasks, frozen, s)
    assert len(seeds) == len(set(seeds)) == 3


def test_no_mask_where_nothing_is_padded(settings):
    s = settings(tasks="sst2", batch_size=2)
    encoder, _, tasks = train.load(s)
    pad = encoder.config.pad_token_id
    stream = batches_of_steps(tasks, 0, s, pad, torch.device("cpu"))
    seen = [batch for _, (batch,) in zip(range(60), stream, strict=False)]
    assert {batch.mask is None for batch in seen} == {True, False}
    assert all((batch.mask is None) == bool((batch.ids != pad).all()) for batch in seen)


class Enough(Exception):
    pass


def ten_steps(monkeypatch, method, s):
    """Ten steps of `train.train` on torch's meta device, where there are no numbers: what the host waits for raises.

    From the second step, since the first is logged; and of 1000 steps every twentieth is logged.
    """
    s.steps = 1000
    encoder, frozen, tasks = train.load(s)
    model = train.build(method, frozen, tasks, 0, s).to("meta")
    monkeypatch.setattr(runs, "resume", lambda *_: (1, 0.0))
    bar = mock.Mock()
    bar.update.side_effect = [None] * 10 + [Enough]
    unit = runs.Unit(Path("nowhere"), method, 0, ("sst2", "mnli", "stsb"))
    with pytest.raises(Enough):
        train.train(unit, model, tasks, encoder, s, None, bar)
    assert bar.update.call_args_list == 11 * [mock.call(3)]


@pytest.mark.parametrize("how", ["loop", "stacked"])
@pytest.mark.parametrize("method, more", [("joint", {}), ("ortho", {}), ("joint", {"balance": True})])
def test_no_step_waits_for_the_device(settings, monkeypatch, method, more, how):
    ten_steps(monkeypatch, method, settings(per_task=how, dropout=0.1, save_every=1e9, **more))


def test_a_process_that_saves_nothing_does_not_wait_to_save(settings, monkeypatch):
    monkeypatch.setattr(train, "RANK", 1)
    monkeypatch.setattr(train, "WORLD", 2)
    monkeypatch.setattr(runs, "average", lambda *_: None)
    ten_steps(monkeypatch, "ortho", settings(save_every=0.0))


def test_a_frozen_weight_is_bf16_once_and_what_trains_is_not(settings):
    s = settings(tasks="sst2", dtype="bf16")
    encoder, frozen, tasks = train.load(s)
    model = train.build("joint", frozen, tasks, 0, s)
    assert all(p.dtype == (torch.float32 if p.requires_grad else torch.bfloat16) for p in model.parameters())
    weights = {id(p) for p in frozen.parameters()}
    assert all(id(p) in weights for p in model.encoder.parameters() if not p.requires_grad)  # no copy of them
    assert all(p.dtype == torch.float32 for p in encoder.parameters())  # the scores' encoder is as it was
    assert not lora.lora_layers(frozen) and not lora.lora_layers(encoder)


def test_regression_loss_of_the_mean_is_one(settings):
    s = settings(tasks="stsb")
    _, frozen, (data,) = train.load(s)
    s.batch_size = len(data.train)
    model = train.build("head", frozen, [data], 0, s)
    torch.nn.init.zeros_(model.heads["stsb"].out.weight)  # its bias is the mean label
    ((batch,),) = [next(batches_of_steps([data], 0, s, 0, torch.device("cpu")))]
    assert train.task_losses(model, batch)[0].item() == pytest.approx(1.0, abs=1e-4)


def test_learning_rate_schedule():
    s = train.Settings(steps=100, warmup=0.1)
    rates = [train.lr_at(step, s) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and max(rates) == 1.0 and 0 < rates[-1] < 0.02
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert [train.lr_at(0, train.Settings(steps=1, warmup=w)) for w in (0.0, 1.0)] == [1.0, 1.0]


# ---------------------------------------------------------------------------------------------------------------------
# The same run by other means: one stacked batch, two processes, a compiled encoder, scores on the way


def assert_same_run(one, other, methods):
    for method in methods:
        for log in sorted(one.glob(f"{method}/**/log.jsonl")):
            logged = [log_of(folder)[0] for folder in (log.parent, other / log.parent.relative_to(one))]
            ours, theirs = ([list(line["loss"].values()) for line in lines] for lines in logged)
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)  # a loss near 0 is rounding
    ours, theirs = adapters(one, methods), adapters(other, methods)
    for method in methods:
        assert (ours[method] - theirs[method]).norm() < 1e-4 * ours[method].norm()
        assert not torch.equal(ours[method], ours[methods[0]]) or method == methods[0]


SGD = "--tasks sst2,mnli,stsb --steps 5 --optimizer sgd --lr 0.05 --warmup 0"  # Adam would blow rounding up


def test_stacked_is_the_loop(run, tmp_path):
    # Without dropout the two must agree. (Other settings: step by step, above.)
    flags = "--task-weights 1,1,2 --factors B --combine mean"
    methods = ["single", "joint", "ortho", "lori-ortho"]
    for how in ("loop", "stacked"):
        assert run(f"{SGD} --methods {','.join(methods)} --per-task {how} {flags}", out=tmp_path / how)[0] == 0
        assert results_of(tmp_path / how)["settings"]["per_task"] == how
    assert_same_run(tmp_path / "loop", tmp_path / "stacked", methods)


@pytest.fixture
def shallow(demo, tmp_path):
    """The demo's model cut down to its first layer, since compiling takes as long as there is to compile."""
    folder = shutil.copytree(demo / "model", tmp_path / "shallow")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    return folder


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_encoder_computes_the_same(run, tmp_path, shallow):
    flags = f"{SGD} --methods ortho --per-task stacked"
    for name, flag in (("plain", ""), ("compiled", "--compile")):
        assert run(f"{flags} {flag}", model=shallow, out=tmp_path / name)[0] == 0
    assert_same_run(tmp_path / "plain", tmp_path / "compiled", ["ortho"])


@pytest.mark.parametrize("how", ["loop", "stacked"])
def test_compile_serves_every_method(run, tmp_path, monkeypatch, shallow, how):
    """Beyond a number of variants torch goes on uncompiled, with a warning that nobody reads; here it raises."""
    methods = ["head", "single", "joint", "pcgrad", "ortho", "lori-ortho", "lori-d", "lori-s"]
    flags = f"{SGD} --methods {','.join(methods)} --per-task {how}"
    assert run(flags, model=shallow, out=tmp_path / "plain")[0] == 0
    compile_ = torch.nn.Module.compile  # by the tracer alone: no C++ compiler, and seconds
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: compile_(self, backend="eager", **more))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_cache_limit_hit=True):
        assert run(flags + " --compile", model=shallow, out=tmp_path / "compiled")[0] == 0
    assert_same_run(tmp_path / "plain", tmp_path / "compiled", methods)


def test_balance_changes_shared_adapters_alone(run, tmp_path):
    methods = ["single", "joint", "ortho"]
    for name, flag in ("plain", ""), ("balanced", "--balance"):
        assert run(f"{SGD} --methods {','.join(methods)} {flag}", out=tmp_path / name)[0] == 0
    plain, balanced = adapters(tmp_path / "plain", methods), adapters(tmp_path / "balanced", methods)
    assert [torch.equal(plain[m], balanced[m]) for m in methods] == [True, False, False]
    found = results_of(tmp_path / "balanced")["methods"]
    assert found["joint"]["0"]["conflicts"]["removed"] == 0 < found["ortho"]["0"]["conflicts"]["removed"]


@pytest.mark.parametrize("size, how", [(4, "loop"), (2, "stacked")])
def test_two_processes_are_one(run, demo, tmp_path, size, how):
    methods = ["joint", "ortho"]
    flags = f"{SGD} --methods {','.join(methods)} --batch-size {size} --per-task {how}"
    assert run(flags, out=tmp_path / "one")[0] == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [ROOT / "train.py", "--model", demo / "model", "--glue", demo / "glue", "--out", tmp_path / "two"]
    command += ["--max-length", "32", "--dtype", "fp32", *flags.split()]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trainings to do") == 1  # one process prints
    assert_same_run(tmp_path / "one", tmp_path / "two", methods)
    one, two = (results_of(tmp_path / name)["methods"] for name in ("one", "two"))
    for method in methods:
        for task in ("sst2", "mnli", "stsb"):
            assert one[method]["0"]["tasks"][task] == pytest.approx(two[method]["0"]["tasks"][task], abs=0.2)


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--batch-size 5", "--batch-size 5 can't be shared out evenly over 2 processes"),
        ("--device cuda:1", "--device cuda:1 under torchrun"),
        ("--jobs 2", "--jobs 2 under torchrun"),
    ],
)
def test_what_torchrun_can_not_do(run, tmp_path, monkeypatch, flags, says):
    monkeypatch.setattr(train, "WORLD", 2)
    assert_refused(run(f"--tasks sst2 --steps 2 {flags}"), says)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setattr(train, name, 1)  # all processes end, and one of each machine says why
    status, text, err = run(f"--tasks sst2 --steps 2 {flags}")
    assert status == 2 and not text and not err and not (tmp_path / "out").exists()
    monkeypatch.setattr(train, "LOCAL_RANK", 0)
    assert_refused(run(f"--tasks sst2 --steps 2 {flags}"), says)


def test_scores_on_the_way_change_no_byte_but_the_log(run, tmp_path):
    methods = ["single", "joint", "ortho", "lori-d", "lori-s"]
    flags = f"--tasks sst2,stsb --methods {','.join(methods)} --steps 4 --lr 5e-3 --dropout 0.2"
    assert run(flags, out=tmp_path / "plain")[0] == 0
    assert run(flags + " --eval-every 2", out=tmp_path / "scored")[0] == 0
    plain, scored = (files_of(tmp_path / name) for name in ("plain", "scored"))
    assert plain.keys() == scored.keys()
    for name in plain:
        if name.endswith("log.jsonl"):
            assert scored[name].count(b'"scores"') == 2
            scored[name] = b"".join(line for line in scored[name].splitlines(True) if b'"scores"' not in line)
        assert scored[name] == plain[name], name
    results = results_of(tmp_path / "scored")["methods"]
    for method in methods:  # in float32 what is trained scores what is saved
        last = {}
        for log in sorted((tmp_path / "scored" / method).rglob("log.jsonl")):
            _, scores = log_of(log.parent)
            assert [line["step"] for line in scores] == [1, 3]
            last |= scores[-1]["scores"]
        assert last == {task: found["score"] for task, found in results[method]["0"]["tasks"].items()}


def test_scoring_on_the_way_is_no_part_of_a_step(run, tmp_path, monkeypatch):
    scoring, stopped = train.scores_in_training, [0.0]  # a clock that scoring alone moves on

    def slow(*args):
        stopped[0] += 100
        return scoring(*args)

    monkeypatch.setattr(train, "time", mock.Mock(perf_counter=lambda: stopped[0]))
    monkeypatch.setattr(train, "scores_in_training", slow)
    assert run("--tasks sst2 --methods joint --steps 4 --eval-every 2 --save-every 0")[0] == 0
    assert (
        stopped == [200] and json.loads((tmp_path / "out/joint/seed0/timing.json").read_text())["seconds_per_step"] == 0
    )


# ---------------------------------------------------------------------------------------------------------------------
# Data


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
    assert results_of(tmp_path / "out")["majority"]["sst2"]["accuracy"] == max(np.mean(labels), 1 - np.mean(labels))
    for method in ("joint", "ortho"):
        assert np.isfinite([line["loss"]["sst2"] for line in log_of(tmp_path / "out" / method / "seed0")[0]]).all()


def test_one_example(run, tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / "glue/sst2", [{"sentence": "a kind dog", "label": 0}], split)
    assert run("--tasks sst2 --methods joint,ortho --steps 4", glue=tmp_path / "glue")[0] == 0


def test_held_out_rows_are_said_to_be_scored(run, tmp_path):
    assert run("--tasks sst2 --methods head --steps 1 --holdout 20")[0] == 0
    assert "20 held-out training rows" in (tmp_path / "out/results.md").read_text()


def test_what_a_run_prints(run, tmp_path):
    status, text, err = run("--tasks sst2 --methods joint --steps 2")
    assert status == 0 and "examples to train on: sst2 64" in text
    assert "1 of 1 trainings to do, 1 at a time, 2 steps, into " in text and f", into {tmp_path / 'out'}\n" in text
    assert (tmp_path / "out/results.md").read_text() in text
    assert "joint, seed 0" in err and "batch" in err


# ---------------------------------------------------------------------------------------------------------------------
# LoRI


def factors_of(folder):
    """{path: A}, {path: B} of an adapter folder."""
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    return [{n.split(".lora_")[0]: t for n, t in tensors.items() if f"lora_{f}" in n} for f in "AB"]


def test_lori_counts_and_masks(finished_lori):
    out, results = finished_lori
    count = {m: results["methods"][m]["0"]["adapter_parameters"] for m in results["methods"]}
    dense = count["lori-d"]
    assert dense == count["single"] // 2 == 2 * count["lori-ortho"]  # square layers: A and B are of one size
    assert count["lori-s"] == 2 * round(0.1 * dense / 2) and count["lori-s-merged"] == count["lori-s"]
    for task in ("sst2", "mnli"):
        A, B = factors_of(out / "lori-s/seed0" / task)
        masks = safetensors.torch.load_file(out / "lori-s/seed0" / task / "masks.safetensors")
        assert {mask.dtype for mask in masks.values()} == {torch.bool}
        assert {f"base_model.model.bert.{path}": mask.shape for path, mask in masks.items()} == {
            path: b.shape for path, b in B.items()
        }
        assert sum(int(m.sum()) for m in masks.values()) == round(0.1 * dense / 2)
        assert all(not B[f"base_model.model.bert.{path}"][~mask].any() for path, mask in masks.items())
        dense_A, dense_B = factors_of(out / "lori-d/seed0" / task)
        assert all(torch.equal(A[path], dense_A[path]) for path in A)  # the calibration's A
        assert any(not torch.equal(B[path], dense_B[path]) for path in B)
        size = torch.cat([b.abs().flatten() for b in dense_B.values()])
        chosen = torch.cat([masks[path.removeprefix("base_model.model.bert.")].flatten() for path in dense_B])
        assert size[chosen].min() >= size[~chosen].max()
    assert not torch.equal(*(next(iter(factors_of(out / "lori-d/seed0" / t)[0].values())) for t in ("sst2", "mnli")))
    assert not list(out.glob("lori-d*/**/masks.safetensors"))


def test_merged_is_the_mean_of_the_deltas(finished_lori):
    out, results = finished_lori
    for merged, own in (("lora-merged", "single"), ("lori-d-merged", "lori-d"), ("lori-s-merged", "lori-s")):
        A, B = factors_of(out / merged / "seed0/sst2")
        parts = [factors_of(out / own / "seed0" / task) for task in ("sst2", "mnli")]
        for path in A:
            delta = sum(2.0 * b[path] @ a[path] for a, b in parts) / 2  # scale 16 / 8
            torch.testing.assert_close(B[path] @ A[path], delta, atol=1e-7, rtol=1e-5)
        for task in ("sst2", "mnli"):  # each keeps its head
            folders = [out / method / "seed0" / task for method in (merged, own)]
            ours, theirs = (read_safetensors(folder / "adapter_model.safetensors") for folder in folders)
            assert all(torch.equal(ours[name], x) for name, x in theirs.items() if "lora_" not in name)
        cosines = results["methods"][merged]["0"]["cosines"]
        a, b = (torch.cat([(b[p] @ a[p]).flatten() for p in a]) for a, b in parts)
        assert cosines[0][1] == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5)


def test_merged_linearly_factors_add_up(run, tmp_path):
    """Every A and B is (weight · scale)^½ times the sum of the tasks' own, and the merged adapter's scale is 1."""
    flags = "--methods single,lora-merged --own-a --merge linear --merge-weight 0.3 --alpha 4"
    assert run(f"--tasks sst2,mnli --steps 2 {flags}")[0] == 0
    merged, *parts = (
        factors_of(tmp_path / "out" / p) for p in ("lora-merged/seed0/sst2", "single/seed0/sst2", "single/seed0/mnli")
    )
    for found, *own in zip(merged, *parts, strict=True):
        for path in found:
            torch.testing.assert_close(found[path], (0.3 * 0.5) ** 0.5 * sum(x[path] for x in own))


def test_lori_s_starts_over_at_ten_times_the_rate(finished_lori, settings):
    for task in ("sst2", "mnli"):
        dense, sparse = (log_of(finished_lori[0] / m / "seed0" / task)[0][0] for m in ("lori-d", "lori-s"))
        assert sparse["loss"] == dense["loss"] and sparse["lr"] == pytest.approx(10 * dense["lr"])
    for given, peak in ((0.0, 1e-2), (0.5, 0.5)):
        s = settings(tasks="sst2", lr=1e-3, sparse_lr=given)
        _, frozen, tasks = train.load(s)
        trained = {n: p for n, p in train.build("lori-s", frozen, tasks, 0, s).named_parameters() if p.requires_grad}
        rate = {id(p): g["peak"] for g in train.make_optimizer("lori-s", trained, s).param_groups for p in g["params"]}
        assert {(n.partition(".")[0], rate[id(p)]) for n, p in trained.items()} == {("encoder", peak), ("heads", 1e-3)}


def test_own_a_is_for_single_and_joint_keeps_its_own(finished, finished_lori):
    out, _ = finished_lori
    A = {m: {t: factors_of(out / m / "seed0" / t)[0] for t in ("sst2", "mnli")} for m in ("single", "joint")}
    path = next(iter(A["joint"]["sst2"]))
    assert torch.equal(A["joint"]["sst2"][path], A["joint"]["mnli"][path])
    start = factors_of(finished[0] / "head/seed0/sst2")[0][path]  # a seed's A; six steps move it by 0.03 at most
    far = {m: [(A[m][t][path] - start).abs().mean() for t in ("sst2", "mnli")] for m in A}  # or U(-1/8, 1/8), by 1/12
    assert max(far["joint"]) < 0.03 and min(far["single"]) > 0.05
    assert (A["single"]["sst2"][path] - A["single"]["mnli"][path]).abs().mean() > 0.05


def test_lori_ortho_trains_B_alone(finished_lori):
    out, results = finished_lori
    blocks = results["methods"]["lori-ortho"]["0"]["conflicts"]["blocks"]
    assert blocks and all(name.endswith(".B") for name in blocks)


def test_lori_trains_no_A(run, tmp_path):
    methods = ["lori-ortho", "lori-d", "lori-s"]
    for steps in (1, 3):
        flags = f"--tasks sst2,mnli --methods {','.join(methods)} --lr 1e-2"
        assert run(f"{flags} --steps {steps}", out=tmp_path / str(steps))[0] == 0
    for method in methods:
        (A, B), (A3, B3) = (factors_of(tmp_path / steps / method / "seed0/mnli") for steps in "13")
        assert all(torch.equal(A[path], A3[path]) for path in A) and any(not torch.equal(B[p], B3[p]) for p in B)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one clear line, exit status 2, nothing half-written


@pytest.mark.parametrize(
    "flags, says",
    [
        ("--tasks sst3", "--tasks: unknown 'sst3'"),
        ("--tasks mnli,ax", "--tasks: unknown 'ax'"),
        ("--tasks sst2,sst2", "--tasks 'sst2,sst2': give each one once"),
        ("--methods ortho,magic", "--methods: unknown 'magic'"),
        ("--targets nothing", "target 'nothing' matches no linear layer"),
        ("--rank 0", "--rank 0"),
        ("--batch-size 0", "--batch-size 0"),
        ("--steps 0", "--steps 0"),
        ("--lr nan", "--lr nan"),
        ("--lr inf", "--lr inf"),
        ("--clip inf", "--clip inf"),
        ("--dropout 1", "--dropout 1.0"),
        ("--seeds 0,x", "--seeds '0,x'"),
        ("--seeds 1,1", "--seeds '1,1': give each one once"),
        ("--seeds 4294967296", "2^32"),
        ("--seeds=-1", "each must be at least 0"),
        ("--task-weights 1,2,3", "2 tasks need 2 weights"),
        ("--task-weights 1,nan", "--task-weights '1,nan'"),
        ("--max-length 9999", "--max-length 9999"),
        ("--holdout 9999", "--holdout 9999"),
        ("--tasks sst2,rte", "no task 'rte'"),
        ("--device cuda:99", "--device cuda:99"),
        ("--device nothing", "--device nothing"),
        ("--unit everything", "--unit 'everything' is none of tensor, factor, all"),
        ("--optimizer magic", "--optimizer 'magic' is none of adamw, sgd"),
        ("--sparsity 1", "--sparsity 1.0 is outside"),
        ("--sparsity -0.1", "--sparsity -0.1 is outside"),
        ("--methods lori-d,lori-s --sparsity 0.9999", "--sparsity 0.9999: lori-s would train none of the"),
        ("--methods lori-s", "lori-s is made from lori-d"),
        ("--methods lora-merged", "lora-merged is made from single"),
        ("--tasks sst2 --methods single,lora-merged", "nothing to merge"),
        ("--methods lori-ortho --factors A", "--factors A: lori-ortho"),
        ("--methods single,head --balance", "--balance: no shared adapter"),
        ("--balance --task-weights 1,2", "leave out --task-weights"),
        ("--balance --factors A", "--factors A: --balance"),
        ("--jobs 0", "--jobs 0 is outside"),
        ("--save-every -1", "--save-every -1.0 is outside"),
        ("--glue ~nobody-of-that-name/glue", "no GLUE folder ~nobody"),
        ("--demo", "--demo brings its own"),
        ("--evaluate out/ortho/seed0", "--evaluate has moved: python evaluate.py ADAPTER"),
        ("--submit folder", "--submit has moved: python evaluate.py ADAPTER --submit FOLDER"),
        ("--continual", "--continual has moved: python experiments/continual.py"),
        ("--disjoint", "--disjoint has moved: python experiments/continual.py --disjoint"),
        ("--evaluate=out", "python evaluate.py"),
    ],
)
def test_bad_setting(run, tmp_path, flags, says):
    assert_refused(run("--tasks sst2,mnli --steps 2 " + flags), says)
    assert not (tmp_path / "out").exists()


def test_home_is_home(monkeypatch, tmp_path):
    """Of --out=~/x a shell leaves the ~ as it is."""
    monkeypatch.setenv("HOME", str(tmp_path))
    assert train.parse(["--out=~/x", "--steps=1"]) == {"out": f"{tmp_path}/x", "steps": 1}


def test_a_stacked_copy_waits_for_a_gpu_alone(monkeypatch):
    """On mps a copy that is not waited for may read memory that is gone."""
    seen = mock.Mock(side_effect=lambda *_, **__: torch.zeros(1))
    monkeypatch.setattr(torch.Tensor, "to", seen)
    glue.to_device(np.zeros(1), torch.device("mps"))
    assert not seen.call_args.kwargs.get("non_blocking")


def test_resume_of_nothing(capsys):
    assert train.main(["--resume"]) == 2
    assert capsys.readouterr().err == "train.py: --resume needs --out FOLDER: the folder of the run to go on with\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(run, tmp_path):
    assert_refused(run("--tasks sst2 --device cuda"), "--device cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flags", ["--steps many", "--learning-rate 1", "--step 3", "--granularity tensor"])
def test_no_such_flag_or_number_is_argparse(run, tmp_path, capsys, flags):
    with pytest.raises(SystemExit) as e:
        run(flags)
    assert e.value.code == 2 and flags.split()[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


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
    assert_refused(run("--tasks sst2 --steps 2", model=tmp_path / "model"), says)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "rows, says",
    [
        ([{"text": "a", "label": 0}], "no column 'sentence'"),
        ([{"sentence": "a", "label": 0}, {"sentence": "b", "label": 7}], "label 7"),
        ([{"sentence": "a", "label": -1}], "label -1"),
        ([{"sentence": "a", "label": [1]}], "label [1]"),
        ([], "sst2"),
    ],
)
def test_bad_data(run, tmp_path, rows, says):
    write_rows(tmp_path / "glue/sst2", rows)
    write_rows(tmp_path / "glue/sst2", rows[:1], "validation")
    assert_refused(run("--tasks sst2 --steps 2", glue=tmp_path / "glue"), says)
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be_written(run, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(run("--tasks sst2 --steps 2", out=tmp_path / "file" / "out"), "can't be written")


@pytest.mark.parametrize("more", ["", " --eval-every 1"])
def test_divergence_is_named(run, tmp_path, more):
    flags = "--tasks sst2,stsb --methods ortho --steps 120 --lr 1000 --optimizer sgd --clip 0 --warmup 0"
    status, _, err = run(flags + more)
    last = err.strip().splitlines()[-1]
    assert (
        status == 1 and last.startswith("train.py: ortho, seed 0, step ") and last.endswith("a smaller --lr may help")
    )
    assert "the gradient of encoder" in last or "the loss of" in last
    assert not list((tmp_path / "out").rglob("result.json")) and "Traceback" not in err


def test_a_gpu_without_memory_left_is_one_line(run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")

    monkeypatch.setattr(train, "gradients", full)
    status, _, err = run("--tasks sst2 --methods joint --steps 2")
    assert status == 1 and "Traceback" not in err
    expected = "CUDA out of memory. Tried to allocate 2.00 GiB. A smaller --batch-size or --max-length may help"
    assert err.strip().splitlines()[-1] == f"train.py: {expected}"


# ---------------------------------------------------------------------------------------------------------------------
# Without the Hub

SMALL_DEMO = """
import sys, train
from support import toy
train.demo = lambda s: toy.make_demo(steps=5, rows=64, quiet=True)
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
    return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=600)


def test_bare_command_falls_back_to_the_demo(tmp_path):
    done = without_hub(
        tmp_path, "--steps", "2", "--methods", "joint", "--seeds", "0", "--dtype", "auto", "--device", "cpu"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("loading roberta-base") and "So this is the demo" in done.stdout
    assert f"1 of 1 trainings to do, {min(8, os.cpu_count())} at a time" in done.stdout
    assert "The demo: a toy grammar" in done.stdout and "| joint" in done.stdout
    made, files = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert re.fullmatch(r"demo-\d{8}-\d{6}", made) and re.fullmatch("toy-[0-9a-f]{8}", files)
    results = results_of(tmp_path / "runs" / made)
    assert results["demo"] is True and results["settings"]["lr"] == toy.DEMO["lr"]
    assert results["settings"]["dtype"] == "fp32"  # auto was resolved, or the folder would bind the word


def test_the_demo_by_its_flag(demo, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "demo", lambda s: demo)
    assert not train.main(["--demo", "--steps=2", "--seeds=0", "--jobs=1", f"--out={tmp_path / 'out'}"])
    results = results_of(tmp_path / "out")
    assert list(results["methods"]) == toy.DEMO["methods"].split(",") and results["demo"] is True
    assert results["settings"]["task_weights"] == "0.1,1,1,1" and "loading" not in capsys.readouterr().out


def test_auto_is_what_it_is_on_the_demo_s_device(monkeypatch, tmp_path):
    """As if there were a GPU and no Hub: bf16 and one pass for all there, on the CPU that the demo runs on neither."""
    made, s = iter([HubError("no Hub"), "the demo's"]), train.Settings(dtype="auto", per_task="auto")

    def load(_):
        if isinstance(found := next(made), Exception):
            raise found
        return found

    monkeypatch.setattr(train, "load", load)
    monkeypatch.setattr(train, "demo", lambda s: tmp_path)
    monkeypatch.setattr(train, "find_device", lambda name, rank: torch.device("cuda" if name == "auto" else name))
    monkeypatch.setattr(train, "fast_in_bf16", lambda device: device.type == "cuda")
    train.resolve(s)
    assert (s.dtype, s.per_task) == ("bf16", "stacked")
    assert train.load_or_demo(s, {"dtype": "auto", "per_task": "auto"}) == "the demo's"
    assert (s.device, s.dtype, s.per_task) == ("cpu", "fp32", "loop")


def test_the_demo_fits_what_is_asked_of_it():
    """Its weights are for its own tasks, and --balance would have none; what is given comes first."""
    own = toy.demo_settings({}, 1)
    assert own["task_weights"] == "0.1,1,1,1" and own["jobs"] == min(8, os.cpu_count())
    assert toy.demo_settings({}, 2)["jobs"] == 1
    assert own["device"] == "cpu" and toy.demo_settings({"device": "cuda"}, 1)["device"] == "cuda"
    assert toy.demo_settings({"tasks": toy.DEMO["tasks"]}, 1)["task_weights"] == own["task_weights"]
    for given in ({"tasks": "sst2,mrpc"}, {"balance": True}, {"task_weights": "1,2,3,4", "steps": 3}):
        found = toy.demo_settings(given, 1)
        assert found.items() >= given.items() and found.get("task_weights") == given.get("task_weights")
        train.check(train.Settings(**found))
    train.check(train.Settings(**toy.demo_settings({"factors": "A"}, 1)))  # without balanced, which scales A and B


def test_a_mask_of_what_did_not_train_names_its_task(run):
    status, _, err = run("--tasks sst2,mnli --steps 1 --methods lori-d,lori-s --task-weights 1,0")
    said = "train.py: lori-s, seed 0, mnli: no mask of sparsity 0.9: all that may be chosen are zero: train B first"
    assert status == 2 and err.splitlines()[-1] == said


def test_a_space_after_a_comma_is_no_other_setting():
    """Or the demo would lose its weights by it, and --resume be refused. A path may have one."""
    given = train.parse(["--tasks", "sst2, mrpc, mnli, stsb", "--task-weights", "1, 2,3, 4", "--model", "a, b"])
    assert given == {"tasks": "sst2,mrpc,mnli,stsb", "task_weights": "1,2,3,4", "model": "a, b"}
    del given["task_weights"], given["model"]
    assert toy.demo_settings(given, 1)["task_weights"] == "0.1,1,1,1"


def test_the_demo_asks_its_question_of_its_own_settings_alone(monkeypatch, capsys):
    monkeypatch.setattr(toy, "make_demo", lambda conflict: conflict)
    for given in ({}, {"methods": "lori-d"}, {"tasks": "mrpc"}, {"balance": True}):
        toy.demo(train.Settings(**toy.demo_settings(given, 1)))
        said = capsys.readouterr().out
        assert said.startswith("The demo: a toy grammar") and ("counts a tenth" in said) == (not given)


@pytest.mark.parametrize("flags", [["--model", "roberta-base"], ["--glue", "nyu-mll/glue"], ["--tasks", "rte"]])
def test_no_fallback_where_something_was_asked_for(tmp_path, flags, monkeypatch, capsys):
    def load(s):
        raise HubError("no Hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", load)
    monkeypatch.setattr(train, "demo", lambda s: pytest.fail("the demo"))
    assert_refused((train.main(["--steps", "2", *flags]), *capsys.readouterr()), "no Hub")
    assert not (tmp_path / "runs").exists()


def test_an_interrupted_fallback_says_demo(demo, monkeypatch, tmp_path, capsys):
    """Once the Hub answers again, the bare command would be another run."""
    honest = train.load

    def load(s):
        if not s.demo:
            raise HubError("no Hub")
        return honest(s)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", load)
    monkeypatch.setattr(train, "demo", lambda s: demo)
    monkeypatch.setattr(train, "run", interrupted)
    assert train.main(["--steps", "2", "--jobs", "1"]) == 130
    (out,) = (tmp_path / "runs").iterdir()
    last = capsys.readouterr().err.splitlines()[-1]
    words = f"--steps 2 --jobs 1 --demo --out runs/{out.name} --resume"
    assert last == f"train.py: interrupted; to go on: python train.py {words}"


def test_a_hub_that_is_down_makes_no_demo_of_a_run_on_glue(finished, tmp_path, monkeypatch, capsys):
    def load(s):
        raise HubError("no Hub")

    out = shutil.copytree(finished[0], tmp_path / "out")
    monkeypatch.setattr(train, "load", load)
    monkeypatch.setattr(train, "demo", lambda s: pytest.fail("the demo"))
    assert train.main(["--out", str(out), "--resume"]) == 2 and capsys.readouterr().err == "train.py: no Hub\n"


def test_help_names_every_setting(capsys):
    with pytest.raises(SystemExit) as e:
        train.main(["--help"])
    text, settings = capsys.readouterr().out, dataclasses.fields(train.Settings)
    assert e.value.code == 0 and all("--" + f.name.replace("_", "-") in text for f in settings)
