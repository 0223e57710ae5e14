"""Layers without their weights, and models as they are called."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSpec:
    """A linear layer without its weights."""

    in_features: int
    out_features: int
    bias: bool

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvSpec:
    """A convolution over one or two axes without its weights; `padding` is in pixels or torch's word for it."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: PaddingMode
    bias: bool

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingSpec:
    """A table of embeddings without its weights: its rows are looked up, not multiplied by, so it takes bits alone."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.num_embeddings, self.embedding_dim)


LayerSpec = LinearSpec | ConvSpec
WeightSpec = LayerSpec | EmbeddingSpec
_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}
_PRECISIONS = {torch.float16: "f16", torch.bfloat16: "bf16"}


def layer_spec(module: nn.Module) -> LayerSpec | None:
    """The spec of a Linear, Conv1d, Conv2d or transformers' Conv1D; None for any other module, subclasses included."""
    if type(module) is nn.Linear or _is_transposed_linear(module):
        n_outputs, n_inputs = layer_weight(module).shape
        return LinearSpec(in_features=n_inputs, out_features=n_outputs, bias=module.bias is not None)
    if type(module) is nn.Conv1d or type(module) is nn.Conv2d:
        return ConvSpec(
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=module.kernel_size,
            stride=module.stride,
            padding=module.padding,
            dilation=module.dilation,
            groups=module.groups,
            padding_mode=module.padding_mode,
            bias=module.bias is not None,
        )
    return None


def weight_spec(module: nn.Module) -> WeightSpec | None:
    """The spec of what takes bits: that of a layer, or of an nn.Embedding that only looks up its rows; else None."""
    if type(module) is nn.Embedding:
        # Others change their weight when they run, or train it by gradients that no optimizer here takes.
        plain = module.max_norm is None and not module.sparse
        return _embedding_spec(module) if plain else None
    return layer_spec(module)


def layer_weight(module: nn.Module) -> Tensor:
    """The module's weight as its spec has it, (T, ...), outputs first: a detached view, through which it is written."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if _is_transposed_linear(module) else weight.detach()


@overload
def build_layer(spec: LayerSpec) -> nn.Linear | nn.Conv1d | nn.Conv2d: ...


@overload
def build_layer(spec: WeightSpec) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding: ...


def build_layer(spec: WeightSpec) -> nn.Linear | nn.Conv1d | nn.Conv2d | nn.Embedding:
    """A fresh layer of torch's own kind for this spec, weights as torch initialises them."""
    if isinstance(spec, EmbeddingSpec):
        return nn.Embedding(spec.num_embeddings, spec.embedding_dim, padding_idx=spec.padding_idx)
    if isinstance(spec, LinearSpec):
        return nn.Linear(spec.in_features, spec.out_features, bias=spec.bias)
    return _CONVOLUTIONS[len(spec.kernel_size)](
        spec.in_channels,
        spec.out_channels,
        spec.kernel_size,  # type: ignore[arg-type]
        stride=spec.stride,  # type: ignore[arg-type]
        padding=spec.padding,  # type: ignore[arg-type]
        dilation=spec.dilation,  # type: ignore[arg-type]
        groups=spec.groups,
        bias=spec.bias,
        padding_mode=spec.padding_mode,
    )


def other_floats(model: nn.Module) -> str | None:
    """What to do about a model whose parameters are not all float32, in which models are measured; None where they are.

    Runtimes lower the precision of a float32 model by their target's, and have kernels or none for other floats.
    """
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            told = _PRECISIONS.get(parameter.dtype)
            wanted = f", and Target(precision={told!r}) to run it in such floats" if told else ""
            dtype = str(parameter.dtype).removeprefix("torch.")
            return f"parameter {name!r} is {dtype}, and models are measured in float32: give model.float(){wanted}"
    return None


def call_model(model: nn.Module, inputs: Any) -> Any:
    """Calls the model as users write it: a tensor as model(x), a tuple as model(*x), a mapping as model(**x)."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def first_argument(arguments: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> Tensor:
    """A layer's input, however it was given."""
    return arguments[0] if arguments else next(iter(named.values()))


def in_eval_mode(model: nn.Module) -> nn.Module:
    """The model, put in eval mode (in place); a `train` of its own, which eval() calls, may give nothing back."""
    model.eval()
    return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; every submodule's mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield in_eval_mode(model) if any(modes.values()) else model
    finally:
        for module, training in modes.items():
            # Setting an attribute of a module takes ten times as long as reading it.
            if module.training != training:
                module.training = training


def count_macs(model: nn.Module, example: Any) -> int:
    """Multiply-adds of the weights that the model applies to `example`, one row; any module with a `weight` counts.

    An embedding only looks its rows up.
    """
    total = 0

    def add(module: nn.Module, _inputs: Any, output: Any) -> None:
        nonlocal total
        if isinstance(output, Tensor):
            total += output[0].numel() * layer_weight(module)[0].numel()

    handles = [m.register_forward_hook(add) for m in model.modules() if _has_own_weight(m)]
    try:
        with evaluating(model):
            call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()
    return total


def _embedding_spec(module: nn.Embedding) -> EmbeddingSpec:
    return EmbeddingSpec(
        num_embeddings=module.num_embeddings, embedding_dim=module.embedding_dim, padding_idx=module.padding_idx
    )


def _is_transposed_linear(module: nn.Module) -> bool:
    """Whether it is the `Conv1D` of transformers, a Linear whose weight is (in, out); told without importing them."""
    return (type(module).__module__, type(module).__name__) == ("transformers.pytorch_utils", "Conv1D")


def _has_own_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    looks_up = isinstance(module, nn.Embedding) or isinstance(getattr(module, "spec", None), EmbeddingSpec)
    return weight is not None and weight.dim() >= 2 and not looks_up
