"""Solve each last factor again, on the inputs that come from the already compressed layers before it."""

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ranksearch.errors import StudyError
from ranksearch.layers import LayerSpec, call_model, evaluating, layer_spec
from ranksearch.spec import Batches
from ranksearch.statistics.patches import channels_first, count_taps, output_rows, tap_patches
from ranksearch.trees import concatenate, count_rows, first_examples

MIN_ROWS = 1024
# Patches are made for as many examples at once as give this many numbers: 16 MB, which the caches nearly hold.
CHUNK_NUMBERS = 1 << 22


@dataclass(frozen=True, kw_only=True, slots=True)
class Refit:
    """The squared error of a layer's output over the variance of the dense one, before and after the refit."""

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

    `layers_last` names for each layer of `dense` the submodule of `model` that is its last factor. One pass over
    the first `max_examples`: later layers see the inputs that the refitted ones give. `ridge` is relative to the
    mean square of the inputs and pulls towards the present weight. Left alone, and missing from the result, are
    layers that run more than once, have groups, or see fewer rows than they have weights per output.
    Raises StudyError where the data yields nothing.
    """
    inputs = _first_inputs(batches, max_examples)
    outputs = {name: dense.get_submodule(name).get_parameter("weight").shape[0] for name in layers_last}
    n_affordable = memory_bytes // max(4 * sum(outputs.values()), 1)
    wanted = _DenseRows(max_rows=min(max_rows, max(n_affordable, MIN_ROWS)), seed=seed)
    with evaluating(dense), _hooks() as handles:
        for name in layers_last:
            handles.append(dense.get_submodule(name).register_forward_hook(wanted.listener(name)))
        call_model(dense, inputs)
    results: dict[str, Refit] = {}
    with evaluating(model), _hooks() as handles:
        for name, path in layers_last.items():
            spec = layer_spec(model.get_submodule(path))
            if wanted.n_calls.get(name) == 1 and spec is not None and getattr(spec, "groups", 1) == 1:
                solver = _Solver(name, spec, *wanted.rows.pop(name), ridge, results)
                handles.append(model.get_submodule(path).register_forward_hook(solver))
        call_model(model, inputs)
    return results


def solve_centred(inputs: Tensor, outputs: Tensor, weight: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The (T, D) weight and (T,) bias that map `inputs` (M, D) to `outputs` (M, T), float64.

    Least squares on centred rows; `ridge` times the mean square of the inputs pulls towards `weight`.
    """
    input_mean, output_mean = inputs.mean(0), outputs.mean(0)
    centred = inputs - input_mean
    residual = outputs - output_mean - centred @ weight.T
    gram = centred.T @ centred
    strength = max(ridge * float(gram.diagonal().mean()), torch.finfo(gram.dtype).tiny)
    gram.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return weight, output_mean - weight @ input_mean
    solved = weight + torch.cholesky_solve(centred.T @ residual, factor).T
    return solved, output_mean - solved @ input_mean


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

    def __init__(self, max_rows: int, seed: int) -> None:
        self.max_rows = max_rows
        self.generator = torch.Generator().manual_seed(seed)
        self.rows: dict[str, tuple[Tensor, Tensor]] = {}
        self.n_calls: dict[str, int] = {}

    def listener(self, name: str) -> Any:
        def hook(module: nn.Module, _arguments: tuple[Tensor, ...], output: Tensor) -> None:
            self.n_calls[name] = self.n_calls.get(name, 0) + 1
            spec = layer_spec(module)
            assert spec is not None, "only compressible layers are refitted"
            rows = output_rows(spec, output)
            n_rows = rows.shape[0] * rows.shape[1]
            index = torch.arange(n_rows)
            if n_rows > self.max_rows:
                index = torch.randperm(n_rows, generator=self.generator)[: self.max_rows].sort().values
            self.rows[name] = index, rows[index // rows.shape[1], index % rows.shape[1]].clone()

        return hook


class _Solver:
    """Solves one last factor when its inputs arrive, and gives the corrected output."""

    def __init__(
        self, name: str, spec: LayerSpec, index: Tensor, wanted: Tensor, ridge: float, results: dict[str, Refit]
    ) -> None:
        self.name, self.spec, self.index, self.wanted, self.ridge = name, spec, index, wanted, ridge
        self.results = results
        self.solving = False

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], _output: Tensor) -> Tensor | None:
        if self.solving or self.name in self.results:
            return None
        weight = module.get_parameter("weight")
        rows = self._rows(arguments[0]).double()
        if len(rows) <= rows.shape[1]:
            return None
        wanted = self.wanted.double()
        old = weight.detach().flatten(1).double()
        bias = module._parameters.get("bias")
        old_bias = torch.zeros(len(old)).double() if bias is None else bias.detach().double()
        new, new_bias = self._solve(rows, wanted, old, has_bias=bias is not None)
        before, after = (_relative_error(rows @ w.T + b, wanted) for w, b in ((old, old_bias), (new, new_bias)))
        self.results[self.name] = Refit(before=before, after=min(before, after))
        if not after < before:
            return None
        weight.copy_(new.reshape(weight.shape))
        if bias is not None:
            bias.copy_(new_bias)
        self.solving = True
        corrected: Tensor = module(*arguments)
        self.solving = False
        return corrected

    def _solve(self, rows: Tensor, wanted: Tensor, old: Tensor, *, has_bias: bool) -> tuple[Tensor, Tensor]:
        if has_bias:
            return solve_centred(rows, wanted, old, self.ridge)
        # Rows and their mirror images have mean zero: the same solution without a bias.
        mirrored = torch.cat([rows, -rows]), torch.cat([wanted, -wanted])
        return solve_centred(*mirrored, old, self.ridge)

    def _rows(self, inputs: Tensor) -> Tensor:
        """The inputs of the sampled output positions, (M, D)."""
        size = max(1, CHUNK_NUMBERS // (inputs[0].numel() * count_taps(self.spec)))
        parts, start = [], 0
        for chunk in torch.split(inputs, size):
            patches = tap_patches(self.spec, chunk)
            n_rows = patches.shape[0] * patches.shape[1]
            index = self.index[(self.index >= start) & (self.index < start + n_rows)] - start
            parts.append(patches[index // patches.shape[1], index % patches.shape[1]])
            start += n_rows
        return channels_first(self.spec, torch.cat(parts))


def _relative_error(outputs: Tensor, wanted: Tensor) -> float:
    spread = (wanted - wanted.mean(0)).square().mean()
    return float((outputs - wanted).square().mean() / spread.clamp_min(1e-30))
