"""How latency climbs with the rank: kernels compute whole blocks of channels, so ranks between blocks gain nothing."""

import contextlib
import json
from dataclasses import dataclass
from typing import Self

import torch
from pydantic import TypeAdapter

from ranksearch.cache import Cache, content_hash
from ranksearch.compression import rebuild
from ranksearch.device import timed_cores
from ranksearch.finding import LayerInfo, compressible_layers
from ranksearch.latency import compare, timed_call
from ranksearch.layer_timing import QUICKLY, Neighbourhood, neighbourhood_example
from ranksearch.plan import LayerChoice, Plan
from ranksearch.runtimes import AbstractRuntime
from ranksearch.spec import Target

# From corner to corner of ever wider steps: multiples of 4, 8, 16, and of 32.
RANKS = (36, 40, 48, 64)
MULTIPLES = (4, 8, 16, 32)
# Ranks whose latencies differ by less stand on one step.
SAME_STEP = 0.05
_RATIOS = TypeAdapter(tuple[tuple[float, float, float, float], ...])


@dataclass(frozen=True, kw_only=True, slots=True)
class Staircase:
    """Latencies of representative layers at RANKS over those at the largest, one row per layer."""

    ratios: tuple[tuple[float, ...], ...]

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What to_json wrote. Raises ValueError for anything else."""
        return cls(ratios=_RATIOS.validate_json(text))

    def to_json(self) -> str:
        """The ratios as JSON."""
        return json.dumps(self.ratios)

    @property
    def multiple(self) -> int:
        """The widest step that the ranks of every layer stand on: of all ranks, only its multiples are worth trying.

        Rank 36 as slow as 40 says that steps are 8 wide, 40 as slow as 48 then 16, and 48 as slow as 64 then 32.
        """
        width = 0
        while width < len(MULTIPLES) - 1 and all(_on_one_step(row, width) for row in self.ratios):
            width += 1
        return MULTIPLES[width]


def measure_staircase(runtime: AbstractRuntime, target: Target, cache: Cache) -> Staircase:
    """The target's staircase in float, from the cache where it is known."""
    key = f"staircase-{content_hash(runtime.fingerprint(target), repr(target), list(RANKS))}"
    if (known := cache.get(key)) is not None:
        with contextlib.suppress(ValueError):
            return Staircase.from_json(known)
    layers = [layer for module, shape in _representatives(target) for layer in _found(module, shape)]
    with timed_cores(target):
        staircase = Staircase(ratios=tuple(_climb(module, info, runtime, target) for module, info in layers))
    cache.put(key, staircase.to_json().encode())
    return staircase


def _representatives(target: Target) -> list[tuple[torch.nn.Module, tuple[int, ...]]]:
    """Layers large enough that the rank tells in their latency, small enough to be timed in no time."""
    return [
        (torch.nn.Conv2d(128, 128, 3, padding=1), (target.batch_size, 128, 14, 14)),
        (torch.nn.Conv2d(256, 256, 1), (target.batch_size, 256, 14, 14)),
    ]


def _found(module: torch.nn.Module, shape: tuple[int, ...]) -> list[tuple[torch.nn.Module, LayerInfo]]:
    layers = compressible_layers(torch.nn.Sequential(module), torch.zeros(shape)).layers
    return [(module, info) for info in layers.values()]


def _climb(module: torch.nn.Module, info: LayerInfo, runtime: AbstractRuntime, target: Target) -> tuple[float, ...]:
    """The layer's latencies at RANKS over that at the largest."""
    whole, example = Neighbourhood(info, module).eval(), neighbourhood_example(info)
    calls = []
    for rank in RANKS:
        choice = LayerChoice(decomposition="svd", ranks=(rank,))
        session = runtime.prepare(rebuild(whole, Plan(layers={"layer": choice})), example, target)
        calls.append(timed_call(session, example.numpy(), target))
    return (*(compare(call, calls[-1], **QUICKLY).ratio for call in calls[:-1]), 1.0)


def _on_one_step(ratios: tuple[float, ...], step: int) -> bool:
    """Whether the rank RANKS[step] is as slow as the next."""
    return ratios[step] >= (1 - SAME_STEP) * ratios[step + 1]
