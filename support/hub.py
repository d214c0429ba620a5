"""A name -> a folder or a dataset, or one clear line. The Hub is asked once.

find_checkpoint     a local folder or a Hub id -> a folder with config.json, tokenizer.json and weights
read_splits         a task of a GLUE folder, or of a dataset on the Hub -> {split: datasets.Dataset}
"""

import contextlib
import http.client
import io
import logging
import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path

from support.checkpoint import BadInput, shards


class HubError(BadInput):
    """The Hub could not be reached, or did not have what was asked of it."""


def looks_like_path(name):
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def reason(error):
    """What an error began with, in one line."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def hub_error(kind, name, error):
    """A HubError with one line for whatever the Hub's libraries raised over the model or dataset `name`."""
    from huggingface_hub import constants
    from huggingface_hub import errors as hub

    if isinstance(error, hub.GatedRepoError):
        return HubError(f"{kind} {name!r} is gated: ask for access on its page and set HF_TOKEN")
    if isinstance(error, hub.RepositoryNotFoundError):
        return HubError(f"no {kind} {name!r} on the Hub, or it is private (then set HF_TOKEN)")
    if isinstance(error, hub.OfflineModeIsEnabled):
        why, advice = "it is down, or HF_HUB_OFFLINE is set, and the cache lacks it or a part of it", "connect"
    else:
        why, status = reason(error), getattr(getattr(error, "response", None), "status_code", None)
        advice = {401: "check HF_TOKEN", 403: "check HF_TOKEN", 429: "wait some minutes"}.get(status, "try again later")
    where = "" if constants.ENDPOINT in why else f" ({constants.ENDPOINT})"
    return HubError(f"{kind} {name!r} can't be had from the Hub: {why}{where}; {advice}, or give a local folder")


def ask_hub(kind, name, file, revision="main"):
    """Ask the Hub for a file's headers: None, or a HubError that says why the model or dataset can't be had.

    Only once: its libraries would try a Hub that is down for 25 seconds, and wait as long as a busy one tells them to.
    Raises BadInput for what is no Hub id.
    """
    # Imported here, not above: HF_HUB_OFFLINE and its like are read at import, after train.py has set them.
    from huggingface_hub import errors as hub
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(name, file, repo_type=kind, revision=revision))
    except hub.EntryNotFoundError:
        pass  # the file is not there, the repository is
    except hub.HFValidationError:
        raise BadInput(f"{name!r} is neither a folder nor a Hub id") from None
    except hub.RevisionNotFoundError:
        return HubError(f"{kind} {name!r} has no revision {revision!r}; try 'main'")
    except Exception as e:  # no network, a proxy: classes of several packages
        return hub_error(kind, name, e)


def find_checkpoint(path_or_id, revision="main"):
    """The folder that holds a checkpoint: the local folder of that name, or the Hub's, downloaded or from its cache.

    Raises BadInput for a folder that isn't there, HubError for all that can go wrong with the Hub.
    """
    folder = os.path.expanduser(path_or_id)
    if os.path.isdir(folder):
        return Path(folder)
    if looks_like_path(str(path_or_id)) or os.path.exists(folder):
        raise BadInput(f"there is no model folder {path_or_id}")

    trouble = ask_hub("model", str(path_or_id), "config.json", revision)  # then the cache is all there is
    from huggingface_hub import errors as hub
    from huggingface_hub import hf_hub_download, logging

    logging.set_verbosity_error()  # no warning for each of its retries

    def download(*names):
        """The first of `names` that the repository has; None where it has none."""
        for name in names:
            try:
                return Path(hf_hub_download(path_or_id, name, revision=revision, local_files_only=bool(trouble)))
            except hub.LocalEntryNotFoundError:
                if not trouble:
                    raise
            except hub.EntryNotFoundError:
                continue
        return None

    try:
        config = download("config.json")
        if config is None:
            raise trouble or HubError(f"model {path_or_id!r} has no config.json")
        download("tokenizer.json")
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


def split_files(folder):
    """{split: its files} of a folder with train-00000-of-00001.parquet, validation.csv, test.jsonl or the like."""
    splits = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix in (".parquet", ".csv", ".json", ".jsonl"):
            splits.setdefault(re.split("[-.]", path.name)[0], []).append(path.name)
    return splits


def read_splits(name, source):
    """{split: datasets.Dataset} of a task, from a local folder or else from the Hub or its cache.

    Raises BadInput for a folder or task that isn't there or can't be read, HubError for all that can fail at the Hub.
    """
    source, folder = str(source), Path(os.path.expanduser(source))
    if not folder.is_dir() and (looks_like_path(source) or folder.exists()):
        raise BadInput(f"there is no GLUE folder {source}")

    # Imported here, not above: HF_HUB_OFFLINE and its like are read at import, after train.py has set them.
    import datasets

    trouble = None if folder.is_dir() else ask_hub("dataset", source, "README.md")
    offline = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = offline or trouble is not None  # then the cache is all there is
        with quiet():
            if not folder.is_dir():
                return datasets.load_dataset(source, name)
            # A folder for each task first: `datasets` caches these by their files, but what a README names by that
            # README alone, so that changed files, or another folder of the same name, would give the old rows.
            folders = [path.name for path in folder.iterdir() if split_files(path)]
            if name in folders:
                return datasets.load_dataset(str(folder / name), data_files=split_files(folder / name))
            configs = datasets.get_dataset_config_names(str(folder))  # as the folder's README has them
            if name in configs:
                return datasets.load_dataset(str(folder), name)
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
    raise BadInput(f"{source} has no task {name!r}; it has {', '.join(tasks) or 'none'}")


def hub_answers(seconds=5):
    """Whether the Hub answers at all. The libraries retry for 25 seconds before they give up, so ask once ourselves."""
    url, answers = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), []

    def ask():
        try:
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=seconds)
            answers.append(True)
        except urllib.error.HTTPError as e:
            answers.append(e.code < 500)
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)

    thread = threading.Thread(target=ask, daemon=True)  # a name look-up obeys no timeout, so wait for it from outside
    thread.start()
    thread.join(seconds)
    return bool(answers) and answers[0]


def go_offline_if_hub_is_down(*sources):
    """Where something must come from the Hub and it does not answer, let the libraries look in their caches alone."""
    remote = [x for x in sources if not (looks_like_path(x) or Path(x).exists())]
    if remote and "HF_HUB_OFFLINE" not in os.environ and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by the Hub's libraries when they are imported, which is later
