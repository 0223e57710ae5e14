"""Layers that compute as kernels on rounded weights and inputs do; gradients pass straight through."""

from collections.abc import Callable, Mapping
from typing import Any, cast, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranksearch.layers import ConvSpec, EmbeddingSpec, LinearSpec, WeightSpec, build_layer, weight_spec
from ranksearch.quantization.fake_quantization import fake_quantize
from ranksearch.quantization.formats import ACTIVATION_LEVELS, affine_range, affine_step
from ranksearch.quantization.weight_formats import Grid, Int8, WeightFormat

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
        if values.dtype != torch.float32:
            return self.round(values.float()).to(values.dtype)
        return fake_quantize(values, self.scale, self.zero_point, 0, ACTIVATION_LEVELS)


class _Rounded(nn.Module):
    """A layer whose weight is rounded to its `weight_format`; its inputs are rounded where `activation` does so.

    It is called as torch's layer is, which names its argument `input`.
    """

    spec: WeightSpec
    weight: nn.Parameter
    bias: nn.Parameter | None
    weight_scale: Tensor | None
    weight_zero_point: Tensor | None

    def __init__(
        self,
        layer: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding,
        weight_format: WeightFormat,
        *,
        rounds_inputs: bool,
        clips: bool,
    ) -> None:
        super().__init__()
        spec = weight_spec(layer)
        assert spec is not None, "quantize_module takes plain layers alone"
        self.spec, self.weight_format = spec, weight_format
        self.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=layer.weight.requires_grad)
        bias = layer._parameters.get("bias")
        copied = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        self.register_parameter("bias", copied)
        grid = weight_format.fit(layer.weight, clips=clips)
        self.register_buffer("weight_scale", grid.scale)
        # A zero point that all weights of the format share is in no file.
        is_own = weight_format.pack_grid(grid).zero_point is not None
        self.register_buffer("weight_zero_point", grid.zero_point, persistent=is_own)
        self.activation: nn.Module = ActivationQuantizer() if rounds_inputs else nn.Identity()
        self.rounds_inputs = rounds_inputs

    @property
    def grid(self) -> Grid:
        """What the weight is rounded to."""
        return Grid(scale=self.weight_scale, zero_point=self.weight_zero_point)

    @property
    def rounded_weight(self) -> Tensor:
        """The weight as kernels see it, in float; its gradient passes to `weight` where it is not clipped."""
        return self.weight_format.round(self.weight, self.grid)

    def in_float(self) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding:
        """The plain layer of the rounded weight, whose inputs are not rounded."""
        with torch.device("meta"):  # draws nothing
            layer = build_layer(self.spec)
        layer.weight = nn.Parameter(self.rounded_weight.detach().contiguous(), requires_grad=self.weight.requires_grad)
        if self.bias is not None:
            layer.register_parameter("bias", self.bias)
        return layer.train(self.training)


class QuantizedLinear(_Rounded):
    """A linear layer that computes as kernels on rounded weights do."""

    spec: LinearSpec

    def forward(self, input: Tensor) -> Tensor:
        return functional.linear(self.activation(input), self.rounded_weight, self.bias)


class _RoundedConvolution(_Rounded):
    """What convolutions share: torch's settings, and how they pad by other than zeros."""

    spec: ConvSpec

    def __init__(
        self, layer: nn.Conv1d | nn.Conv2d, weight_format: WeightFormat, *, rounds_inputs: bool, clips: bool
    ) -> None:
        super().__init__(layer, weight_format, rounds_inputs=rounds_inputs, clips=clips)
        padding: Any = layer.padding if layer.padding_mode == "zeros" else 0
        self.settings: dict[str, Any] = {
            "stride": layer.stride,
            "padding": padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
        }
        self.border = tuple(layer._reversed_padding_repeated_twice)
        self.padding_mode = layer.padding_mode

    def padded(self, values: Tensor) -> Tensor:
        """The inputs with their border, where that is of other than zeros."""
        return values if self.padding_mode == "zeros" else functional.pad(values, self.border, mode=self.padding_mode)


class QuantizedConv1d(_RoundedConvolution):
    """A convolution over one axis that computes as kernels on rounded weights do."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv1d(self.padded(self.activation(input)), self.rounded_weight, self.bias, **self.settings)


class QuantizedConv2d(_RoundedConvolution):
    """A convolution over two axes that computes as kernels on rounded weights do."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.conv2d(self.padded(self.activation(input)), self.rounded_weight, self.bias, **self.settings)


class QuantizedEmbedding(_Rounded):
    """A table of embeddings that gives the rows of rounded weights; only the rows that are asked for are rounded."""

    spec: EmbeddingSpec

    def forward(self, input: Tensor) -> Tensor:
        rows = input.flatten()
        found = functional.embedding(rows, self.weight, self.spec.padding_idx)
        if cast(Any, torch.jit).is_tracing() or len(rows):  # torch rounds no empty tensor, and traces none
            grid = Grid(*(None if values is None else values[rows] for values in self.grid))
            found = self.weight_format.round(found, grid)
        return found.reshape(*input.shape, self.spec.embedding_dim)


QuantizedLayer = QuantizedConv1d | QuantizedConv2d | QuantizedLinear
QuantizedModule = QuantizedLayer | QuantizedEmbedding
_QUANTIZED: dict[type[nn.Module], Callable[..., QuantizedModule]] = {
    nn.Conv1d: QuantizedConv1d,
    nn.Conv2d: QuantizedConv2d,
    nn.Linear: QuantizedLinear,
    nn.Embedding: QuantizedEmbedding,
}


def quantize_module(
    module: nn.Module, weight_format: WeightFormat | None = None, *, rounds_inputs: bool = True, clips: bool = True
) -> QuantizedModule:
    """The counterpart of a plain nn.Conv1d, nn.Conv2d, nn.Linear or nn.Embedding with a copy of its weights, rounded.

    The format is int8 unless given. What is frozen stays so. The input's range is a placeholder until observe_ranges;
    an embedding, whose inputs are indices, rounds none. Without `clips` the weights' grid covers all of them, quickly.
    Raises TypeError for any other module.
    """
    quantized = _QUANTIZED.get(type(module))
    if quantized is None:
        known = ", ".join(f"nn.{kind.__name__}" for kind in _QUANTIZED)
        raise TypeError(f"{type(module).__name__} cannot be quantized; only {known} can")
    return quantized(module, weight_format or Int8(), rounds_inputs=rounds_inputs, clips=clips).train(module.training)


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


def quantized_modules(model: nn.Module) -> dict[str, QuantizedModule]:
    """The quantized layers and embeddings of the model by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedModule)}


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Those of them that multiply by their weights."""
    return {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLayer)}


def activation_quantizers(model: nn.Module) -> dict[str, ActivationQuantizer]:
    """The activation quantizers of the model by name, each once."""
    return {n: m for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}


@torch.no_grad()
def freeze(model: nn.Module) -> None:
    """Snaps every quantized layer's float weight onto its grid (in place); outputs stay as they are, to the bit."""
    for module in quantized_modules(model).values():
        module.weight.copy_(module.rounded_weight)
