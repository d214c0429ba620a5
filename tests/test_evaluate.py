"""evaluate.py: a saved adapter scores what the table says, here and in peft, and its predictions become the files."""

import json
import re
import shutil
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import results_of, write_rows
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

import evaluate
from glue import encode, load_task, load_tokenizer, score
from model import load_encoder
from support.checkpoint import read_header, read_safetensors, write_safetensors


def rows_of(text):
    """{(adapter, task, split): (metrics, score)} of a printed table."""
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert cells[0] == ["adapter", "task", "split", "metrics", "score"]
    return {tuple(row[:3]): tuple(row[3:]) for row in cells[1:]}


def refused(arguments, capsys):
    """The one line that a command says, which writes nothing else and ends with status 2."""
    assert evaluate.main([str(x) for x in arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("evaluate.py: ") and err.count("\n") == 1 and len(err) < 1000
    return err


# ---------------------------------------------------------------------------------------------------------------------
# The table's numbers


@pytest.mark.parametrize("method", ["single", "ortho"])
def test_it_gives_the_tables_numbers_and_needs_no_flags(finished, capsys, method):
    out, results = finished
    assert evaluate.main([str(out / method / "seed1")]) is None
    rows = rows_of(capsys.readouterr().out)
    expected = results["methods"][method]["1"]["tasks"]
    split = {"sst2": "validation", "mnli": "validation_matched", "stsb": "validation"}
    assert rows.keys() == {(task, task, split[task]) for task in expected}
    for task, scores in expected.items():
        metrics, points = rows[task, task, split[task]]
        assert points == f"{scores['score']:.1f}"
        assert metrics == ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "score")


def test_bf16_trains_and_is_scored_in_float32(run, tmp_path, capsys):
    for dtype in ("fp32", "bf16"):
        assert run(f"--tasks stsb --methods ortho --steps 3 --lr 5e-3 --dtype {dtype}", out=tmp_path / dtype)[0] == 0
    logs = [(tmp_path / dtype / "ortho/seed0/log.jsonl").read_text().splitlines() for dtype in ("fp32", "bf16")]
    exact, rounded = ([json.loads(line)["loss"]["stsb"] for line in log] for log in logs)
    assert exact != rounded and rounded == pytest.approx(exact, rel=0.05)
    assert evaluate.main([str(tmp_path / "bf16/ortho/seed0")]) is None  # which is float32 always
    found = results_of(tmp_path / "bf16")["methods"]["ortho"]["0"]["tasks"]["stsb"]
    ((metrics, _),) = rows_of(capsys.readouterr().out).values()
    assert metrics == ", ".join(f"{name} {value:.4f}" for name, value in found.items() if name != "score")


def test_merged_adapters(finished_lori, capsys):
    out, results = finished_lori
    for method in ("lori-s", "lora-merged", "lori-s-merged"):
        assert evaluate.main([str(out / method / "seed0")]) is None
        rows = rows_of(capsys.readouterr().out)
        for task, split in (("sst2", "validation"), ("mnli", "validation_matched")):
            assert rows[task, task, split][1] == f"{results['methods'][method]['0']['tasks'][task]['score']:.1f}"


def test_one_adapter_alone(finished, monkeypatch, capsys):
    out, results = finished
    monkeypatch.chdir(out / "ortho/seed0/sst2")
    assert evaluate.main([".", "--device", "cpu"]) is None
    ((key, (_, points)),) = rows_of(capsys.readouterr().out).items()
    assert key == ("sst2", "sst2", "validation")
    assert points == f"{results['methods']['ortho']['0']['tasks']['sst2']['score']:.1f}"


def test_held_out_rows_are_told_from_the_validation_split(run, tmp_path, capsys):
    assert run("--tasks sst2 --methods joint --steps 1 --holdout 10")[0] == 0
    assert evaluate.main([str(tmp_path / "out/joint/seed0")]) is None
    assert "sst2 was trained with --holdout 10, and scored on those rows then." in capsys.readouterr().out


def test_peft_gives_the_tables_numbers(finished, demo):
    out, results = finished
    base = AutoModelForSequenceClassification.from_pretrained(demo / "model", num_labels=3)
    model = PeftModel.from_pretrained(base, str(out / "ortho/seed0/mnli")).eval()
    examples = load_task("mnli", demo / "glue", "validation")
    encoded = encode(load_tokenizer(demo / "model"), examples.texts, 32)
    with torch.inference_mode():
        predictions = [
            model(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits.argmax().item()
            for ids, types in encoded
        ]
    assert score("mnli", predictions, examples.labels) == results["methods"]["ortho"]["0"]["tasks"]["mnli"]


def test_flags_say_otherwise(finished, demo, tmp_path, capsys):
    """Another model, other data, fewer tokens: by what they are given as, not by what the adapter says."""
    folder, texts = finished[0] / "ortho/seed0/sst2", [f"the {x} dog" for x in ("kind", "cruel", "bold", "harsh")]
    encoder, tokenizer = load_encoder(demo / "model"), load_tokenizer(demo / "model")
    model = evaluate.load_tuned(encoder, folder, "sst2")
    labels = evaluate.predict(model, "sst2", encode(tokenizer, [(text,) for text in texts], 128))
    write_rows(
        tmp_path / "glue/sst2",
        [{"sentence": t, "label": int(x)} for t, x in zip(texts, labels, strict=True)],
        "validation",
    )
    assert evaluate.main([str(folder), "--glue", str(tmp_path / "glue")]) is None
    assert rows_of(capsys.readouterr().out)["sst2", "sst2", "validation"] == ("accuracy 1.0000", "100.0")

    for name in ("adapter", "model"):
        shutil.copytree({"adapter": folder, "model": demo / "model"}[name], tmp_path / name)
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "gone"}))
    flags = ["--model", str(tmp_path / "model"), "--glue", str(tmp_path / "glue")]
    assert evaluate.main([str(tmp_path / "adapter"), *flags]) is None
    assert rows_of(capsys.readouterr().out)["adapter", "sst2", "validation"][1] == "100.0"
    said = refused([tmp_path / "adapter", *flags, "--max-length", 4], capsys)
    assert "max length 4, but " in said and "takes 8 to 64 tokens; give another --max-length" in said


# ---------------------------------------------------------------------------------------------------------------------
# Predictions


def test_predict_is_the_unmerged_model_one_by_one(finished, demo):
    """Batches by length and a merge into the weights change no class and no score."""
    encoder, tokenizer = load_encoder(demo / "model"), load_tokenizer(demo / "model")
    for task in ("mnli", "stsb"):
        model = evaluate.load_tuned(encoder, finished[0] / "ortho/seed0" / task, task).eval()
        encoded = encode(tokenizer, load_task(task, demo / "glue", "train").texts, 32)
        with torch.inference_mode():
            logits = torch.cat([model(task, torch.tensor([a]), None, torch.tensor([b])) for a, b in encoded])
        found = evaluate.predict(model, task, encoded)
        if task == "mnli":
            assert found.dtype == np.int64 and found.tolist() == logits.argmax(1).tolist()
        else:
            np.testing.assert_allclose(found, logits.squeeze(1), rtol=1e-4, atol=1e-5)


def test_submission(finished, tmp_path, capsys):
    """Test splits as the leaderboard wants them. That they have labels here, as MRPC's have, shows nowhere."""
    glue, out = tmp_path / "glue", finished[0]
    texts = ["a kind dog", "the cruel doctor slept", "a car"]
    for split, extra in (("validation", []), ("test", ["the hat"])):
        rows = [{"idx": i, "sentence": text, "label": 1} for i, text in enumerate(texts + extra)]
        write_rows(glue / "sst2", rows, split)
    flags = ["--glue", str(glue), "--submit", str(tmp_path / "submission")]
    assert evaluate.main([str(out / "ortho/seed0/sst2"), *flags]) is None
    said = capsys.readouterr().out
    assert list(rows_of(said)) == [("sst2", "sst2", "validation")]
    assert f"wrote {tmp_path / 'submission/SST-2.tsv'}" in said
    (written,) = (tmp_path / "submission").iterdir()
    lines = written.read_text().splitlines()
    assert lines[0] == "index\tprediction" and [line.split("\t")[0] for line in lines[1:]] == ["0", "1", "2", "3"]
    assert all(line.split("\t")[1] in ("0", "1") for line in lines[1:])


def test_what_can_not_be_scored_or_written_is_refused_before_anything_is(finished, tmp_path, capsys):
    glue, out = tmp_path / "glue", finished[0]
    row, flags = {"idx": 0, "sentence": "a kind dog", "label": 1}, ["--glue", str(glue)]
    write_rows(glue / "sst2", [row], "train")
    assert "sst2 in" in (said := refused([out / "ortho/seed0/sst2", *flags], capsys)) and "no validation split" in said
    write_rows(glue / "sst2", [row], "test")
    for name in ("one", "two"):
        shutil.copytree(out / "ortho/seed0/sst2", tmp_path / "both" / name)
    flags += ["--submit", str(tmp_path / "submission")]
    assert "more than one adapter is for sst2" in refused([tmp_path / "both", *flags], capsys)
    shutil.rmtree(tmp_path / "both/two")
    shutil.copytree(out / "ortho/seed0/stsb", tmp_path / "both/two")
    write_rows(glue / "stsb", [{"idx": 0, "sentence1": "a", "sentence2": "b", "label": 1.0}], "validation")
    assert "stsb in" in (said := refused([tmp_path / "both", *flags], capsys)) and "no split 'test'" in said
    assert not (tmp_path / "submission").exists()


def test_an_adapter_that_is_not_finite_is_refused(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0] / "ortho/seed0/sst2", tmp_path / "sst2")
    tensors = read_safetensors(folder / "adapter_model.safetensors")
    tensors[next(name for name in tensors if "lora_B" in name)][0, 0] = float("nan")
    _, metadata, _ = read_header(folder / "adapter_model.safetensors")
    write_safetensors(folder / "adapter_model.safetensors", tensors, metadata)
    assert "sst2: not all outputs are finite" in refused([folder], capsys)


def test_other_weights_of_the_base_are_told(finished, demo, tmp_path, capsys):
    adapter, base = finished[0] / "ortho/seed0/sst2", shutil.copytree(demo / "model", tmp_path / "model")
    assert evaluate.main([str(adapter), "--model", str(base)]) is None and not capsys.readouterr().err
    tensors = read_safetensors(base / "model.safetensors")
    for tensor in tensors.values():
        tensor += 1e-3
    write_safetensors(base / "model.safetensors", tensors)
    evaluate.load_base.cache_clear()
    assert evaluate.main([str(adapter), "--model", str(base)]) is None
    assert f"NOTICE: sst2 was trained on other weights than {base} has now" in capsys.readouterr().err


def test_an_interruption_is_one_line(finished, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "predict", mock.Mock(side_effect=KeyboardInterrupt))
    assert evaluate.main([str(finished[0] / "ortho/seed0/sst2")]) == 130
    assert capsys.readouterr().err == "evaluate.py: interrupted\n"


def test_too_little_memory_is_one_line(finished, monkeypatch, capsys):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
    monkeypatch.setattr(evaluate, "predict", mock.Mock(side_effect=error))
    assert evaluate.main([str(finished[0] / "ortho/seed0/sst2")]) == 1
    assert capsys.readouterr().err == "evaluate.py: CUDA out of memory. Tried to allocate 2.00 GiB.\n"


@pytest.mark.parametrize("ax", [True, False, "damaged"])
def test_submission_of_mnli(finished, tmp_path, capsys, ax):
    """Both of its test splits under their names, and the diagnostic set where there is one; its scores need no ax."""
    glue, out = tmp_path / "glue", finished[0]
    rows = [
        {"idx": i, "premise": "the dog slept .", "hypothesis": f"the {x} slept .", "label": 0}
        for i, x in enumerate("ab")
    ]
    for split in ("validation_matched", "validation_mismatched", "test_matched", "test_mismatched"):
        write_rows(glue / "mnli", rows, split)
    if ax:
        write_rows(glue / "ax", [{"premise": row["premise"]} if ax == "damaged" else row for row in rows], "test")
    flags = ["--glue", str(glue), "--submit", str(tmp_path / "submission")]
    assert evaluate.main([str(out / "ortho/seed0/mnli"), *flags]) is None
    said, notice = capsys.readouterr()
    assert list(rows_of(said)) == [("mnli", "mnli", f"validation_{which}matched") for which in ("", "mis")]
    assert {True: "", False: "has no task 'ax'", "damaged": "has no column 'hypothesis'"}[ax] in notice
    assert notice.startswith("NOTICE: no AX.tsv: ") == (ax is not True)
    written = {path.name: path.read_text() for path in (tmp_path / "submission").iterdir()}
    assert written.keys() == {"MNLI-m.tsv", "MNLI-mm.tsv"} | ({"AX.tsv"} if ax is True else set())
    for text in written.values():
        assert re.fullmatch("index\tprediction\n(?:[01]\t(?:entailment|neutral|contradiction)\n){2}", text)


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: one clear line


@pytest.mark.parametrize(
    "change, says",
    [
        ({"base_model_name_or_path": None}, "give it with --model"),
        ({"base_model_name_or_path": "nobody/../x/y"}, "there is no model folder"),
        ({"max_length": "9" * 5000}, "max length '999"),
        ({"max_length": "4"}, "takes 8 to"),
        ({"max_length": "many"}, "max length 'many' is no number of tokens"),
        ({"task": "sst3"}, "does not say its task"),
        ({"task": "mnli"}, "classifier.weight is (2, 64), mnli needs (3, 64)"),
        ({"glue": "./nowhere"}, "there is no GLUE folder ./nowhere"),
        ({"glue": "/a\nTraceback: oops"}, "does not say its glue, but '/a\\nTraceback: oops'; give it with --glue"),
        ({"glue": "~nobody\0b"}, "does not say its glue"),
        ({"glue": "/" + "a" * 5000}, "does not say its glue"),
        ({"revision": "\x1b[31mred"}, "give it with --revision"),
        ({"base_model_name_or_path": "~x\0b"}, "give it with --model"),
        ({"r": 0}, "adapter has r=0"),
    ],
)
def test_a_strangers_adapter(finished, tmp_path, capsys, change, says):
    folder = shutil.copytree(finished[0] / "ortho/seed0/sst2", tmp_path / "adapter")
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    metadata = read_header(weights)[1]
    if change.keys() <= metadata.keys():
        write_safetensors(weights, read_safetensors(weights), metadata | change)
    else:
        config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert says in refused([folder], capsys)


def test_an_adapter_that_does_not_say_its_task(finished, demo, tmp_path, capsys):
    """As peft's own don't: it is given with --tasks, for one adapter alone."""
    out, results = finished
    for task in ("sst2", "mnli"):
        folder = shutil.copytree(out / "ortho/seed0" / task, tmp_path / "both" / task)
        tensors = read_safetensors(folder / "adapter_model.safetensors")
        write_safetensors(folder / "adapter_model.safetensors", tensors, {"format": "pt"})
    flags = ["--tasks", "sst2", "--glue", demo / "glue", "--max-length", 32]
    assert "does not say its task; score it alone, with --tasks" in refused([tmp_path / "both", *flags], capsys)
    assert evaluate.main([str(x) for x in (tmp_path / "both/sst2", *flags)]) is None
    (row,) = rows_of(capsys.readouterr().out).values()
    assert row[1] == f"{results['methods']['ortho']['0']['tasks']['sst2']['score']:.1f}"


@pytest.mark.parametrize(
    "arguments, says",
    [
        (["nowhere"], "nowhere: no adapter_config.json there, nor in a folder inside it"),
        (["OUT/ortho/seed0/sst2", "--device", "cuda:99"], "--device cuda:99: "),
        (["OUT/ortho/seed0/sst2", "--device", "nothing"], "--device nothing: "),
        (["OUT/ortho/seed0/sst2", "--device", "meta"], "--device meta: "),
        (["OUT/ortho/seed0/sst2", "--model", "./nowhere"], "there is no model folder ./nowhere"),
        (["OUT/ortho/seed0/sst2", "--tasks", "sst3"], "one adapter is for one task, out of cola, sst2"),
        (["OUT/ortho/seed0/sst2", "--tasks", "sst2,mnli"], "one adapter is for one task"),
        (["OUT/ortho/seed0/mnli", "--tasks", "ax"], "give --submit"),
        (["OUT/ortho/seed0/sst2", "--device", "hpu"], "--device hpu: "),
        (["OUT/ortho/seed0", "--tasks", "sst2"], "adapters, which say their own"),
        (["OUT/ortho/seed0/sst2", "--max-length", "0"], "max length 0, but "),
        (["OUT/ortho/seed0/sst2", "--submit", "submission"], "no split 'test'"),
        (["OUT"], "no adapter_config.json there"),
    ],
)
def test_bad_arguments(finished, capsys, arguments, says):
    assert says in refused([x.replace("OUT", str(finished[0])) for x in arguments], capsys)


def test_no_such_flag_is_argparse(capsys):
    for arguments in ([], ["out", "--learning-rate", "1"], ["out", "--max-length", "many"]):
        with pytest.raises(SystemExit) as e:
            evaluate.main(arguments)
        assert e.value.code == 2 and "usage: evaluate.py" in capsys.readouterr().err
