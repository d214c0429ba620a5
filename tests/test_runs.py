"""An out folder that was left at any moment goes on to the same bytes; nothing in it is lost, or made twice."""

import builtins
import contextlib
import dataclasses
import errno
import functools
import gc
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import kills
import numpy as np
import pytest
import torch

import train
from support import runs, table
from support.checkpoint import BadInput, load_state, read_safetensors, write_safetensors

ROOT = Path(__file__).parent.parent
BASE = "--tasks sst2,stsb --steps 3 --batch-size 4 --max-length 32 --dtype fp32 --save-every 0"
FLAGS = f"{BASE} --dropout 0.1 --methods {kills.METHODS}"
LONG = BASE.replace("--steps 3", "--steps 200") + " --methods joint,ortho"


class Interrupted(BaseException):
    """A crash, as far as train.py can see."""


@pytest.fixture(autouse=True)
def one_thread(threads):
    """As --jobs has it: runs with and without it are compared, and the number binds an out folder."""
    torch.set_num_threads(1)


def command(demo, out, flags):
    return ["--model", str(demo / "model"), "--glue", str(demo / "glue"), "--out", str(out), *flags.split()]


@pytest.fixture
def run(demo, capsys):
    """run(out, "--flags"): (exit status, standard output, standard error)."""

    def run(out, flags=FLAGS):
        capsys.readouterr()  # what an interrupted run has said
        return train.main(command(demo, out, flags)) or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def whole(demo, tmp_path_factory):
    """whole("--flags"): {file: bytes} of a run that nothing happened to."""

    @functools.cache
    def whole(flags=FLAGS):
        out = tmp_path_factory.mktemp("whole") / "out"
        assert not train.main(command(demo, out, flags))
        return kills.kept(out)

    return whole


def start(demo, out, flags, **more):
    """The command as a process of its own, in a group of its own, that hears Ctrl-C."""
    words = [sys.executable, str(ROOT / "train.py"), *command(demo, out, flags)]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a background job of a script ignores it
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(words, preexec_fn=heard, start_new_session=True, env=env, **pipes, **more)


HANGS = 600  # seconds after which a process is called stuck


def wait_for(process, happened):
    until = time.monotonic() + HANGS
    while not happened():
        assert process.poll() is None and time.monotonic() < until, (process.kill(), process.communicate())
        time.sleep(0.01)


def ours(err):
    """The one line of standard error that train.py wrote; beside it there may be a progress bar, and nothing else."""
    lines = [
        line for line in err.replace("\r", "\n").splitlines() if line.strip() and not re.search(r"\[\d+:\d+<", line)
    ]
    assert len(lines) == 1 and lines[0].startswith("train.py: "), err
    return lines[0]


def crash_at(patch, nth, where=(runs, "save_state"), before=False):
    """Let the nth call of a function be the last thing that a run does, or the first that it doesn't."""
    function, calls = getattr(*where), [0]

    def counting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == nth and before:
            raise Interrupted
        result = function(*args, **kwargs)
        if calls[0] == nth:
            raise Interrupted
        return result

    patch.setattr(*where, counting)
    return calls


@contextlib.contextmanager
def crash(nth, *where, before=False):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        crash_at(patch, nth, *where, before=before)
        yield


@pytest.fixture
def interrupted(run, tmp_path):
    """An out folder in the middle of a run: single is finished, joint has its first state."""
    with crash(5):
        run(tmp_path / "out")
    assert (tmp_path / "out/joint/seed0/state.safetensors").exists()
    return tmp_path / "out"


def stamps(out, below=""):
    """{file: (when it was written, bytes)} of an out folder, or of a method in it."""
    files = [path for path in (out / below).rglob("*") if path.is_file()]
    return {str(path.relative_to(out)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def no_work(monkeypatch):
    """From here on nothing is trained or scored."""
    for name in ("gradients", "predict", "run_merge"):
        monkeypatch.setattr(train, name, lambda *_, name=name: pytest.fail(f"{name} once more"))


# ---------------------------------------------------------------------------------------------------------------------
# The same end


@pytest.mark.parametrize(
    "flags",
    [
        FLAGS,
        f"{BASE} --dropout 0.2 --optimizer sgd --seeds 0,1 --methods single,ortho",
        f"{BASE} --dropout 0.1 --per-task stacked --methods joint,ortho,lori-ortho",
    ],
)
def test_a_crash_after_any_save_changes_nothing(run, whole, tmp_path, flags):
    saves = {FLAGS: 16}.get(flags, 12 if "seeds" in flags else 6)  # two of each training's three steps
    for nth in range(1, saves + 1, 3):
        out = tmp_path / f"crash{nth}"
        with crash(nth):
            run(out, flags)
        assert run(out, f"{flags} --resume")[0] == 0
        assert kills.kept(out) == whole(flags), f"interrupted after save {nth}"


@pytest.mark.parametrize(
    "where, nth, then",
    [
        ((train, "predict"), 3, 2),
        ((train, "save_adapter"), 3, 2),
        ((train, "write_safetensors"), 1, 1),  # masks
        ((train, "run_merge"), 1, 2),
        ((runs, "write_text"), 3, 2),  # a timing.json, then a result.json
        ((runs, "save_state"), 4, 1),
        ((table, "write_text"), 1, 2),  # results.json, then results.md
    ],
    ids=lambda x: x[1] if isinstance(x, tuple) else None,
)
def test_a_crash_before_any_write_and_one_more_changes_nothing(run, whole, tmp_path, where, nth, then):
    out = tmp_path / "out"
    for number, more in (nth, ""), (then, "--resume"):
        with crash(number, where, before=True):
            run(out, f"{FLAGS} {more}")
    assert run(out, f"{FLAGS} --resume")[0] == 0
    assert kills.kept(out) == whole()


def test_a_crash_between_a_result_and_the_end_of_its_state(run, whole, tmp_path):
    out = tmp_path / "out"
    with crash(2, (runs, "write_text")):
        run(out)
    assert (out / "single/seed0/sst2/state.safetensors").exists()
    assert run(out, f"{FLAGS} --resume")[0] == 0
    assert kills.kept(out) == whole()


def test_what_is_finished_is_not_made_again(run, interrupted, whole, monkeypatch):
    before, trained, end = stamps(interrupted, "single"), [], whole()
    honest = train.run_training
    monkeypatch.setattr(train, "run_training", lambda unit, *rest: (trained.append(str(unit)), honest(unit, *rest)))
    with crash(1, (table, "write_text"), before=True):  # all is done, and no results.json
        run(interrupted, f"{FLAGS} --resume")
    assert trained[:2] == ["joint, seed 0", "ortho, seed 0"] and len(trained) == 6
    assert stamps(interrupted, "single") == before
    no_work(monkeypatch)
    assert run(interrupted, f"{FLAGS} --resume")[0] == 0
    assert kills.kept(interrupted) == end


def test_the_shorter_run_of_the_killing_script():
    words = [sys.executable, ROOT / "tests/kills.py", "--count", "2"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0 and "2/2 runs" in done.stdout and "0 wrong" in done.stdout, done


# ---------------------------------------------------------------------------------------------------------------------
# A run that is finished, and what is added to it


def test_a_finished_run_is_refused_kept_and_added_to(run, whole, tmp_path, monkeypatch, capsys):
    flags, out = f"{BASE} --methods joint,single", tmp_path / "it's the $HOME of an out folder"
    assert run(out, flags)[0] == 0
    before = stamps(out)
    status, text, err = run(out, flags)
    assert status == 2 and text == "" and stamps(out) == before
    words = shlex.split(ours(err).partition("add to it: ")[2])
    assert words[:2] == ["python", "train.py"] and words[-1] == "--resume" and str(out) in words
    with monkeypatch.context() as patch:
        no_work(patch)
        assert not train.main(words[2:])
    assert (out / "results.md").read_text() in capsys.readouterr().out
    assert kills.kept(out) == {name: data for name, (_, data) in before.items() if Path(name).name not in kills.TIMES}
    more = f"{BASE} --methods joint,single,ortho --seeds 0,1"
    assert run(out, f"{more} --resume")[0] == 0
    assert stamps(out, "joint/seed0") | stamps(out, "single/seed0") == {
        name: data for name, data in before.items() if "seed0" in name
    }
    assert kills.kept(out) == whole(more)


def test_the_command_that_goes_on():
    assert runs.again(["--steps", "3"], "runs/a b", demo=True) == (
        "python train.py --steps 3 --demo --out 'runs/a b' --resume"
    )
    words = ["--demo", "--out", "a", "--resume"]
    assert runs.again(words, "a", demo=True) == "python train.py " + " ".join(words)
    assert runs.again(["--out=a"], "a", demo=False) == "python train.py --out=a --resume"


def test_what_is_made_of_others_needs_them(run, tmp_path):
    out = tmp_path / "out"
    for methods in ("--methods lori-s", "--methods lora-merged,joint --resume"):
        status, _, err = run(out, f"{BASE} {methods}")
        assert status == 2 and "name that too" in ours(err)
    assert run(out, f"{BASE} --methods single --resume")[0] == 0
    assert run(out, f"{BASE} --methods lora-merged --resume")[0] == 0
    assert list(json.loads((out / "results.json").read_text())["methods"]) == ["single", "lora-merged"]


@pytest.mark.parametrize("path", ["results.json", "joint/seed0/result.json"])
def test_what_no_settings_belong_to_is_refused(run, tmp_path, path):
    (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / path).write_text("{}")
    before = stamps(tmp_path)
    for more in ("", " --resume"):
        status, _, err = run(tmp_path, FLAGS + more)
        assert status == 2 and "no settings.json" in ours(err) and stamps(tmp_path) == before


@pytest.mark.parametrize("name, text", [("results.md", "my notes"), ("settings.json", '{"settings": []}')])
def test_a_users_own_file_is_not_written_over(run, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    before = stamps(tmp_path)
    status, _, err = run(tmp_path, f"{FLAGS} --resume")
    assert status == 2 and name in ours(err) and "choose another folder" in err
    assert {path.name for path in tmp_path.iterdir()} == {name} and stamps(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# Several processes, one folder


def test_two_processes_with_a_seed_each_are_one_with_both(demo, whole, tmp_path):
    flags = f"{BASE} --methods joint,ortho"
    both = [start(demo, tmp_path / "out", f"{flags} --resume --seeds {seed}") for seed in (0, 1)]
    for process in both:
        _, err = process.communicate(timeout=HANGS)
        assert process.returncode == 0, err
    assert kills.kept(tmp_path / "out") == whole(f"{flags} --seeds 0,1")


def test_two_different_runs_at_once(demo, tmp_path):
    both = [start(demo, tmp_path / "out", f"{BASE} --methods joint --lr {lr}") for lr in ("1e-3", "1e-4")]
    said = [process.communicate(timeout=HANGS)[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], said
    assert "has a run in it" in ours(next(err for err, process in zip(said, both, strict=True) if process.returncode))


@pytest.mark.parametrize("resume, words", [(False, "has a run in it"), (True, "lr was")])
def test_one_of_many_makes_the_folder(tmp_path, resume, words):
    """At the same moment, and without what a run does before it: threads, each with a lock of its own."""
    barrier, won, lost = threading.Barrier(8), [], []

    def open_out(lr):
        barrier.wait()
        try:
            runs.open_out(tmp_path / "out", {"lr": lr}, {}, {"methods": {}}, resume, "python train.py")
            won.append(lr)
        except BadInput as e:
            lost.append(str(e))

    threads = [threading.Thread(target=open_out, args=(lr,)) for lr in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and len(lost) == 7 and all(words in text for text in lost)
    assert json.loads((tmp_path / "out/settings.json").read_text())["settings"] == {"lr": won[0]}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["settings.json"]


def test_a_demo_that_is_refused_is_told_to_go_on_as_one(tmp_path, capsys):
    """As Ctrl-C tells it: without --demo the Hub would be asked for roberta-base, and its run be refused."""
    (tmp_path / "settings.json").write_text('{"demo": true}')
    assert train.main(["--out", str(tmp_path)]) == 2
    assert f"add to it: python train.py --out {tmp_path} --demo --resume" in ours(capsys.readouterr().err)


@pytest.mark.parametrize("text", ['{"settings": {}}', '{"settings": {}, "facts": {}, "methods": []}'])
def test_settings_that_someone_has_edited(tmp_path, text):
    (tmp_path / "settings.json").write_text(text)
    with pytest.raises(BadInput, match="settings.json was not written by train.py; choose another folder"):
        runs.open_out(tmp_path, {}, {}, {"methods": {"joint": 1}}, True, "python train.py")


def test_a_time_says_what_it_was_measured_on():
    assert runs.hardware(torch.nn.Linear(1, 1)) == "CPU, 1 thread"
    assert runs.hardware(torch.nn.Linear(1, 1, device="meta")) == "meta"  # in the place of Apple's mps


def test_what_blocks_inside_is_not_the_lock(tmp_path):
    with pytest.raises(BlockingIOError, match="a full pipe"), runs.locked(tmp_path):
        raise BlockingIOError("a full pipe")


def test_methods_that_are_newer_than_the_folder_are_added(tmp_path):
    for resume, methods in ((False, {"joint": 1}), (True, {"ortho": 2, "joint": 3})):
        runs.open_out(tmp_path, {"lr": 1}, {}, {"methods": methods}, resume, "python train.py")
    kept = json.loads((tmp_path / "settings.json").read_text())
    assert kept == {"settings": {"lr": 1}, "facts": {}, "methods": {"ortho": 2, "joint": 1}}


def test_a_log_that_someone_has_taken_away(run, interrupted):
    (interrupted / "joint/seed0/log.jsonl").unlink()
    assert run(interrupted, f"{FLAGS} --resume")[0] == 0
    lines = (interrupted / "joint/seed0/log.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line) for line in lines)


def test_a_unit_is_one_processs(run, interrupted, whole):
    with runs.locked(interrupted / "joint/seed0"):
        before = stamps(interrupted)
        status, _, err = run(interrupted, f"{FLAGS} --resume")
        assert status == 2 and f"another process is at work on {interrupted / 'joint/seed0'}" in ours(err)
        assert stamps(interrupted) == before
        assert run(interrupted, f"{FLAGS} --resume --methods lori-d")[0] == 0  # another part
    assert run(interrupted, f"{FLAGS} --resume")[0] == 0
    assert kills.kept(interrupted) == whole()


def test_a_unit_that_another_process_has_finished_meanwhile(run, tmp_path, monkeypatch):
    flags, out = f"{BASE} --methods joint --resume", tmp_path / "out"
    honest = runs.unfinished

    def slow(units):
        todo = honest(units)
        monkeypatch.setattr(runs, "unfinished", honest)
        assert run(out, flags)[0] == 0  # the other
        no_work(monkeypatch)
        return todo

    monkeypatch.setattr(runs, "unfinished", slow)
    assert run(out, flags)[0] == 0


# ---------------------------------------------------------------------------------------------------------------------
# What binds a folder


def test_other_settings_are_refused(run, interrupted):
    before = stamps(interrupted)
    for change, words in {
        "--lr 0.1": "lr was 0.0005 and is 0.1",
        "--steps 4": "steps was 3 and is 4",
        "--tasks sst2,mnli": "tasks was 'sst2,stsb' and is 'sst2,mnli'",
        "--clip 0.5": "clip was 1.0 and is 0.5",
        "--per-task stacked": "per_task was 'loop' and is 'stacked'",
        "--rslora": "rslora was False and is True",
    }.items():
        status, _, err = run(interrupted, f"{FLAGS} {change} --resume")
        assert status == 2 and words in ours(err) and stamps(interrupted) == before


def test_other_surroundings_are_refused(run, interrupted, monkeypatch):
    before = stamps(interrupted)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    said = ours(run(interrupted, f"{FLAGS} --resume")[2])
    assert f"threads was {threads} and is {threads + 1} (1 with --jobs; else OMP_NUM_THREADS sets it); choose" in said
    torch.set_num_threads(threads)
    version = torch.__version__
    monkeypatch.setattr(torch, "__version__", "1.13")
    assert f"torch was {str(version)!r} and is '1.13'" in ours(run(interrupted, f"{FLAGS} --resume")[2])
    assert stamps(interrupted) == before


def test_rows_that_were_split_elsewhere_are_other_data(demo):
    s = train.Settings(model=str(demo / "model"), glue=str(demo / "glue"), tasks="sst2", max_length=32)
    encoder, _, (data,) = train.load(s)
    moved = dataclasses.replace(
        data,
        train=data.train[:-1],
        train_labels=data.train_labels[:-1],
        validation=data.train[-1:] + data.validation,
        validation_labels=np.concatenate([data.train_labels[-1:], data.validation_labels]),
    )
    there, new = runs.facts(encoder, [data]), runs.facts(encoder, [moved])
    assert [what for what in there if there[what] != new[what]] == ["the number of sst2's rows to train on"]


def test_other_data_and_weights_are_refused_and_copies_are_not(demo, interrupted, whole, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(demo, copy, ignore=shutil.ignore_patterns("*.arrow", "*.lock"))
    rows = {split: next((copy / "glue/sst2").glob(f"{split}*")) for split in ("train", "validation")}
    shutil.copy(rows["train"], copy / "rows")
    shutil.copy(rows["validation"], rows["train"])
    again, before = [*command(copy, interrupted, FLAGS), "--resume"], stamps(interrupted)
    assert train.main(again) == 2 and "the data of sst2 was" in ours(capsys.readouterr().err)
    shutil.copy(copy / "rows", rows["train"])

    weights = copy / "model/model.safetensors"
    shutil.copy(weights, copy / "weights")
    tensors = read_safetensors(weights)
    name = next(name for name in tensors if "LayerNorm" in name and "cls" not in name)
    write_safetensors(weights, {**tensors, name: tensors[name] + 1e-6})
    assert train.main(again) == 2 and "the weights of the model was" in ours(capsys.readouterr().err)
    assert stamps(interrupted) == before
    shutil.copy(copy / "weights", weights)
    config, text = copy / "model/config.json", (copy / "model/config.json").read_text()
    config.write_text(json.dumps(json.loads(text) | {"layer_norm_eps": 0.1}))
    assert train.main(again) == 2 and "the model's layer_norm_eps was" in ours(capsys.readouterr().err)
    assert stamps(interrupted) == before
    config.write_text(text)

    assert not train.main(again)
    results = json.loads(whole()["results.json"])
    assert json.loads((interrupted / "results.json").read_text()) == results


def test_methods_seeds_and_the_way_it_runs_may_differ(run, tmp_path):
    assert run(tmp_path / "out", f"{BASE} --methods joint")[0] == 0
    more = "--methods ortho --seeds 1 --save-every 5 --eval-every 2 --device cpu --resume"
    assert run(tmp_path / "out", f"{BASE} {more}")[0] == 0
    found = json.loads((tmp_path / "out/results.json").read_text())["methods"]
    assert {name: list(seeds) for name, seeds in found.items()} == {"joint": ["0"], "ortho": ["1"]}


# ---------------------------------------------------------------------------------------------------------------------
# Disks and numbers that go wrong


def test_a_disk_that_is_full_at_any_write(run, tmp_path, monkeypatch):
    """ENOSPC, at every file's first and last write: one line, no loss but of the training at hand, the same end."""
    flags = f"{BASE} --tasks sst2 --targets query --optimizer sgd --steps 2 --resume --methods"
    assert run(tmp_path / "began", f"{flags} head")[0] == 0
    real, writes, of_file = builtins.open, [0, 0], {}  # so far, and which fails; {file: its writes}

    class Full:
        """A file that may not be written."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            writes[0] += 1
            of_file.setdefault(self.file.name, []).append(writes[0])
            if writes[0] == writes[1]:
                self.file.write(data[: len(data) // 2])  # half of it still fits
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Full(file) if set(mode) & set("wa") and str(tmp_path) in str(path) else file

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(Path, "write_text", lambda path, text, **_: opened(path, "w").write(text))
    shutil.copytree(tmp_path / "began", tmp_path / "whole")
    assert run(tmp_path / "whole", f"{flags} head,joint")[0] == 0
    whole = kills.kept(tmp_path / "whole")
    ends = sorted({n for found in of_file.values() for n in (found[0], found[-1])})  # a tensor after the next is alike
    assert writes[0] > 40 and len(ends) > 10
    for nth in ends:
        out = tmp_path / f"full{nth}"
        shutil.copytree(tmp_path / "began", out)
        before, writes[:] = stamps(out, "head"), [0, nth]
        status, _, err = run(out, f"{flags} head,joint")
        assert status == 2 and "No space left" in ours(err) and stamps(out, "head") == before, nth
        assert not list(out.rglob(".*.tmp"))
        writes[1] = 0
        assert run(out, f"{flags} head,joint")[0] == 0
        assert kills.kept(out) == whole, f"full at write {nth}"
        shutil.rmtree(out)
    writes[:] = [0, 1]
    status, _, err = run(tmp_path / "new", f"{flags} joint")
    assert status == 2 and f"--out {tmp_path / 'new'} can't be written: No space left" in ours(err)


def test_a_damaged_state_is_named_and_not_used(run, interrupted, whole):
    """A bit flipped; other damage to the file is in test_checkpoint.py."""
    path = interrupted / "joint/seed0/state.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-100] + bytes([good[-100] ^ 1]) + good[-99:])
    before = stamps(interrupted)
    status, _, err = run(interrupted, f"{FLAGS} --resume")
    assert status == 2 and f"{path} is damaged" in ours(err) and "delete it" in err
    assert stamps(interrupted) == before
    path.unlink()
    assert run(interrupted, f"{FLAGS} --resume")[0] == 0
    assert kills.kept(interrupted) == whole()


@pytest.mark.parametrize(
    "method, what, every",
    [(m, what, 0) for m in ("joint", "ortho", "single") for what in ("loss", "gradient")] + [("ortho", "gradient", 60)],
)
def test_no_state_from_after_the_first_bad_step(run, tmp_path, monkeypatch, method, what, every):
    """Step 5 of 200 goes wrong, between two log lines: it is named, and what is saved is from before it."""
    flags = f"{LONG} --methods {method} --save-every {every}"
    honest, calls = train.task_losses, [0]

    def losses(model, batch):
        found, step = honest(model, batch), calls[0] // (1 if method == "single" else 2)
        calls[0] += 1
        if step == 5 and batch.tasks[0].name == ("sst2" if method == "single" else "stsb"):
            if what == "loss":
                return [found[0] * float("nan")]
            next(p for p in model.parameters() if p.shape[0] == 8).register_hook(lambda g: g * float("inf"))  # an A
        return found

    monkeypatch.setattr(train, "task_losses", losses)
    status, _, err = run(tmp_path / "out", flags)
    assert status == 1 and "step 5" in ours(err) and "query.A" in err and f"{method}, seed 0" in err
    assert ("the loss of " + ("sst2" if method == "single" else "stsb") in err) == (what == "loss")
    folder = tmp_path / "out" / method / ("seed0/sst2" if method == "single" else "seed0")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 4]
    assert (folder / "state.safetensors").exists() == (every == 0) and not (folder / "result.json").exists()
    if every == 0:
        tensors, info = load_state(folder / "state.safetensors")
        assert info["step"] == 5  # steps 0 to 4 are behind it
        assert all(x.isfinite().all() for x in tensors.values() if x.is_floating_point())


# ---------------------------------------------------------------------------------------------------------------------
# --jobs


def test_jobs_change_no_byte(demo, whole, tmp_path):
    process = start(demo, tmp_path / "out", f"{FLAGS} --jobs 2")
    text, err = process.communicate(timeout=HANGS)
    assert process.returncode == 0 and text.count("examples to train on: ") == 1  # in the parent alone
    assert "Traceback" not in err and "leaked" not in err
    assert kills.kept(tmp_path / "out") == whole()


def test_a_merge_waits_for_its_sources(run, tmp_path):
    """There are three units and three workers, so that the merge could be begun at once."""
    assert run(tmp_path / "out", f"{LONG} --methods single,lora-merged --jobs 3")[0] == 0
    assert (tmp_path / "out/lora-merged/seed0/result.json").exists()


def test_bad_input_of_a_worker_ends_all(run, interrupted):
    path = interrupted / "joint/seed0/state.safetensors"
    path.write_bytes(b"no state")
    status, _, err = run(interrupted, f"{FLAGS} --jobs 2 --resume")
    assert status == 2 and f"{path} is damaged" in ours(err) and not multiprocessing.active_children()


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_training_that_diverges_stops_no_other(run, tmp_path, jobs):
    """STS-B's loss does, at such a rate; what would be merged out of it is left out, and all is said in one line."""
    flags = f"{BASE} --steps 40 --optimizer sgd --lr 1000 --clip 0 --warmup 0 --jobs {jobs}"
    status, _, err = run(tmp_path / "out", f"{flags} --methods joint,single,lora-merged,lori-d")
    assert status == 1 and not multiprocessing.active_children() and ours(err).endswith("a smaller --lr may help")
    assert all(f"{unit}, step 5" in err for unit in ("joint, seed 0", "single, seed 0, stsb", "lori-d, seed 0, stsb"))
    done = sorted(str(path.parent.relative_to(tmp_path / "out")) for path in tmp_path.rglob("result.json"))
    assert done == ["lori-d/seed0/sst2", "single/seed0/sst2"]


def test_what_has_diverged_is_named_and_holds_no_memory():
    """Also where it shows in the outputs alone, when it is scored."""
    held = []

    def diverge(unit, bar):
        model = torch.nn.Identity()
        held.append(weakref.ref(model))
        raise FloatingPointError(f"{unit}, step 3" if unit == "a" else "sst2: not all outputs are finite")

    class Unit(str):
        ready = True

    said = [str(e) for e in runs.in_turn(diverge, [Unit("a"), Unit("b")], [], None)]
    assert said == ["a, step 3", "b: sst2: not all outputs are finite"]
    gc.collect()
    assert len(held) == 2 and not any(model() for model in held)


def test_a_killed_worker_ends_all(run, tmp_path):
    ended = threading.Event()

    def kill():
        while not list(tmp_path.rglob("state.safetensors")):
            if ended.wait(0.01):
                return
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    status, _, err = run(tmp_path / "out", f"{LONG.replace('200', '2000')} --jobs 2")
    ended.set()
    killer.join()
    assert status == 2 and ours(err).startswith("train.py: a worker of --jobs ended with exit code -9")
    assert not multiprocessing.active_children()


def test_workers_end_with_a_killed_parent(demo, tmp_path):
    process = start(demo, tmp_path / "out", f"{LONG.replace('200', '20000')} --jobs 2")
    folders = [tmp_path / "out" / method / "seed0" for method in ("joint", "ortho")]
    wait_for(process, lambda: all((folder / "state.safetensors").exists() for folder in folders))
    process.kill()
    process.communicate(timeout=HANGS)  # which ends when the last process that holds its pipes has
    for folder in folders:
        with runs.locked(folder):
            pass


class Lethal:
    """A unit that is asked whether it is ready when a worker has room for it, and kills that worker then."""

    tasks, worker = ("sst2",), None

    @property
    def ready(self):
        os.kill(Lethal.worker.pid, signal.SIGKILL)
        Lethal.worker.join()
        return True


def test_a_worker_that_is_killed_just_before_a_unit_goes_to_it():
    with runs.Workers(print) as workers:
        workers.start(2)
        Lethal.worker, other = workers.started.values()
        os.kill(other.pid, signal.SIGSTOP)  # so that the first one gets the unit
        try:
            with pytest.raises(ChildProcessError, match="exit code -9"):
                workers.do([Lethal()], b"", None)
        finally:
            os.kill(other.pid, signal.SIGCONT)


# ---------------------------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.mark.parametrize("jobs, when", [(1, "log.jsonl"), (2, "log.jsonl"), (2, "settings.json")])
def test_ctrl_c_says_how_to_go_on(run, demo, whole, tmp_path, jobs, when):
    """It reaches every process of the group, as a terminal sends it: in training, and while workers start."""
    out, flags = tmp_path / "an out", f"{LONG} --jobs {jobs}"
    process = start(demo, out, flags)
    wait_for(process, lambda: any(path.stat().st_size for path in out.rglob(when)))
    if when == "settings.json":
        time.sleep(0.6)  # in which workers import
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=HANGS)
    assert process.returncode == 130
    go_on = [*command(demo, out, ""), *flags.split(), "--resume"]
    assert ours(err) == f"train.py: interrupted; to go on: python train.py {shlex.join(go_on)}"
    assert not (out / "results.json").exists()
    assert run(out, f"{LONG} --resume")[0] == 0
    assert kills.kept(out) == whole(LONG)


# ---------------------------------------------------------------------------------------------------------------------
# torchrun

FAULTS = """
import os
import signal
import sys
import train

kind, sys.argv = sys.argv[1], [sys.argv[0], *sys.argv[2:]]
honest, honest_save, calls = train.task_losses, train.runs.save, [0]


def losses(model, batch):
    found, calls[0] = honest(model, batch), calls[0] + 1
    return [found[0] * float("nan")] if train.RANK == 1 and calls[0] == 11 else found


def save(*_):
    raise OSError(28, "No space left on device")


def save_and_die(*args):
    honest_save(*args)
    calls[0] += 1
    if calls[0] == 3:
        os.kill(os.getpid(), signal.SIGKILL)


if kind == "nan":
    train.task_losses = losses
elif kind == "full":
    train.runs.save = save  # which the first one alone does
elif kind == "killed":
    train.runs.save = save_and_die
elif kind == "alone" and train.RANK:
    train.finish = train.run_merge = None
    for name in ("refuse_taken", "open_out", "unfinished", "locked", "load_state", "save"):
        setattr(train.runs, name, None)
train.runs.end(train.main)
"""


def torchrun(demo, tmp_path, kind, flags):
    (tmp_path / "faulty.py").write_text(FAULTS)
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words += [str(tmp_path / "faulty.py"), kind, *command(demo, tmp_path / "out", flags)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, env=env, capture_output=True, text=True, timeout=HANGS)


@pytest.mark.parametrize("kind, words", [("taken", "has a run in it"), ("nan", "step 5"), ("full", "No space left")])
def test_what_ends_one_process_ends_all_with_one_line(demo, tmp_path, kind, words):
    if kind == "taken":
        (tmp_path / "out").mkdir()
        (tmp_path / "out/settings.json").write_text("{}")
    done = torchrun(demo, tmp_path, kind, LONG)
    own = done.stderr.partition("torch/distributed/elastic")[0].rpartition("\n")[0]  # before torchrun's own report
    assert done.returncode and words in ours(own)
    assert done.stderr.count("Traceback (most recent") == 1 and "ChildFailedError" in done.stderr  # torchrun's
    assert not list(tmp_path.rglob(".*.tmp"))


def test_two_processes_that_are_killed_go_on_to_the_same_bytes(demo, tmp_path):
    flags = f"{BASE} --steps 6 --dropout 0.1 --methods joint,ortho --resume"
    for name, kinds in {"whole": ["plain"], "parts": ["killed", "plain"]}.items():
        (tmp_path / name).mkdir()
        for kind in kinds:
            done = torchrun(demo, tmp_path / name, kind, flags)
            assert (done.returncode != 0) == (kind == "killed"), done.stderr
            if kind == "killed":
                assert load_state(tmp_path / name / "out/joint/seed0/state.safetensors")[1]["step"] == 3
    assert kills.kept(tmp_path / "whole/out") == kills.kept(tmp_path / "parts/out")


@pytest.mark.parametrize("world, said", [("1", "said\nlate\n"), ("2", "said\n")])
def test_under_torchrun_nothing_runs_while_the_interpreter_ends(world, said):
    """A thread of gloo's may abort it there. What was printed is out, and the status stays."""
    code = "import atexit; from support import runs; atexit.register(print, 'late'); print('said'); runs.end(lambda: 2)"
    env = {**os.environ, "WORLD_SIZE": world, "PYTHONPATH": str(ROOT)}
    how = {"env": env, "capture_output": True, "text": True, "timeout": HANGS}
    done = subprocess.run([sys.executable, "-c", code], **how)
    assert (done.returncode, done.stdout) == (2, said), done.stderr
    done = subprocess.run([sys.executable, "-c", code.replace("2)", "1 / 0)")], **how)
    assert (done.returncode, done.stdout) == (1, said) and done.stderr.count("ZeroDivisionError: ") == 1  # a bug's


def test_a_terminal_without_the_tables_signs_gets_the_table_all_the_same():
    code = "from support import runs; runs.end(lambda: print('88.4 ± 3.8'))"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=HANGS)
    assert (done.returncode, done.stdout) == (0, "88.4 ? 3.8\n"), done.stderr


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("mine"), getattr(torch, "AcceleratorError", None)])
def test_a_gpus_fault_is_not_another_process_s(error):
    if not isinstance(error, RuntimeError):
        error = error and error("mine")
    for raised, says in ((error, "mine"), (RuntimeError("gone"), "another process has ended: gone")):
        with pytest.raises(type(raised) if says == "mine" else ConnectionError, match=says), runs.together():
            raise raised


@pytest.mark.parametrize("more", [{"RANK": "1"}, {"LOCAL_RANK": "2", "WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}], ids=str)
def test_one_process_is_the_first(more):
    code = "from support import runs; print(runs.RANK, runs.WORLD, runs.LOCAL_RANK)"
    env = {**os.environ, "PYTHONPATH": str(ROOT), **more}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=HANGS)
    assert done.stdout == "0 1 0\n", done.stderr


def test_torchruns_variables_by_half(monkeypatch):
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadInput, match="torchrun's other variables are not set"):
        runs.join_processes("cpu")


def test_more_processes_than_gpus(monkeypatch):
    monkeypatch.setattr(runs, "WORLD", 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(BadInput, match="2 processes on 1 GPUs"):
        runs.join_processes("auto")


def test_the_first_process_alone_looks_at_the_folder(demo, tmp_path):
    done = torchrun(demo, tmp_path, "alone", f"{BASE} --methods single,joint,lora-merged --resume")
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out/results.json").read_text())
    assert list(results["methods"]) == ["single", "joint", "lora-merged"]


# ---------------------------------------------------------------------------------------------------------------------
# The parts


def test_units(tmp_path):
    names = ("single", "joint", "lora-merged")
    found = runs.units(tmp_path, {name: train.METHODS[name] for name in names}, [0, 7], ["rte", "cola"])
    assert [str(unit) for unit in found[:4]] == [
        "single, seed 0, rte",
        "single, seed 0, cola",
        "joint, seed 0",
        "lora-merged, seed 0",
    ]
    assert [str(unit.folder.relative_to(tmp_path)) for unit in found[4:]] == [
        "single/seed7/rte",
        "single/seed7/cola",
        "joint/seed7",
        "lora-merged/seed7",
    ]
    single, other, joint, merged = found[:4]
    assert joint.tasks == ("rte", "cola") and joint.adapter("cola") == tmp_path / "joint/seed0/cola"
    assert single.ready and joint.ready and not merged.ready and not single.finished
    assert runs.unfinished(found) == found
    with pytest.raises(BadInput, match="lora-merged, seed 0 is made from single"):
        runs.unfinished([joint, merged])
    for unit in (single, other):
        unit.folder.mkdir(parents=True)
        unit.state.write_bytes(b"")
        assert not merged.ready
        unit.finish({"score": 1}, {"seconds": 2})
        assert unit.finished and not unit.state.exists()
    assert merged.ready and not found[7].ready
    assert runs.unfinished([single, joint, merged]) == [joint, merged]


def test_a_lock_clears_what_a_killed_process_was_writing(tmp_path):
    for name in (".results.json.123.tmp", "joint/seed0/sst2/.adapter_model.safetensors.123.tmp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("half")
    (tmp_path / ".notes.tmp").write_text("the user's")
    with runs.locked(tmp_path, wait=True):  # of OUT: a unit's may be another process's
        assert len(list(tmp_path.rglob(".*.tmp"))) == 2
    with runs.locked(tmp_path / "joint/seed0"), pytest.raises(BadInput, match="another process"):
        assert [path.name for path in tmp_path.rglob(".*.tmp")] == [".notes.tmp"]
        with runs.locked(tmp_path / "joint/seed0"):
            pass
    with runs.locked(tmp_path / "joint/seed0"):
        pass


def test_what_was_done_before_is_not_counted_as_fast(capsys):
    """100 s for the next 10 of 110, of which 50 were done before: the other 50 take 500."""
    bar, now = runs.Bar(110, False), 0.0
    bar._time = lambda: now
    bar.start_t = bar.last_print_t = now
    bar.skip(50)
    now = 100.0
    bar.update(10)
    assert "60/110 [01:40<08:20, 10.00s/batch]" in capsys.readouterr().err
    runs.Bar(1, True).skip(1)


def test_agreed_in_one_process():
    assert runs.agreed(lambda: 3) == 3 and runs.agreed(lambda: 4, everywhere=True) == 4
    for error in (BadInput("no"), OSError(28, "full")):
        with pytest.raises(type(error)) as raised:
            runs.agreed(lambda error=error: (_ for _ in ()).throw(error))
        assert raised.value is error
