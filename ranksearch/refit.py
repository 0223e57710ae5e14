"""Solve each last factor again, on the inputs that come from the already compressed layers before it."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from ranksearch.layers import LayerSpec, call_model, evaluating, layer_spec, layer_weight
from ranksearch.spec import Batches
from ranksearch.statistics.least_squares import relative_error, solve_centred
from ranksearch.statistics.patches import count_groups, count_taps
from ranksearch.statistics.rows import OutputRows, OutputSampler, first_inputs, input_rows, temporary_hooks

MIN_ROWS = 1024
# Numbers in one layer's rows, of all its groups: a convolution in many groups has few weights in each to solve for.
MAX_GROUPED_NUMBERS = 1 << 22


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
    inputs = first_inputs(batches, max_examples)
    specs = {name: _spec(model.get_submodule(path)) for name, path in layers_last.items()}
    n_affordable = memory_bytes // max(4 * sum(spec.weight_shape[0] for spec in specs.values()), 1)
    limit = min(max_rows, max(n_affordable, MIN_ROWS))
    wanted = OutputSampler(
        max_rows={name: min(limit, _sufficient_rows(spec)) for name, spec in specs.items()}, seed=seed
    )
    with evaluating(dense), temporary_hooks() as handles:
        for name in layers_last:
            handles.append(dense.get_submodule(name).register_forward_hook(wanted.listener(name)))
        call_model(dense, inputs)
    results: dict[str, Refit] = {}
    with evaluating(model), temporary_hooks() as handles:
        for name, path in layers_last.items():
            last = model.get_submodule(path)
            if wanted.n_calls.get(name) == 1 and last.get_parameter("weight").requires_grad:
                solver = _Solver(name, specs[name], wanted.rows.pop(name), ridge, results)
                handles.append(last.register_forward_hook(solver))
        call_model(model, inputs)
    return results


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


class _Solver:
    """Solves one last factor when its inputs arrive, and gives the corrected output."""

    def __init__(self, name: str, spec: LayerSpec, wanted: OutputRows, ridge: float, results: dict[str, Refit]) -> None:
        self.name, self.spec, self.wanted, self.ridge, self.results = name, spec, wanted, ridge, results
        self.solving = False

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.solving or self.name in self.results:
            return None
        rows = input_rows(self.spec, arguments[0], output, self.wanted.index).double()
        groups, _, n_inputs = rows.shape
        kept, held_out = ~self.wanted.held_out, self.wanted.held_out
        if int(kept.sum()) <= n_inputs or not bool(held_out.any()):
            return None
        wanted = self.wanted.values.double().reshape(len(rows[0]), groups, -1).transpose(0, 1)
        weight, bias = layer_weight(module), module.get_parameter("bias")
        old = weight.double().reshape(groups, -1, n_inputs)
        old_bias = bias.detach().double().reshape(groups, -1)
        solved = solve_centred(rows[:, kept], wanted[:, kept], old, self.ridge)
        judged, truth = rows[:, held_out], wanted[:, held_out]
        before, after = (relative_error(judged @ w.mT + b[:, None], truth) for w, b in ((old, old_bias), solved))
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
