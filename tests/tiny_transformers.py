"""Tiny models of transformers with random weights, and a tokenizer of a few words, as folders that they load from."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerFast

WORDS = (
    "good",
    "bad",
    "film",
    "a",
    "the",
    "is",
    "was",
    "cat",
    "dog",
    "sat",
    "on",
    "mat",
    "very",
    "not",
    "play",
    "song",
)
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
N_TOKENS = len(SPECIAL) + len(WORDS)
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 48,
}
OTHER_SIZES: dict[str, dict[str, Any]] = {
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "bart": {
        f"{part}_{what}": size
        for part in ("encoder", "decoder")
        for what, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 48))
    }
    | {"d_model": 32},
    "opt": {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "swin": {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "image_size": 32, "window_size": 4},
}
OTHER_SIZES["whisper"] = {**OTHER_SIZES["bart"], "decoder_start_token_id": 1}


def tiny_config(family: str, **changes: Any) -> Any:
    """The configuration of a model of this family with two layers of 32 features."""
    sizes = {"vocab_size": N_TOKENS, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
    if family in ("vit", "deit", "dinov2"):
        sizes |= {"image_size": 16, "patch_size": 8}
    return AutoConfig.for_model(family, **sizes, **OTHER_SIZES.get(family, SIZES), **changes)


def tiny_model(family: str, kind: Any, **changes: Any) -> nn.Module:
    """A model of random weights; `kind` is one of transformers' Auto classes."""
    torch.manual_seed(0)
    model: nn.Module = kind.from_config(tiny_config(family, **changes))
    return model.eval()


def write_folder(path: Path, family: str, kind: Any, **changes: Any) -> Path:
    """The model's folder, with its tokenizer."""
    tiny_model(family, kind, **changes).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *WORDS))}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]"}
    if family == "gpt2":
        tokenizer.post_processor = None
        names = {"unk_token": "[UNK]", "eos_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(path)
    return path
