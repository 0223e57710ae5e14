"""Statistics as tensors by name, so that they can be handed to other processes."""

from collections.abc import Mapping

from torch import Tensor

from ranksearch.statistics.values import LayerStatistics

# Gradients of single examples predict losses; whoever cuts factors does without, and they are the bulk.
KEPT = ("input_covariance", "input_mean", "output_gradient_covariance")


def to_tensors(statistics: Mapping[str, LayerStatistics]) -> dict[str, Tensor]:
    """What factors are cut by, under `field/layer`."""
    return {
        f"{name}/{layer}": tensor.contiguous()
        for layer, known in statistics.items()
        for name in KEPT
        if (tensor := getattr(known, name)) is not None
    }


def from_tensors(tensors: Mapping[str, Tensor]) -> dict[str, LayerStatistics]:
    """The statistics that `to_tensors` gave."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, layer = key.partition("/")
        layers.setdefault(layer, {})[name] = tensor
    return {layer: LayerStatistics(**fields) for layer, fields in layers.items()}
