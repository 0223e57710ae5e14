"""Round the weights of quantized layers by calibration: each on the inputs that the rounded layers before it give."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import call_model, evaluating, first_argument, layer_spec, layer_weight
from ranksearch.quantization import QuantizedLayer, compensated, quantized_layers
from ranksearch.statistics.least_squares import relative_error, solve, solve_centred
from ranksearch.statistics.patches import count_groups, count_taps
from ranksearch.statistics.rows import OutputRows, OutputSampler, input_rows, temporary_hooks

MIN_ROWS, ROWS_PER_INPUT = 4096, 8
# Numbers in one layer's rows, but for two rows an input: 256 MB in double precision.
MAX_NUMBERS = 1 << 25
# What the outputs of all layers together may take: of a deep network of wide layers fewer rows are kept.
MAX_OUTPUT_BYTES = 2 << 30
# Relative to the mean squared input; pulls the weight that is rounded towards that of the float layer.
RIDGE = 0.03


@dataclass(frozen=True, kw_only=True, slots=True)
class Rounding:
    """The squared error of a layer's output over the float one's variance, rounded plainly and as it was chosen.

    Both are those of examples that no choice was fitted to.
    """

    plain: float
    chosen: float


def sample_outputs(model: nn.Module, layers: Iterable[str], inputs: Any) -> dict[str, OutputRows]:
    """Rows of what the float layers give for `inputs`; those that do not run just once are missing."""
    modules = {name: model.get_submodule(name) for name in layers}
    affordable = MAX_OUTPUT_BYTES // max(4 * sum(len(layer_weight(module)) for module in modules.values()), 1)
    most = max(affordable, MIN_ROWS)
    sampler = OutputSampler(
        max_rows={name: min(_sufficient_rows(module), most) for name, module in modules.items()}, seed=0
    )
    with evaluating(model), temporary_hooks() as handles:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(sampler.listener(name)))
        call_model(model, inputs)
    return {name: rows for name, rows in sampler.rows.items() if sampler.n_calls[name] == 1}


def round_weights(model: nn.Module, wanted: Mapping[str, OutputRows], inputs: Any) -> dict[str, Rounding]:
    """Puts the weights of quantized layers on their grids, in place, such that their outputs change little.

    `wanted`, from sample_outputs on the same inputs, is what the float layers gave. One pass: later layers see what
    the rounded ones give, and are solved for what was wanted before they are rounded with compensation; a bias takes
    what rounding moves the mean by. A layer is rounded so only where that errs less on examples that it was not fitted
    to. Left to plain rounding are 16-bit floats, frozen weights, and layers that saw too few rows. Raises StudyError,
    which names the layer, where its inputs are not finite.
    """
    results: dict[str, Rounding] = {}
    with evaluating(model), temporary_hooks() as handles:
        for name, module in quantized_layers(model).items():
            if name in wanted and module.weight.requires_grad:
                rounder = _Rounder(name, wanted[name], results)
                handles.append(module.register_forward_hook(rounder, with_kwargs=True))
        call_model(model, inputs)
    return results


def _sufficient_rows(module: nn.Module) -> int:
    spec = layer_spec(module)
    assert spec is not None, "only plain layers are sampled"
    n_inputs, groups = spec.weight_shape[1] * count_taps(spec), count_groups(spec)
    wanted = max(MIN_ROWS // min(groups, 16), ROWS_PER_INPUT * n_inputs)
    return min(wanted, max(MAX_NUMBERS // (groups * n_inputs), 2 * n_inputs))


class _Rounder:
    """Rounds one layer's weight when its inputs arrive, and gives the corrected output."""

    def __init__(self, name: str, wanted: OutputRows, results: dict[str, Rounding]) -> None:
        self.name, self.wanted, self.results = name, wanted, results

    def __call__(
        self, module: QuantizedLayer, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> Tensor | None:
        if self.name in self.results:  # the corrected output is being computed
            return None
        levels = module.weight_format.levels(module.grid, module.weight.shape)
        if levels is None:
            return None
        inputs = first_argument(arguments, named)
        rows = input_rows(module.spec, module.activation(inputs), output, self.wanted.index).double()
        if not bool(rows.isfinite().all()):
            raise StudyError(f"layer {self.name!r}: its inputs on calibration data are not finite (NaN or infinity)")
        groups, _, n_inputs = rows.shape
        wanted = self.wanted.values.double().reshape(rows.shape[1], groups, -1).transpose(0, 1)
        kept, held_out = ~self.wanted.held_out, self.wanted.held_out
        if int(kept.sum()) <= n_inputs or not bool(held_out.any()):
            return None
        fit = _Fit(rows[:, kept], wanted[:, kept], has_bias=module.bias is not None)
        weight = module.weight.detach().double().reshape(groups, -1, n_inputs)
        plain = module.rounded_weight.detach().double().reshape(weight.shape)
        tried = [fit.with_bias(plain), fit.with_bias(compensated(fit.solved(weight), fit.moment, levels))]
        errors = [relative_error(rows[:, held_out] @ w.mT + b[:, None], wanted[:, held_out]) for w, b in tried]
        self.results[self.name] = Rounding(plain=errors[0], chosen=min(errors))
        if not errors[1] < errors[0]:
            return None
        return self._changed(module, inputs, *tried[1])

    def _changed(self, module: QuantizedLayer, inputs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        module.weight.copy_(weight.reshape(module.weight.shape))
        if module.bias is not None:
            module.bias.copy_(bias.flatten())
        corrected: Tensor = module(inputs)
        return corrected


class _Fit:
    """What a layer's weight is fitted to: rows of inputs (G, M, D) and of wanted outputs (G, M, T / G), float64.

    With a bias means do not count, since the bias makes up for them.
    """

    def __init__(self, inputs: Tensor, outputs: Tensor, *, has_bias: bool) -> None:
        self.inputs, self.outputs, self.has_bias = inputs, outputs, has_bias
        means = inputs.mean(1, keepdim=True) if self.has_bias else 0.0
        centred = inputs - means
        self.moment = centred.mT @ centred / inputs.shape[1]

    def solved(self, weight: Tensor) -> Tensor:
        """The float weight that gives the wanted outputs of these inputs, near `weight`."""
        if self.has_bias:
            return solve_centred(self.inputs, self.outputs, weight, RIDGE)[0]
        return solve(self.inputs, self.outputs, weight, RIDGE)

    def with_bias(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The weight and the bias (G, T / G) that suits it best, zeros where the layer has none."""
        bias = (self.outputs.mean(1, keepdim=True) - self.inputs.mean(1, keepdim=True) @ weight.mT)[:, 0]
        return weight, bias if self.has_bias else torch.zeros_like(bias)
