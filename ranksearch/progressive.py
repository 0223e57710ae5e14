"""Compression in stages: cut a little, train a little, cut more; for plans that leave little of a model."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.layers import ConvSpec, LayerSpec, build_layer, layer_spec
from ranksearch.plan import LayerChoice, Plan
from ranksearch.recovery.factors import product
from ranksearch.surgery import copy_model, replace_modules

# A compressed copy of a model by a plan; and a training in place for this share of the budget.
Cut = Callable[[nn.Module, Plan], nn.Module]
Train = Callable[[nn.Module, float], None]


def n_cuts(plan: Plan, n_stages: int) -> int:
    """In how many steps a plan is cut that may be cut in so many: one that factors nothing, in one."""
    return n_stages if any(choice.decomposition != "none" for choice in plan.layers.values()) else 1


def compress_in_stages(source: nn.Module, plan: Plan, n_stages: int, cut: Cut, train: Train) -> nn.Module:
    """The source cut by the plan in so many stages, trained after each but the last for an equal share of the budget.

    Between stages the factors of a layer are multiplied out, and what they amount to is factored anew.
    """
    for step in _steps(source, plan, n_stages):
        model = cut(source, step)
        train(model, 1 / n_stages)
        source = multiplied_out(model, source, step)
    return cut(source, plan)


def _steps(source: nn.Module, plan: Plan, n_stages: int) -> Sequence[Plan]:
    """The plan at larger ranks for each stage before the last, in float32; only what the plan factors is changed."""
    factored = {name: choice for name, choice in plan.layers.items() if choice.decomposition != "none"}
    specs = {name: layer_spec(source.get_submodule(name)) for name in factored}
    known = {name: spec for name, spec in specs.items() if spec is not None}
    return [
        Plan(layers={name: _wider(factored[name], spec, stage / n_stages) for name, spec in known.items()})
        for stage in range(1, n_cuts(plan, n_stages))
    ]


def _wider(choice: LayerChoice, spec: LayerSpec, share: float) -> LayerChoice:
    """The choice at ranks this share of the way, in the logarithm, from where it begins to save parameters."""
    method, options = DECOMPOSITIONS[choice.decomposition], choice.factor_options
    start = method.break_even(spec, options) or method.max_ranks(spec, options)
    ranks = tuple(
        max(rank, round(first * (rank / first) ** share)) for rank, first in zip(choice.ranks, start, strict=True)
    )
    return choice.in_float.model_copy(update={"ranks": ranks})


def multiplied_out(model: nn.Module, source: nn.Module, plan: Plan) -> nn.Module:
    """A copy of the model in which the layers that the plan factored are plain again, of the same outputs."""
    plain = {}
    for name in plan.layers:
        spec = layer_spec(source.get_submodule(name))
        assert spec is not None, "a plan names layers"
        weight, bias = product(tuple(model.get_submodule(name).children()))
        plain[name] = _layer(spec, weight.detach(), bias)
    return replace_modules(copy_model(model), plain)


def _layer(spec: LayerSpec, weight: Tensor, bias: Tensor | None) -> nn.Module:
    with torch.device("meta"):  # draws nothing
        layer = build_layer(replace(spec, bias=bias is not None))
    layer.weight = nn.Parameter(_in_groups(spec, weight).clone())
    layer.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))
    return layer


def _in_groups(spec: LayerSpec, weight: Tensor) -> Tensor:
    """The part of a weight (out, in, ...) that a layer in groups has."""
    groups = spec.groups if isinstance(spec, ConvSpec) else 1
    blocks = weight.reshape(groups, weight.shape[0] // groups, groups, weight.shape[1] // groups, *weight.shape[2:])
    index = torch.arange(groups)
    return blocks[index, :, index].reshape(spec.weight_shape)
