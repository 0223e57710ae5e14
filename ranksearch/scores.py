"""Scores by name, for study scripts: of each example, or of a whole data set."""

from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from ranksearch.errors import StudyError
from ranksearch.spec import corpus_score

NO_TOKEN = -100  # torch's cross-entropy leaves such targets out


def top1(outputs: Any, targets: Any) -> Tensor:
    """1.0 for each example whose largest logit is at its target, else 0.0. `outputs` is (N, C), `targets` (N,)."""
    logits, labels = torch.as_tensor(outputs), torch.as_tensor(targets)
    return (logits.argmax(1) == labels.to(logits.device)).float()


@corpus_score
def f1(outputs: Any, targets: Any) -> float:
    """The F1 score of class 1: `outputs` are logits (N, 2), or (N,) or (N, 1) above 0 for it; `targets` (N,)."""
    logits = torch.as_tensor(outputs)
    chosen = logits.argmax(1) if logits.dim() > 1 and logits.shape[1] > 1 else (logits.flatten() > 0).long()
    return float(_f1_of_classes(chosen, torch.as_tensor(targets).long().flatten(), n_classes=2)[1])


@corpus_score
def macro_f1(outputs: Any, targets: Any) -> float:
    """The mean F1 score of the classes that occur or are predicted. `outputs` are logits (N, C), `targets` (N,)."""
    logits, labels = torch.as_tensor(outputs), torch.as_tensor(targets).long()
    chosen = logits.argmax(1)
    of_classes = _f1_of_classes(chosen, labels, n_classes=logits.shape[1])
    there = torch.bincount(torch.cat([chosen, labels]), minlength=len(of_classes)) > 0
    return float(of_classes[there].mean())


@corpus_score
def spearman(outputs: Any, targets: Any) -> float:
    """Spearman's rank correlation of outputs, (N,) or (N, 1), and targets (N,); ties share their mean rank."""
    ranks = np.stack([_mean_ranks(np.asarray(values).ravel()) for values in (outputs, targets)])
    ranks -= ranks.mean(1, keepdims=True)
    spread = np.sqrt(np.square(ranks).sum(1).prod())
    return float(ranks.prod(0).sum() / spread) if spread > 0 else float("nan")


def pair_cosines(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """The cosine of each two rows that follow each other, (N,) of (2 N, D), and the targets (N,).

    Raises StudyError where rows and targets are not two to one.
    """
    rows, wanted = torch.as_tensor(outputs), torch.as_tensor(targets)
    if len(rows) != 2 * len(wanted):
        raise StudyError(
            f"{len(rows)} rows and {len(wanted)} targets are no pairs; give both sentences of a pair, one after the "
            "other, and one target for the two"
        )
    return F.cosine_similarity(rows[0::2], rows[1::2]), wanted


pair_spearman = corpus_score(spearman.function, pair_cosines)


def nll_per_token(outputs: Any, targets: Any) -> Tensor:
    """Each example's mean negative log likelihood per token, in nats; lower is better.

    `outputs` are logits (N, V, T), `targets` (N, T) the tokens, -100 where none counts.
    """
    losses, n_tokens = _token_losses(outputs, targets)
    return losses / n_tokens.clamp_min(1)


cast(Any, nll_per_token).lower_is_better = True


def _token_losses(outputs: Any, targets: Any) -> tuple[Tensor, Tensor]:
    """Each example's summed negative log likelihood, (N,), and the number of its tokens, (N,)."""
    logits, tokens = torch.as_tensor(outputs).float(), torch.as_tensor(targets)
    losses = F.cross_entropy(logits, tokens.to(logits.device), reduction="none", ignore_index=NO_TOKEN)
    return losses.double().sum(1), (tokens != NO_TOKEN).sum(1).to(logits.device)


def _perplexity(losses: Tensor, n_tokens: Tensor) -> float:
    """exp of the mean negative log likelihood per token over all texts; lower is better."""
    return float((losses.sum() / n_tokens.sum()).exp())


perplexity = corpus_score(_perplexity, _token_losses, lower_is_better=True)


def _f1_of_classes(chosen: Tensor, labels: Tensor, n_classes: int) -> Tensor:
    """F1 by class, (n_classes,): 0 where a class neither occurs nor is predicted."""
    right, n_chosen, n_labels = (
        torch.bincount(classes, minlength=n_classes).double() for classes in (labels[chosen == labels], chosen, labels)
    )
    return 2 * right / (n_chosen + n_labels).clamp_min(1)


def _mean_ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """Ranks from 1 up, equal values at the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_ranks: NDArray[np.float64] = counts.cumsum() - (counts - 1) / 2
    return mean_ranks[places]
