"""toy.py: the labels follow from the grammar, the files are ordinary GLUE and ordinary BERT, and a seed is a seed."""

import hashlib
import json
import math
import random
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import one_line

import glue
from model import load_encoder
from support import toy
from support.checkpoint import BadInput, read_safetensors

TINY = {"steps": 5, "rows": 64, "quiet": True}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    return toy.make_demo(tmp_path_factory.mktemp("toy") / "demo", **TINY)


@pytest.fixture(scope="module")
def tasks():
    return {c: toy.make_tasks(random.Random(f"test {c}"), c, (1200, 300)) for c in (0.0, 0.5, 1.0)}


# ---------------------------------------------------------------------------------------------------------------------
# The grammar


def test_sentences_by_hand():
    c = toy.Clause("brave", "dog", "bought", "car", never=True, manner="quickly", place="yard", time="monday")
    assert toy.say(c) == "the brave dog never bought the car quickly at the yard on monday ."
    assert toy.say(c, passive=True, front=True) == (
        "at the yard the car was never bought by the brave dog quickly on monday ."
    )
    assert toy.say(toy.Clause(None, "lawyer", "lost", "hat", time="two")) == "the lawyer lost the hat at two ."


def test_sense_and_tone_by_hand():
    assert toy.same("brave", "sense") == toy.same("brave", "tone") == ("brave", "bold")
    assert toy.same("thrifty", "sense") == ("thrifty", "stingy")
    assert toy.same("thrifty", "tone") == ("thrifty", "generous")
    assert toy.opposite("thrifty", "sense") == ("generous", "wasteful")
    assert toy.opposite("thrifty", "tone") == ("stingy", "wasteful")
    assert toy.same("bought", "sense") == toy.same("bought", "tone") == ("bought", "purchased")
    assert set(toy.opposite("sold", "tone")) == {"bought", "purchased"}
    assert toy.same("dog", "sense") == ("dog", "hound") and toy.KIND["hound"] == "animal"
    assert toy.TONE["thrifty"] == toy.TONE["brave"] == 1 and toy.TONE["stingy"] == toy.TONE["timid"] == 0


def test_no_word_has_two_meanings():
    words = [w for f in (*toy.VERBS, *toy.PLAIN, *toy.MIXED) for pair in f for w in pair]
    words += [w for pairs in (*toy.NOUNS.values(), toy.MANNERS, toy.PLACES, toy.TIMES) for pair in pairs for w in pair]
    words += [*toy.NOUNS, "the", "never", "not", "was", "by", "at", "on", "that", "everyone", "praised", "blamed"]
    assert len(words) == len(set(words)) and 120 <= len(words) <= 400


def meaning(sentence):
    """Read a sentence back: what it says in each role, by the word tables alone."""
    words = sentence.split()
    nouns = [w for w in words if w in toy.KIND or w in toy.NOUNS]

    def role(test):
        found = [w for w in words if test(w)]
        assert len(found) <= 1, sentence
        return found[0] if found else None

    def kind(word):
        return toy.KIND.get(word, word)

    verbs = {w for f in toy.VERBS for pair in f for w in pair}
    (subject,), (obj,) = ([n for n in nouns if kind(n) in kinds] for kinds in (toy.SUBJECTS, toy.OBJECTS))
    extras = {
        name: {w for pair in pairs for w in pair}
        for name, pairs in (("manner", toy.MANNERS), ("place", toy.PLACES), ("time", toy.TIMES))
    }
    return {
        "subject": subject,
        "object": obj,
        "trait": role(lambda w: w in toy.SENSE),
        "verb": role(lambda w: w in verbs),
        "never": "never" in words,
        **{name: role(lambda w, s=s: w in s) for name, s in extras.items()},
    }


def alike(a, b, reading):
    """{role: whether two meanings agree in it}. Traits of one family agree by the reading, of two never."""
    out = {}
    for role in a:
        x, y = a[role], b[role]
        out[role] = x == y
        if role == "trait":
            table = toy.SENSE if reading == "sense" else toy.TONE
            out[role] = toy.FAMILY[x] is toy.FAMILY[y] and table[x] == table[y]
        elif isinstance(x, str) and x in toy.ALIKE:
            out[role] = y in toy.ALIKE[x]
    return out


@pytest.mark.parametrize("conflict", (0.0, 0.5, 1.0))
def test_labels_follow_from_the_meaning(tasks, conflict):
    core = ("trait", "subject", "verb", "object")
    for row in tasks[conflict]["sst2"]["train"]:
        words = row["sentence"].split()
        (trait,) = (w for w in words if w in toy.TONE)
        assert row["label"] == toy.TONE[trait] ^ ("not" in words), row
    for row in tasks[conflict]["mrpc"]["train"]:
        a, b = meaning(row["sentence1"]), meaning(row["sentence2"])
        assert row["label"] == all(alike(a, b, "sense").values()), row
    for row in tasks[conflict]["stsb"]["train"]:
        same = alike(meaning(row["sentence1"]), meaning(row["sentence2"]), "sense")
        assert row["label"] == sum((1 + (role == "trait")) * same[role] for role in core), row
    for row in tasks[conflict]["mnli"]["train"]:
        a, b = meaning(row["premise"]), meaning(row["hypothesis"])
        same = alike(a, b, "tone")
        if row["label"] == 2:  # it says the opposite of something
            assert [same[r] for r in ("trait", "verb", "never")].count(False) == 1, row
            assert same["trait"] or toy.FAMILY[a["trait"]] is toy.FAMILY[b["trait"]]
            continue
        assert same["trait"] and same["verb"] and same["never"] and same["subject"], row
        extras = ("manner", "place", "time")
        added = [r for r in extras if b[r] and not same[r]]
        broader = same["object"] or b["object"] == toy.KIND.get(a["object"])
        assert (row["label"] == 0) == (not added and broader), row


def test_classes_are_balanced_whatever_the_conflict(tasks):
    for splits in tasks.values():
        for task, classes in (("sst2", 2), ("mrpc", 2), ("mnli", 3)):
            share = np.bincount([row["label"] for row in splits[task]["train"]], minlength=classes) / 1200
            assert abs(share - 1 / classes).max() < 0.06, (task, share)
        scores = np.array([row["label"] for row in splits["stsb"]["train"]])
        assert scores.min() == 0 and scores.max() == 5 and abs(scores.mean() - 2.5) < 0.2 and scores.std() > 1


def test_the_conflict_knob_is_the_share_of_words_that_the_tasks_read_differently(tasks):
    mixed = {w for f in toy.MIXED for pair in f for w in pair}
    for conflict, splits in tasks.items():
        for task, rows in splits.items():
            texts = [row.get("sentence", row.get("sentence1", row.get("premise"))).split() for row in rows["train"]]
            share = np.mean([any(w in mixed for w in words) for words in texts])
            assert share == conflict if conflict in (0, 1) else abs(share - conflict) < 0.06, (task, conflict)
    # What it means: on all pairs of unlike words of a PLAIN family the readings agree, in a MIXED one on a third.
    for families, agree in ((toy.PLAIN, 1), (toy.MIXED, 1 / 3)):
        for f in families:
            words = [w for pair in f for w in pair]
            pairs = [(a, b) for a in words for b in words if a != b]
            assert np.mean([(b in toy.same(a, "sense")) == (b in toy.same(a, "tone")) for a, b in pairs]) == agree
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"\[0, 1\]"):
            toy.make_tasks(random.Random(0), wrong, (4, 2))


def test_no_row_is_both_trained_on_and_validated_on(tasks):
    for task, splits in tasks[0.5].items():
        train, validation = ({tuple(r.values())[:-1] for r in rows} for rows in splits.values())
        assert len(train) == 1200 and len(validation) == 300 and not train & validation, task


# ---------------------------------------------------------------------------------------------------------------------
# The files


def test_glue_folder_is_read_like_the_real_one(demo):
    import datasets

    folder, expected = demo / "glue", toy.make_tasks(random.Random("tasks 0"), toy.CONFLICT, (64, 12))
    assert set(datasets.get_dataset_config_names(str(folder))) == set(expected)
    for task, splits in expected.items():
        found = datasets.load_dataset(str(folder), task)
        assert set(found) == set(splits) and set(splits) == {"train", *glue.TASKS[task].validation[:1]}
        label = found["train"].features["label"]
        assert label == datasets.Value("float32") if task == "stsb" else tuple(label.names) == glue.TASKS[task].labels
        for split, rows in splits.items():
            assert found[split].column_names == [*glue.TASKS[task].columns, "label", "idx"]
            assert found[split]["idx"][:] == list(range(len(rows)))
            examples = glue.load_task(task, folder, split)
            assert list(examples.texts) == [tuple(v for k, v in row.items() if k != "label") for row in rows]
            assert examples.labels.tolist() == [row["label"] for row in rows]


def test_tokenizer(demo):
    tokenizer = glue.load_tokenizer(demo / "model")
    e = tokenizer.encode("The Brave DOG .", "the zebra")
    assert e.tokens[:6] == ["[CLS]", "the", "brave", "dog", ".", "[SEP]"] and e.tokens[-1] == "[SEP]"
    assert e.tokens[7:-1] == ["z", "##e", "##b", "##r", "##a"] and e.type_ids == [0] * 6 + [1] * 7
    assert [tokenizer.token_to_id(t) for t in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")] == [0, 1, 2, 3, 4]
    for word in toy.WORDS:
        assert tokenizer.token_to_id(word), word  # a token of its own


def test_transformers_loads_the_checkpoint_and_computes_the_same(demo):
    import transformers

    theirs, info = transformers.AutoModelForMaskedLM.from_pretrained(demo / "model", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    ours, tokenizer = load_encoder(demo / "model"), glue.load_tokenizer(demo / "model")
    corpus = toy.make_corpus(random.Random(1), 8)
    ids, mask, types, _ = toy.encode(tokenizer, corpus)
    with torch.no_grad():
        a = ours(ids, mask, types)
        b = theirs.eval()(ids, mask, types, output_hidden_states=True)
    assert (a - b.hidden_states[-1])[mask.bool()].abs().max() < 1e-5

    # the language-model head, too: what is pretrained is what transformers computes
    where = mask.bool()
    model = toy.MaskedLM(ours.config)
    model.encoder = ours
    tensors = read_safetensors(demo / "model" / "model.safetensors")
    assert tensors.keys() == model.tensors().keys() and {name.split(".")[0] for name in tensors} == {"bert", "cls"}
    for name, tensor in model.tensors().items():
        tensor.copy_(tensors[name])
    with torch.no_grad():
        logits, _ = model(ids, mask, types, where)
    assert (logits - b.logits[where]).abs().max() < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Pretraining


def test_masking_is_berts():
    ids = torch.arange(5, 205).repeat(500, 1)  # (500, 200)
    ids[:, 0], ids[:, 1], ids[:, -1] = 2, 3, 0
    corrupted, where = toy.mask_tokens(ids, 205, torch.Generator().manual_seed(0))
    real = ids >= 5
    assert not where[~real].any() and (corrupted == ids)[~where].all()
    assert abs(where[real].float().mean() - 0.15) < 0.005
    masked, kept = (corrupted == 4)[where].float().mean(), (corrupted == ids)[where].float().mean()
    assert abs(masked - 0.8) < 0.01 and abs(kept - 0.1) < 0.01 and corrupted[where].min() == 4


def test_odd_words_by_hand():
    corpus = [
        ("the brave dog bought the car .", "the bold dog sold the car .", {"bought", "sold"}),
        ("the dog .", "the hound .", set()),
        ("everyone praised the dog that was brave .", None, None),
    ]
    tokenizer = toy.train_tokenizer([text for row in corpus for text in row[:2] if text])
    ids, mask, types, odd = toy.encode(tokenizer, corpus)
    asked = [
        {tokenizer.id_to_token(int(t)): int(o) for t, o in zip(*rows, strict=True) if o >= 0}
        for rows in zip(ids, odd, strict=True)
    ]
    assert asked[0] == {"[CLS]": 1, "brave": 0, "dog": 0, "bought": 1, "car": 0, "bold": 0, "sold": 1}
    assert asked[1] == {"[CLS]": 0, "dog": 0, "hound": 0} and asked[2] == {}
    assert mask.sum(1).tolist() == [17, 9, 10] and types.sum(1).tolist() == [8, 4, 0]


def test_a_short_pretraining_beats_word_frequencies():
    corpus = toy.make_corpus(random.Random(2), 2000)
    tokenizer = toy.train_tokenizer([text for row in corpus for text in row[:2] if text])
    data = toy.encode(tokenizer, corpus)
    counts = torch.bincount(data[0][data[0] >= 5]).double()
    share = counts[counts > 0] / counts.sum()
    entropy = -(share * share.log()).sum().item()  # what the best constant guess loses per word, in nats
    config = toy.replace(toy.CONFIG, vocab_size=tokenizer.get_vocab_size())
    _, losses = toy.pretrain(config, data, steps=120, batch_size=32)
    assert len(losses) == 120 and abs(losses[0] - math.log(config.vocab_size)) < 1
    assert np.mean(losses[-20:]) < 0.8 * entropy
    _, again = toy.pretrain(config, data, steps=3, batch_size=32)
    _, other = toy.pretrain(config, data, steps=3, batch_size=32, seed=1)
    assert again[0] == losses[0] and other[0] != losses[0]


# ---------------------------------------------------------------------------------------------------------------------
# The folder


def test_another_seed_gives_another_toy(demo, tmp_path):
    other = contents(toy.make_demo(tmp_path / "other", seed=1, **TINY))
    assert other.keys() == contents(demo).keys()
    for name in ("model/model.safetensors", "glue/sst2/train-00000-of-00001.parquet"):
        assert other[name] != contents(demo)[name]


def test_the_same_arguments_give_the_same_bytes_and_no_global_random_state_is_used_or_changed(demo, tmp_path):
    torch.manual_seed(123), random.seed(123), np.random.seed(123)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    toy.make_demo(tmp_path, **TINY)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2] and contents(tmp_path) == contents(demo)


def test_a_finished_folder_is_kept(demo, monkeypatch):
    before, stamp = contents(demo), (demo / "model/model.safetensors").stat().st_mtime_ns
    monkeypatch.setattr(toy, "pretrain", None)  # would be called
    assert toy.make_demo(demo, **TINY) == demo
    assert contents(demo) == before and (demo / "model/model.safetensors").stat().st_mtime_ns == stamp


@pytest.mark.parametrize("how", ["another seed", "another version", "damaged", "no toy"])
def test_a_folder_of_something_else_is_refused(demo, tmp_path, how):
    folder = tmp_path / "folder"
    folder.mkdir()
    if how == "no toy":
        (folder / "thesis.tex").write_text("years of work")
    else:
        marker = json.loads((demo / toy.MARKER).read_text())
        marker |= {"another seed": {"seed": 1}, "another version": {"source": "0"}, "damaged": {}}[how]
        text = json.dumps(marker, indent=1).encode() + b"\n"
        (folder / toy.MARKER).write_bytes(b"\xff" + text if how == "damaged" else text)
    before = contents(folder)
    with pytest.raises(BadInput) as e:
        toy.make_demo(folder, **TINY)
    assert one_line(e) == f"{folder} holds something other than this toy; choose another folder, or remove it"
    assert contents(folder) == before and list(tmp_path.iterdir()) == [folder]


def test_it_is_whole_or_not_there(demo, tmp_path, monkeypatch):
    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:  # stopped halfway: nothing is left, so the next call begins again
        m.setattr(toy, "write_model", stop)
        with pytest.raises(KeyboardInterrupt):
            toy.make_demo(tmp_path / "runs/toy", **TINY)
    assert list((tmp_path / "runs").iterdir()) == []
    assert contents(toy.make_demo(tmp_path / "runs/toy", **TINY)) == contents(demo)


def test_of_two_at_once_the_first_one_stays(demo, tmp_path, monkeypatch):
    honest = toy.write_model

    def slow(folder, *rest):  # while this one is at it, another one is done
        honest(folder, *rest)
        shutil.copytree(demo, tmp_path / "toy")

    monkeypatch.setattr(toy, "write_model", slow)
    assert toy.make_demo(tmp_path / "toy", **TINY) == tmp_path / "toy"
    assert contents(tmp_path / "toy") == contents(demo) and list(tmp_path.iterdir()) == [tmp_path / "toy"]


def test_by_default_the_folder_is_named_after_what_is_in_it(demo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [toy.make_demo(**TINY), toy.make_demo(**TINY), toy.make_demo(seed=1, **TINY)]
    assert folders[0] == folders[1] != folders[2]
    digest = hashlib.sha256((folders[0] / toy.MARKER).read_bytes()).hexdigest()
    assert str(folders[0]) == f"runs/toy-{digest[:8]}" and contents(folders[0]) == contents(demo)
    assert sorted(Path("runs").iterdir()) == sorted(folders[1:])


def test_a_wrong_conflict_touches_nothing(tmp_path):
    with pytest.raises(ValueError, match="conflict"):
        toy.make_demo(tmp_path / "new", conflict=2, **TINY)
    assert not (tmp_path / "new").exists()


def test_command_line(tmp_path, monkeypatch, capsys):
    made = {}
    monkeypatch.setattr(toy, "make_demo", lambda *args: made.update(args=args))
    monkeypatch.setattr(sys, "argv", ["toy.py", str(tmp_path), "--seed", "3", "--conflict", "1"])
    toy.main()
    out = capsys.readouterr().out
    assert made["args"] == (tmp_path, 3, 1.0) and all(f"\n{task}\n" in out for task in toy.DRAW)


@pytest.mark.parametrize(
    "arguments, says", [(["new", "--conflict", "2"], "[0, 1]"), (["."], "holds something other"), (["file"], "file")]
)
def test_bad_command_line(tmp_path, monkeypatch, capsys, arguments, says):
    (tmp_path / "file").write_text("")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["toy.py", *arguments])
    assert toy.main() == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("support.toy: ") and err.count("\n") == 1 and says in err
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]
