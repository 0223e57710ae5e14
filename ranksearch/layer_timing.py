"""The latency of a layer's choices on the target, each layer alone, from the cache where it is known."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import final

import torch
from torch import Tensor, nn

from ranksearch.cache import Cache, content_hash
from ranksearch.compression import rebuild
from ranksearch.latency import compare
from ranksearch.layers import LayerInfo
from ranksearch.plan import LayerChoice, Plan
from ranksearch.runtimes import AbstractRuntime
from ranksearch.spec import Target

# Choice by choice: (latency ratio to the dense layer, the dense layer's latency in ms).
LayerTimes = dict[LayerChoice, tuple[float, float]]


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class LayerTimer:
    """Times choices for one layer alone, interleaved with the dense layer, on random input of the layer's shape."""

    runtime: AbstractRuntime
    target: Target
    cache: Cache

    def __call__(self, info: LayerInfo, layer: nn.Module, choices: Iterable[LayerChoice]) -> LayerTimes:
        """Each choice's latency ratio to the dense layer, and the dense layer's latency in ms."""
        alone = nn.Sequential(layer)
        example = torch.randn(info.input_shape, generator=torch.Generator().manual_seed(0))
        dense = cache(lambda: self._bind(alone, example))
        return {choice: self._time(info, alone, choice, example, dense) for choice in choices}

    def _time(
        self,
        info: LayerInfo,
        alone: nn.Sequential,
        choice: LayerChoice,
        example: Tensor,
        dense: Callable[[], Callable[[], None]],
    ) -> tuple[float, float]:
        place = {
            "layer": type(alone[0]).__name__,
            "spec": repr(info.spec),
            "input": info.input_shape,
            "choice": choice.key(),
        }
        key = "layer-" + content_hash(self.runtime.fingerprint(self.target), repr(self.target), place)
        if (known := self.cache.get(key)) is not None:
            ratio, reference_ms = json.loads(known)
            return float(ratio), float(reference_ms)
        model = rebuild(alone, Plan(layers={"0": choice}), self.runtime.weight_limit(self.target))
        candidate = self._bind(model, example)
        latency = compare(candidate, dense(), n_blocks=6, max_seconds=0.1, block_seconds=0.003, seed=0)
        self.cache.put(key, json.dumps([latency.ratio, latency.reference_ms]).encode())
        return latency.ratio, latency.reference_ms

    def _bind(self, model: nn.Module, example: Tensor) -> Callable[[], None]:
        return self.runtime.prepare(model.eval(), example, self.target).bind(example.numpy())
