"""transformers' encoders: classifiers of texts, and sentence embeddings."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.adapters.base import Adapter, library
from ranksearch.scores import pair_cosines, pair_spearman, top1

Text = str | tuple[str, str]


class Classifier(nn.Module):
    """A classifier of transformers as a model of tensors: what its tokenizer gives in, or images; logits (N, C) out."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor:
        """Logits (N, C)."""
        logits: Tensor = self.network(*inputs, **named).logits
        return logits


class SentenceEncoder(nn.Module):
    """An encoder of transformers whose output is one vector of unit length for each text, (N, D).

    The mean over its tokens; Reimers and Gurevych, Sentence-BERT (2019).
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Embeddings (N, D) of token ids and their mask, both (N, T)."""
        states: Tensor = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        return F.normalize((states * mask).sum(1) / mask.sum(1).clamp_min(1), dim=1)


def text_classifier(model: str | PathLike[str], *, length: int = 128) -> Adapter:
    """transformers' sequence classifier of this name or folder; `inputs` takes texts, or pairs of them.

    Texts are padded and cut to `length` tokens.
    """
    return Adapter(
        model=partial(_load_classifier, str(model)),
        inputs=partial(tokenize, str(model), length),
        loss=F.cross_entropy,
        score=top1,
    )


def sentence_encoder(model: str | PathLike[str], *, length: int = 128) -> Adapter:
    """transformers' encoder of this name or folder as a sentence encoder; `inputs` takes texts, cut to `length` tokens.

    For its loss and its score, Spearman's correlation, a batch holds both sentences of each pair, one after the other,
    and for the two one target: how alike they are, from -1 to 1.
    """
    return Adapter(
        model=partial(_load_encoder, str(model)),
        inputs=partial(_embeddable, str(model), length),
        loss=pair_cosine_loss,
        score=pair_spearman,
    )


def pair_cosine_loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean squared difference of the cosines of pairs, rows (2 N, D) that follow each other, and targets (N,)."""
    cosines, wanted = pair_cosines(outputs, targets)
    return F.mse_loss(cosines, wanted.to(cosines))


def tokenize(model: str, length: int, texts: Sequence[Text], **options: Any) -> dict[str, Tensor]:
    """What the model's tokenizer gives of texts, or of pairs of them, padded or cut to `length` tokens, (N, length)."""
    tokenizer = _tokenizer(model)
    tokens = tokenizer(
        list(texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt", **options
    )
    return {name: tokens[name] for name in tokenizer.model_input_names}


def pretrained(kind: str, model: str) -> nn.Module:
    """transformers' model of this name or folder, by one of its Auto classes, in float32 however it was published."""
    load = partial(getattr(library("transformers"), kind).from_pretrained, model, dtype="float32")
    with _no_bars() if Path(model).is_dir() else nullcontext():
        network: nn.Module = load()
    return network


@contextmanager
def _no_bars() -> Iterator[None]:
    """While open, transformers draws no progress, not even that of downloads, which is worth seeing."""
    progress = library("transformers.utils.logging")
    was_shown = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            progress.enable_progress_bar()


def _embeddable(model: str, length: int, texts: Sequence[Text]) -> dict[str, Tensor]:
    tokens = tokenize(model, length, texts)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}


@cache
def _tokenizer(model: str) -> Any:
    tokenizer = library("transformers").AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked wherever it pads
    return tokenizer


def _load_classifier(model: str) -> nn.Module:
    return Classifier(pretrained("AutoModelForSequenceClassification", model)).eval()


def _load_encoder(model: str) -> nn.Module:
    return SentenceEncoder(pretrained("AutoModel", model)).eval()
