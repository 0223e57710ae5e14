"""The factorisations of a model's layers, and the factors that are cut from them, kept by their content."""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import final

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ranksearch import decompositions
from ranksearch.cache import Cache, content_hash
from ranksearch.decompositions import DECOMPOSITIONS, Factorisation, Metric
from ranksearch.errors import DecompositionError
from ranksearch.layers import LayerSpec, layer_spec, layer_weight
from ranksearch.plan import LayerChoice
from ranksearch.statistics import LayerStatistics, check_statistics, mean_change


@final
@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Factors:
    """A layer's factors at some ranks, float32, in the order of the modules that hold them.

    `mean_change` (T,), float64, is how much less the factors give on average than the layer: a constant that the
    bias can keep. None where the inputs' mean is not known.
    """

    weights: tuple[Tensor, ...]
    mean_change: Tensor | None


@final
class Factorisations:
    """The factorisations of a model's layers, each computed when first asked for.

    With a cache, the factors that are cut from them are kept on disk under what they were made from. With
    `only_last`, memory keeps the factorisations of the layer last asked for alone: those of every layer at once can
    take ten times the model. Raises StudyError where the statistics are those of another model.
    """

    def __init__(
        self,
        model: nn.Module,
        statistics: Mapping[str, LayerStatistics],
        cache: Cache | None = None,
        *,
        only_last: bool = False,
    ) -> None:
        check_statistics(model, statistics)
        self.statistics = statistics
        self._model = model
        self._cache = cache
        self._only_last = only_last
        self._layers: dict[str, _Layer] = {}
        self._hashes: dict[str, str] = {}

    def of(self, layer: str, choice: LayerChoice) -> Factorisation:
        """The factorisation that serves `choice` at every rank. Raises DecompositionError where there is none."""
        if layer not in self._layers:
            if self._only_last:
                self._layers.clear()
            self._layers[layer] = _Layer(layer, self._model.get_submodule(layer), self.statistics.get(layer))
        return self._layers[layer].factorisation(choice)

    def factors(self, layer: str, choice: LayerChoice) -> Factors:
        """The factors of `choice`, the caller's own. Raises DecompositionError where there are none."""
        code = _code_hash(type(DECOMPOSITIONS[choice.decomposition]))
        if self._cache is None or code is None:
            return self._cut(layer, choice)
        what = [choice.decomposition, _spelled_out(choice), list(choice.ranks)]
        key = content_hash(code, self._layer_hash(layer), what)
        known = self._cache.get(key)
        if known is not None and (kept := _from_bytes(known, self._shapes(layer, choice))) is not None:
            return kept
        factors = self._cut(layer, choice)
        self._cache.put(key, _to_bytes(factors))
        return factors

    def _cut(self, layer: str, choice: LayerChoice) -> Factors:
        factorisation = self.of(layer, choice)
        change, statistics = None, self.statistics.get(layer)
        if statistics is not None and statistics.input_mean is not None:
            weight = layer_weight(self._model.get_submodule(layer))
            change = mean_change(weight - factorisation.weight(choice.ranks), statistics.input_mean)
        return Factors(weights=factorisation.factors(choice.ranks), mean_change=change)

    def _shapes(self, layer: str, choice: LayerChoice) -> list[torch.Size]:
        """Those of the factors' weights, in their order."""
        with torch.device("meta"):
            built = DECOMPOSITIONS[choice.decomposition].build(
                _spec(self._model.get_submodule(layer)), choice.ranks, choice.factor_options
            )
        return [layer_weight(module).shape for module in built.modules() if layer_spec(module) is not None]

    def _layer_hash(self, layer: str) -> str:
        """What a layer's factors are made from, beside the code."""
        if layer not in self._hashes:
            module, statistics = self._model.get_submodule(layer), self.statistics.get(layer)
            known = () if statistics is None else (
                # Gradients of single examples predict losses; no factor knows of them.
                statistics.input_covariance, statistics.input_mean, statistics.output_gradient_covariance,
            )  # fmt: skip
            parts = [_content(tensor) for tensor in (layer_weight(module), *known)]
            self._hashes[layer] = content_hash(repr(layer_spec(module)), *parts)
        return self._hashes[layer]


@final
class _Layer:
    """One layer with the factorisations that it has been asked for, on one metric, which keeps what it computes."""

    def __init__(self, name: str, module: nn.Module, statistics: LayerStatistics | None) -> None:
        self._name = name
        self._spec, self._weight = _spec(module), layer_weight(module)
        self._metric = _metric(statistics)
        self._known: dict[str, Factorisation] = {}

    def factorisation(self, choice: LayerChoice) -> Factorisation:
        key = f"{choice.decomposition} {_spelled_out(choice)}"
        if key not in self._known:
            method = DECOMPOSITIONS[choice.decomposition]
            try:
                self._known[key] = method.factorise(self._weight, self._spec, choice.factor_options, self._metric)
            except DecompositionError as error:
                raise DecompositionError(f"layer {self._name!r}: {error}") from None
        return self._known[key]


def _metric(statistics: LayerStatistics | None) -> Metric | None:
    """What it costs to change the layer; None where nothing is known, or where no input varies: all would be free."""
    if statistics is None or statistics.input_covariance is None or not bool(statistics.input_covariance.any()):
        return None
    output = statistics.output_gradient_covariance
    return Metric(
        input=statistics.input_covariance, output=output if output is not None and bool(output.any()) else None
    )


def _spec(module: nn.Module) -> LayerSpec:
    spec = layer_spec(module)
    assert spec is not None, "checked by check_plan"
    return spec


def _spelled_out(choice: LayerChoice) -> str:
    """The choice's options, those that it leaves out at their defaults, as one text."""
    return json.dumps(DECOMPOSITIONS[choice.decomposition].spell_out(choice.factor_options), sort_keys=True)


@cache
def _code_hash(method: type) -> str | None:
    """The code that factors: ours, torch's version and the file of the method; None where its source is not there."""
    try:
        files = [*Path(decompositions.__file__).parent.glob("*.py"), Path(inspect.getfile(method))]
        return content_hash(torch.__version__, *(file.read_bytes() for file in sorted(files)))
    except (OSError, TypeError):
        return None


def _content(tensor: Tensor | None) -> bytes:
    return b"" if tensor is None else safetensors.torch.save({"": tensor.detach().cpu().contiguous()})


def _to_bytes(factors: Factors) -> bytes:
    tensors = {f"factor{i}": weight.contiguous() for i, weight in enumerate(factors.weights)}
    if factors.mean_change is not None:
        tensors["mean_change"] = factors.mean_change
    return safetensors.torch.save({name: tensor.cpu() for name, tensor in tensors.items()})


def _from_bytes(data: bytes, shapes: Sequence[torch.Size]) -> Factors | None:
    """What _to_bytes wrote of factors of these shapes; None where it is something else."""
    try:
        tensors = safetensors.torch.load(data)
        change = tensors.pop("mean_change", None)
        weights = tuple(tensors.pop(f"factor{i}") for i in range(len(shapes)))
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None
    are_factors = [weight.shape for weight in weights] == list(shapes) and not tensors
    is_bias = change is None or change.shape == shapes[-1][:1]
    return Factors(weights=weights, mean_change=change) if are_factors and is_bias else None
