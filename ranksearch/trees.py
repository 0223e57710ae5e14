"""Inputs, targets and outputs of whatever structure: a tensor, or tuples, lists and mappings of them."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.errors import StudyError


def tensors(tree: Any) -> list[Tensor]:
    """The tensors in `tree` in their order, arrays as tensors; whatever else it holds is left out."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, np.ndarray):
        return [torch.as_tensor(tree)]
    if isinstance(tree, Mapping):
        return [tensor for value in tree.values() for tensor in tensors(value)]
    if isinstance(tree, tuple | list):
        return [tensor for value in tree for tensor in tensors(value)]
    return []


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """`tree` with `function` of each tensor in its place; mappings become dicts, arrays go in as tensors."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, np.ndarray):
        return function(torch.as_tensor(tree))
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, function) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        parts = [map_tensors(value, function) for value in tree]
        return parts if isinstance(tree, list) else tuple(parts)
    return tree


def tensor_bytes(tensor: Tensor) -> bytes:
    """The tensor's numbers as bytes, whatever its type; numpy knows no bfloat16."""
    data: bytes = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return data


def count_rows(tree: Any) -> int:
    """The number of examples in a batch: the first size of its first tensor that has one, 0 where none has."""
    return next((tensor.shape[0] for tensor in tensors(tree) if tensor.dim() > 0), 0)


def pick_rows(tree: Any, rows: slice | Tensor) -> Any:
    """The examples `rows` of a batch; tensors that do not run over its examples stay whole."""
    n_rows = count_rows(tree)
    return map_tensors(tree, lambda t: t[rows] if t.dim() > 0 and t.shape[0] == n_rows else t)


def first_examples(batches: Iterable[tuple[Any, Any]], max_examples: int) -> Iterator[Any]:
    """The inputs of batches until they make up `max_examples`, the last ones cut to fit."""
    n_left = max_examples
    for inputs, _ in batches:
        n_rows = count_rows(inputs)
        yield inputs if n_rows <= n_left else pick_rows(inputs, slice(n_left))
        n_left -= n_rows
        if n_left <= 0:
            return


def concatenate(parts: list[Any]) -> Any:
    """One batch out of several of one structure; examples that are not tensors become one list.

    Raises StudyError where shapes beyond the first size differ.
    """
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: concatenate([part[key] for part in parts]) for key in first}
    if isinstance(first, tuple) or (isinstance(first, list) and tensors(first)):
        columns = [concatenate(list(column)) for column in zip(*parts, strict=True)]
        return columns if isinstance(first, list) else tuple(columns)
    if isinstance(first, list):
        return [example for part in parts for example in part]
    return _cat([torch.as_tensor(part) for part in parts]) if tensors(first) else first


def is_classification(loss: Any) -> bool:
    """Whether `loss` is torch's cross-entropy, so that the outputs are class logits (N, C, ...)."""
    if isinstance(loss, functools.partial):
        return is_classification(loss.func)
    return loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)


def _cat(parts: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1 or parts[0].dim() == 0:
        raise StudyError(f"batches of shapes (N, ...) with ... in {shapes} do not fit together; pad them to one shape")
    return torch.cat(parts)
