"""An interrupted run goes on to the same end, and no fault leaves it without a last good state."""

import builtins
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import kills
import pytest
import torch

import train
from support import checkpoint
from support.checkpoint import (
    BadInput,
    Progress,
    load_state,
    read_header,
    read_safetensors,
    save_state,
    write_safetensors,
)

ROOT = Path(__file__).parent.parent
METHODS = "single,joint,ortho,lori-d,lori-s,lora-merged,lori-s-merged"
FLAGS = f"--tasks sst2,stsb --methods {METHODS} --steps 3 --batch-size 4 --max-length 32 --dtype fp32 --save-every 0"


class Interrupted(BaseException):
    """A crash, as far as train.py can see."""


@pytest.fixture
def run(demo, capsys):
    """run(out, "--flags"): (exit status, standard output, standard error)."""

    def run(out, flags=FLAGS):
        files = ["--model", str(demo / "model"), "--glue", str(demo / "glue"), "--out", str(out)]
        capsys.readouterr()  # what an interrupted run has said
        return train.main([*files, *flags.split()]) or 0, *capsys.readouterr()

    return run


def crash_at(monkeypatch, nth, where=(checkpoint, "save_state"), before=False):
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

    monkeypatch.setattr(*where, counting)
    return calls


# ---------------------------------------------------------------------------------------------------------------------
# The same end


@pytest.mark.parametrize(
    "flags",
    [
        FLAGS,
        f"{FLAGS} --dropout 0.2 --optimizer sgd --seeds 0,1 --methods single,ortho",
        f"{FLAGS} --per-task stacked",
        FLAGS.replace(f"--methods {METHODS}", "--continual --disjoint --dropout 0.2"),
    ],
)
def test_a_crash_after_any_save_changes_nothing(run, tmp_path, flags):
    assert run(tmp_path / "whole", flags)[0] == 0
    whole = kills.kept(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        saves = crash_at(patch, 0)
        run(tmp_path / "count", flags)
    assert saves[0] > 12
    for nth in range(1, saves[0] + 1, 1 + saves[0] // 7):
        out = tmp_path / f"crash{nth}"
        with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
            crash_at(patch, nth)
            run(out, flags)
        assert run(out, f"{flags} --resume")[0] == 0
        assert kills.kept(out) == whole, f"interrupted after save {nth}"


def test_a_crash_while_scoring_and_one_more_changes_nothing(run, tmp_path):
    assert run(tmp_path / "whole")[0] == 0
    for where in ((train, "predict"), (train, "save"), (train, "merged"), (train, "write_text")):
        out = tmp_path / where[1]
        for nth, more in (3, ""), (2, "--resume"):
            with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
                crash_at(patch, nth, where, before=True)
                run(out, f"{FLAGS} {more}")
        assert run(out, f"{FLAGS} --resume")[0] == 0
        assert kills.kept(out) == kills.kept(tmp_path / "whole"), where[1]


def test_what_is_finished_is_not_trained_again(run, tmp_path, monkeypatch):
    assert run(tmp_path / "count")[0] == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        crash_at(patch, 1, (train, "write_text"), before=True)  # all is trained, and no results.json
        run(tmp_path / "out")
    monkeypatch.setattr(train, "gradients", lambda *_: pytest.fail("trained again"))
    monkeypatch.setattr(train, "predict", lambda *_: pytest.fail("scored again"))
    assert run(tmp_path / "out", f"{FLAGS} --resume")[0] == 0


def test_the_shorter_run_of_the_killing_script(capsys):
    done = subprocess.run([sys.executable, ROOT / "tests/kills.py", "--count", "2"], capture_output=True, text=True)
    assert done.returncode == 0 and "2/2 runs" in done.stdout and "0 wrong" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_saves_and_says_how_to_go_on(run, demo, tmp_path, number):
    flags = FLAGS.replace(METHODS, "joint,ortho").replace("--save-every 0", "").replace("--steps 3", "--steps 200")
    assert run(tmp_path / "whole", flags)[0] == 0
    out, log = tmp_path / "out", tmp_path / "out/log.jsonl"
    files = ["--model", demo / "model", "--glue", demo / "glue", "--out", out, "--steps", "200"]
    command = [str(part) for part in [sys.executable, ROOT / "train.py", *files, *flags.split()]]
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  a background job of a script ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    while not (log.exists() and log.read_text().count("\n") > 3):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in err
    hint = f"train.py: stopped, and saved; go on with: python train.py {' '.join(command[2:])} --resume"
    assert err.splitlines()[-1] == hint
    assert run(out, f"{flags} --resume")[0] == 0
    assert kills.kept(out) == kills.kept(tmp_path / "whole")


# ---------------------------------------------------------------------------------------------------------------------
# What can't be resumed


@pytest.fixture
def interrupted(run, tmp_path):
    """An out folder in the middle of a run, with a state and the one before it."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        crash_at(patch, 5)
        run(tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "no header"])
def test_a_damaged_state_is_named_and_the_one_before_it_used(run, interrupted, tmp_path, damage):
    path = interrupted / train.STATE
    whole = path.read_bytes()
    middle = len(whole) - 100
    path.write_bytes(
        {
            "flip": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:-7],
            "empty": b"",
            "no header": bytes(len(whole)),
        }[damage]
    )
    status, text, _ = run(interrupted, f"{FLAGS} --resume")
    assert status == 0 and f"NOTICE: {path}" in text and "going on from the state before it" in text
    assert run(tmp_path / "whole")[0] == 0
    assert kills.kept(interrupted) == kills.kept(tmp_path / "whole")


def test_two_damaged_states_are_an_error_and_stay(run, interrupted):
    for name in (train.STATE, train.STATE + ".previous"):
        (interrupted / name).write_bytes(b"no state")
    status, _, err = run(interrupted, f"{FLAGS} --resume")
    assert status == 2 and len(err.splitlines()) == 1 and train.STATE in err and "no whole" in err
    assert (interrupted / train.STATE).read_bytes() == b"no state"


@pytest.mark.parametrize(
    "change, words",
    [
        ("--lr 0.1", "lr was 0.0005 and is 0.1"),
        ("--steps 4", "steps was 3 and is 4"),
        ("--seeds 1", "seeds was '0'"),
        ("--methods joint", "methods was"),
        ("--tasks sst2,mnli", "tasks was"),
        ("--clip 0.5", "clip was 1.0 and is 0.5"),
    ],
)
def test_other_settings_are_refused(run, interrupted, change, words):
    before = (interrupted / train.STATE).read_bytes()
    status, _, err = run(interrupted, f"{FLAGS} {change} --resume")
    assert status == 2 and len(err.splitlines()) == 1 and words in err
    assert (interrupted / train.STATE).read_bytes() == before


def test_other_data_and_weights_are_refused(demo, interrupted, tmp_path, capsys):
    for part, words in (("glue", "the data of sst2 was"), ("model", "the weights of the model was")):
        files = {name: tmp_path / part / name for name in ("model", "glue")}
        for name, folder in files.items():
            shutil.copytree(demo / name, folder)
        state = load_state(interrupted / train.STATE)[1]
        facts = state["facts"] | {name: str(folder) for name, folder in files.items()}
        if part == "glue":
            file = next((files["glue"] / "sst2").glob("train*"))
            shutil.copy(next((files["glue"] / "sst2").glob("validation*")), file)
        else:
            weights = next(files["model"].glob("*.safetensors"))
            tensors = read_safetensors(weights)
            tensors[next(name for name in tensors if "LayerNorm" in name and "cls" not in name)][0] += 1e-6
            write_safetensors(weights, tensors)
        out = tmp_path / part / "out"
        out.mkdir()
        save_state(out / train.STATE, load_state(interrupted / train.STATE)[0], state | {"facts": facts})
        flags = [f"--{name}={folder}" for name, folder in files.items()]
        assert train.main([*flags, f"--out={out}", *FLAGS.split(), "--resume"]) == 2
        assert words in capsys.readouterr().err


def test_resume_without_an_interrupted_run(run, interrupted, tmp_path):
    status, _, err = run(tmp_path / "new", f"{FLAGS} --resume")
    assert status == 2 and "no interrupted run" in err
    status, _, err = run(interrupted)  # a new run would take the place of hours of work
    assert status == 2 and "--resume" in err and (interrupted / train.STATE).exists()
    assert run(interrupted, f"{FLAGS} --resume")[0] == 0
    status, _, err = run(interrupted, f"{FLAGS} --resume")
    assert status == 2 and "finished" in err
    assert train.main(["--resume"]) == 2


# ---------------------------------------------------------------------------------------------------------------------
# A disk that is full


def test_a_disk_that_is_full_at_any_write(run, tmp_path, monkeypatch):
    """ENOSPC at the nth write, for every n: exit status 2, and the last state is whole, or there was none yet."""
    flags = "--tasks sst2 --methods joint --steps 2 --batch-size 4 --max-length 32 --dtype fp32 --save-every 0"
    assert run(tmp_path / "whole", flags)[0] == 0
    whole, real, writes = kills.kept(tmp_path / "whole"), builtins.open, [0, 0]  # so far, and which fails

    class Full:
        """A file that may not be written."""

        def __init__(self, file):
            self.file = file

        def write(self, data):
            writes[0] += 1
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
    assert run(tmp_path / "count", flags)[0] == 0
    count = writes[0]
    assert count > 20
    for nth in range(1, count + 1):
        out, writes[:] = tmp_path / f"full{nth}", [0, nth]
        status, _, err = run(out, flags)
        assert status == 2 and "No space left" in err, nth
        writes[1] = 0
        states = list(out.glob(train.STATE + "*")) if out.exists() else []
        if states:
            load_state(out / train.STATE)
        assert run(out, flags + " --resume" * bool(states))[0] == 0
        assert kills.kept(out) == whole, f"full at write {nth}"


# ---------------------------------------------------------------------------------------------------------------------
# The file


def test_a_state_comes_back_to_the_bit(tmp_path):
    torch.manual_seed(0)
    tensors = {"a": torch.randn(3, 4), "b": torch.get_rng_state(), "c": torch.tensor(2.0), "d": torch.zeros(0)}
    info = {"step": 3, "score": 1 / 3, "names": ["é", None]}
    save_state(tmp_path / "state", tensors, info)
    found, again, complaint = load_state(tmp_path / "state")
    assert again == info and complaint is None and found.keys() == tensors.keys()
    assert all(torch.equal(found[name], x) and found[name].shape == x.shape for name, x in tensors.items())
    _, metadata, _ = read_header(tmp_path / "state")
    assert len(metadata["sha256"]) == 64
    save_state(tmp_path / "state", {}, {"step": 4})
    (tmp_path / "state").unlink()  # a crash between the two renamings of save_state
    assert load_state(tmp_path / "state")[1] == info
    with pytest.raises(BadInput, match="elsewhere"):
        load_state(tmp_path / "elsewhere")


def test_the_facts_are_compared(tmp_path):
    with open(tmp_path / "log", "w") as log:
        progress = Progress(tmp_path / "state", {"lr": 0.1, "tasks": ["a"]}, every=0)
        progress.begin("joint", 0)
        progress.enter()
        progress.save({}, 0, 0.0, log)
    Progress(tmp_path / "state", {"lr": 0.1, "tasks": ["a"]}, 0, resume=True)
    with pytest.raises(BadInput, match=r"lr was 0.1 and is 0.2"):
        Progress(tmp_path / "state", {"lr": 0.2, "tasks": ["a"]}, 0, resume=True)
    with pytest.raises(BadInput, match=r"balance was None and is True"):  # the state is older than the setting
        Progress(tmp_path / "state", {"lr": 0.1, "tasks": ["a"], "balance": True}, 0, resume=True)


# ---------------------------------------------------------------------------------------------------------------------
# Numbers that go wrong


@pytest.mark.parametrize("method", ["joint", "ortho", "single"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_no_state_from_after_the_first_bad_step(run, tmp_path, monkeypatch, method, what):
    """Step 5 of 200 goes wrong, between two log lines: it is named, and what is saved is from before it."""
    flags = FLAGS.replace(METHODS, method).replace("--steps 3", "--steps 200")
    honest, calls = train.task_losses, [0]

    def losses(model, batch, s):
        found, step = honest(model, batch, s), calls[0] // (1 if method == "single" else 2) - 2 * 3
        calls[0] += 1
        if step == 5 and batch.tasks[0].name == ("sst2" if method == "single" else "stsb"):
            if what == "loss":
                return [found[0] * float("nan")]
            for p in model.parameters():
                if p.requires_grad and p.ndim == 2 and p.shape[0] == 8:  # an A
                    p.register_hook(lambda g: g * float("inf"))
                    break
        return found

    monkeypatch.setattr(train, "estimate", lambda *_: 0.0)  # it would count
    calls[0] = 2 * 3 * (1 if method == "single" else 2)
    monkeypatch.setattr(train, "task_losses", losses)
    status, _, err = run(tmp_path / "out", flags)
    assert status == 1 and len([x for x in err.splitlines() if x.startswith("train.py")]) == 1
    assert "step 5" in err and "query.A" in err
    assert ("the loss of " + ("sst2" if method == "single" else "stsb") in err) == (what == "loss")
    tensors, info, _ = load_state(tmp_path / "out" / train.STATE)
    assert all(x.isfinite().all() for x in tensors.values() if x.is_floating_point())
    assert list(info["places"].values())[0][0] == 5  # the steps before it, 0 to 4
    lines = [json.loads(line) for line in (tmp_path / "out/log.jsonl").read_text().splitlines()]
    assert max(line["step"] for line in lines) < 5
