"""The layers of a model that can be compressed, and why the others cannot."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ranksearch.errors import StudyError
from ranksearch.factored import Factored, telling
from ranksearch.layers import (
    EmbeddingSpec,
    LayerSpec,
    LinearSpec,
    WeightSpec,
    call_model,
    evaluating,
    first_argument,
    weight_spec,
)
from ranksearch.surgery import replace_modules
from ranksearch.trees import copied, tensors

# What is a layer, or becomes one by rs.expose_layers.
_KINDS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.MultiheadAttention, nn.Embedding)


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

    def without(self, reasons: Mapping[str, str]) -> "FoundLayers":
        """Those that have no reason to be skipped."""
        return FoundLayers(
            layers={name: info for name, info in self.layers.items() if name not in reasons},
            embeddings={name: info for name, info in self.embeddings.items() if name not in reasons},
            skipped={**self.skipped, **reasons},
        )

    @property
    def all(self) -> Mapping[str, WeightInfo]:
        """Whatever a plan may change, layers first."""
        return {**self.layers, **self.embeddings}


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


def irreplaceable_layers(model: nn.Module, example: Any, layers: Mapping[str, WeightInfo]) -> dict[str, str]:
    """The layers in whose place no factors can be, with the reason: the model reads their weight, or asks their class.

    Found by putting the layer itself behind what would stand for it: all of them at once, then one by one.
    """
    if "" in layers:  # the model is a layer, and has no code of its own around it
        return {}
    with evaluating(model):
        expected = tensors(call_model(model, copied(example)))
        if _stands_in(model, example, layers, expected) is None:
            return {}
        told = {name: _stands_in(model, example, {name: info}, expected) for name, info in layers.items()}
    return {name: reason for name, reason in told.items() if reason is not None}


def _stands_in(
    model: nn.Module, example: Any, layers: Mapping[str, WeightInfo], expected: Sequence[Tensor]
) -> str | None:
    """Why the model does not give the same with something else in the layers' place; None where it does."""
    originals = {name: model.get_submodule(name) for name in layers}
    replace_modules(model, {name: telling(Factored(originals[name]), info.spec) for name, info in layers.items()})
    try:
        found = tensors(call_model(model, copied(example)))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        return f"the model reads its weight, or asks for its class, beside calling it ({first})"
    finally:
        replace_modules(model, originals)
    same = len(found) == len(expected) and all(
        a.shape == b.shape and torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, expected, strict=True)
    )
    return None if same else "the model asks for its class: with another module in its place it gives other outputs"


def unread_layers(model: nn.Module, example: Any, layers: Iterable[str]) -> dict[str, str]:
    """The layers on which nothing that the model gives depends, such as a pooler that is not read, with that reason.

    None where no gradient can tell: where all outputs are integers, or the model changes a frozen layer's in place.
    """
    given: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            given.setdefault(name, []).append(output if output.requires_grad else output.requires_grad_())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in layers]
    try:
        with evaluating(model), torch.enable_grad():
            told = [tensor for tensor in tensors(call_model(model, example)) if tensor.requires_grad]
            if not told:
                return {}
            flat = [output for outputs in given.values() for output in outputs]
            total = torch.stack([tensor.float().sum() for tensor in told]).sum()
            gradients = iter(torch.autograd.grad(total, flat, allow_unused=True))
    except RuntimeError:
        return {}
    finally:
        for handle in handles:
            handle.remove()
    reached = {name: [next(gradients) is not None for _ in outputs] for name, outputs in given.items()}
    reason = "nothing that the model gives depends on it, or no gradient reaches it (torch.no_grad, detach)"
    return {name: reason for name, calls in reached.items() if not any(calls)}


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
