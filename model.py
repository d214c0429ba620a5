"""A pretrained encoder out of a published checkpoint, and one classification head per task.

BERT, RoBERTa / XLM-R and DistilBERT are one architecture (post-norm Transformer encoder, arXiv 1810.04805) under
different names. Every module here sits at the path that Hugging Face gave it, so a checkpoint's tensor names are ours,
LoRA targets are called what everyone calls them ("query", "q_lin"), and adapter files need no renaming. All sizes come
from `config.json`; what it may leave out is in OPTIONAL.
"""

import dataclasses
import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from support.checkpoint import BadInput, read_json, read_weights, shown
from support.hub import find_checkpoint

# fmt: off
DISTILBERT_KEYS = {  # Config's fields, which are BERT's keys in config.json -> DistilBERT's
    "hidden_size": "dim", "num_hidden_layers": "n_layers", "num_attention_heads": "n_heads",
    "intermediate_size": "hidden_dim", "hidden_act": "activation", "hidden_dropout_prob": "dropout",
    "attention_probs_dropout_prob": "attention_dropout", "classifier_dropout": "seq_classif_dropout",
}
BERT_LAYER = {
    "query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
    "attended": "attention.output.dense", "norm1": "attention.output.LayerNorm",
    "up": "intermediate.dense", "down": "output.dense", "norm2": "output.LayerNorm",
}
DISTILBERT_LAYER = {
    "query": "attention.q_lin", "key": "attention.k_lin", "value": "attention.v_lin", "attended": "attention.out_lin",
    "norm1": "sa_layer_norm", "up": "ffn.lin1", "down": "ffn.lin2", "norm2": "output_layer_norm",
}
OPTIONAL = {"classifier_dropout": None, "seq_classif_dropout": 0.2, "initializer_range": 0.02}  # None: hidden's
LIMITS = {"num_hidden_layers": (1, 100), "pad_token_id": (0, 10**7), "type_vocab_size": (0, 10**7)}  # else 1 to 10**7
FAMILIES = {  # model_type: prefix in task models, other keys than Config's, stack of layers, layer
    "bert": ("bert.", {}, "encoder.layer", BERT_LAYER),
    "roberta": ("roberta.", {}, "encoder.layer", BERT_LAYER),
    "xlm-roberta": ("roberta.", {}, "encoder.layer", BERT_LAYER),
    "distilbert": ("distilbert.", DISTILBERT_KEYS, "transformer.layer", DISTILBERT_LAYER),
}
ACTIVATIONS = {
    "gelu": F.gelu, "gelu_new": partial(F.gelu, approximate="tanh"), "relu": F.relu, "silu": F.silu,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"), "gelu_python": F.gelu, "swish": F.silu,
}
# fmt: on


@dataclass(frozen=True)
class Config:
    """What an encoder is made of, under the names of BERT's config.json."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int  # RoBERTa's first pad_token_id + 1 are not usable
    pad_token_id: int
    hidden_act: str
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    classifier_dropout: float
    initializer_range: float
    type_vocab_size: int = 0  # DistilBERT's file has no key for these two
    layer_norm_eps: float = 1e-12

    @property
    def prefix(self):
        return FAMILIES[self.model_type][0]

    @property
    def counts_from_padding(self):
        """RoBERTa numbers its positions from pad_token_id + 1, over the tokens that are no padding."""
        return self.model_type in ("roberta", "xlm-roberta")

    @property
    def max_length(self):
        """The longest usable sequence, in tokens."""
        return self.max_position_embeddings - (self.pad_token_id + 1 if self.counts_from_padding else 0)


def read_config(raw, where="config.json"):
    """Config from the dictionary in a `config.json`. Raises BadInput, naming the key and its value."""
    family = raw.get("model_type")
    if family not in list(FAMILIES):  # a list: what the file says may be unhashable
        raise BadInput(f"{where}: model_type {shown(family)} is none of {', '.join(FAMILIES)}")
    for key, plain in ("position_embedding_type", "absolute"), ("is_decoder", False):
        if raw.get(key, plain) != plain:
            raise BadInput(f"{where}: {key} is {shown(raw[key])}; it must be {plain!r}, others can't be loaded")
    kinds = {field.name: field.type for field in dataclasses.fields(Config)}
    keys = {name: FAMILIES[family][1].get(name, name) for name in kinds}
    fixed, values = ("type_vocab_size", "layer_norm_eps") if family == "distilbert" else (), {}
    for name in [name for name in kinds if name not in fixed]:
        key, kind = keys[name], kinds[name]
        if key not in raw and key not in OPTIONAL:
            raise BadInput(f"{where} has no {key}")
        value = raw.get(key, OPTIONAL.get(key))
        if name == "classifier_dropout" and value is None:
            value = values["hidden_dropout_prob"]
        low, high = (0, 1) if kind is float else LIMITS.get(name, (1, 10**7))
        is_kind = type(value) in (int, float) if kind is float else type(value) is kind  # a bool is no int here
        if not is_kind or (kind is not str and not low <= value <= high):
            raise BadInput(f"{where}: {key} is {shown(value)}, no {kind.__name__}{f' from {low} to {high}' * is_kind}")
        values[name] = value
    c = Config(**values)
    if c.hidden_act not in ACTIVATIONS:
        raise BadInput(f"{where}: {keys['hidden_act']} {shown(c.hidden_act)} is none of {', '.join(ACTIVATIONS)}")
    if c.hidden_size % c.num_attention_heads:
        heads, width = keys["num_attention_heads"], keys["hidden_size"]
        raise BadInput(f"{where}: {heads} {c.num_attention_heads} does not divide {width} {c.hidden_size}")
    if c.pad_token_id >= c.vocab_size:
        raise BadInput(f"{where}: pad_token_id {c.pad_token_id} is beyond vocab_size {c.vocab_size}")
    if c.max_length < 1:
        raise BadInput(f"{where}: max_position_embeddings {c.max_position_embeddings} leaves no room for a token")
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

    The fused kernel; but written out where a CPU trains in half precision, since the fused one is slower there.
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
        self.heads, self.act = c.num_attention_heads, ACTIVATIONS[c.hidden_act]
        self.dropout, self.attention_dropout = c.hidden_dropout_prob, c.attention_probs_dropout_prob
        self.attended_dropout = 0.0 if c.model_type == "distilbert" else c.hidden_dropout_prob  # there: none
        self.paths = FAMILIES[c.model_type][3]
        width, inner = c.hidden_size, c.intermediate_size
        sizes = {"up": (width, inner), "down": (inner, width)}
        for part, path in self.paths.items():
            if part.startswith("norm"):
                put(self, path, nn.LayerNorm(width, c.layer_norm_eps))
            else:
                put(self, path, nn.Linear(*sizes.get(part, (width, width))))

    def forward(self, x, mask, tokens=None):
        """x: (batch, length, width) -> the same, or its first `tokens` alone; mask: as for `attention`."""
        at = {part: self.get_submodule(path) for part, path in self.paths.items()}
        kept = x[:, :tokens]  # (batch, tokens, width): they attend to all of x
        q, k, v = at["query"](kept), at["key"](x), at["value"](x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in (q, k, v))  # (batch, heads, n, d)
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
        self.embeddings.word_embeddings = nn.Embedding(c.vocab_size, c.hidden_size)
        self.embeddings.position_embeddings = nn.Embedding(c.max_position_embeddings, c.hidden_size)
        if c.type_vocab_size:
            self.embeddings.token_type_embeddings = nn.Embedding(c.type_vocab_size, c.hidden_size)
        self.embeddings.LayerNorm = nn.LayerNorm(c.hidden_size, c.layer_norm_eps)
        self.stack = FAMILIES[c.model_type][2]
        put(self, self.stack, nn.ModuleList(Layer(c) for _ in range(c.num_hidden_layers)))
        if pooler:
            put(self, "pooler.dense", nn.Linear(c.hidden_size, c.hidden_size))
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
            real = (input_ids != c.pad_token_id).long()
            positions = real.cumsum(1) * real + c.pad_token_id  # (batch, length)
        else:
            positions = torch.arange(length, device=input_ids.device)[None]  # (1, length)
        x = e.word_embeddings(input_ids) + e.position_embeddings(positions)  # (batch, length, width)
        if c.type_vocab_size:  # where there is one type, as in RoBERTa, the tokenizer's are ignored
            types = torch.zeros_like(input_ids) if token_type_ids is None or c.type_vocab_size == 1 else token_type_ids
            x = x + e.token_type_embeddings(types)
        x = F.dropout(e.LayerNorm(x), c.hidden_dropout_prob, self.training)
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
        c, self.family, self.dropout = config, config.model_type, config.classifier_dropout
        self.out_path, self.saved = "classifier", ["classifier"]  # saved: what peft calls modules_to_save
        if c.model_type == "distilbert":
            self.dense_path, self.saved = "pre_classifier", ["classifier", "pre_classifier"]
        elif c.model_type != "bert":
            self.dense_path, self.out_path = "classifier.dense", "classifier.out_proj"
        elif own_pooler:
            self.dense_path, self.saved = "bert.pooler.dense", ["classifier", "pooler"]
        else:
            self.dense_path = None
        if self.dense_path:
            put(self, self.dense_path, nn.Linear(c.hidden_size, c.hidden_size))
        put(self, self.out_path, nn.Linear(c.hidden_size, outputs))
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.normal_(m.weight, std=c.initializer_range)
                nn.init.zeros_(m.bias)

    def forward(self, x):  # (batch, width) -> (batch, outputs); of an encoder in bf16 as well
        x, drop = x.to(self.out.weight.dtype), partial(F.dropout, p=self.dropout, training=self.training)
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
        own_pooler = self.encoder.config.model_type == "bert" and not self.encoder.has_pooler
        self.heads[name] = Head(self.encoder.config, outputs, own_pooler)

    def forward(self, task, input_ids, attention_mask=None, token_type_ids=None):
        """logits (batch, outputs)."""
        return self.heads[task](self.encoder.summary(self.encoder(input_ids, attention_mask, token_type_ids, tokens=1)))


# ---------------------------------------------------------------------------------------------------------------------
# Loading


def encoder_tensors(tensors, prefix):
    """{the encoder's name: tensor} of a file: without the task model's prefix, LayerNorm's old names renewed."""
    if any(name.startswith(prefix) for name in tensors):
        tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    for old, new in ("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"):
        tensors = {name.removesuffix(old) + new if name.endswith(old) else name: t for name, t in tensors.items()}
    return tensors


def load_encoder(path_or_id, revision="main"):
    """The encoder of a local checkpoint folder or a Hub id, in float32 and eval mode.

    Every tensor of the encoder must be in the file with its exact shape; what the file has beyond is ignored: a
    language model's head, RoBERTa's unused pooler, saved position numbers. Raises BadInput, HubError.
    """
    folder = find_checkpoint(path_or_id, revision)
    config = read_config(read_json(folder / "config.json"), where=str(folder / "config.json"))
    tensors = encoder_tensors(read_weights(folder), config.prefix)
    with torch.device("meta"):  # names and shapes alone: memory is taken when the file has been held against them
        encoder = Encoder(config, pooler=config.model_type == "bert" and "pooler.dense.weight" in tensors)
    expected = encoder.state_dict()
    for name, wanted in expected.items():
        if name not in tensors:
            raise BadInput(f"{folder}: the weights have no tensor {name!r}")
        tensor, shape = tensors[name], tuple(wanted.shape)
        if tuple(tensor.shape) != shape:
            raise BadInput(f"{folder}: tensor {name!r} is {tuple(tensor.shape)}, config.json asks for {shape}")
        if not tensor.is_floating_point():
            raise BadInput(f"{folder}: tensor {name!r} is of type {tensor.dtype}, not floating-point")
    encoder.load_state_dict({name: tensors[name].float().contiguous() for name in expected}, assign=True)
    return encoder.eval()
