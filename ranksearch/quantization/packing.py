"""The true bits of a model: packed codes and 16-bit floats where layers are quantized, as files hold them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ranksearch.errors import PlanError
from ranksearch.quantization.modules import ActivationQuantizer, QuantizedModule, quantized_modules
from ranksearch.quantization.weight_formats import Grid

GRID = {field: f"weight_{field}" for field in Grid._fields}
SCALE, ZERO_POINT = "activation.scale", "activation.zero_point"
COUNT = "num_batches_tracked"
KINDS = (*GRID.values(), SCALE, ZERO_POINT, COUNT)
Joined = dict[str, dict[str, Tensor]]


def is_joined(name: str) -> bool:
    """Whether the tensor of this name holds small tensors of all layers."""
    kind, colon, _ = name.partition(":")
    return bool(colon) and kind in KINDS


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with the packed bits of each quantized layer's `weight`, and what is joined of all layers.

    Where layers are quantized, their steps and zero points, and BatchNorms' counts, are joined in the model's order by
    kind and type, such as `weight_scale:float32`: of small layers a file would else hold more names than numbers.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    joined: dict[str, list[Tensor]] = {}
    for name, module in quantized_modules(model).items():
        state[_join(name, "weight")] = module.weight_format.pack(module.weight, module.grid)
    for name, tensors in _to_join(model).items():
        for kind, values in tensors.items():
            state.pop(_join(name, kind), None)
            joined.setdefault(_joined_name(kind, values), []).append(values.flatten())
    return state | {name: torch.cat(values) for name, values in joined.items()}


def load_packed(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what packed_state gave (in place), strictly: every tensor, and no other.

    Raises PlanError where names, shapes or types do not fit the model.
    """
    modules = quantized_modules(model)
    unpacked = {name: tensor for name, tensor in state.items() if not is_joined(name)}
    own = model.state_dict()
    weights = {_join(name, "weight") for name in modules}
    for name, tensor in unpacked.items():
        is_float = name in own and name not in weights and own[name].is_floating_point()
        if is_float and not tensor.is_floating_point():
            raise _misfit(name, tensor, "a float")
    apart = _apart(_to_join(model), {name: tensor for name, tensor in state.items() if is_joined(name)})
    for name, tensors in apart.items():
        weight = state.get(_join(name, "weight"))
        if name not in modules:
            unpacked |= {_join(name, kind): values for kind, values in tensors.items()}
        elif weight is not None:  # one that is missing is told of by load_state_dict
            unpacked |= _unpacked(name, modules[name], weight, tensors)
    try:
        model.load_state_dict(unpacked, strict=True)
    except RuntimeError as error:
        raise PlanError(f"the weights do not fit the model: {error}") from None


def _steps(module: QuantizedModule) -> Iterator[tuple[str, Tensor]]:
    """The module's steps and zero points by their names in it, as files hold them."""
    for field, values in module.weight_format.pack_grid(module.grid)._asdict().items():
        if values is not None:
            yield GRID[field], values
    if isinstance(module.activation, ActivationQuantizer):
        yield SCALE, module.activation.scale
        yield ZERO_POINT, module.activation.zero_point.to(torch.uint8)  # a code of 0..255


def _to_join(model: nn.Module) -> Joined:
    """The small tensors of each layer by their names in it, as files hold them; none where no layer is quantized."""
    modules = quantized_modules(model)
    counts = {
        name: {COUNT: module.num_batches_tracked}
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None
    }
    return {name: dict(_steps(module)) for name, module in modules.items()} | counts if modules else {}


def _apart(expected: Joined, joined: Mapping[str, Tensor]) -> Joined:
    """The small tensors of each layer, of the `expected` names and shapes, out of what is `joined` of all layers."""
    wanted: dict[str, int] = {}
    for tensors in expected.values():
        for kind, values in tensors.items():
            wanted[_joined_name(kind, values)] = wanted.get(_joined_name(kind, values), 0) + values.numel()
    for name in {**wanted, **joined}:
        _check(name, joined.get(name), wanted.get(name))
    places = dict.fromkeys(joined, 0)
    apart: Joined = {}
    for layer, tensors in expected.items():
        apart[layer] = {}
        for kind, values in tensors.items():
            name = _joined_name(kind, values)
            apart[layer][kind] = joined[name][places[name] :][: values.numel()].reshape(values.shape)
            places[name] += values.numel()
    return apart


def _unpacked(layer: str, module: QuantizedModule, weight: Tensor, steps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weight, steps and zero points of a layer, by their names in the model's state."""
    if weight.dtype != module.weight_format.dtype:
        raise _misfit(_join(layer, "weight"), weight, _called(module.weight_format.dtype))
    shape = module.weight.shape
    n_packed = module.weight_format.pack(module.weight, module.grid).shape
    if weight.shape != n_packed:
        raise PlanError(
            f"the weights do not fit the model: tensor {_join(layer, 'weight')!r} has shape {tuple(weight.shape)}; "
            f"the plan wants {tuple(n_packed)}"
        )
    grid = module.weight_format.unpack_grid(Grid(**{f: steps.get(name) for f, name in GRID.items()}), shape)
    values = {"weight": module.weight_format.unpack(weight, grid, shape)}
    persistent = module.state_dict()
    values |= {GRID[field]: v for field, v in grid._asdict().items() if GRID[field] in persistent}
    if SCALE in steps:
        values |= {SCALE: steps[SCALE], ZERO_POINT: steps[ZERO_POINT].int()}
    return {_join(layer, name): tensor for name, tensor in values.items()}


def _check(name: str, found: Tensor | None, wanted: int | None) -> None:
    """Raises PlanError where a joined tensor is not there as it has to be; its name tells its type."""
    dtype = name.rpartition(":")[2]
    if found is None or wanted is None or len(found) != wanted or _called(found.dtype) != dtype:
        told = "missing" if found is None else f"{_called(found.dtype)} of {found.numel()} values"
        raise PlanError(f"tensor {name!r} is {told}; the plan wants {dtype + f' of {wanted}' if wanted else 'none'}")


def _joined_name(kind: str, values: Tensor) -> str:
    return f"{kind}:{_called(values.dtype)}"


def _misfit(name: str, tensor: Tensor, wanted: str) -> PlanError:
    return PlanError(f"tensor {name!r} is {_called(tensor.dtype)}; the plan wants {wanted}")


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor
