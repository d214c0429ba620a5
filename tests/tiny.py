"""Small random models made by `transformers`, and batches for them: what the tests hold ours against."""

import torch
import transformers as hf

hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

FAMILIES = ("bert", "roberta", "xlm-roberta", "distilbert")
CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta", "distilbert": "DistilBert"}


def tiny(family, width=24, layers=2, heads=4, inner=40, positions=30, act="gelu", pad=None, **others):
    """A `transformers` configuration. RoBERTa's numbers differ from its class's defaults, as roberta-base's do."""
    pad = {"bert": 0, "distilbert": 0}.get(family, 1) if pad is None else pad
    others = {"vocab_size": 61, "max_position_embeddings": positions, "pad_token_id": pad, **others}
    others["attn_implementation"] = "eager"  # plain matrix products, to hold our fused attention against
    if family == "distilbert":
        sizes = {"dim": width, "n_layers": layers, "n_heads": heads, "hidden_dim": inner, "activation": act}
    else:
        sizes = {
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_act": act,
            "intermediate_size": inner,
            "type_vocab_size": 2 if family == "bert" else 1,
            "layer_norm_eps": 1e-12 if family == "bert" else 1e-5,
        }
    return getattr(hf, CLASSES[family] + "Config")(**{**sizes, **others})


def make(config, task="Model", seed=0, **others):
    """A random `transformers` model, e.g. task="ForMaskedLM". As in a trained one, no bias is zero and no norm one."""
    torch.manual_seed(seed)
    model = getattr(hf, CLASSES[config.model_type] + task)(config, **others).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    return model


def batch(config, lengths=(12, 1, 7, 3), pairs=False, seed=0):
    """(ids, mask, token types or None), right-padded. With `pairs`, each second half is of type 1."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(10, config.vocab_size, (len(lengths), max(lengths)), generator=g)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.where(mask.bool(), ids, config.pad_token_id)
    types = (torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None] / 2).long() * mask if pairs else None
    return ids, mask, types


@torch.no_grad()
def run(model, ids, mask, types=None):
    """The `transformers` model's logits or hidden states."""
    out = model(input_ids=ids, attention_mask=mask, **({} if types is None else {"token_type_ids": types}))
    return out.logits if hasattr(out, "logits") else out.last_hidden_state


def one_line(error):
    """What a user would read; the tests then look for the words that matter."""
    message = str(error.value)
    assert message and "\n" not in message
    return message
