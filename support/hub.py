"""A name -> a folder or a dataset, or one clear line. The Hub is asked once.

    find_checkpoint     a local folder or a Hub id -> a folder with config.json, tokenizer.json and weights
    read_splits         a task of a GLUE folder, or of a dataset on the Hub -> {split: datasets.Dataset}

A local folder is never looked for on the Hub. Where the Hub does not answer, or refuses, its libraries' cache is all
there is: what is there is found, and what is not raises `HubError` with what the Hub said.
"""

import contextlib
import glob
import hashlib
import io
import logging
import os
import re
import threading
import time
from pathlib import Path

from support.checkpoint import BadInput, reason, shards

PATIENCE = 5  # seconds that the Hub has to answer
PAUSE = 60  # seconds in which a Hub that gave no answer is not asked again, but taken to be as silent


class HubError(BadInput):
    """The Hub could not be reached, or did not have what was asked of it."""


def looks_like_path(name):
    """Whether a name means a path; a Hub id is "name" or "owner/name"."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def hub_error(kind, name, error):
    """A HubError with one line for whatever the Hub's libraries raised over the model or dataset `name`."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return HubError(f"{kind} {name!r} is gated: ask for access on its page and set HF_TOKEN")
    if isinstance(error, hub.RepositoryNotFoundError):
        there = "on the Hub, or it is private (then set HF_TOKEN)"
        return HubError(f"no {kind} {name!r} {there}; nor is there such a folder here")
    if isinstance(error, hub.OfflineModeIsEnabled):
        why, advice = "the Hub is down, or HF_HUB_OFFLINE is set, and not all of it is in the cache", "connect"
    else:
        why, status = reason(error), getattr(getattr(error, "response", None), "status_code", None)
        advice = {401: "check HF_TOKEN", 403: "check HF_TOKEN", 429: "wait some minutes"}.get(status, "try again later")
    where = "" if constants.ENDPOINT in why else f" ({constants.ENDPOINT})"
    return HubError(f"{kind} {name!r} can't be had from the Hub: {why}{where}; {advice}, or give a local folder")


silent_until = 0.0  # on time.monotonic's clock


def ask_hub(kind, name, file, revision="main"):
    """Ask the Hub for a file's headers: None, or a HubError that says why the model or dataset can't be had.

    Once, and for PATIENCE seconds at most: its libraries would go on for 25 seconds with a Hub that is down, and wait
    as long as a busy one tells them to. Raises BadInput for what is no Hub id.
    """
    global silent_until
    # Imported here, not above: HF_HUB_OFFLINE and its like are read at import, and may be set until a Hub is needed.
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        url = hf_hub_url(name, file, repo_type=kind, revision=revision)
    except hub.HFValidationError:
        raise BadInput(f"{name!r} is neither a folder nor a Hub id") from None
    answers = []

    def ask():
        try:
            get_hf_file_metadata(url)
            answers.append(None)
        except Exception as e:  # no network, a proxy: classes of several packages
            answers.append(e)

    if time.monotonic() >= silent_until:
        thread = threading.Thread(target=ask, daemon=True)  # waited for from outside: a name look-up has no timeout
        thread.start()
        thread.join(PATIENCE)
        silent_until = 0.0 if answers else time.monotonic() + PAUSE
    error = answers[0] if answers else TimeoutError(f"no answer in {PATIENCE} seconds")
    if error is None or isinstance(error, hub.EntryNotFoundError):  # the file is not there, but the repository is
        return None
    if isinstance(error, hub.RevisionNotFoundError):
        return HubError(f"{kind} {name!r} has no revision {revision!r}; try 'main'")
    return hub_error(kind, name, error)


def find_checkpoint(path_or_id, revision="main"):
    """The folder that holds a checkpoint: the local folder of that name, or the Hub's, downloaded or from its cache.

    Raises BadInput for a folder that isn't there, HubError for all that can go wrong with the Hub.
    """
    path_or_id = str(path_or_id)
    folder = os.path.expanduser(path_or_id)
    if os.path.isdir(folder):
        return Path(folder)
    if looks_like_path(path_or_id) or os.path.exists(folder):
        raise BadInput(f"there is no model folder {path_or_id}; give another with --model")

    trouble = ask_hub("model", path_or_id, "config.json", revision)  # then the cache is all there is
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download, logging, try_to_load_from_cache

    logging.set_verbosity_error()  # no warning for each of its retries

    def download(*names):
        """The first of `names` that the repository has; None where it has none."""
        for name in names:
            if trouble:  # hf_hub_download has things to ask even for local_files_only
                cached = try_to_load_from_cache(path_or_id, name, revision=revision)
                if isinstance(cached, str):
                    return Path(cached)
                continue
            try:
                return Path(hf_hub_download(path_or_id, name, revision=revision))
            except hub.LocalEntryNotFoundError:
                raise
            except hub.EntryNotFoundError:
                continue
        return None

    try:
        config = download("config.json")
        if config is None:
            raise trouble or HubError(f"model {path_or_id!r} has no config.json")
        if download("tokenizer.json") is None and trouble:
            raise trouble
        weights = download("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
        if weights is None:
            raise trouble or HubError(f"model {path_or_id!r} has no model.safetensors and no pytorch_model.bin")
        if weights.name.endswith(".index.json"):
            for shard in shards(weights):
                if download(shard) is None:
                    raise trouble or HubError(f"model {path_or_id!r} has no {shard}, which its index names")
        return config.parent
    except BadInput:
        raise
    except Exception as e:  # a connection that broke, a full disk: classes of several packages
        raise hub_error("model", path_or_id, e) from None


# ---------------------------------------------------------------------------------------------------------------------
# Datasets


@contextlib.contextmanager
def quiet():
    """No progress bars, log lines or warnings of the loading libraries amid our own output."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


FORMATS = {".parquet": {}, ".json": {}, ".jsonl": {}}  # {its suffix: what load_dataset is told}
FORMATS[".csv"] = {"keep_default_na": False, "na_values": [""]}  # "None" and "null" are texts


def split_files(folder):
    """{split: its files} of a folder with train-00000-of-00001.parquet, validation.csv, test.jsonl or the like.

    A backup such as train.old.csv would be a split of its own, which nobody asks for.
    """
    splits = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in FORMATS and not path.name.startswith("."):
            splits.setdefault(re.sub(r"-\d+(-of-\d+(-[0-9a-f]+)?)?$", "", path.stem), []).append(path.name)
    return splits


def read_split(folder, split, files):
    """A datasets.Dataset of files alone: beside others, it would get the first one's columns, and names of labels.

    `datasets` takes a file of the same path and time for the same; so the cache's place is named by what is in it.
    Raises BadInput where the files are not all of one split's, so that none is read twice, or left out.
    """
    parts = {int(m[1]) if (m := re.search(r"-of-(\d+)", file)) else 1 for file in files}
    if parts != {len(files)}:
        raise BadInput(f"{split} is {', '.join(files)}, not one file, or all of its -of-N")
    import datasets

    paths = [folder.absolute() / file for file in files]
    content = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()[:16]
    return datasets.load_dataset(
        str(folder),
        data_files={split: [glob.escape(str(path)) for path in paths]},
        cache_dir=os.path.join(datasets.config.HF_DATASETS_CACHE, content),
        **FORMATS[paths[0].suffix],
    )[split]


def read_splits(name, source, only):
    """{split: datasets.Dataset} of a task, from a local folder or else from the Hub or its cache.

    only: those to read; what else a local folder has files of is there as None, and all that the Hub has is read.
    Raises BadInput for a folder or task that isn't there or can't be read, HubError for all that can fail at the Hub.
    """
    source, folder = str(source), Path(os.path.expanduser(source))
    if not folder.is_dir() and (looks_like_path(source) or folder.exists()):
        raise BadInput(f"there is no GLUE folder {source}; give another with --glue")

    import datasets  # here, not above: as in ask_hub

    trouble = None if folder.is_dir() else ask_hub("dataset", source, "README.md")
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or trouble is not None  # then the cache is all there is
        with quiet():
            if not folder.is_dir():
                return datasets.load_dataset(source, name)
            # A folder for each task first: what a README names `datasets` caches by that README alone, so that changed
            # files, or another folder of the same name, would give the old rows.
            if files := split_files(folder / name):
                return {x: read_split(folder / name, x, files[x]) if x in only else None for x in files}
            configs = datasets.get_dataset_config_names(str(folder))  # as the folder's README has them
            if name in configs:
                return datasets.load_dataset(str(folder), name)
            folders = [x.name for x in folder.iterdir() if os.access(x, os.R_OK | os.X_OK) and split_files(x)]
            tasks = sorted({*configs, *folders} - {"default"})
    except Exception as e:  # each way to fail raises a class of its own, some of them other packages'
        if empty := re.search(r'"(\w+)" corresponds to no data', str(e)):
            raise BadInput(f"{name} {empty[1]} in {source} is empty") from None
        if folder.is_dir():
            raise BadInput(f"task {name!r} in {source} can't be read: {reason(e)}") from None
        if "BuilderConfig" not in str(e):
            raise trouble or hub_error("dataset", source, e) from None
        tasks = re.findall(r"'(\w+)'", str(e).partition("Available")[2])
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    looked = f"none in TASK/SPLIT{', '.join(FORMATS)}" if folder.is_dir() else "none"
    raise BadInput(f"{source} has no task {name!r}; it has {', '.join(tasks) or looked}")
