"""What several files' tests share: the small demo, a command to train on it, and one finished run of each kind."""

import json
import os

import pytest
import torch

import train
from support.toy import make_demo

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # what is tested is a CPU's, and compared to the bit


@pytest.fixture(autouse=True)
def threads():
    """The demo and --jobs set their number for the process; the next test has its own again."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def demo(tmp_path_factory):
    """The demo's files, small: folder/model, folder/glue."""
    return make_demo(tmp_path_factory.mktemp("demo"), steps=20, rows=64, quiet=True)


SMALL = ["--max-length", "32", "--batch-size", "4", "--dtype", "fp32"]


@pytest.fixture
def run(demo, tmp_path, capsys):
    """run("--steps 3 …") trains on the small demo's files: (exit status, standard output, standard error)."""

    def run(text="", **paths):
        paths = {"model": demo / "model", "glue": demo / "glue", "out": tmp_path / "out"} | paths
        flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
        status = train.main(flags + SMALL + text.split())
        return status or 0, *capsys.readouterr()

    return run


def trained(demo, out, flags):
    """(out, what its results.json holds) of a run on the small demo's files."""
    paths = ["--model", str(demo / "model"), "--glue", str(demo / "glue"), "--out", str(out)]
    assert not train.main([*paths, *SMALL, "--lr", "5e-3", *flags.split()])
    return out, json.loads((out / "results.json").read_text())


@pytest.fixture(scope="session")
def finished(demo, tmp_path_factory):
    """One run of everything that is trained on gradients alone, for the tests that look at what it left."""
    flags = "--tasks sst2,mnli,stsb --methods head,single,joint,pcgrad,ortho --steps 5 --seeds 0,1"
    return trained(demo, tmp_path_factory.mktemp("finished"), flags)


@pytest.fixture(scope="session")
def finished_lori(demo, tmp_path_factory):
    """The same of LoRI's methods, and of what is merged."""
    methods = "single,joint,lori-ortho,lori-d,lori-s,lora-merged,lori-d-merged,lori-s-merged"
    flags = f"--tasks sst2,mnli --methods {methods} --steps 6 --own-a"
    return trained(demo, tmp_path_factory.mktemp("lori"), flags)


def write_rows(folder, rows, split="train"):
    """A task of one's own: rows as JSON lines."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def results_of(out):
    return json.loads((out / "results.json").read_text())
