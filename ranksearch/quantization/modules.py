"""Layers that compute as int8 kernels do: input and weight are rounded, gradients pass straight through."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranksearch.quantization.formats import (
    ACTIVATION_LEVELS,
    CODE_LIMIT,
    affine_range,
    affine_step,
    per_channel,
    weight_scale,
)

# Until ranges are observed; positive, since with a step of zero OpenVINO silently leaves int8.
PLACEHOLDER_RANGE = (0.0, 6.0)


class ActivationQuantizer(nn.Module):
    """Rounds a tensor to 256 levels between a low and a high value.

    While `observe` is set, it receives every tensor instead, and the tensor passes unrounded. One that rounds the
    output of another module, `output_of`, lets its own module's input pass, which comes rounded; `readers` names the
    other quantized modules that read that output.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero_point", torch.zeros((), dtype=torch.int32))
        self.observe: Callable[[Tensor], None] | None = None
        self.output_of: str | None = None
        self.readers: tuple[str, ...] = ()
        self.set_range(*PLACEHOLDER_RANGE)

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and highest value that survive rounding."""
        return affine_range(float(self.scale), int(self.zero_point))

    def set_range(self, low: float, high: float) -> None:
        """Covers low..high, and zero, from now on (in place)."""
        step, zero_point = affine_step(low, high)
        self.scale.fill_(step)
        self.zero_point.fill_(zero_point)

    def forward(self, values: Tensor) -> Tensor:
        return self.round(values) if self.output_of is None else values

    def round(self, values: Tensor) -> Tensor:
        """The values as 256 levels hold them."""
        if self.observe is not None:
            self.observe(values)
            return values
        return torch.fake_quantize_per_tensor_affine(values, self.scale, self.zero_point, 0, ACTIVATION_LEVELS)


class QuantizedLinear(nn.Module):
    """A linear layer with int8 weights and inputs; `weight_limit` bounds the codes of the weights."""

    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: nn.Linear, weight_limit: int = CODE_LIMIT) -> None:
        super().__init__()
        _take_weights(self, layer, weight_limit)
        self.weight_limit = weight_limit
        self.activation: nn.Module = ActivationQuantizer()

    def forward(self, inputs: Tensor) -> Tensor:
        return functional.linear(self.activation(inputs), quantized_weight(self), cast(Tensor | None, self.bias))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Sliding:
    """How a convolution runs over its inputs: torch's settings, and what is padded before by other than zeros."""

    settings: dict[str, Any]
    border: tuple[int, ...]
    padding_mode: str

    def padded(self, values: Tensor) -> Tensor:
        return values if self.padding_mode == "zeros" else functional.pad(values, self.border, mode=self.padding_mode)


def _sliding(layer: nn.Conv1d | nn.Conv2d) -> _Sliding:
    padding: Any = layer.padding if layer.padding_mode == "zeros" else 0
    return _Sliding(
        settings={"stride": layer.stride, "padding": padding, "dilation": layer.dilation, "groups": layer.groups},
        border=tuple(layer._reversed_padding_repeated_twice),
        padding_mode=layer.padding_mode,
    )


class QuantizedConv1d(nn.Module):
    """A convolution over one axis with int8 weights and inputs; `weight_limit` bounds the codes of the weights."""

    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: nn.Conv1d, weight_limit: int = CODE_LIMIT) -> None:
        super().__init__()
        _take_weights(self, layer, weight_limit)
        self.weight_limit = weight_limit
        self.activation: nn.Module = ActivationQuantizer()
        self._sliding = _sliding(layer)

    def forward(self, inputs: Tensor) -> Tensor:
        values, weight, bias = self.activation(inputs), quantized_weight(self), cast(Tensor | None, self.bias)
        return functional.conv1d(self._sliding.padded(values), weight, bias, **self._sliding.settings)


class QuantizedConv2d(nn.Module):
    """A convolution over two axes with int8 weights and inputs; `weight_limit` bounds the codes of the weights."""

    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(self, layer: nn.Conv2d, weight_limit: int = CODE_LIMIT) -> None:
        super().__init__()
        _take_weights(self, layer, weight_limit)
        self.weight_limit = weight_limit
        self.activation: nn.Module = ActivationQuantizer()
        self._sliding = _sliding(layer)

    def forward(self, inputs: Tensor) -> Tensor:
        values, weight, bias = self.activation(inputs), quantized_weight(self), cast(Tensor | None, self.bias)
        return functional.conv2d(self._sliding.padded(values), weight, bias, **self._sliding.settings)


QuantizedModule = QuantizedConv1d | QuantizedConv2d | QuantizedLinear
_QUANTIZED: dict[type[nn.Module], Callable[..., QuantizedModule]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
}


def quantize_module(module: nn.Module, weight_limit: int = CODE_LIMIT) -> QuantizedModule:
    """The int8 counterpart of a plain nn.Conv1d, nn.Conv2d or nn.Linear, with a copy of its weights.

    What is frozen stays so. The input's range is a placeholder until observe_ranges. Raises TypeError for any other
    module.
    """
    quantized = _QUANTIZED.get(type(module))
    if quantized is None:
        raise TypeError(f"{type(module).__name__} cannot be quantized; only nn.Conv1d, nn.Conv2d and nn.Linear can")
    return quantized(module, weight_limit).train(module.training)


def round_outputs(model: nn.Module, inputs: Mapping[str, str], results: Mapping[str, str]) -> None:
    """Has the outputs of modules rounded (in place), in the order of quantized module to the module it names.

    In `inputs` a quantized module reads that output: its own quantizer moves there, and further ones that read the
    same output do without. In `results` the output is what the quantized module computes: it gets a quantizer more,
    `result`. Raises KeyError for a name that is no quantized module of the model.
    """
    quantized = quantized_modules(model)
    groups: dict[str, list[str]] = {}
    for reader, output_of in inputs.items():
        groups.setdefault(output_of, []).append(reader)
    for output_of, (first, *others) in groups.items():
        quantizer = quantized[first].activation
        assert isinstance(quantizer, ActivationQuantizer), "a quantizer moves once"
        quantizer.readers = tuple(others)
        _round_output(model, output_of, quantizer)
        for other in others:
            quantized[other].activation = nn.Identity()
    for layer, output_of in results.items():
        quantized[layer].result = quantizer = ActivationQuantizer()
        _round_output(model, output_of, quantizer)


def _round_output(model: nn.Module, output_of: str, quantizer: ActivationQuantizer) -> None:
    quantizer.output_of = output_of
    model.get_submodule(output_of).register_forward_hook(_RoundOutput(quantizer))


@final
class _RoundOutput:
    """A forward hook; it holds the quantizer alone, so that it is copied with its model."""

    def __init__(self, quantizer: ActivationQuantizer) -> None:
        self.quantizer = quantizer

    def __call__(self, _module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        return self.quantizer.round(output)


def quantized_weight(module: QuantizedModule) -> Tensor:
    """The weight as int8 kernels see it, in float; its gradient passes to `weight` within the codes' limit."""
    weight, scale = module.weight, module.weight_scale
    assert isinstance(weight, Tensor)
    if module.weight_limit < CODE_LIMIT:
        # Clamped here, since runtimes know no quantizer of so few levels.
        bound = per_channel(scale * module.weight_limit, weight)
        weight = torch.minimum(torch.maximum(weight, -bound), bound)
    return torch.fake_quantize_per_channel_affine(weight, scale, module.weight_zero_point, 0, -CODE_LIMIT, CODE_LIMIT)


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """The quantized layers of the model by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of the model by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


@torch.no_grad()
def rescale_weights(model: nn.Module) -> None:
    """Chooses every quantized layer's weight_scale anew for its present weight (in place)."""
    for module in quantized_modules(model).values():
        module.weight_scale.copy_(weight_scale(cast(Tensor, module.weight), module.weight_limit))


@torch.no_grad()
def freeze(model: nn.Module) -> None:
    """Snaps every quantized layer's float weight onto its grid (in place); outputs stay as they are, to the bit."""
    for module in quantized_modules(model).values():
        cast(Tensor, module.weight).copy_(quantized_weight(module))


def _take_weights(module: QuantizedModule, layer: nn.Conv1d | nn.Conv2d | nn.Linear, weight_limit: int) -> None:
    """Copies weight and bias into `module`, trainable where they were, and registers the grid of the weight."""
    if not 1 <= weight_limit <= CODE_LIMIT:
        raise ValueError(f"weight_limit is {weight_limit}; it must be between 1 and {CODE_LIMIT}")
    weight = layer.weight.detach()
    module.weight = nn.Parameter(weight.clone(), requires_grad=layer.weight.requires_grad)
    bias = layer.bias
    copied = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    module.register_parameter("bias", copied)
    module.register_buffer("weight_scale", weight_scale(weight, weight_limit))
    zeros = torch.zeros(len(weight), dtype=torch.int32, device=weight.device)
    module.register_buffer("weight_zero_point", zeros, persistent=False)
