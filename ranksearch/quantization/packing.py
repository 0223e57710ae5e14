"""The true bits of a model: packed codes and 16-bit floats where layers are quantized, as files hold them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ranksearch.errors import PlanError
from ranksearch.quantization.modules import QuantizedModule, quantized_modules
from ranksearch.quantization.weight_formats import Grid

GRID = {field: f"weight_{field}" for field in Grid._fields}


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with the packed bits of each quantized layer's `weight`, beside its packed grid."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, module in quantized_modules(model).items():
        state[_join(name, "weight")] = module.weight_format.pack(module.weight, module.grid)
        for field, values in module.weight_format.pack_grid(module.grid)._asdict().items():
            if values is not None:
                state[_join(name, GRID[field])] = values
    return state


def load_packed(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what packed_state gave (in place), strictly: every tensor, and no other.

    Raises PlanError where names, shapes or types do not fit the model.
    """
    unpacked = dict(state)
    packed = {_join(name, "weight"): (name, module) for name, module in quantized_modules(model).items()}
    own = model.state_dict()
    for name, tensor in state.items():
        if name in packed:
            unpacked |= _unpacked(*packed[name], tensor, state)
        elif name in own and own[name].is_floating_point() and not tensor.is_floating_point():
            raise _misfit(name, tensor, "a float")
    try:
        model.load_state_dict(unpacked, strict=True)
    except RuntimeError as error:
        raise PlanError(f"the weights do not fit the model: {error}") from None


def _unpacked(layer: str, module: QuantizedModule, weight: Tensor, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weight and the grid of a layer, by their names in the model's state."""
    expected = module.weight_format.pack_grid(module.grid)
    if weight.dtype != module.weight_format.dtype:
        raise _misfit(_join(layer, "weight"), weight, _called(module.weight_format.dtype))
    found = {field: state.get(_join(layer, name)) for field, name in GRID.items()}
    for field, wanted in expected._asdict().items():
        _check(_join(layer, GRID[field]), found[field], wanted)
    shape = module.weight.shape
    n_packed = module.weight_format.pack(module.weight, module.grid).shape
    if weight.shape != n_packed:
        raise PlanError(
            f"the weights do not fit the model: tensor {_join(layer, 'weight')!r} has shape {tuple(weight.shape)}; "
            f"the plan wants {tuple(n_packed)}"
        )
    grid = module.weight_format.unpack_grid(Grid(**found), shape)
    values = {"weight": module.weight_format.unpack(weight, grid, shape)}
    persistent = module.state_dict()
    values |= {GRID[field]: v for field, v in grid._asdict().items() if GRID[field] in persistent}
    return {_join(layer, name): tensor for name, tensor in values.items()}


def _check(name: str, found: Tensor | None, wanted: Tensor | None) -> None:
    """Raises PlanError where a tensor of a grid is not there as it has to be."""
    if wanted is None:
        return  # one too many is told of by load_state_dict
    if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
        told = "missing" if found is None else f"{_called(found.dtype)} of shape {tuple(found.shape)}"
        raise PlanError(f"tensor {name!r} is {told}; the plan wants {_called(wanted.dtype)} {tuple(wanted.shape)}")


def _misfit(name: str, tensor: Tensor, wanted: str) -> PlanError:
    return PlanError(f"tensor {name!r} is {_called(tensor.dtype)}; the plan wants {wanted}")


def _called(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor
