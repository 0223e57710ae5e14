"""Whether statistics are those of a model's layers, before anything is fitted to them."""

import math
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import LayerSpec, layer_spec
from ranksearch.statistics.patches import count_groups
from ranksearch.statistics.values import LayerStatistics


def check_statistics(model: nn.Module, statistics: Mapping[str, LayerStatistics]) -> None:
    """Raises StudyError, naming the layer, where they tell of one that the model has not, or not in this shape."""
    specs = {name: layer_spec(module) for name, module in model.named_modules()}
    for name, of_layer in statistics.items():
        spec = specs.get(name)
        if spec is None:
            known = _listed(known for known, spec in specs.items() if spec is not None)
            raise StudyError(
                f"the statistics tell of layer {name!r}, and {type(model).__name__} has {known}; "
                "collect them for this very model"
            )
        _check_shapes(name, spec, of_layer)


def check_complete(statistics: Mapping[str, LayerStatistics], layers: Iterable[str]) -> None:
    """Raises StudyError, naming the layer, where the statistics tell nothing of one of `layers`."""
    for name in layers:
        if name not in statistics:
            raise StudyError(
                f"the statistics tell nothing of layer {name!r}, but of {_listed(statistics)}; "
                "collect them for every layer that the plan factors"
            )


def _check_shapes(name: str, spec: LayerSpec, statistics: LayerStatistics) -> None:
    n_outputs, *rest = spec.weight_shape
    n_inputs, n_groups = math.prod(rest), count_groups(spec)
    groups = (n_groups,) if n_groups > 1 else ()
    n_examples = 0 if statistics.weight_gradients is None else len(statistics.weight_gradients)
    expected = {
        "input_covariance": (*groups, n_inputs, n_inputs),
        "input_mean": (*groups, n_inputs),
        "output_gradient_covariance": (n_outputs, n_outputs),
        "weight_gradients": (n_examples, n_outputs, n_inputs),
        "bias_gradients": (n_examples, n_outputs),
    }
    for field, shape in expected.items():
        found: Tensor | None = getattr(statistics, field)
        if found is not None and tuple(found.shape) != shape:
            raise StudyError(
                f"layer {name!r}: the statistics' {field} is {tuple(found.shape)}; its weight of shape "
                f"{spec.weight_shape} needs {shape}: collect them for this very model"
            )


def _listed(names: Iterable[str]) -> str:
    """The first few names."""
    return ", ".join(repr(name) for name in list(names)[:6]) or "no layer"
