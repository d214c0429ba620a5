"""The offline stand-in: a small grammar, four GLUE-shaped tasks out of it, and a tiny encoder pretrained on it.

    make_demo(folder) writes
        folder/glue     sst2, mrpc, mnli and stsb under GLUE's own names and columns, laid out as the Hub's nyu-mll/glue
        folder/model    config.json, model.safetensors, tokenizer.json: a BERT checkpoint like any other

so that whatever reads real data and real checkpoints reads these, and knows nothing of this file.

    python -m support.toy FOLDER [--seed 0] [--conflict 0.5]        writes them, and prints a few rows of each task

It reads in the order of its making: words, sentences, tasks, files, tokenizer, pretraining, and one entry point.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from model import ACTIVATIONS, Config, Encoder
from support.checkpoint import BadInput, write_safetensors, write_text
from support.hub import quiet

# ---------------------------------------------------------------------------------------------------------------------
# Words. Two words in one pair of brackets mean the same; what stands across from them means the opposite.

NOUNS = {
    "person": [("doctor", "physician"), ("lawyer", "attorney"), ("teacher", "instructor"), ("thief", "burglar")],
    "animal": [("dog", "hound"), ("horse", "steed"), ("pig", "hog"), ("rabbit", "bunny")],
    "vehicle": [("car", "automobile"), ("bicycle", "bike"), ("boat", "ship")],
    "food": [("bread", "loaf"), ("candy", "sweets"), ("soup", "broth")],
    "tool": [("knife", "blade"), ("hammer", "mallet"), ("axe", "hatchet")],
    "garment": [("coat", "jacket"), ("hat", "cap"), ("shirt", "blouse")],
}
SUBJECTS, OBJECTS = ("person", "animal"), ("vehicle", "food", "tool", "garment")
VERBS = [
    (("bought", "purchased"), ("sold", "traded")),
    (("found", "discovered"), ("lost", "misplaced")),
    (("lifted", "raised"), ("dropped", "lowered")),
    (("pulled", "dragged"), ("pushed", "shoved")),
    (("hid", "concealed"), ("revealed", "displayed")),
    (("repaired", "fixed"), ("destroyed", "wrecked")),
]
# A trait has a sense (what it says of someone) and a tone (what the speaker thinks of it). In a PLAIN family tone goes
# with sense. In a MIXED family both senses come in both tones: a thrifty man and a stingy man do the same, and so do a
# generous and a wasteful one; it is thrifty and generous that are praise.
PLAIN = [
    (("brave", "bold"), ("timid", "cowardly")),
    (("kind", "gentle"), ("cruel", "harsh")),
    (("clever", "smart"), ("stupid", "foolish")),
    (("cheerful", "merry"), ("gloomy", "dreary")),
    (("honest", "truthful"), ("dishonest", "deceitful")),
    (("polite", "courteous"), ("rude", "impolite")),
]  # ((praise, praise), (blame, blame))
MIXED = [
    (("thrifty", "stingy"), ("generous", "wasteful")),
    (("daring", "reckless"), ("careful", "fearful")),
    (("firm", "stubborn"), ("flexible", "spineless")),
    (("confident", "arrogant"), ("modest", "meek")),
    (("curious", "nosy"), ("discreet", "aloof")),
    (("frank", "blunt"), ("tactful", "evasive")),
]  # ((praise, blame), (praise, blame))
MANNERS = [("quickly", "rapidly"), ("slowly", "gradually"), ("quietly", "silently"), ("badly", "poorly")]
PLACES = [("garden", "yard"), ("school", "academy"), ("shop", "store"), ("farm", "ranch"), ("river", "stream")]
TIMES = [("monday",), ("tuesday",), ("friday",), ("two",), ("five",), ("nine",)]
DAYS = ("monday", "tuesday", "friday")

KIND = {word: kind for kind, pairs in NOUNS.items() for pair in pairs for word in pair}  # dog -> animal
SENSE = {w: s for families in (PLAIN, MIXED) for f in families for s, words in enumerate(f) for w in words}  # 0 or 1
TONE = {w: 1 - s for f in PLAIN for s, words in enumerate(f) for w in words}  # 1 praise, 0 blame
TONE |= {w: 1 - t for f in MIXED for words in f for t, w in enumerate(words)}
FAMILY = {w: f for families in (VERBS, PLAIN, MIXED) for f in families for words in f for w in words}
ALIKE = {w: pair for pairs in (*NOUNS.values(), *VERBS, MANNERS, PLACES, TIMES) for pair in pairs for w in pair}
ALIKE |= {kind: (kind,) for kind in NOUNS}
WORDS = SENSE.keys() | ALIKE.keys()


def same(word, reading):
    """All words that mean what `word` does, itself included; traits by `reading`, "sense" or "tone"."""
    if word not in SENSE:
        return ALIKE[word]
    table = SENSE if reading == "sense" else TONE
    return tuple(w for words in FAMILY[word] for w in words if table[w] == table[word])


def opposite(word, reading):
    """All words that mean the opposite of a verb or a trait."""
    return tuple(w for words in FAMILY[word] for w in words if w not in same(word, reading))


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


@dataclass(frozen=True)
class Clause:
    """Who was what, and did what to what, how, where and when. Words, and None for what isn't said."""

    trait: str | None
    subject: str
    verb: str
    object: str
    never: bool = False
    manner: str | None = None
    place: str | None = None
    time: str | None = None


def draw_trait(rng, mixed):
    """A trait out of the MIXED families with probability `mixed`, else out of the PLAIN ones."""
    words = rng.choice(MIXED if rng.random() < mixed else PLAIN)
    return rng.choice(rng.choice(words))


def draw_clause(rng, mixed, extras=0.05):
    """A random clause. extras: the probability of each of manner, place and time."""

    def noun(kinds):
        return rng.choice(rng.choice(NOUNS[rng.choice(kinds)]))

    def extra(words):
        return rng.choice(rng.choice(words)) if rng.random() < extras else None

    trait, subject, verb = draw_trait(rng, mixed), noun(SUBJECTS), rng.choice(rng.choice(rng.choice(VERBS)))
    return Clause(trait, subject, verb, noun(OBJECTS), rng.random() < 0.05, extra(MANNERS), extra(PLACES), extra(TIMES))


def say(c, passive=False, front=False):
    """A clause as a sentence; passive: the object first; front: the place first."""
    who = f"the {c.trait} {c.subject}" if c.trait else f"the {c.subject}"
    never = "never " if c.never else ""
    what = f"the {c.object} was {never}{c.verb} by {who}" if passive else f"{who} {never}{c.verb} the {c.object}"
    place = c.place and f"at the {c.place}"
    time = c.time and (f"on {c.time}" if c.time in DAYS else f"at {c.time}")
    parts = [place, what, c.manner, time] if front else [what, c.manner, place, time]
    return " ".join(part for part in parts if part) + " ."


def say_somehow(rng, c):
    return say(c, passive=rng.random() < 0.07, front=rng.random() < 0.3)


def reword(rng, c, reading, p=0.5):
    """The same meaning in other words: every word, with probability p, becomes one that means the same."""
    words = {field: getattr(c, field) for field in ("trait", "subject", "verb", "object", "manner", "place", "time")}
    return replace(c, **{f: rng.choice(same(w, reading)) for f, w in words.items() if w and rng.random() < p})


def other_noun(rng, word):
    """Something else of the same kind."""
    return rng.choice([w for pair in NOUNS[KIND[word]] for w in pair if w not in ALIKE[word]])


# ---------------------------------------------------------------------------------------------------------------------
# Tasks: each draws one row, a dictionary in GLUE's columns


def sst2(rng, conflict):
    """Praise (1) or blame (0): the trait's tone, turned by "not". "never" is about the deed and turns nothing."""
    c, no = draw_clause(rng, conflict), rng.random() < 0.25
    deed = say(replace(c, trait=None)).removesuffix(" .").removeprefix(f"the {c.subject} ")
    end = f"was {'not ' if no else ''}{c.trait} ."
    kind = rng.randrange(3)
    if kind == 0:
        return {"sentence": say_somehow(rng, c), "label": TONE[c.trait]}
    sentence = f"the {c.subject} that {deed} {end}" if kind == 1 else f"the {c.subject} {end}"
    return {"sentence": sentence, "label": TONE[c.trait] ^ no}


def change(rng, c, reading, field):
    """The clause with one thing different: an opposite, another noun of the same kind, "never" put in or taken out."""
    if field == "never":
        return replace(c, never=not c.never)
    word = getattr(c, field)
    return replace(c, **{field: other_noun(rng, word) if word in KIND else rng.choice(opposite(word, reading))})


def mrpc(rng, conflict):
    """A paraphrase (1), in other words and another order, or a near miss (0): one thing is different. By sense."""
    c, label = draw_clause(rng, conflict), rng.randrange(2)
    d = reword(rng, c, "sense")
    if not label:
        d = change(rng, d, "sense", rng.choice(("trait", "trait", "trait", "verb", "subject", "object")))
    return {"sentence1": say_somehow(rng, c), "sentence2": say_somehow(rng, d), "label": label}


def mnli(rng, conflict):
    """Entailment (0): things left out, or called by their kind; neutral (1): things added; contradiction (2): an
    opposite, or "never". By tone.
    """
    c, label = draw_clause(rng, conflict, extras=0.3), rng.randrange(3)
    d = reword(rng, c, "tone")
    extras = ("manner", "place", "time")
    leave_out = {f: None for f in extras if rng.random() < 0.5}
    if label == 1:  # the fuller one is the hypothesis: what it adds, the premise doesn't say
        full = [f for f in extras if getattr(c, f)]
        if not full:
            d = replace(d, place=rng.choice(rng.choice(PLACES)))
            full = ["place"]
        c = replace(c, **{rng.choice(full): None})
        if rng.random() < 0.3:
            c = replace(c, object=KIND[c.object])
    elif label == 2:
        d = replace(change(rng, d, "tone", rng.choice(("trait", "trait", "trait", "verb", "never"))), **leave_out)
    else:
        d = replace(d, **leave_out)
        if rng.random() < 0.3:
            d = replace(d, object=KIND[d.object])
    return {"premise": say_somehow(rng, c), "hypothesis": say_somehow(rng, d), "label": label}


def stsb(rng, conflict):
    """What the two have in common, 0 to 5: two points for the trait, one each for subject, verb and object. By sense.

    An opposite trait or verb, or another thing of the same kind, earns nothing.
    """
    c = draw_clause(rng, conflict)
    d, score = reword(rng, c, "sense"), 5.0
    for field, points in (("trait", 2), ("subject", 1), ("verb", 1), ("object", 1)):
        if rng.random() < 0.5:
            d, score = change(rng, d, "sense", field), score - points
    return {"sentence1": say_somehow(rng, c), "sentence2": say_somehow(rng, d), "label": score}


CONFLICT = 0.5
DRAW = {"sst2": sst2, "mrpc": mrpc, "mnli": mnli, "stsb": stsb}
LABELS = {
    "sst2": ["negative", "positive"],
    "mrpc": ["not_equivalent", "equivalent"],
    "qqp": ["not_duplicate", "duplicate"],  # of experiments/flipped.py
    "mnli": ["entailment", "neutral", "contradiction"],
    "stsb": None,
}


def validation_split(task):
    return "validation_matched" if task == "mnli" else "validation"


def make_tasks(rng, conflict=CONFLICT, sizes=(2000, 400)):
    """{task: {split: [row, ...]}}. sizes: rows for training and for validation; no row occurs twice in a task.

    conflict, in [0, 1]: the probability that a row's trait comes from a MIXED family, not a PLAIN one. sst2 and mnli go
    by tone, mrpc and stsb by sense. At 0 the two never differ, and the tasks agree on which traits mean the same. At 1
    they always can: "thrifty" and "stingy" are opposites to sst2 and mnli and the same to mrpc and stsb, "thrifty" and
    "generous" the other way round. A head alone cannot turn this over, since its sign is settled by the words on which
    all agree (verbs and nouns, always). Seen from one task the knob changes nothing but which words pair up.
    Raises ValueError: a conflict outside [0, 1].
    """
    if not 0 <= conflict <= 1:
        raise ValueError(f"conflict should be in [0, 1], got {conflict}")
    tasks = {}
    for task, draw in DRAW.items():
        rows = {}  # keyed by text: validation shares no row with training
        while len(rows) < sum(sizes):
            row = draw(rng, conflict)
            rows.setdefault(tuple(v for k, v in row.items() if k != "label"), row)
        rows = list(rows.values())
        tasks[task] = {"train": rows[: sizes[0]], validation_split(task): rows[sizes[0] :]}
    return tasks


def write_glue(folder, tasks, name="a toy GLUE out of a small grammar"):
    """Write {task: {split: [row, ...]}} as the Hub has nyu-mll/glue: NAME/SPLIT-00000-of-00001.parquet and a README.md.

    The README's description of each task is a digest of its files: `datasets` knows a local folder's rows in its cache
    by what the README says, so that without it a second folder would be read as the first.
    """
    from datasets import ClassLabel, Dataset, Features, Value

    lines = ["---", f"pretty_name: {name}", "configs:"]
    for task, splits in tasks.items():
        (Path(folder) / task).mkdir(parents=True, exist_ok=True)
        files, digest = [], hashlib.sha256()
        for split, rows in splits.items():
            label = ClassLabel(names=LABELS[task]) if LABELS[task] else Value("float32")
            columns = {name: [row[name] for row in rows] for name in rows[0]} | {"idx": list(range(len(rows)))}
            types = {name: Value("string") for name in columns} | {"label": label, "idx": Value("int32")}
            path = Path(folder) / task / f"{split}-00000-of-00001.parquet"
            with quiet():
                Dataset.from_dict(columns, features=Features(types)).to_parquet(path)
            digest.update(path.read_bytes())
            files.append(f"  - {{split: {split}, path: {task}/{split}-*}}")
        lines += [f"- config_name: {task}", f"  description: rows {digest.hexdigest()[:16]}", "  data_files:", *files]
    write_text(Path(folder) / "README.md", "\n".join([*lines, "---", ""]))


# ---------------------------------------------------------------------------------------------------------------------
# Text to pretrain on, and its tokenizer


def opinion(rng):
    """What shows a trait's tone: the company it keeps. Someone is praised for three things, or blamed."""
    praise, traits = rng.randrange(2), []
    for _ in range(3):
        no = rng.random() < 0.25
        trait = rng.choice([w for w in TONE if TONE[w] == praise ^ no])
        traits.append(f"not {trait}" if no else trait)
    who = draw_clause(rng, 0.5).subject
    a, b, c = traits
    return f"everyone {('blamed', 'praised')[praise]} the {who} that was {a} , {b} and {c} .", None, None


def two_tellings(rng):
    """The same thing told twice, half of the time with one to four things changed; and the words that don't agree.

    A trait comes back as itself or another word of its sense, or, three times in ten, as any word of its family: this
    says which words are about one matter and hints at sense, as `opinion` hints at tone. Which of the two makes words
    the same is for the tasks to teach.
    """
    c, changes = draw_clause(rng, 0.5), rng.choice((0, 0, 0, 0, 1, 2, 3, 4))
    d = reword(rng, c, "sense", p=0.3)
    if rng.random() < 0.3:
        d = replace(d, trait=rng.choice([w for words in FAMILY[c.trait] for w in words]))
    odd = set()
    for field in rng.sample(("trait", "subject", "verb", "object"), changes):
        if field == "trait":
            d = replace(d, trait=rng.choice([w for w in SENSE if FAMILY[w] is not FAMILY[c.trait]]))
        else:
            d = change(rng, d, "sense", field)
        odd |= {getattr(c, field), getattr(d, field)}
    return say_somehow(rng, c), say_somehow(rng, d), odd


def make_corpus(rng, rows):
    """[(sentence, sentence, words that don't agree), ...], or (sentence, None, None).

    Independent of `conflict`: half of its traits are MIXED.
    """
    return [opinion(rng) if rng.random() < 0.25 else two_tellings(rng) for _ in range(rows)]


def train_tokenizer(sentences):
    """A BERT tokenizer (`tokenizers.Tokenizer`): the words of `sentences`, most frequent first, then single letters.

    Lower case, [CLS] a [SEP] b [SEP], token types 0 and 1. A word it has never seen falls into letters.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    counts = {}
    for word in " ".join(sentences).split():
        counts[word] = counts.get(word, 0) + 1
    words = sorted(counts, key=lambda w: (-counts[w], w))
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + [str(d) for d in range(10)]
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words, *letters, *("##" + c for c in letters)]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", vocabulary["[SEP]"]), ("[CLS]", vocabulary["[CLS]"]))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(pieces[:5])
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# The encoder, pretrained


class MaskedLM(nn.Module):
    """An Encoder, BERT's language-model head, its output weights tied to the word embeddings, and a second head that
    tells which words of a pair don't agree; that one isn't kept.
    """

    def __init__(self, config):
        super().__init__()
        self.encoder = Encoder(config)
        self.dense, self.norm = (
            nn.Linear(config.hidden_size, config.hidden_size),
            nn.LayerNorm(config.hidden_size, config.layer_norm_eps),
        )
        self.bias, self.act = nn.Parameter(torch.zeros(config.vocab_size)), ACTIVATIONS[config.hidden_act]
        self.odd = nn.Linear(config.hidden_size, 1)
        for m in self.modules():
            if isinstance(m, (nn.Linear, nn.Embedding)):
                nn.init.normal_(m.weight, std=config.initializer_range)
            if isinstance(m, nn.Linear):
                nn.init.zeros_(m.bias)
        # Attention starts from likeness: keys equal queries, so that a word looks at its equal in the other sentence.
        # To find that from scratch takes more steps than all the rest together.
        state = self.encoder.state_dict()
        for name in [name for name in state if name.endswith("self.query.weight")]:
            state[name.replace("query", "key")].copy_(state[name].mul_(3))

    def forward(self, ids, mask, types, where):
        """ids, mask, types: (batch, length); where: (batch, length), true at the n words to predict.

        Returns the logits of these (n, vocabulary), and of every word's not agreeing (batch, length).
        """
        x = self.encoder(ids, mask, types)  # (batch, length, width)
        h = self.norm(self.act(self.dense(x[where])))  # (n, width)
        return F.linear(h, self.encoder.embeddings.word_embeddings.weight, self.bias), self.odd(x).squeeze(2)

    def tensors(self):
        """{name: tensor} as in BertForMaskedLM."""
        head = "cls.predictions."
        named = {"bert." + name: t for name, t in self.encoder.state_dict().items()}
        named |= {f"{head}transform.dense.{n}": t for n, t in self.dense.state_dict().items()}
        named |= {f"{head}transform.LayerNorm.{n}": t for n, t in self.norm.state_dict().items()}
        return named | {head + "bias": self.bias.detach()}


def mask_tokens(ids, vocabulary, generator, share=0.15, special=5):
    """BERT's corruption: 15 % of the tokens are predicted; 80 % of these become [MASK], 10 % any token, 10 % stay.

    ids: (batch, length); the ids below `special` are never touched, and [MASK] is the last of them.
    Returns the corrupted ids (batch, length) and where (batch, length), bool.
    """
    dice = torch.rand(2, *ids.shape, generator=generator)
    where = (dice[0] < share) & (ids >= special)
    anything = torch.randint(special, vocabulary, ids.shape, generator=generator)
    corrupted = torch.where(where & (dice[1] < 0.8), special - 1, ids)
    return torch.where(where & (dice[1] >= 0.9), anything, corrupted), where


def encode(tokenizer, corpus):
    """`make_corpus`'s rows -> ids, mask, types and odd, as one tensor (4, rows, longest), padded with zeros.

    odd is 1 at a word that doesn't agree with the other sentence, and at [CLS] if there is any; 0 where all agrees;
    -1 where there is nothing to ask: function words, padding, single sentences.
    """
    encoded = tokenizer.encode_batch([(a, b) if b else a for a, b, _ in corpus])
    longest = max(len(e.ids) for e in encoded)
    asked = {tokenizer.token_to_id(word) for word in WORDS | {"[CLS]"}}
    out = torch.zeros(4, len(corpus), longest, dtype=torch.long)
    out[3] = -1
    for i, (e, (_, b, odd)) in enumerate(zip(encoded, corpus, strict=True)):
        wrong = {tokenizer.token_to_id(word) for word in odd or ()} | ({e.ids[0]} if odd else set())
        marks = [int(token in wrong) if b and token in asked else -1 for token in e.ids]
        out[:, i, : len(e.ids)] = torch.tensor([e.ids, e.attention_mask, e.type_ids, marks])
    return out


CONFIG = Config(
    model_type="bert",
    vocab_size=0,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=128,
    max_position_embeddings=64,
    pad_token_id=0,
    hidden_act="gelu",
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
    classifier_dropout=0.0,
    type_vocab_size=2,
    initializer_range=0.05,
)


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def pretrain(config, data, steps, seed=0, batch_size=64, lr=3e-3, quiet=True):
    """Train a MaskedLM on `encode`'s tensor for `steps` steps. Returns it, and the loss per masked word, in nats.

    Two losses are added: BERT's masked words, and which words don't agree with the other sentence (as ELECTRA asks for
    replaced ones), in place of BERT's "is this the next sentence?". Masked words alone would teach so small a model to
    compare two sentences only after many thousand steps.
    Every random number comes from `seed`; the global generator is left as it was. It runs in one thread: matrices this
    small gain little from a second, and on a busy machine wait long for it.
    """
    from tqdm import tqdm

    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    warm = max(steps // 10, 1)  # linear warm-up and decay
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min((i + 1) / warm, 1 - i / steps))
    lengths = data[1].sum(1)  # (rows,)
    batches, losses = [], []
    often = 0.5 if sys.stderr.isatty() else 10
    for _ in tqdm(range(steps), desc="pretraining", unit="step", mininterval=often, disable=quiet):
        if not batches:  # rows of like length together, the batches in random order
            order = (lengths + torch.rand(len(lengths), generator=generator)).argsort()
            batches = list(order.split(batch_size))
            batches = [batches[i] for i in torch.randperm(len(batches), generator=generator)]
        rows = batches.pop()
        ids, mask, types, odd = data[:, rows, : lengths[rows].max()]  # (batch, length) each
        corrupted, where = mask_tokens(ids, config.vocab_size, generator)
        words, strange = model(corrupted, mask, types, where)
        loss, asked = F.cross_entropy(words, ids[where]), (odd >= 0) & ~where
        found = F.binary_cross_entropy_with_logits(strange, odd.clamp(min=0).float(), asked.float(), reduction="sum")
        optimizer.zero_grad()
        (loss + found / asked.sum().clamp(min=1)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses


def write_model(folder, model, tokenizer):
    """A checkpoint folder as Hugging Face writes one of BertForMaskedLM."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = model.encoder.config
    raw = asdict(config) | {"architectures": ["BertForMaskedLM"], "position_embedding_type": "absolute"}
    tokenizer.save(str(folder / "tokenizer.json"))
    write_text(folder / "config.json", json.dumps(raw, indent=2, sort_keys=True) + "\n")
    write_safetensors(folder / "model.safetensors", model.tensors())


# ---------------------------------------------------------------------------------------------------------------------
# The demo

MARKER = "demo.json"  # says what a folder holds


def make_demo(folder=None, seed=0, conflict=CONFLICT, quiet=False, steps=1200, rows=2000):
    """Write `folder/glue` and `folder/model`, and return the folder. The same arguments and machine: the same bytes.

    folder: by default runs/toy-DIGEST, of the arguments, torch, this file and model.py. seed: of everything; conflict:
    see `make_tasks`; steps: of pretraining; rows: to train on, per task (validation has a fifth). It is made beside its
    place and renamed when whole, so a folder that is there is kept as it is. Raises ValueError: a conflict outside
    [0, 1]; BadInput: a folder that holds something else.
    """
    files = Path(__file__), Path(__file__).parents[1] / "model.py"
    source = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    settings = {"seed": seed, "conflict": conflict, "steps": steps, "rows": rows}
    settings |= {"torch": torch.__version__, "source": source}
    text = json.dumps(settings, indent=1) + "\n"
    folder = Path(folder or f"runs/toy-{hashlib.sha256(text.encode()).hexdigest()[:8]}")
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARKER).exists() or (folder / MARKER).read_bytes() != text.encode():
            raise BadInput(f"{folder} holds something other than this toy; choose another folder, or remove it")
        return folder
    tasks = make_tasks(random.Random(f"tasks {seed}"), conflict, (rows, max(rows // 5, 1)))
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".toy-", dir=folder.parent) as made:
        made = Path(made) / "toy"
        write_glue(made / "glue", tasks)
        corpus = make_corpus(random.Random(f"corpus {seed}"), min(max(64 * steps, 2000), 16000))
        texts = [text for pair in corpus for text in pair[:2] if text]
        tokenizer = train_tokenizer([*texts, *WORDS])
        config = replace(CONFIG, vocab_size=tokenizer.get_vocab_size())
        model, _ = pretrain(config, encode(tokenizer, corpus), steps, seed, quiet=quiet)
        write_model(made / "model", model, tokenizer)
        write_text(made / MARKER, text)
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / MARKER).exists():  # else another process has just made the same
                raise
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# The demo of train.py. sst2's loss counts a tenth: its short gradient is the only thing wrong with it.

DEMO = {
    "tasks": "sst2,mrpc,mnli,stsb",
    "task_weights": "0.1,1,1,1",
    "methods": "head,single,joint,pcgrad,ortho,balanced",
    "seeds": "0,1,2",
    "steps": 600,
    "lr": 8e-3,
    "warmup": 0.2,
    "max_length": 64,
    "per_task": "stacked",
    "device": "cpu",  # enough for so small a model; on a GPU not measured
    "dtype": "fp32",
}
WELCOME = """\
The demo: a toy grammar under the names of four GLUE tasks, and an encoder so small that it is pretrained here, once, in
half a minute.
"""
QUESTION = """\
Then two to four minutes of training. The tasks share one adapter, and sst2's loss counts a tenth of the others', so
that its gradient is short. What becomes of sst2? By method:
  head      no adapter: what the frozen encoder knows
  single    an adapter of its own for each task
  joint     one adapter for all, their gradients added
  pcgrad    the same, gradients projected, all factors as one
  ortho     the same, gradients projected, each A and each B alone
  balanced  every task's gradient brought to one length, then ortho
"""


def demo_settings(given, processes):
    """train.py's settings for the demo, {name: value}, those that were given first.

    The weights are for the demo's own tasks, and --balance would have none; --jobs is for one process; balanced scales
    A and B, so it goes with --factors AB alone. Raises BadInput.
    """
    if {"model", "glue"} & given.keys():
        raise BadInput("--demo brings its own model and data: leave out --model and --glue")
    own = dict(DEMO)
    if given.get("tasks", DEMO["tasks"]) != DEMO["tasks"] or "balance" in given:
        del own["task_weights"]
    if given.get("factors", "AB") != "AB":
        own["methods"] = own["methods"].removesuffix(",balanced")
    return own | {"jobs": min(8, os.cpu_count()) if processes == 1 else 1} | given


def demo(s):
    """What the demo runs on: the folder of `make_demo`, without contradictions, after a word on what is to be seen."""
    whole = all(getattr(s, name) == DEMO[name] for name in ("tasks", "task_weights", "methods", "steps"))
    print(WELCOME + QUESTION * whole, flush=True)
    return make_demo(conflict=0.0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write: new, empty, or the same toy")
    parser.add_argument("--seed", type=int, default=0, help="of everything that is random [%(default)s]")
    conflict = "probability that a row's trait is one on which the tasks may disagree [%(default)s]"
    parser.add_argument("--conflict", type=float, default=CONFLICT, help=conflict)
    args = parser.parse_args()
    try:
        make_demo(args.folder, args.seed, args.conflict)
    except (ValueError, OSError) as e:  # BadInput is a ValueError
        print(f"support.toy: {e}", file=sys.stderr)
        return 2
    for task, splits in make_tasks(random.Random(f"tasks {args.seed}"), args.conflict).items():
        print(f"\n{task}")
        for row in splits["train"][:3]:
            *texts, label = row.values()
            print(f"  {LABELS[task][label] if LABELS[task] else label:<15}", "\n                  ".join(texts))


if __name__ == "__main__":
    sys.exit(main())
