"""Score saved adapters on their tasks' validation splits, and write the leaderboard's files with them.

    python evaluate.py OUT/ortho/seed0                     all adapters in a folder, or one adapter's folder
    python evaluate.py OUT/ortho/seed0 --submit FOLDER     predictions for the test splits as well

An adapter itself says which task it is for, and with which base model and GLUE it was trained; flags override that.
"""

import argparse
import copy
import functools
import os
import re
import sys
from pathlib import Path

import torch

from glue import (
    TASKS,
    encode_for,
    evaluation_batches,
    inputs,
    load_task,
    load_tokenizer,
    score,
    write_submission,
)
from lora import merge_lora
from lori import adapter, insert
from model import MultiTaskModel, load_encoder
from support.checkpoint import BadInput, load_adapter, read_header, read_json, shown, weights_checksum
from support.hub import find_checkpoint, read_splits
from support.table import markdown


def find_device(name, local_rank=0):
    """torch.device for --device; "cuda" is that of this process. Raises BadInput where there is none of that kind."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local_rank}" if name == "cuda" else name)
        torch.empty(1, device=device).cpu()  # fails for "meta", which holds no numbers
    except (RuntimeError, AssertionError, ImportError) as e:  # the last of a kind that wants a package
        raise BadInput(f"--device {name}: {str(e).splitlines()[0]}") from None
    return device


def fast_in_bf16(device):
    """Whether --dtype auto means bf16: on a GPU that has it."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def load_tuned(encoder, folder, task):
    """A copy of the encoder with a saved adapter's LoRA layers, and the task's head. Raises BadInput."""
    model = MultiTaskModel(copy.deepcopy(encoder), {task: TASKS[task].outputs})
    load_adapter(model, folder, task)
    return model.to(next(encoder.parameters()).device)


@torch.inference_mode()
def logits_of(model, task, encoded):
    """(n, outputs) on the CPU, of encoded texts; LoRA layers are merged into the weights, in place."""
    merge_lora(model.encoder).eval()
    model.heads.eval()
    device, found = next(model.parameters()).device, torch.zeros(len(encoded), TASKS[task].outputs)
    for rows in evaluation_batches(encoded, 256 if device.type == "cuda" else 64):
        batch = inputs([encoded[i] for i in rows], model.encoder.config.pad_token_id, device)
        found[torch.from_numpy(rows)] = model(task, *batch).cpu()
    return found


def predict(model, task, encoded):
    """Class ids, or scores: (n,); LoRA layers are merged, in place.

    Raises FloatingPointError where an output is not finite: argmax would make a class of it.
    """
    logits = logits_of(model, task, encoded)
    if not logits.isfinite().all():
        raise FloatingPointError(f"{task}: not all outputs are finite")
    return (logits.squeeze(1) if TASKS[task].outputs == 1 else logits.argmax(1)).numpy()


def scores_in_training(model, encoder, tasks):
    """{task: score} of a model in training, on a copy, with the adapter merged into the encoder's float32 weights."""
    plain = MultiTaskModel(copy.deepcopy(encoder), {})
    insert(plain.encoder, adapter(model.encoder))
    plain.heads = copy.deepcopy(model.heads)
    return {d.name: score(d.name, predict(plain, d.name, d.validation), d.validation_labels)["score"] for d in tasks}


# ---------------------------------------------------------------------------------------------------------------------
# The command


def adapters_in(folder):
    """The adapter folders in `folder`, or itself. Raises BadInput where there is none."""
    found = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    if (folder / "adapter_config.json").exists():
        return [folder.absolute()]  # "." has no name
    if not found:
        raise BadInput(f"{folder}: no adapter_config.json there, nor in a folder inside it; give OUT/METHOD/seedN")
    return found


def described(folder, args, alone):
    """What an adapter is scored with: {task, model, revision, glue, max_length}, by its files and the flags.

    And what it says of its making: holdout, on how many held-out training rows it was scored then, if not on the
    validation split; weights, the checksum of its base's.
    """
    _, metadata, _ = read_header(folder / "adapter_model.safetensors")
    config = read_json(folder / "adapter_config.json")
    found = {"task": metadata.get("task"), "model": config.get("base_model_name_or_path")}
    found |= {"revision": "main", "glue": "nyu-mll/glue", "max_length": "128"}
    found |= {name: metadata[name] for name in ("revision", "glue", "max_length") if name in metadata}
    given = vars(args) | ({"task": args.tasks} if alone else {})
    found |= {name: given[name] for name in found if given.get(name) is not None}
    if alone and args.tasks and args.tasks not in TASKS:
        raise BadInput(f"--tasks {args.tasks}: one adapter is for one task, out of {', '.join(TASKS)}")
    if found["task"] not in TASKS:
        raise BadInput(f"{folder} does not say its task; score it alone, with --tasks out of {', '.join(TASKS)}")
    for name in ("model", "revision", "glue"):  # what a stranger's file says goes into paths, and onto the screen
        said = found[name]
        if not isinstance(said, str) or not said.isprintable() or not 0 < len(said) <= 1000:
            raise BadInput(f"{folder} does not say its {name}, but {shown(said)}; give it with --{name}")
    if not re.fullmatch("[0-9]{1,9}", str(found["max_length"])):
        raise BadInput(f"{folder}: max length {shown(found['max_length'])} is no number of tokens; give --max-length")
    held = re.fullmatch("[1-9][0-9]{0,8}", metadata.get("holdout", ""))
    made = {"holdout": held and held[0], "weights": metadata.get("weights")}
    return found | {"max_length": int(found["max_length"])} | made


def check(about, submit):
    """Raises BadInput where a split is missing, or two adapters would write one file. Nothing is scored yet."""
    for said in about:
        task, source = TASKS[said["task"]], said["glue"]
        if not task.validation and not submit:
            raise BadInput(f"{task.name} has no labels to score by; for the leaderboard's file, give --submit FOLDER")
        there = read_splits(task.name, source, only=())
        if missing := [split for split in task.test if submit and split not in there]:
            raise BadInput(f"{task.name} in {source} has no split {missing[0]!r}; it has {', '.join(there)}")
        if not submit and not set(task.validation) & there.keys():
            raise BadInput(f"{task.name} in {source} has no validation split; it has {', '.join(there)}")
    tasks = [said["task"] for said in about]
    if submit and len(set(tasks)) < len(tasks):
        twice = next(task for task in tasks if tasks.count(task) > 1)
        raise BadInput(f"--submit {submit}: more than one adapter is for {twice}; give one adapter's folder")


@functools.lru_cache(maxsize=1)
def load_base(name, revision):
    """(encoder, tokenizer, checksum of the weights) of a base model; the last is kept, as adapters mostly share it."""
    folder = find_checkpoint(name, revision)
    encoder = load_encoder(folder)
    return encoder, load_tokenizer(folder), str(weights_checksum(encoder))


def evaluate(folder, about, device, submit):
    """Score one adapter, and write its test predictions if asked. Returns (rows of the table, paths written)."""
    task, source, length = about["task"], about["glue"], about["max_length"]
    encoder, tokenizer, checksum = load_base(about["model"], about["revision"])
    if about["weights"] not in (None, checksum):
        print(f"NOTICE: {folder.name} was trained on other weights than {about['model']} has now.", file=sys.stderr)
    if not 8 <= length <= encoder.config.max_length:
        limits = f"{about['model']} takes 8 to {encoder.config.max_length} tokens"
        raise BadInput(f"{folder}: max length {length}, but {limits}; give another --max-length")
    model = load_tuned(encoder, folder, task).to(device)

    def predictions(examples):
        return predict(model, task, encode_for(encoder.config, tokenizer, examples.texts, length))

    rows, written, available = [], [], read_splits(task, source, only=())
    for split in [split for split in TASKS[task].validation if split in available]:
        examples = load_task(task, source, split)
        scores = score(task, predictions(examples), examples.labels)
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "score")
        rows.append([folder.name, task, split, metrics, f"{scores['score']:.1f}"])
    if submit:
        for split in TASKS[task].test:
            written.append(write_submission(submit, task, predictions(load_task(task, source, split)), split))
        if task == "mnli":  # its adapter answers the diagnostic set, too, where there is one
            try:
                examples = load_task("ax", source, "test")
            except BadInput as e:
                print(f"NOTICE: no AX.tsv: {e}", file=sys.stderr)
            else:
                written.append(write_submission(submit, "ax", predictions(examples), "test"))
    return rows, written


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapter", type=Path, help="an adapter's folder, or a folder of them")
    parser.add_argument("--tasks", help="the task of a single adapter [what it says]")
    parser.add_argument("--model", help="the base model: a checkpoint folder or Hub id [what the adapter says]")
    parser.add_argument("--revision", help="the base model's revision on the Hub [what the adapter says, or main]")
    parser.add_argument("--glue", help="GLUE folder or Hub id [what the adapter says, or nyu-mll/glue]")
    parser.add_argument("--max-length", type=int, help="tokens to cut texts to [what the adapter says, or 128]")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N [%(default)s]")
    parser.add_argument(
        "--submit", type=os.path.expanduser, help="write the leaderboard's files for the test splits into this folder"
    )
    args = parser.parse_args(argv)
    try:
        device, found = find_device(args.device), adapters_in(args.adapter)
        about = [described(folder, args, len(found) == 1) for folder in found]
        if args.tasks and len(found) > 1:
            said = f"{args.adapter} has {len(found)} adapters, which say their own"
            raise BadInput(f"--tasks {args.tasks}: {said}; leave it out, or give one adapter's folder")
        check(about, args.submit)
        done = [evaluate(folder, said, device, args.submit) for folder, said in zip(found, about, strict=True)]
    except (BadInput, OSError, FloatingPointError) as e:  # the user's; or a full disk, a folder taken away
        print(f"evaluate.py: {e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as e:  # of a GPU
        print(f"evaluate.py: {str(e).splitlines()[0]}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("evaluate.py: interrupted", file=sys.stderr)
        return 130
    for folder, said in zip(found, about, strict=True):
        if said["holdout"]:
            print(f"NOTICE: {folder.name} was trained with --holdout {said['holdout']}, and scored on those rows then.")
    print(markdown([["adapter", "task", "split", "metrics", "score"], *(row for rows, _ in done for row in rows)]))
    for path in (path for _, paths in done for path in paths):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
