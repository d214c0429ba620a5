"""Models and data from a Hub in bad weather: one line for each thing that can go wrong, soon, and a good next run.

Each run is a process of its own, since the Hub's libraries read their settings when they are imported.
"""

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from loopback import serve, silence
from test_glue import rows_of, write
from tiny import make, tiny

import glue
from support import hub
from support.checkpoint import BadInput
from support.hub import HubError, find_checkpoint, read_splits

ROOT = Path(glue.__file__).parent

# Its waits between attempts don't pass, they are added up.
ASK = """
import json, os, sys, time
from support import hub
from support.checkpoint import BadInput
from support.hub import find_checkpoint
from glue import read_splits
from model import load_encoder

waits, hub.PATIENCE = [], float(os.environ.get("PATIENCE", 60))
time.sleep = waits.append
for name in sys.argv[1:]:
    try:
        if name.startswith("datasets/"):
            got = {split: len(rows) for split, rows in read_splits("rte", name.removeprefix("datasets/"), ()).items()}
        else:
            folder = find_checkpoint(*name.split("@"))
            got = [load_encoder(folder).config.num_hidden_layers, *sorted(p.name for p in folder.iterdir())]
        print(json.dumps([name, ["found", got, sum(waits)]]))
    except BadInput as e:
        print(json.dumps([name, [type(e).__name__, str(e), sum(waits)]]))
    waits.clear()
"""


def environment(home, **others):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "TRANSFORMERS_"))}
    return (
        kept
        | {
            "PYTHONPATH": str(ROOT),
            "HF_HOME": str(home),
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }
        | others
    )


def ask(home, names, **others):
    """{name: ("found" or the error's class, what was found or the error's text, seconds it waited to try again)}."""
    command = [sys.executable, "-c", ASK, *names]
    done = subprocess.run(command, env=environment(home, **others), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    return dict(map(json.loads, done.stdout.splitlines()))


# What the Hub answers: HTTP status, X-Error-Code, and the words that must then be in the message.
REFUSALS = {
    "gated": (403, "GatedRepo", "is gated: ask for access on its page and set HF_TOKEN"),
    "anonymous": (401, "GatedRepo", "is gated: ask for access on its page and set HF_TOKEN"),
    "private": (401, "RepoNotFound", "on the Hub, or it is private (then set HF_TOKEN)"),
    "missing": (404, "RepoNotFound", "on the Hub, or it is private (then set HF_TOKEN)"),
    "forbidden": (403, "", "403 "),  # what follows is the Hub client's
    "busy": (429, "", "429 "),
    "down": (503, "", "503 "),
    "odd": (418, "", "418 "),
}
ADVICE = {"forbidden": "check HF_TOKEN", "busy": "wait some minutes", "down": "try again", "odd": "try again"}
KINDS = {"model": "o/", "dataset": "datasets/o/"}
GOOD = ["bert-tiny", "o/sharded", "o/pickled", "datasets/o/good"]
PARTS = ["o/partial", "o/shardless", "o/tokenless", "datasets/o/partial"]  # downloaded, then damaged in the cache
FOUND = {"train": 600, "validation": 2}


@pytest.fixture(scope="module")
def weather(tmp_path_factory):
    """Five runs with one cache: {"bad", "gone", "silent", "offline", "good": ask's answers, "log": requests of the
    first and the fourth, "connections": how many to the silent Hub, "parts": the shards' names}."""
    work = tmp_path_factory.mktemp("hub")
    folders = {name: work / name for name in ("whole", "sharded", "pickled", "weightless")}
    model = make(tiny("bert"))
    for name, folder in folders.items():
        model.save_pretrained(folder, max_shard_size="9KB" if name == "sharded" else "1GB")
        (folder / "tokenizer.json").write_text("{}")
        (folder / "README.md").write_text("not asked for")
    torch.save(model.state_dict(), folders["pickled"] / "pytorch_model.bin")
    for name in "pickled", "weightless":
        (folders[name] / "model.safetensors").unlink()
    (work / "empty").mkdir()
    parts = sorted(p.name for p in folders["sharded"].glob("model-*"))
    assert len(parts) > 3
    data = write(work / "data", "rte", "train", rows_of("rte", [0, 1] * 300))
    write(data, "rte", "validation", rows_of("rte", [0, 1]), readme=True)

    others = ["o/weightless", "o/empty", "bert-tiny@v2"]
    refused = [prefix + name for prefix in KINDS.values() for name in [*REFUSALS, "torn"]]
    never = [prefix + "never" for prefix in KINDS.values()]
    repositories = {n: data if n.startswith("datasets/") else folders["whole"] for n in [*GOOD, *PARTS, *refused]}
    repositories |= {f"o/{name}": folders[name] for name in ("sharded", "pickled", "weightless")}
    repositories |= {"o/shardless": folders["sharded"], "o/empty": work / "empty"}
    statuses = {prefix + name: row[:2] for prefix in KINDS.values() for name, row in REFUSALS.items()}
    breaks = {prefix + "torn": 2000 for prefix in KINDS.values()}
    answers, log, home = {"parts": parts}, [], work / "home"
    with serve(repositories, statuses, log, breaks) as address:
        answers["bad"] = ask(home, [*GOOD, *PARTS, *others, *refused], HF_ENDPOINT=address)
        answers["log"] = log[:]

    lost = ("partial", "model.safetensors"), ("shardless", parts[1]), ("tokenless", "tokenizer.json")
    for name, file in lost:  # as if killed amid a download
        (pointer,) = (home / f"hub/models--o--{name}/snapshots").glob(f"*/{file}")
        blob = pointer.resolve()
        pointer.unlink()
        blob.with_name(blob.name + ".0a1b2c3d.incomplete").write_bytes(blob.read_bytes()[:-1])
        blob.unlink()
    (folder,) = (path for path in (home / "datasets/o___partial/rte").glob("*/*") if path.is_dir())
    (folder / "dataset_info.json").unlink()
    folder.rename(f"{folder}.incomplete")
    answers["gone"] = ask(home, [*GOOD, *never], HF_ENDPOINT=address)
    with silence() as (quiet, count):
        answers["silent"] = ask(
            home, [*GOOD, *never, *PARTS], HF_ENDPOINT=quiet, PATIENCE="0.5", HF_HUB_DISABLE_TELEMETRY="1"
        )
        answers["connections"] = count()
    with serve(repositories, log=log) as address:
        answers["offline"] = ask(home, [*GOOD, *PARTS, *never], HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
        answers["requests offline"] = len(log) - len(answers["log"])
        answers["good"] = ask(home, [*GOOD, *PARTS, *refused], HF_ENDPOINT=address)
    return answers


def one_line(answer, kind, name, seconds=0):
    """What the user read, having waited no longer than that."""
    error, text, waited = answer
    assert error == "HubError" and f"{kind} {name!r}" in text and "\n" not in text and waited <= seconds
    return text


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", REFUSALS)
def test_a_hub_that_refuses(weather, kind, name):
    id = "o/" + name
    text = one_line(weather["bad"][KINDS[kind] + name], kind, id)
    assert REFUSALS[name][2] in text and ADVICE.get(name, "HF_TOKEN") in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_connection_that_breaks_amid_a_file(weather, kind):
    text = one_line(weather["bad"][KINDS[kind] + "torn"], kind, "o/torn", seconds=5)  # five more attempts, one a second
    assert "try again later" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_that_is_not_reached(weather, kind):
    text = one_line(weather["gone"][KINDS[kind] + "never"], kind, "o/never")
    assert "refused (http://127.0.0.1:" in text and "or give a local folder" in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_hub_that_listens_and_never_answers(weather, kind):
    text = one_line(weather["silent"][KINDS[kind] + "never"], kind, "o/never")
    assert "no answer in 0.5 seconds (http://127.0.0.1:" in text and "or give a local folder" in text


def test_a_silent_hub_is_asked_once_for_all(weather):
    """Each further request would be waited for as long."""
    assert weather["connections"] == 1


@pytest.mark.parametrize("name", PARTS)
def test_a_silent_hub_with_a_part_in_the_cache(weather, name):
    kind = "dataset" if name.startswith("datasets/") else "model"
    assert "no answer" in one_line(weather["silent"][name], kind, name.removeprefix("datasets/"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_look_up_that_hangs(kind, monkeypatch, tmp_path):
    """It obeys no timeout, so it is waited for from outside."""
    import datasets
    import huggingface_hub

    asked, never = [], threading.Event()

    def look_up(*_, **__):
        asked.append(threading.current_thread())
        if asked[-1] is threading.main_thread():  # and this test would hang
            raise OSError
        never.wait(30)

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(hub, "PATIENCE", 0.2)
    monkeypatch.setattr(hub, "silent_until", 0.0)
    for _ in range(2):
        with pytest.raises(HubError, match="'o/never' can't be had from the Hub: no answer in 0.2 seconds"):
            find_checkpoint("o/never") if kind == "model" else read_splits("rte", "o/never", ())
        if kind == "model":
            with pytest.raises(HubError, match="model 'o/never' can't be had from the Hub: no answer"):
                find_checkpoint(Path("o/never"))
    assert len(asked) == 1
    monkeypatch.setattr(hub, "silent_until", 0.0)  # a minute later it is asked again
    with pytest.raises(HubError, match="no answer"):
        find_checkpoint("o/never")
    assert len(asked) == 2 and threading.main_thread() not in asked
    never.set()
    for thread in set(asked):  # or it would go on asking in the next test
        thread.join()


@pytest.mark.parametrize("kind", KINDS)
def test_offline_with_nothing_in_the_cache(weather, kind):
    text = one_line(weather["offline"][KINDS[kind] + "never"], kind, "o/never")
    assert "HF_HUB_OFFLINE" in text and "cache" in text and "or give a local folder" in text


@pytest.mark.parametrize("name", PARTS)
def test_offline_with_a_part_in_the_cache(weather, name):
    kind = "dataset" if name.startswith("datasets/") else "model"
    text = one_line(weather["offline"][name], kind, name.removeprefix("datasets/"))
    assert "HF_HUB_OFFLINE" in text and "cache" in text and "or give a local folder" in text


@pytest.mark.parametrize("run", ["bad", "gone", "silent", "offline"])
def test_what_is_in_the_cache_is_found_in_any_weather(weather, run):
    answers = weather[run]
    assert answers["bert-tiny"] == ["found", [2, "config.json", "model.safetensors", "tokenizer.json"], 0]
    shards = [2, "config.json", *weather["parts"], "model.safetensors.index.json", "tokenizer.json"]
    assert answers["o/sharded"] == ["found", shards, 0]
    assert answers["o/pickled"] == ["found", [2, "config.json", "pytorch_model.bin", "tokenizer.json"], 0]
    assert answers["datasets/o/good"] == ["found", FOUND, 0]


def test_offline_asks_nobody(weather):
    assert weather["requests offline"] == 0
    assert not any("README" in path for _, path in weather["log"] if "/datasets/" not in path)


def test_the_next_run_with_a_good_hub_finds_everything(weather):
    assert len(weather["good"]) == len(GOOD) + len(PARTS) + 2 * len(REFUSALS) + 2
    for name, (kind, got, waited) in weather["good"].items():
        assert (kind, waited) == ("found", 0), (name, got)
        assert got == FOUND if name.startswith("datasets/") else got[0] == 2


def test_repositories_that_lack_something(weather):
    assert one_line(weather["bad"]["o/weightless"], "model", "o/weightless").endswith(
        "has no model.safetensors and no pytorch_model.bin"
    )
    assert one_line(weather["bad"]["o/empty"], "model", "o/empty").endswith("has no config.json")
    assert one_line(weather["bad"]["bert-tiny@v2"], "model", "bert-tiny").startswith(
        "model 'bert-tiny' has no revision 'v2'"
    )


@pytest.mark.parametrize("name", ["a b", "-x-", "x" * 200, "owner/"])
def test_names_that_are_no_id(name, monkeypatch):
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("the Hub was asked"))
    for refuse in (find_checkpoint, lambda name: read_splits("rte", name, ())):
        with pytest.raises(BadInput, match="neither a folder nor a Hub id"):
            refuse(name)


# ---------------------------------------------------------------------------------------------------------------------
# Local folders

SEALED = """
import os, sys, traceback

def seal(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.sendmsg"):
        print("network:", event, arguments, *traceback.format_stack(), file=sys.stderr, flush=True)
        os._exit(77)

sys.addaudithook(seal)  # of Python's sockets none gets by
from glue import load_data, load_task, load_tokenizer
from model import load_encoder
from support.checkpoint import BadInput
from support.hub import find_checkpoint

model, data = sys.argv[1:]
folder = find_checkpoint(model)
encoder, tokenizer = load_encoder(folder), load_tokenizer(folder)
print(len(load_data("sst2", data, tokenizer, encoder.config, 32).validation))
for name in "./none", "/none", "~/none", data + "/none", data + "/sst2":
    for load in (lambda name: load_task("sst2", name)), load_encoder:
        try:
            load(name)
        except BadInput as error:
            print(type(error).__name__)
"""


def test_what_is_local_makes_no_network_call(demo, tmp_path):
    command = [sys.executable, "-c", SEALED, str(demo / "model"), str(demo / "glue")]
    done = subprocess.run(command, env=environment(tmp_path / "home"), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "network:" not in done.stderr, done.stderr
    rows, *refusals = done.stdout.split()
    assert rows == str(len(glue.load_task("sst2", demo / "glue", "validation").texts)) and refusals == ["BadInput"] * 10
