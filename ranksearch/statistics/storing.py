"""Statistics as tensors by name, so that they can be handed to other processes, and kept in files."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ranksearch.cache import cache_directory
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


def mapped(statistics: LayerStatistics) -> LayerStatistics:
    """The same, what factors are cut by in a file beside the caches: read when looked at, dropped when memory is short.

    The file goes with the last tensor. In memory, where it cannot be written.
    """
    held = {name: tensor.contiguous() for name in KEPT if (tensor := getattr(statistics, name)) is not None}
    try:
        cache_directory().mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="statistics-", dir=cache_directory(), ignore_cleanup_errors=True) as folder:
            file = Path(folder) / "statistics.safetensors"
            save_file(held, file)
            return replace(statistics, **load_file(file))
    except (OSError, SafetensorError):
        return statistics
