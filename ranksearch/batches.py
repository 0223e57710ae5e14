"""Batches of examples put together, where running them one by one would take longer."""

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ranksearch.layers import call_model, evaluating
from ranksearch.trees import concatenate, count_rows, tensors

# With so few numbers a large model is read from memory longer than it computes.
FEW_NUMBERS = 256


def merged(model: nn.Module, batches: Iterable[Any]) -> Iterator[Any]:
    """The inputs in their order, small neighbours of like shapes as one where the model takes them so."""
    takes_more: bool | None = None
    for group in _groups(batches):
        if len(group) > 1 and takes_more is None:
            takes_more = _takes(model, concatenate(group))
        yield from [concatenate(group)] if len(group) > 1 and takes_more else group


def _groups(batches: Iterable[Any]) -> Iterator[list[Any]]:
    group: list[Any] = []
    for batch in batches:
        if group and not _are_few([*group, batch]):
            yield group
            group = []
        group.append(batch)
    if group:
        yield group


def _are_few(batches: list[Any]) -> bool:
    """Whether the batches are alike, with a row of every tensor for each example, and few numbers in all."""
    by_row = all(tensor.dim() > 0 and len(tensor) == count_rows(b) for b in batches for tensor in tensors(b))
    shapes = {tuple(tensor.shape[1:] for tensor in tensors(batch)) for batch in batches}
    return by_row and len(shapes) == 1 and sum(t.numel() for batch in batches for t in tensors(batch)) <= FEW_NUMBERS


def _takes(model: nn.Module, inputs: Any) -> bool:
    """Whether the model gives as many rows as it gets: it may have been written for batches of one size."""
    try:
        with evaluating(model):
            return count_rows(call_model(model, inputs)) == count_rows(inputs)
    except Exception:  # whatever a model's own code raises
        return False
