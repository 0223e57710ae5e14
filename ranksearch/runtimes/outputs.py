"""What a model gives, as a flat list of tensors and how they are arranged."""

from typing import Any, cast

from torch import Tensor, nn

from ranksearch.errors import MeasurementError
from ranksearch.runtimes.structure import Kind, Structure
from ranksearch.trees import named_tensors


def flat_outputs(outputs: Any) -> tuple[Structure, list[Tensor]]:
    """The tensors of a model's outputs; what is nested goes by dotted names, what is no tensor is left out.

    Raises MeasurementError where there is no tensor.
    """
    found = named_tensors(outputs)
    if not found:
        raise MeasurementError(f"the model gives a {type(outputs).__name__} without a tensor; let it give tensors")
    kind: Kind = "mapping"
    if isinstance(outputs, Tensor):
        kind = "single"
    elif isinstance(outputs, tuple | list) and not any("." in name for name in found):
        kind = "tuple"
    return Structure(kind=kind, names=tuple(found)), list(found.values())


def gives_flat_outputs(model: nn.Module) -> nn.Module:
    """The model, in place, whose outputs are a tensor, a tuple of tensors or a dict of them."""

    def flat(_module: nn.Module, _inputs: Any, outputs: Any) -> Any:
        structure, leaves = flat_outputs(outputs)
        return structure.arrange(leaves)

    cast(Any, model).register_forward_hook(flat)
    return model
