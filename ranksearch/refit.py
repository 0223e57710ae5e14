"""Solve each last factor again, on the inputs that come from the already compressed layers before it."""

import sys
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ranksearch.errors import StudyError
from ranksearch.layers import LayerSpec, call_model, evaluating, layer_spec, layer_weight
from ranksearch.spec import Batches
from ranksearch.statistics.patches import (
    by_group,
    channels_first,
    count_groups,
    count_positions,
    count_taps,
    output_rows,
    sampled_patches,
)
from ranksearch.trees import concatenate, count_rows, first_examples

MIN_ROWS = 1024
# Patches are made for as many examples at once as give this many numbers: 16 MB, which the caches nearly hold.
CHUNK_NUMBERS = 1 << 22
# Numbers in one layer's rows, of all its groups: a convolution in many groups has few weights in each to solve for.
MAX_GROUPED_NUMBERS = 1 << 22
# One example in so many is held out: a solution on the others has to err less on it than the present factor.
HELD_OUT_INTERVAL = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Refit:
    """The squared error of a layer's output over the variance of the dense one, before and after the refit.

    Both are those of examples that were held out of the solution.
    """

    before: float
    after: float


def refit_last_factors(
    model: nn.Module,
    layers_last: Mapping[str, str],
    dense: nn.Module,
    batches: Batches,
    *,
    max_examples: int = 256,
    max_rows: int = 16384,
    memory_bytes: int = 1 << 30,
    ridge: float = 1e-5,
    seed: int = 0,
) -> dict[str, Refit]:
    """Sets weight and bias of each last factor, in place, by least squares from its inputs to the dense outputs.

    `layers_last` names for each layer of `dense` the submodule of `model` that is its last factor; it has a bias.
    One pass over the first `max_examples`: later layers see the inputs that the refitted ones give. A factor is
    changed only where a solution on three quarters of the examples lowers the error on the others. `ridge` is
    relative to the mean square of the inputs and pulls towards the present weight. Convolutions in groups are solved
    group by group.
    Left alone, and missing from the result, are layers that run more than once, whose last factor is frozen, or
    that see fewer rows than they have weights per output. Raises StudyError where the data yields nothing.
    """
    inputs = _first_inputs(batches, max_examples)
    specs = {name: _spec(model.get_submodule(path)) for name, path in layers_last.items()}
    n_affordable = memory_bytes // max(4 * sum(spec.weight_shape[0] for spec in specs.values()), 1)
    limit = min(max_rows, max(n_affordable, MIN_ROWS))
    wanted = _DenseRows(max_rows={name: min(limit, _sufficient_rows(spec)) for name, spec in specs.items()}, seed=seed)
    with evaluating(dense), _hooks() as handles:
        for name in layers_last:
            handles.append(dense.get_submodule(name).register_forward_hook(wanted.listener(name)))
        call_model(dense, inputs)
    results: dict[str, Refit] = {}
    with evaluating(model), _hooks() as handles:
        for name, path in layers_last.items():
            last = model.get_submodule(path)
            if wanted.n_calls.get(name) == 1 and last.get_parameter("weight").requires_grad:
                solver = _Solver(name, specs[name], *wanted.rows.pop(name), ridge, results)
                handles.append(last.register_forward_hook(solver))
        call_model(model, inputs)
    return results


def solve_centred(inputs: Tensor, outputs: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The (G, T, D) weights and (G, T) biases that map `inputs` (G, M, D) to `outputs` (G, M, T), float64.

    Least squares on centred rows, group by group; `ridge` times the mean square of a group's inputs pulls towards
    `weight`, which a group keeps where its inputs leave no way to solve.
    """
    input_mean, output_mean = inputs.mean(1, keepdim=True), outputs.mean(1, keepdim=True)
    centred = inputs - input_mean
    residual = outputs - output_mean - centred @ weight.mT
    gram = centred.mT @ centred
    diagonals = gram.diagonal(dim1=1, dim2=2)
    diagonals += (ridge * diagonals.mean(1, keepdim=True)).clamp_min(torch.finfo(gram.dtype).tiny)
    factor, failed = torch.linalg.cholesky_ex(gram)
    step = torch.cholesky_solve(centred.mT @ residual, factor).mT
    solved = torch.where((failed == 0)[:, None, None] & step.isfinite(), weight + step, weight)
    return solved, (output_mean - input_mean @ solved.mT)[:, 0]


def _spec(last: nn.Module) -> LayerSpec:
    spec = layer_spec(last)
    assert spec is not None, "the last factor is a plain layer"
    return spec


def _sufficient_rows(spec: LayerSpec) -> int:
    """How many rows are worth solving on; as many as there are for a layer without groups."""
    n_inputs = spec.weight_shape[1] * count_taps(spec)
    if (groups := count_groups(spec)) == 1:
        return sys.maxsize
    return max(MAX_GROUPED_NUMBERS // (groups * n_inputs), 64 * n_inputs)


def _first_inputs(batches: Batches, max_examples: int) -> Any:
    parts = list(first_examples(batches, max_examples))
    if not parts or count_rows(parts[0]) == 0:
        raise StudyError("the calibration data yields no example")
    try:
        return concatenate(parts)
    except StudyError:
        return parts[0]  # batches padded to different lengths do not fit together


@contextmanager
def _hooks() -> Any:
    """A list of hooks that are removed at the end."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


class _DenseRows:
    """Keeps a random sample of the output rows of dense layers; mutable, and gone after the refit."""

    def __init__(self, max_rows: Mapping[str, int], seed: int) -> None:
        self.max_rows = max_rows
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self.n_calls: dict[str, int] = {}

    def listener(self, name: str) -> Any:
        def hook(module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.n_calls[name] = self.n_calls.get(name, 0) + 1
            spec = layer_spec(module)
            assert spec is not None, "only compressible layers are refitted"
            rows = output_rows(spec, output)
            n_rows = rows.shape[0] * rows.shape[1]
            index = torch.arange(n_rows)
            if n_rows > (most := self.max_rows[name]):
                index = torch.randperm(n_rows, generator=self.generator)[:most].sort().values
            example = index // rows.shape[1]
            held_out = example % HELD_OUT_INTERVAL == 1
            self.rows[name] = index, held_out, rows[example, index % rows.shape[1]].clone()

        return hook


class _Solver:
    """Solves one last factor when its inputs arrive, and gives the corrected output."""

    def __init__(
        self,
        name: str,
        spec: LayerSpec,
        index: Tensor,
        held_out: Tensor,
        wanted: Tensor,
        ridge: float,
        results: dict[str, Refit],
    ) -> None:
        self.name, self.spec, self.index, self.held_out, self.ridge = name, spec, index, held_out, ridge
        self.wanted, self.results = wanted, results
        self.solving = False

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.solving or self.name in self.results:
            return None
        rows = self._rows(arguments[0], count_positions(self.spec, output))
        groups, _, n_inputs = rows.shape
        kept, held_out = ~self.held_out, self.held_out
        if int(kept.sum()) <= n_inputs or not bool(held_out.any()):
            return None
        wanted = self.wanted.double().reshape(len(self.wanted), groups, -1).transpose(0, 1)
        weight, bias = layer_weight(module), module.get_parameter("bias")
        old = weight.double().reshape(groups, -1, n_inputs)
        old_bias = bias.detach().double().reshape(groups, -1)
        solved = solve_centred(rows[:, kept], wanted[:, kept], old, self.ridge)
        judged, truth = rows[:, held_out], wanted[:, held_out]
        before, after = (_relative_error(judged @ w.mT + b[:, None], truth) for w, b in ((old, old_bias), solved))
        self.results[self.name] = Refit(before=before, after=min(before, after))
        if not after < before:
            return None
        # Once it has proved itself, the solution of all rows is the better one.
        new, new_bias = solve_centred(rows, wanted, old, self.ridge)
        weight.copy_(new.reshape(weight.shape))
        bias.copy_(new_bias.flatten())
        self.solving = True
        corrected: Tensor = module(*arguments)
        self.solving = False
        return corrected

    def _rows(self, inputs: Tensor, n_positions: int) -> Tensor:
        """The inputs of the sampled output positions, (groups, M, D), float64."""
        size = max(1, CHUNK_NUMBERS // inputs[0].numel())
        parts = []
        for first, chunk in enumerate(torch.split(inputs, size)):
            start = first * size * n_positions
            index = self.index[(self.index >= start) & (self.index < start + len(chunk) * n_positions)] - start
            parts.append(sampled_patches(self.spec, chunk, index))
        return channels_first(self.spec, by_group(self.spec, torch.cat(parts)).double())


def _relative_error(outputs: Tensor, wanted: Tensor) -> float:
    spread = (wanted - wanted.mean(1, keepdim=True)).square().mean()
    return float((outputs - wanted).square().mean() / spread.clamp_min(1e-30))
