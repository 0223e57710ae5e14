"""The true bits of a model: int8 codes where layers are quantized, as files hold them."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ranksearch.errors import PlanError
from ranksearch.quantization.formats import per_channel, weight_codes
from ranksearch.quantization.modules import quantized_modules


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict with each quantized layer's `weight` as int8 codes beside its float32 `weight_scale`."""
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    for name, module in quantized_modules(model).items():
        weight = state[_join(name, "weight")]
        state[_join(name, "weight")] = weight_codes(weight, module.weight_scale, module.weight_limit)
    return state


def load_packed(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what packed_state gave (in place), strictly: every tensor, and no other.

    Raises PlanError where names, shapes or types do not fit the model.
    """
    unpacked = dict(state)
    quantized = quantized_modules(model)
    for name, tensor in state.items():
        owner = name.removesuffix("weight").removesuffix(".") if name.endswith("weight") else None
        is_packed = owner is not None and owner in quantized
        if is_packed != (tensor.dtype == torch.int8):
            found = str(tensor.dtype).removeprefix("torch.")
            raise PlanError(f"tensor {name!r} is {found}; the plan wants {'int8' if is_packed else 'a float'}")
        if is_packed:
            unpacked[name] = _unpack(name, tensor, state)
    try:
        model.load_state_dict(unpacked, strict=True)
    except RuntimeError as error:
        raise PlanError(f"the weights do not fit the model: {error}") from None


def _unpack(name: str, codes: Tensor, state: Mapping[str, Tensor]) -> Tensor:
    scale = state.get(f"{name}_scale")
    if scale is None or scale.shape != codes.shape[:1]:
        found = "missing" if scale is None else f"of shape {tuple(scale.shape)}"
        raise PlanError(f"tensor {name + '_scale'!r} is {found}; {name!r} needs {tuple(codes.shape[:1])}")
    return codes.float() * per_channel(scale, codes)


def _join(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor
