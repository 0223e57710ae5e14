"""The layers that can be compressed, what they look like, and why the others cannot."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard, overload

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ranksearch.errors import StudyError

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
# What is a layer, or becomes one by rs.expose_layers.
_KINDS = (nn.Linear, *_CONVOLUTIONS.values(), nn.MultiheadAttention, nn.Embedding)


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerInfo:
    """A compressible layer as it runs: shapes are those of its first call, MACs those of all calls together."""

    name: str
    spec: LayerSpec
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    n_params: int
    n_calls: int


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddingInfo:
    """A table of embeddings as it runs; `input_shape` is that of the first indices it is asked for."""

    name: str
    spec: EmbeddingSpec
    input_shape: tuple[int, ...]
    n_params: int
    n_calls: int


WeightInfo = LayerInfo | EmbeddingInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundLayers:
    """The compressible layers by name, in the order in which they first run, and the skipped with the reason.

    `embeddings` take bits alone.
    """

    layers: Mapping[str, LayerInfo]
    skipped: Mapping[str, str]
    embeddings: Mapping[str, EmbeddingInfo] = field(default_factory=dict)

    @property
    def all(self) -> Mapping[str, WeightInfo]:
        """Whatever a plan may change, layers first."""
        return {**self.layers, **self.embeddings}


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


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode without gradients; every submodule's mode comes back afterwards."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.no_grad():
            yield model.eval()
    finally:
        for module, training in modes.items():
            module.training = training


def compressible_layers(model: nn.Module, example: Any) -> FoundLayers:
    """Runs the model once on `example` and lists its layers that have a spec.

    A module registered under several names counts once, under the first. Raises StudyError where no layer can
    be compressed, with what was skipped and why.
    """
    modules = {name: module for name, module in model.named_modules() if _has_matrix(module)}
    specs = {name: weight_spec(module) for name, module in modules.items()}
    calls: dict[str, list[tuple[tuple[int, ...], tuple[int, ...]]]] = {}

    def record(name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor) -> None:
            given = first_argument(inputs, named)
            calls.setdefault(name, []).append((tuple(given.shape), tuple(output.shape)))

        return hook

    handles = [
        modules[name].register_forward_hook(record(name), with_kwargs=True) for name, spec in specs.items() if spec
    ]
    try:
        with evaluating(model):
            call_model(model, example)
    finally:
        for handle in handles:
            handle.remove()

    users, readers = weight_users(model), _direct_readers(model)
    skipped = {}
    for name, spec in specs.items():
        reason = readers.get(id(modules[name])) or _reason_to_skip(modules[name], spec, name in calls, users)
        if reason is not None:
            skipped[name] = reason
    found = [_info(name, modules[name], shapes) for name, shapes in calls.items() if name not in skipped]
    if not found:
        listed = "; ".join(f"{name} ({reason})" for name, reason in skipped.items()) or "it has no weights"
        raise StudyError(f"{type(model).__name__} has no layer that can be compressed: {listed}")
    layers = {info.name: info for info in found if isinstance(info, LayerInfo)}
    embeddings = {info.name: info for info in found if isinstance(info, EmbeddingInfo)}
    return FoundLayers(layers=layers, skipped=skipped, embeddings=embeddings)


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


def _info(name: str, module: nn.Module, calls: list[tuple[tuple[int, ...], tuple[int, ...]]]) -> WeightInfo:
    spec = weight_spec(module)
    assert spec is not None, "only layers with a spec are hooked"
    input_shape, output_shape = calls[0]
    if isinstance(spec, EmbeddingSpec):
        n_params = spec.num_embeddings * spec.embedding_dim
        return EmbeddingInfo(name=name, spec=spec, input_shape=input_shape, n_params=n_params, n_calls=len(calls))
    return LayerInfo(
        name=name,
        spec=spec,
        input_shape=input_shape,
        output_shape=output_shape,
        macs=sum(_macs(spec, shape) for _, shape in calls),
        n_params=sum(parameter.numel() for parameter in module.parameters()),
        n_calls=len(calls),
    )


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


def _has_matrix(module: nn.Module) -> bool:
    """Whether it multiplies by weights of its own, under whatever name; containers with a parameter do not count."""
    if parametrize.is_parametrized(module):
        return True
    leaf = not module._modules or isinstance(module, nn.MultiheadAttention)
    return leaf and any(p is not None and p.dim() >= 2 for p in module._parameters.values())


def _direct_readers(model: nn.Module) -> dict[int, str]:
    """Why layers must stay what they are, by the identity of those whose weight torch reads without calling them."""
    reasons: dict[int, str] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            told = "rs.expose_layers splits it" if can_be_split(module) else "it cannot be split"
            reasons[id(module.out_proj)] = f"MultiheadAttention reads its weight without calling it; {told}"
        # After rs.expose_layers the block has another attention, and calls its layers.
        elif isinstance(module, nn.TransformerEncoderLayer) and isinstance(module.self_attn, nn.MultiheadAttention):
            reason = "TransformerEncoderLayer reads its weight without calling it; rs.expose_layers has it called"
            reasons |= dict.fromkeys((id(module.linear1), id(module.linear2)), reason)
    return reasons


def can_be_split(module: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Whether it is an nn.MultiheadAttention that rs.expose_layers splits: of plain layers, with no added key."""
    return (
        type(module) is nn.MultiheadAttention
        and module.bias_k is None
        and not module.add_zero_attn
        and isinstance(module.out_proj, nn.Linear)
        and not parametrize.is_parametrized(module)
    )


def weight_users(model: nn.Module) -> dict[int, int]:
    """How many modules hold each parameter, by the parameter's identity."""
    held = [parameter for module in model.modules() for parameter in module._parameters.values()]
    return Counter(id(parameter) for parameter in held if parameter is not None)


def _reason_to_skip(module: nn.Module, spec: WeightSpec | None, called: bool, users: Mapping[int, int]) -> str | None:
    kind = parametrize.type_before_parametrizations(module)
    if kind not in _KINDS and spec is None:
        return f"{kind.__name__} is not supported"
    if any(users[id(parameter)] > 1 for parameter in module.parameters()):
        return "its weight is tied to another module's"
    if kind is nn.MultiheadAttention:
        told = "rs.expose_layers splits it into Linears" if can_be_split(module) else "it cannot be split"
        return f"MultiheadAttention multiplies by weights of its own; {told}"
    if kind is nn.Embedding and spec is None and not parametrize.is_parametrized(module):
        return "an Embedding with max_norm or sparse gradients is not supported"
    if "weight" not in module._parameters:
        return (
            "its weight is computed from other parameters (weight_norm, spectral_norm, pruning); "
            "rs.expose_layers makes it plain"
        )
    return None if called else "the example never runs it"


def _macs(spec: LayerSpec, output_shape: tuple[int, ...]) -> int:
    """Multiply-adds of one call for one example."""
    if isinstance(spec, LinearSpec):
        rows = int(torch.Size(output_shape[1:-1]).numel())
        return rows * spec.in_features * spec.out_features
    return int(torch.Size(output_shape[1:]).numel()) * math.prod(spec.weight_shape[1:])
