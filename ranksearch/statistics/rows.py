"""Sampled rows of layers in a running model: what a layer gave, and later what its successor in another model reads."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ranksearch.errors import StudyError
from ranksearch.layers import LayerSpec, layer_spec
from ranksearch.spec import Batches
from ranksearch.statistics.patches import (
    by_group,
    channels_first,
    count_positions,
    output_rows,
    sampled_patches,
)
from ranksearch.trees import concatenate, count_rows, first_examples

# Patches are made for as many examples at once as give this many numbers: 16 MB, which the caches nearly hold.
CHUNK_NUMBERS = 1 << 22
# One example in so many is held out: a solution on the others has to err less on it than what it is to replace.
HELD_OUT_INTERVAL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputRows:
    """Rows of a layer's output, `values` (M, T), at sampled places: `index` (M,) counts over examples and positions.

    `held_out` (M,) marks those of examples that no solution may see.
    """

    index: Tensor
    held_out: Tensor
    values: Tensor


class OutputSampler:
    """Keeps a random sample of the output rows of layers; mutable, and gone when its pass has been used."""

    def __init__(self, max_rows: Mapping[str, int], seed: int) -> None:
        self.max_rows = max_rows
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: dict[str, OutputRows] = {}
        self.n_calls: dict[str, int] = {}

    def listener(self, name: str) -> Callable[..., None]:
        """A forward hook for the layer that is called `name`."""

        def hook(module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.n_calls[name] = self.n_calls.get(name, 0) + 1
            spec = layer_spec(module)
            assert spec is not None, "only plain layers are sampled"
            rows = output_rows(spec, output)
            n_rows = rows.shape[0] * rows.shape[1]
            index = torch.arange(n_rows)
            if n_rows > (most := self.max_rows[name]):
                index = torch.randperm(n_rows, generator=self.generator)[:most].sort().values
            example = index // rows.shape[1]
            self.rows[name] = OutputRows(
                index=index,
                held_out=example % HELD_OUT_INTERVAL == 1,
                values=rows[example, index % rows.shape[1]].clone(),
            )

        return hook


def input_rows(spec: LayerSpec, inputs: Tensor, output: Tensor, index: Tensor) -> Tensor:
    """What the weight multiplies at the sampled places, (groups, M, D), D as `weight.flatten(1)` has it."""
    n_positions = count_positions(spec, output)
    size = max(1, CHUNK_NUMBERS // inputs[0].numel())
    parts = []
    for first, chunk in enumerate(torch.split(inputs, size)):
        start = first * size * n_positions
        inside = index[(index >= start) & (index < start + len(chunk) * n_positions)] - start
        parts.append(sampled_patches(spec, chunk, inside))
    return channels_first(spec, by_group(spec, torch.cat(parts)))


def first_inputs(batches: Batches, max_examples: int) -> Any:
    """The first examples' inputs as one batch, or the first batch of data padded to different lengths.

    Raises StudyError where the data yields nothing.
    """
    parts = list(first_examples(batches, max_examples))
    if not parts or count_rows(parts[0]) == 0:
        raise StudyError("the calibration data yields no example")
    try:
        return concatenate(parts)
    except StudyError:
        return parts[0]


@contextmanager
def temporary_hooks() -> Iterator[list[RemovableHandle]]:
    """A list of hooks that are removed at the end."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()
