"""Whether a model can take its data: by name, on one device, in one float."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ranksearch.errors import StudyError
from ranksearch.trees import named_tensors


def check_inputs(model: nn.Module, inputs: Any) -> None:
    """Raises StudyError, naming keys or tensors, where `inputs` do not fit the model's forward or lie elsewhere."""
    _check_signature(model, inputs)
    places = {parameter.device: name for name, parameter in reversed(list(model.named_parameters()))}
    if (empty := places.get(torch.device("meta"))) is not None:
        raise StudyError(f"parameter {empty!r} is on device meta, without values; load the model's weights first")
    for name, tensor in named_tensors(inputs).items():
        if places and tensor.device not in places:
            device, parameter = next(iter(places.items()))
            raise StudyError(
                f"input {name!r} is on {tensor.device}, and parameter {parameter!r} on {device}; "
                f"put both on one device: give model.to({str(tensor.device)!r})"
            )


def other_floats_given(model: nn.Module, inputs: Any) -> str | None:
    """Which input has floats that no parameter has, and what would do; None where there is none."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    for name, tensor in named_tensors(inputs).items():
        if tensor.is_floating_point() and dtypes and tensor.dtype not in dtypes:
            found, wanted = (str(dtype).removeprefix("torch.") for dtype in (tensor.dtype, next(iter(dtypes))))
            return f"input {name!r} is {found}, and the model's parameters are {wanted}; give it as {wanted}"
    return None


def _check_signature(model: nn.Module, inputs: Any) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return  # what is written in C may show none
    by_name = isinstance(inputs, Mapping)
    given = inputs if isinstance(inputs, tuple | list) else (inputs,)
    try:
        signature.bind(**inputs) if by_name else signature.bind(*given)
    except TypeError as error:
        parameters = (parameter.replace(annotation=parameter.empty) for parameter in signature.parameters.values())
        told = f"keys are {', '.join(map(str, inputs))}" if by_name else f"number is {len(given)}"
        raise StudyError(
            f"the inputs' {told}, and {type(model).__name__}.forward takes ({', '.join(map(str, parameters))}): {error}"
        ) from None
