"""transformers' causal language models."""

from collections.abc import Mapping, Sequence
from functools import partial
from os import PathLike

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.adapters.base import Adapter
from ranksearch.adapters.encoders import pretrained, tokenize
from ranksearch.scores import NO_TOKEN, perplexity


class CausalLanguageModel(nn.Module):
    """A causal language model of transformers as a model of tensors: tokens in, logits (N, V, T) out.

    The vocabulary comes before the positions, where torch's cross-entropy looks for classes.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits (N, V, T) of the token after each of the tokens (N, T)."""
        # Without a mask transformers looks for packed texts, by operators that no runtime knows.
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits: Tensor = self.network(input_ids=input_ids, attention_mask=mask, use_cache=False).logits
        return logits.transpose(1, 2)


def causal_language_model(model: str | PathLike[str], *, length: int = 128) -> Adapter:
    """transformers' causal language model of this name or folder, scored by its perplexity.

    `inputs` takes texts and cuts them into blocks of `length` tokens, the last of each text padded; `next_tokens` makes
    the targets of them.
    """
    return Adapter(
        model=partial(_load, str(model)),
        inputs=partial(_blocks, str(model), length),
        loss=F.cross_entropy,
        score=perplexity,
        higher_is_better=False,
    )


def next_tokens(inputs: Mapping[str, Tensor]) -> Tensor:
    """The targets of token ids and their mask: the token after each, -100 where there is none, (N, T)."""
    tokens = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, NO_TOKEN)
    return F.pad(tokens[:, 1:], (0, 1), value=NO_TOKEN)


def _load(model: str) -> nn.Module:
    return CausalLanguageModel(pretrained("AutoModelForCausalLM", model)).eval()


def _blocks(model: str, length: int, texts: Sequence[str]) -> dict[str, Tensor]:
    tokens = tokenize(model, length, texts, return_overflowing_tokens=True)
    return {name: tokens[name] for name in ("input_ids", "attention_mask")}
