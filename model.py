"""A pretrained encoder out of a published checkpoint, and one classification head per task.

BERT, RoBERTa / XLM-R and DistilBERT are one architecture (post-norm Transformer encoder, arXiv 1810.04805) under
different names. Every module here sits at the path that Hugging Face gave it, so a checkpoint's tensor names are ours,
LoRA targets are called what everyone calls them ("query", "q_lin"), and adapter files need no renaming. All sizes come
from `config.json`; nothing is guessed.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from support.checkpoint import BadInput, read_json, read_weights, shown
from support.hub import find_checkpoint

# Our fields <- the keys of config.json, and each layer's parts -> the paths in the checkpoint, family by family.

BERT_KEYS = {
    "vocabulary": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "inner": "intermediate_size", "positions": "max_position_embeddings", "activation": "hidden_act",
    "dropout": "hidden_dropout_prob", "attention_dropout": "attention_probs_dropout_prob", "pad_id": "pad_token_id",
    "segments": "type_vocab_size", "eps": "layer_norm_eps", "head_dropout": "classifier_dropout",
    "initializer_range": "initializer_range",
}  # fmt: skip
DISTILBERT_KEYS = {
    "vocabulary": "vocab_size", "width": "dim", "layers": "n_layers", "heads": "n_heads", "inner": "hidden_dim",
    "positions": "max_position_embeddings", "activation": "activation", "dropout": "dropout",
    "attention_dropout": "attention_dropout", "pad_id": "pad_token_id", "head_dropout": "seq_classif_dropout",
    "initializer_range": "initializer_range",
}  # fmt: skip
OPTIONAL = {"classifier_dropout": None, "seq_classif_dropout": 0.2, "initializer_range": 0.02}  # None: as "dropout"
BERT_LAYER = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attended": "attention.output.dense", "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm2": "output.LayerNorm",
}  # fmt: skip
DISTILBERT_LAYER = {
    "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin", "attended": "attention.out_lin",
    "norm1": "sa_layer_norm", "up": "ffn.lin1", "down": "ffn.lin2", "norm2": "output_layer_norm",
}  # fmt: skip
FAMILIES = {  # model_type: prefix in task models, keys, stack of layers, layer
    "bert": ("bert.", BERT_KEYS, "encoder.layer", BERT_LAYER),
    "roberta": ("roberta.", BERT_KEYS, "encoder.layer", BERT_LAYER),
    "xlm-roberta": ("roberta.", BERT_KEYS, "encoder.layer", BERT_LAYER),
    "distilbert": ("distilbert.", DISTILBERT_KEYS, "transformer.layer", DISTILBERT_LAYER),
}
ACTIVATIONS = {
    "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "gelu_python": F.gelu, "swish": F.silu,
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    """What an encoder is made of, whatever its family calls it."""

    family: str  # model_type
    vocabulary: int
    width: int
    layers: int
    heads: int
    inner: int
    positions: int  # rows of the position table; RoBERTa's first pad_id + 1 are not usable
    activation: str
    dropout: float
    attention_dropout: float
    head_dropout: float
    pad_id: int
    segments: int = 0  # token types; DistilBERT has none
    eps: float = 1e-12  # fixed for DistilBERT, read from the file for the others
    initializer_range: float = 0.02

    @property
    def prefix(self):
        return FAMILIES[self.family][0]

    @property
    def counts_from_padding(self):
        """RoBERTa numbers its positions from pad_id + 1, over the tokens that are no padding."""
        return self.family in ("roberta", "xlm-roberta")

    @property
    def max_length(self):
        """The longest usable sequence, in tokens."""
        return self.positions - (self.pad_id + 1 if self.counts_from_padding else 0)


def read_config(raw, where="config.json"):
    """Config from the dictionary in a `config.json`. Raises BadInput, naming the key and its value."""
    family = raw.get("model_type")
    if family not in list(FAMILIES):  # a list can be asked for anything, an unhashable value too
        raise BadInput(f"{where}: model_type {shown(family)} is none of {', '.join(FAMILIES)}")
    for key, plain in ("position_embedding_type", "absolute"), ("is_decoder", False):
        if raw.get(key, plain) != plain:
            value = shown(raw[key])
            raise BadInput(f"{where}: {key} is {value}; only plain encoders with absolute positions can be loaded")
    keys, values = FAMILIES[family][1], {}
    for field, key in keys.items():
        if key not in raw and key not in OPTIONAL:
            raise BadInput(f"{where} has no {key}")
        value, kind = raw.get(key, OPTIONAL.get(key)), Config.__annotations__[field]
        if field == "head_dropout" and value is None:
            value = values["dropout"]
        kinds = (float, int) if kind is float else (kind,)
        low = 0 if kind is float or field in ("pad_id", "segments") else 1
        high = 1 if kind is float else 100 if field == "layers" else 10_000_000
        if type(value) not in kinds or (kind is not str and not low <= value <= high):
            raise BadInput(f"{where}: {key} is {shown(value)}")
        values[field] = value
    c = Config(family, **values)
    if c.activation not in ACTIVATIONS:
        raise BadInput(f"{where}: {keys['activation']} {shown(c.activation)} is none of {', '.join(ACTIVATIONS)}")
    if c.width % c.heads:
        raise BadInput(f"{where}: {keys['heads']} {c.heads} does not divide {keys['width']} {c.width}")
    if c.pad_id >= c.vocabulary:
        raise BadInput(f"{where}: pad_token_id {c.pad_id} is beyond vocab_size {c.vocabulary}")
    if c.max_length < 1:
        raise BadInput(f"{where}: max_position_embeddings {c.positions} leaves no room beside pad_token_id {c.pad_id}")
    return c


def put(module, path, child):
    """Place `child` at a dotted path, with empty modules in between."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module._modules[parent]
    module.add_module(name, child)


def attention(q, k, v, mask, dropout):
    """softmax(q k' / sqrt(d) + mask) v: each (batch, heads, length, d); mask 0 or -inf, (batch, 1, 1, length), or None.

    The fused kernel, but written out where a CPU trains in half precision: there it takes several times as long.
    """
    if q.is_cuda or q.dtype == torch.float32 or not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(q, k, v, mask, dropout)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (batch, heads, length, length)
    scores = scores if mask is None else scores + mask
    return F.dropout(scores.softmax(-1), dropout) @ v


class Layer(nn.Module):
    """One Transformer layer: x + attention, norm, + feed-forward, norm."""

    def __init__(self, c):
        super().__init__()
        self.heads, self.act = c.heads, ACTIVATIONS[c.activation]
        self.dropout, self.attention_dropout = c.dropout, c.attention_dropout
        self.attended_dropout = 0.0 if c.family == "distilbert" else c.dropout  # it has none there
        self.paths = FAMILIES[c.family][3]
        sizes = {"up": (c.width, c.inner), "down": (c.inner, c.width)}
        for part, path in self.paths.items():
            norm = part.startswith("norm")
            put(self, path, nn.LayerNorm(c.width, c.eps) if norm else nn.Linear(*sizes.get(part, (c.width, c.width))))

    def forward(self, x, mask, tokens=None):
        """x: (batch, length, width) -> the same, or its first `tokens` alone; mask: as for `attention`."""
        at = {part: self.get_submodule(path) for part, path in self.paths.items()}
        kept = x[:, :tokens]  # (batch, tokens, width): these read from all of x
        q, k, v = (at[name](y).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                   for name, y in (("query", kept), ("key", x), ("value", x)))  # fmt: skip
        p = self.attention_dropout if self.training else 0.0
        mixed = attention(q, k, v, mask, p)  # (batch, heads, tokens, width / heads)
        mixed = at["attended"](mixed.transpose(1, 2).flatten(2))  # (batch, tokens, width)
        x = at["norm1"](kept + F.dropout(mixed, self.attended_dropout, self.training))
        h = at["down"](self.act(at["up"](x)))
        return at["norm2"](x + F.dropout(h, self.dropout, self.training))


class Encoder(nn.Module):
    """The pretrained part: token ids to one vector per token."""

    def __init__(self, config, pooler=False):
        super().__init__()
        c = self.config = config
        self.embeddings = nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(c.vocabulary, c.width)
        self.embeddings.position_embeddings = nn.Embedding(c.positions, c.width)
        if c.segments:
            self.embeddings.token_type_embeddings = nn.Embedding(c.segments, c.width)
        self.embeddings.LayerNorm = nn.LayerNorm(c.width, c.eps)
        self.stack = FAMILIES[c.family][2]
        put(self, self.stack, nn.ModuleList(Layer(c) for _ in range(c.layers)))
        if pooler:
            put(self, "pooler.dense", nn.Linear(c.width, c.width))
        self.has_pooler = pooler

    def forward(self, input_ids, attention_mask=None, token_type_ids=None, tokens=None):
        """Ids (batch, length), attention_mask the same, 1 where there is a token -> (batch, length, width).

        No mask means no padding: attention then has less to do. Given `tokens`, only the first so many are returned,
        (batch, tokens, width): the last layer then works out nothing else, which saves most of it.
        """
        c, e = self.config, self.embeddings
        length = input_ids.shape[1]
        if length > c.max_length:
            raise ValueError(f"a sequence of {length} tokens, but the model has {c.max_length} positions")
        if c.counts_from_padding:
            real = (input_ids != c.pad_id).long()
            positions = real.cumsum(1) * real + c.pad_id  # (batch, length)
        else:
            positions = torch.arange(length, device=input_ids.device)[None]  # (1, length)
        x = e.word_embeddings(input_ids) + e.position_embeddings(positions)  # (batch, length, width)
        if c.segments:  # with one type only, as RoBERTa has, what a tokenizer says is ignored
            types = torch.zeros_like(input_ids) if token_type_ids is None or c.segments == 1 else token_type_ids
            x = x + e.token_type_embeddings(types)
        x = F.dropout(e.LayerNorm(x), c.dropout, self.training)
        mask = attention_mask
        if mask is not None:
            mask = x.new_zeros(mask.shape).masked_fill(~mask.bool(), -math.inf)[:, None, None]  # (batch, 1, 1, length)
        *layers, last = self.get_submodule(self.stack)
        for layer in layers:
            x = layer(x, mask)
        return last(x, mask, tokens)

    def summary(self, hidden):
        """The first token, through the pretrained pooler if there is one: (batch, length, width) -> (batch, width)."""
        return torch.tanh(self.pooler.dense(hidden[:, 0])) if self.has_pooler else hidden[:, 0]


class Head(nn.Module):
    """The family's Hugging Face sequence-classification head, at its paths in that class, on `Encoder.summary`.

    BERT        classifier(dropout(pooled)); where the checkpoint has no pooler, a pooler of the task's own, trained
    RoBERTa     out_proj(dropout(tanh(dense(dropout(first)))))
    DistilBERT  classifier(dropout(relu(pre_classifier(first))))
    """

    def __init__(self, config, outputs, own_pooler=False):
        super().__init__()
        c, self.family, self.dropout = config, config.family, config.head_dropout
        self.dense_path, self.out_path, self.saved = {  # saved: what peft calls modules_to_save
            "bert": ("bert.pooler.dense", "classifier", ["classifier", "pooler"]) if own_pooler
                    else (None, "classifier", ["classifier"]),
            "distilbert": ("pre_classifier", "classifier", ["classifier", "pre_classifier"]),
        }.get(c.family, ("classifier.dense", "classifier.out_proj", ["classifier"]))  # fmt: skip
        if self.dense_path:
            put(self, self.dense_path, nn.Linear(c.width, c.width))
        put(self, self.out_path, nn.Linear(c.width, outputs))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=c.initializer_range)
                nn.init.zeros_(m.bias)

    def forward(self, x):  # (batch, width) -> (batch, outputs)
        drop = partial(F.dropout, p=self.dropout, training=self.training)
        if self.dense_path:
            x = drop(x) if self.dense_path == "classifier.dense" else x
            x = self.get_submodule(self.dense_path)(x)
            x = F.relu(x) if self.family == "distilbert" else torch.tanh(x)
        return self.out(drop(x))

    @property
    def out(self):
        """The last linear layer."""
        return self.get_submodule(self.out_path)


class MultiTaskModel(nn.Module):
    """One shared encoder, one head per task. tasks: {name: number of outputs}, 1 for a regression."""

    def __init__(self, encoder, tasks):
        super().__init__()
        self.encoder, self.heads = encoder, nn.ModuleDict()
        for name, outputs in tasks.items():
            self.add_head(name, outputs)

    def add_head(self, name, outputs):
        own_pooler = self.encoder.config.family == "bert" and not self.encoder.has_pooler
        self.heads[name] = Head(self.encoder.config, outputs, own_pooler)

    def forward(self, task, input_ids, attention_mask=None, token_type_ids=None):
        """logits (batch, outputs)."""
        return self.heads[task](self.encoder.summary(self.encoder(input_ids, attention_mask, token_type_ids, tokens=1)))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def encoder_tensors(tensors, prefix):
    """({the encoder's name: tensor}, other names): without the task model's prefix, LayerNorm's old names renewed."""
    if any(name.startswith(prefix) for name in tensors):
        inside = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        outside = [name for name in tensors if not name.startswith(prefix)]
    else:
        inside, outside = tensors, []
    renew = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    for old, new in renew.items():
        inside = {name.removesuffix(old) + new if name.endswith(old) else name: t for name, t in inside.items()}
    return inside, outside


def load_encoder(path_or_id, revision="main", quiet=False):
    """The encoder of a local checkpoint folder or a Hub id, in float32 and eval mode.

    Every tensor of the encoder must be in the file with its exact shape; what the file has beyond (a language model's
    head, RoBERTa's unused pooler, saved position numbers) is named in a line and ignored. Raises BadInput, HubError.
    """
    folder = find_checkpoint(path_or_id, revision)
    config = read_config(read_json(folder / "config.json"), where=str(folder / "config.json"))
    tensors, extra = encoder_tensors(read_weights(folder), config.prefix)
    with torch.device("meta"):
        encoder = Encoder(config, pooler=config.family == "bert" and "pooler.dense.weight" in tensors)
    expected = encoder.state_dict()
    for name, wanted in expected.items():
        if name not in tensors:
            raise BadInput(f"{folder}: the weights have no tensor {name!r}")
        if tensors[name].shape != wanted.shape:
            found, want = tuple(tensors[name].shape), tuple(wanted.shape)
            raise BadInput(f"{folder}: tensor {name!r} is {found}, config.json asks for {want}")
        if not tensors[name].is_floating_point():
            raise BadInput(f"{folder}: tensor {name!r} is of type {tensors[name].dtype}")
    extra = sorted(extra + [name for name in tensors if name not in expected])
    if extra and not quiet:
        print(f"{path_or_id}: ignored {len(extra)} tensors beyond the encoder: {', '.join(extra[:10])}"
              + (", …" if len(extra) > 10 else ""))  # fmt: skip
    if config.family == "bert" and not encoder.has_pooler and not quiet:
        print(f"{path_or_id}: no pooler in the checkpoint; every task trains its own")
    encoder.load_state_dict({name: tensors[name].float().contiguous() for name in expected}, assign=True)
    return encoder.eval()
