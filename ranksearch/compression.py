"""Apply a plan to a model: `rebuild` makes the architecture, `compress` also fills it."""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from ranksearch.decompositions import DECOMPOSITIONS, check_choice
from ranksearch.errors import DecompositionError, PlanError
from ranksearch.factored import Factored, telling
from ranksearch.factorisations import Factorisations
from ranksearch.finding import can_be_split, compressible_layers
from ranksearch.inputs import check_inputs
from ranksearch.layers import EmbeddingSpec, WeightSpec, build_layer, layer_spec, layer_weight, weight_spec
from ranksearch.plan import LayerChoice, Plan
from ranksearch.quantization import (
    CODE_LIMIT,
    Half,
    Int4,
    Int8,
    RoundedOutputs,
    SharedTensors,
    WeightFormat,
    activation_quantizers,
    observe_ranges,
    quantize_module,
    quantized_layers,
    round_outputs,
    rounded_outputs,
    shared_tensors,
)
from ranksearch.refit import refit_last_factors
from ranksearch.rounding import round_weights, sample_outputs
from ranksearch.spec import Batches
from ranksearch.statistics import LayerStatistics, check_complete, collect
from ranksearch.statistics.rows import first_inputs
from ranksearch.surgery import copy_model, replace_modules, unwrapped
from ranksearch.trees import first_examples

PLACEHOLDER_SEED = 0
RANGE_EXAMPLES, ROUNDING_EXAMPLES = 512, 256
# The (weight, activation) bits of a layer, and the options that say how its weights are rounded.
BUILT_BITS: Mapping[tuple[int, int], tuple[str, ...]] = {
    (32, 32): (),
    (16, 32): ("dtype",),
    (16, 16): ("dtype",),
    (8, 32): (),
    (8, 16): (),
    (8, 8): (),
    (4, 32): ("group_size", "scheme"),
    (4, 16): ("group_size", "scheme"),
}


def check_plan(model: nn.Module, plan: Plan) -> dict[str, WeightSpec]:
    """The specs of the layers that the plan changes.

    Raises PlanError for a layer that the model does not have or that cannot be compressed, and for a choice that
    does not fit its layer.
    """
    modules = dict(model.named_modules())
    for name in plan.layers:
        if name not in modules:
            near = difflib.get_close_matches(name, modules, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "a layer's name is that of model.named_modules()"
            raise PlanError(f"the model has no layer {name!r}; {hint}")
    return {name: _checked(name, modules[name], choice) for name, choice in plan.changes().items()}


def _checked(name: str, module: nn.Module, choice: LayerChoice) -> WeightSpec:
    spec = weight_spec(module)
    if parametrize.is_parametrized(module) or (spec is not None and module._parameters.get("weight") is None):
        raise PlanError(f"layer {name!r}: its weight is computed from others; rs.expose_layers makes it plain")
    if spec is None:
        split = "; rs.expose_layers splits it into Linears" if can_be_split(module) else ""
        raise PlanError(
            f"layer {name!r} is a {type(module).__name__}; only Linear, Conv1d, Conv2d and transformers' Conv1D can be "
            f"compressed, and Embedding rounded{split}"
        )
    _check_bits(name, choice)
    if isinstance(spec, EmbeddingSpec):
        if choice.decomposition != "none" or choice.activation_bits == 8:
            raise PlanError(
                f"layer {name!r} is an Embedding, whose inputs are indices: only the bits of its weights can be fewer, "
                f"not {choice.label}"
            )
        return spec
    try:
        check_choice(spec, choice, layer=name)
    except DecompositionError as error:
        raise PlanError(str(error)) from None
    return spec


def _check_bits(name: str, choice: LayerChoice) -> None:
    bits = choice.weight_bits, choice.activation_bits
    if bits not in BUILT_BITS:
        built = ", ".join(f"{weights}/{activations}" for weights, activations in BUILT_BITS)
        raise PlanError(f"layer {name!r}: bits {choice.bits} are not built; use one of {built}")
    foreign = sorted(set(choice.rounding_options) - set(BUILT_BITS[bits]))
    if foreign:
        raise PlanError(f"layer {name!r}: bits {choice.bits} have no option {foreign[0]!r}; leave it out")


def rebuild(
    model: nn.Module, plan: Plan, weight_limit: int = CODE_LIMIT, shared: SharedTensors | None = None
) -> nn.Module:
    """A copy of the model with the plan's architecture; the layers that the plan changes hold placeholders.

    Placeholders are random weights at the dense layer's scale from a fixed seed, and positive scales and ranges:
    with zeros a runtime may drop its integer kernels. `weight_limit` is the largest int8 weight code. Quantizers sit
    where the plan's `quantizers` say; a plan without has them at the inputs of 8-bit layers but where `shared`, as
    shared_tensors gives it, knows a tensor that 8-bit layers alone multiply. Raises PlanError where the plan does not
    fit the model.
    """
    model = unwrapped(model)
    specs = check_plan(model, plan)
    rebuilt = copy_model(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(PLACEHOLDER_SEED)
        built = {name: _placeholder(model.get_submodule(name), plan.choice(name)) for name in specs}
    return _quantize(replace_modules(rebuilt, built), plan, weight_limit, shared or SharedTensors(), clips=False)


def compress(
    model: nn.Module,
    plan: Plan,
    *,
    calibration: Batches | None = None,
    loss: Any = None,
    statistics: Mapping[str, LayerStatistics] | None = None,
    factorisations: Factorisations | None = None,
    weight_limit: int = CODE_LIMIT,
    shared: SharedTensors | None = None,
) -> nn.Module:
    """A copy of the model with the plan applied, its factors fitted to the calibration data; nothing is trained.

    The factors minimise the change of each layer's output; then each last factor is solved again by least squares
    on the inputs that come from the already compressed layers before it; then the ranges of quantized activations
    are set, and weights of 8 and 4 bits rounded on the inputs that come from the already rounded layers. Without
    calibration data factors are fitted to the weights alone, weights rounded plainly, and plans with 8-bit activations
    refused. `statistics` (or `factorisations`, which hold them) save a second calibration pass over the dense model,
    and `shared`, as shared_tensors gives it, a run of it on one example.
    Raises PlanError where the plan does not fit the model, or calibration data can be read only once; StudyError
    where the statistics are those of another model, or lack a layer that is to be factored, and where the data does
    not fit the model's forward or lies on another device.
    """
    model = unwrapped(model)
    specs = check_plan(model, plan)
    if isinstance(calibration, Iterator):
        raise PlanError("calibration data is read several times: pass a list or a DataLoader, not an iterator")
    if calibration is None and any(choice.activation_bits == 8 for choice in plan.layers.values()):
        raise PlanError("8-bit activations need calibration data: pass calibration=, batches of (inputs, targets)")
    if factorisations is None:
        known = _collect(model, specs, calibration, loss) if statistics is None else statistics
        factorisations = Factorisations(model, known, only_last=True)
        if statistics is not None:
            factored = [name for name, choice in plan.changes().items() if choice.decomposition != "none"]
            check_complete(statistics, factored)
    with torch.random.fork_rng(devices=[]):  # modules draw weights before they are filled
        built = {name: _filled(model, name, plan.choice(name), factorisations) for name in specs}
    compressed = replace_modules(copy_model(model), built)
    last_factors = _last_factors(built, plan)
    if calibration is not None and last_factors:
        refit_last_factors(compressed, last_factors, model, calibration)
    if shared is None:
        shared = _find_shared(model, plan, calibration)
    return _rounded(compressed, plan, weight_limit, shared, calibration)


def _rounded(
    model: nn.Module, plan: Plan, weight_limit: int, shared: SharedTensors, calibration: Batches | None
) -> nn.Module:
    """The filled model with its layers quantized, in place: ranges set, then weights rounded, on calibration data."""
    integers = [name for name, choice in plan.layers.items() if choice.weight_bits < 16]
    if calibration is None or not integers:
        return _quantize(model, plan, weight_limit, shared)
    inputs = first_inputs(calibration, ROUNDING_EXAMPLES)
    factors = [
        _join(name, path)
        for name in integers
        for path, module in _factor_modules(model.get_submodule(name)).items()
        if layer_spec(module) is not None  # an embedding has no inputs to round it by
    ]
    wanted = sample_outputs(model, factors, inputs)
    quantized = _quantize(model, plan, weight_limit, shared)
    calibrate_ranges(quantized, calibration)
    round_weights(quantized, wanted, inputs)
    return quantized


def calibrate_ranges(model: nn.Module, calibration: Batches) -> None:
    """Sets the ranges of the model's activation quantizers, in place, from the first calibration examples."""
    if activation_quantizers(model):
        observe_ranges(model, first_examples(calibration, RANGE_EXAMPLES))


def count_params(model: nn.Module) -> int:
    """The number of parameters, each counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _collect(
    model: nn.Module, specs: Mapping[str, WeightSpec], calibration: Batches | None, loss: Any
) -> dict[str, LayerStatistics]:
    if calibration is None or not specs:
        return {}
    inputs = next((inputs for inputs, _ in calibration), None)
    if inputs is None:
        raise PlanError("the calibration data yields nothing; pass batches of (inputs, targets)")
    check_inputs(model, inputs)
    found = compressible_layers(model, inputs).layers
    return collect(model, {name: found[name] for name in specs if name in found}, calibration, loss)


def _spec(module: nn.Module) -> WeightSpec:
    spec = weight_spec(module)
    assert spec is not None, "checked by check_plan"
    return spec


def _built(layer: nn.Module, choice: LayerChoice) -> nn.Module:
    """The float modules that stand for the layer, weights as torch initialises them."""
    spec = _spec(layer)
    if choice.decomposition == "none":
        built: nn.Module = build_layer(spec)
        for name, parameter in built.named_parameters():
            parameter.requires_grad_(layer.get_parameter(name).requires_grad)
    else:
        assert not isinstance(spec, EmbeddingSpec), "checked by check_plan"
        built = DECOMPOSITIONS[choice.decomposition].build(spec, choice.ranks, choice.factor_options)
        built = Factored(*built) if type(built) is nn.Sequential else built
    return telling(built.to(layer.get_parameter("weight")).train(layer.training), spec)


def _placeholder(layer: nn.Module, choice: LayerChoice) -> nn.Module:
    built = _built(layer, choice)
    dense, is_dense = layer_weight(layer), choice.decomposition == "none"
    # A factor that never trains, a fixed basis, is what it is.
    modules = [m for m in _factor_modules(built).values() if is_dense or m.get_parameter("weight").requires_grad]
    for module in modules:
        nn.init.kaiming_normal_(layer_weight(module), nonlinearity="linear")
    layer_weight(modules[-1]).mul_(float(dense.norm()) / dense.shape[0] ** 0.5)
    return built


@torch.no_grad()
def _filled(model: nn.Module, name: str, choice: LayerChoice, factorisations: Factorisations) -> nn.Module:
    """The float modules that stand for the layer, with its factors as weights and its bias on the last."""
    layer = model.get_submodule(name)
    built = _built(layer, choice)
    if choice.decomposition == "none":
        layer_weight(built).copy_(layer_weight(layer))
        if layer._parameters.get("bias") is not None:
            built.get_parameter("bias").copy_(layer.get_parameter("bias"))
        return built
    factors = factorisations.factors(name, choice)
    modules = list(_factor_modules(built).values())
    for module, weight in zip(modules, factors.weights, strict=True):
        layer_weight(module).copy_(weight)
    bias = modules[-1].get_parameter("bias")
    if layer._parameters.get("bias") is not None:
        bias.add_(layer.get_parameter("bias"))
    if factors.mean_change is not None:
        # What the cut components give on average is a constant, which the bias can keep.
        bias.add_(factors.mean_change.to(bias))
    return built


def _factor_modules(built: nn.Module) -> dict[str, nn.Module]:
    """The parametrised modules of a built layer by their path below it, in the order in which they run."""
    return {name: module for name, module in built.named_modules() if weight_spec(module) is not None}


def _last_factors(built: Mapping[str, nn.Module], plan: Plan) -> dict[str, str]:
    """The submodule that holds the last factor, for each layer that was factored."""
    return {
        name: _join(name, list(_factor_modules(module))[-1])
        for name, module in built.items()
        if plan.choice(name).decomposition != "none"
    }


def _quantize(
    model: nn.Module, plan: Plan, weight_limit: int, shared: SharedTensors, *, clips: bool = True
) -> nn.Module:
    """The model with the factors of its rounded layers replaced, in place, by quantized modules."""
    quantized = replace_modules(model, dict(_quantized_modules(model, plan, weight_limit, clips)))
    places = _recorded_places(plan) if plan.quantizers else _places(quantized, plan, shared)
    try:
        round_outputs(quantized, places.inputs, places.results)
    except (KeyError, AttributeError) as error:
        raise PlanError(f"the plan's quantizers do not fit the model: {error}") from None
    return quantized


def _recorded_places(plan: Plan) -> RoundedOutputs:
    """Where the quantizers sit, by the modules that hold them, as a plan's file tells."""
    inputs: dict[str, str] = {}
    results: dict[str, str] = {}
    for quantizer in plan.quantizers:
        *module, attribute = quantizer.where.split(".")
        if quantizer.output_of is not None:
            readers = (".".join(module), *quantizer.readers)
            (results if attribute == "result" else inputs).update(dict.fromkeys(readers, quantizer.output_of))
    return RoundedOutputs(inputs=inputs, results=results)


def _places(model: nn.Module, plan: Plan, shared: SharedTensors) -> RoundedOutputs:
    """Where the quantizers of 8-bit layers sit, by quantized module: a layer's first factor reads, its last gives."""
    layers = [name for name, choice in plan.layers.items() if choice.activation_bits == 8]
    places = rounded_outputs(shared, layers)
    factors = {name: list(quantized_layers(model.get_submodule(name))) for name in layers}
    return RoundedOutputs(
        inputs={_join(name, factors[name][0]): module for name, module in places.inputs.items()},
        results={_join(name, factors[name][-1]): module for name, module in places.results.items()},
    )


def _find_shared(model: nn.Module, plan: Plan, calibration: Batches | None) -> SharedTensors:
    quantized = any(choice.activation_bits == 8 for choice in plan.layers.values())
    if calibration is None or plan.quantizers or not quantized:
        return SharedTensors()
    return shared_tensors(model, next(iter(first_examples(calibration, 1))))


def _quantized_modules(model: nn.Module, plan: Plan, weight_limit: int, clips: bool) -> Iterator[tuple[str, nn.Module]]:
    for layer, choice in plan.layers.items():
        if choice.weight_bits < 32:
            weights, rounds_inputs = weight_format(choice, weight_limit), choice.activation_bits == 8
            for path, module in _factor_modules(model.get_submodule(layer)).items():
                quantized = quantize_module(module, weights, rounds_inputs=rounds_inputs, clips=clips)
                yield _join(layer, path), telling(quantized, quantized.spec)


def weight_format(choice: LayerChoice, weight_limit: int) -> WeightFormat:
    """How the choice rounds weights of 16, 8 or 4 bits; `weight_limit` holds where products are of integers."""
    if choice.weight_bits == 16:
        return Half(getattr(torch, str(choice.options.get("dtype", "float16"))))
    if choice.weight_bits == 8:
        return Int8(weight_limit if choice.activation_bits == 8 else CODE_LIMIT)
    return Int4(**cast(dict[str, Any], choice.rounding_options))


def _join(*parts: str) -> str:
    """The dotted name; a root's name is empty."""
    return ".".join(part for part in parts if part)
