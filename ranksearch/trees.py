"""Inputs, targets and outputs of whatever structure: a tensor, or tuples, lists, mappings and dataclasses of them."""

import copy
import dataclasses
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
    return [tensor for _, value in _children(tree) for tensor in tensors(value)]


def named_tensors(tree: Any, name: str = "") -> dict[str, Tensor]:
    """The tensors in `tree` in their order by dotted name: `logits`, `states.0`; a tensor alone is `0`."""
    if isinstance(tree, Tensor | np.ndarray):
        (tensor,) = tensors(tree)  # not as_tensor, which a trace would keep
        return {name or "0": tensor}
    prefix = f"{name}." if name else ""
    return {path: t for key, value in _children(tree) for path, t in named_tensors(value, prefix + key).items()}


def map_tensors(tree: Any, function: Callable[[Tensor], Any]) -> Any:
    """`tree` with `function` of each tensor in its place; arrays go in as tensors.

    Dataclasses, named tuples and classes of dicts stay what they are, transformers' outputs among them; other mappings
    become dicts.
    """
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, np.ndarray):
        return function(torch.as_tensor(tree))
    return _with_children(tree, [map_tensors(value, function) for _, value in _children(tree)])


def arranged(like: Any, leaves: Iterable[Tensor]) -> Any:
    """The leaves, in the order of tensors(like), in the places of its tensors."""
    remaining = iter(leaves)
    return map_tensors(like, lambda _: next(remaining))


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


def copied(tree: Any) -> Any:
    """The same with tensors of its own, for a model that changes its inputs."""
    return map_tensors(tree, lambda tensor: tensor.detach().clone())


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
    if isinstance(first, list) and not tensors(first):
        return [example for part in parts for example in part]
    if _children(first):
        columns = zip(*([value for _, value in _children(part)] for part in parts), strict=True)
        return _with_children(first, [concatenate(list(column)) for column in columns])
    return _cat([torch.as_tensor(part) for part in parts]) if tensors(first) else first


def is_classification(loss: Any) -> bool:
    """Whether `loss` is torch's cross-entropy, so that the outputs are class logits (N, C, ...)."""
    if isinstance(loss, functools.partial):
        return is_classification(loss.func)
    return loss is F.cross_entropy or isinstance(loss, nn.CrossEntropyLoss)


def _children(tree: Any) -> list[tuple[str, Any]]:
    """What a mapping, a sequence or a dataclass holds, by name; nothing for anything else."""
    if isinstance(tree, Mapping):
        return [(str(key), value) for key, value in tree.items()]
    if isinstance(tree, tuple | list):
        return [(str(i), value) for i, value in enumerate(tree)]
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        return [(field.name, getattr(tree, field.name)) for field in dataclasses.fields(tree) if field.init]
    return []


def _with_children(tree: Any, values: list[Any]) -> Any:
    """`tree` with other values in the order of its children."""
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        names = [name for name, _ in _children(tree)]
        return dataclasses.replace(tree, **dict(zip(names, values, strict=True)))
    if isinstance(tree, Mapping):
        changed = dict(zip(tree, values, strict=True))
        if not isinstance(tree, dict) or type(tree) is dict:
            return changed
        other = copy.copy(tree)  # a dict of a class of its own, which may have attributes
        other.update(changed)
        return other
    if isinstance(tree, tuple):
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return values if isinstance(tree, list) else tree


def _cat(parts: list[Tensor]) -> Tensor:
    shapes = sorted({tuple(part.shape[1:]) for part in parts})
    if len(shapes) > 1 or parts[0].dim() == 0:
        raise StudyError(f"batches of shapes (N, ...) with ... in {shapes} do not fit together; pad them to one shape")
    return torch.cat(parts)
