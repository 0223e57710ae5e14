"""Operators as converters know them."""

from typing import Any, final

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@final
class KnownOperators(TorchFunctionMode):
    """While open, torch.diff is traced as the subtraction that it is, and sums of truth values as those of integers.

    For the former neither OpenVINO nor ONNX has a rule, ONNX none for the latter. The causal models of transformers
    look by them for sequences that were packed into one.
    """

    def __torch_function__(self, function: Any, _types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if function in (torch.diff, Tensor.diff):
            return _difference(*arguments, **named)
        if function in (torch.cumsum, Tensor.cumsum) and arguments and arguments[0].dtype == torch.bool:
            arguments = (arguments[0].long(), *arguments[1:])
        return function(*arguments, **named)


def _difference(
    input: Tensor, n: int = 1, dim: int = -1, prepend: Tensor | None = None, append: Tensor | None = None
) -> Tensor:
    """What torch.diff gives, whose parameters these are."""
    parts = [part for part in (prepend, input, append) if part is not None]
    values = torch.cat(parts, dim)
    for _ in range(n):
        length = values.shape[dim] - 1
        after, before = values.narrow(dim, 1, length), values.narrow(dim, 0, length)
        values = after != before if values.dtype == torch.bool else after - before
    return values
