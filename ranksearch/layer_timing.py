"""Latencies for the candidate table: a layer's choices among neighbours as in the model, and whole plans."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Any, final

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from ranksearch.cache import Cache, content_hash
from ranksearch.compression import rebuild
from ranksearch.device import timed_cores
from ranksearch.finding import LayerInfo
from ranksearch.latency import Call, compare, timed_call
from ranksearch.layers import ConvSpec, in_eval_mode
from ranksearch.memory import release_freed_memory
from ranksearch.plan import LayerChoice, Plan
from ranksearch.quantization import SharedTensors
from ranksearch.runtimes import AbstractRuntime, AbstractSession
from ranksearch.runtimes.structure import leaves_of, structure_of
from ranksearch.spec import Target

# Choice by choice: (latency ratio to the dense layer, the dense layer's latency in ms).
LayerTimes = dict[LayerChoice, tuple[float, float]]

# So few input channels are a model's input, which comes plain, as the user gives it; others a layer has made.
FEW_CHANNELS = 4
SMALLEST_RATIO = 0.001
QUICKLY: dict[str, Any] = {"n_blocks": 6, "max_seconds": 0.1, "block_seconds": 0.003, "narrow": 0.02}
WITH_CARE: dict[str, Any] = {"n_blocks": 12, "max_seconds": 0.6, "narrow": 0.02}
_POSITIVE = TypeAdapter(list[Annotated[float, Field(gt=0, le=1e30)]])
_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
_NORMS: dict[int, type[nn.BatchNorm1d] | type[nn.BatchNorm2d]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d}


class Neighbourhood(nn.Module):
    """A layer between a cheap one that makes its input and the normalisation and activation that follow it.

    So its input has the layout and, where the layer quantizes it, the bits in which the runtime has its own layers
    write, its output fuses with what follows, and neither is converted from or to what the user gives and gets. Means
    over positions end it, as they cost next to nothing.
    """

    def __init__(self, info: LayerInfo, layer: nn.Module) -> None:
        super().__init__()
        self.before = _before(info)
        self.layer = layer
        self.after = _after(info)
        self.is_convolution = isinstance(info.spec, ConvSpec)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.after(self.layer(self.before(inputs)))
        return outputs.flatten(2).mean(2) if self.is_convolution else outputs


class Bare(nn.Module):
    """The neighbours without the layer."""

    def __init__(self, info: LayerInfo) -> None:
        super().__init__()
        self.before = _before(info)
        self.is_convolution = isinstance(info.spec, ConvSpec)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.before(inputs)
        return outputs.flatten(2).mean(2) if self.is_convolution else outputs


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimer:
    """Times choices for one layer among neighbours, interleaved with the dense layer among the same.

    Layers of equal spec and input shape are one layer to it.
    """

    runtime: AbstractRuntime
    target: Target
    cache: Cache

    def __call__(self, info: LayerInfo, layer: nn.Module, choices: Iterable[LayerChoice]) -> LayerTimes:
        """Each choice's latency ratio to the dense layer, and the dense layer's latency in ms."""
        place = content_hash(type(layer).__name__, repr(info.spec), info.input_shape)
        wanted = list(dict.fromkeys(choices))
        keys = {choice: f"layer-{self._hash(place, choice.key())}" for choice in wanted}
        kept = {choice: _figures(self.cache.get(keys[choice]), 2) for choice in wanted}
        known = {choice: (times[0], times[1]) for choice, times in kept.items() if times is not None}
        missing = [choice for choice in wanted if choice not in known]
        with timed_cores(self.target):
            for choice, times in self._time(info, layer, missing).items():
                known[choice] = times
                self.cache.put(keys[choice], json.dumps(times).encode())
        return {choice: known[choice] for choice in wanted}

    def _time(self, info: LayerInfo, layer: nn.Module, choices: Iterable[LayerChoice]) -> LayerTimes:
        if not (choices := list(choices)):
            return {}
        whole = Neighbourhood(info, layer).eval()
        example = neighbourhood_example(info)
        dense = self._bind(whole, example)
        bare = compare(self._bind(Bare(info).eval(), example), dense, **QUICKLY).ratio
        times = {}
        for choice in choices:
            model = rebuild(whole, Plan(layers={"layer": choice}), self.runtime.weight_limit(self.target))
            latency = compare(self._bind(model, example), dense, **QUICKLY)
            ratio = max((latency.ratio - bare) / max(1 - bare, SMALLEST_RATIO), SMALLEST_RATIO)
            times[choice] = ratio, max(1 - bare, SMALLEST_RATIO) * latency.reference_ms
        return times

    def _bind(self, model: nn.Module, example: Tensor) -> Call:
        return timed_call(self.runtime.prepare(model.eval(), example, self.target), example.numpy(), self.target)

    def _hash(self, *parts: object) -> str:
        return content_hash(self.runtime.fingerprint(self.target), repr(self.target), *parts)


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class PlanTimer:
    """Times whole plans, interleaved with the dense model; `shared` is the workbench's."""

    model: nn.Module
    example: Any
    dense: AbstractSession
    shared: SharedTensors
    runtime: AbstractRuntime
    target: Target
    cache: Cache

    def __call__(self, plan: Plan) -> float:
        """The plan's latency ratio to dense."""
        shapes = [tuple(leaf.shape) for leaf in leaves_of(self.example)]
        place = repr(self.runtime.fingerprint(self.target)), repr(self.target), repr(self.model), repr(shapes)
        key = f"plan-{content_hash(*place, plan.hash())}"
        if (known := _figures(self.cache.get(key), 1)) is not None:
            return known[0]
        ratio = self._ratio(plan)
        # Models as large as the user's come and go.
        release_freed_memory()
        self.cache.put(key, json.dumps([ratio]).encode())
        return ratio

    def _ratio(self, plan: Plan) -> float:
        model = in_eval_mode(rebuild(self.model, plan, self.runtime.weight_limit(self.target), self.shared))
        arrays = structure_of(self.example).arrange([leaf.detach().cpu().numpy() for leaf in leaves_of(self.example)])
        with timed_cores(self.target):
            sessions = (self.runtime.prepare(model, self.example, self.target), self.dense)
            calls = [timed_call(session, arrays, self.target) for session in sessions]
            return compare(*calls, **WITH_CARE).ratio


def neighbourhood_example(info: LayerInfo) -> Tensor:
    """Random input for a layer among its neighbours."""
    shape = list(info.input_shape)
    axis = 1 if isinstance(info.spec, ConvSpec) else -1
    shape[axis] = min(shape[axis], FEW_CHANNELS)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _figures(kept: bytes | None, count: int) -> list[float] | None:
    """So many positive figures as the cache has them; None where it has none, or something else."""
    try:
        figures = None if kept is None else _POSITIVE.validate_json(kept)
    except ValidationError:
        return None
    return figures if figures is not None and len(figures) == count else None


def _before(info: LayerInfo) -> nn.Module:
    """What makes the layer's input out of few channels; nothing where the input itself has but few."""
    if isinstance(info.spec, ConvSpec):
        if info.spec.in_channels <= FEW_CHANNELS:
            return nn.Identity()
        return nn.Sequential(
            _CONVOLUTIONS[len(info.spec.kernel_size)](FEW_CHANNELS, info.spec.in_channels, 1), nn.ReLU()
        )
    if info.spec.in_features <= FEW_CHANNELS:
        return nn.Identity()
    return nn.Sequential(nn.Linear(FEW_CHANNELS, info.spec.in_features), nn.ReLU())


def _after(info: LayerInfo) -> nn.Module:
    if isinstance(info.spec, ConvSpec):
        return nn.Sequential(_NORMS[len(info.spec.kernel_size)](info.spec.out_channels), nn.ReLU())
    return nn.ReLU()
