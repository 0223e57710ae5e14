"""What a weights file holds: packed bits, each tensor once; and its size, without writing it."""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.quantization import is_joined, load_packed, packed_state

# safetensors' names of types, in the order in which tensors of those types lie in its files.
_DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_PLACES = {dtype: place for place, dtype in enumerate(_DTYPES)}


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """The packed state of the model; a tensor that it holds under several names is there under the first alone."""
    repeated = _repeated_names(model)
    return {name: tensor for name, tensor in packed_state(model).items() if name not in repeated}


def load_stored(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Loads what stored_state gave (in place), strictly. Raises PlanError where it does not fit the model."""
    own = model.state_dict()
    # A repeated name is given the model's own memory, which the first name fills: it is copied onto itself.
    load_packed(model, {**state, **{name: own[name] for name in _repeated_names(model)}})


def packed_bytes(model: nn.Module) -> int:
    """The size of `model.safetensors`, header included, without writing it."""
    return safetensors_size(stored_state(model))


def bytes_in_file(layer: nn.Module) -> int:
    """What a layer adds to `model.safetensors`, up to what does not depend on it."""
    state = stored_state(layer)
    # The names of what is joined of all layers are there whatever this one is.
    named = {name: tensor for name, tensor in state.items() if not is_joined(name)}
    joined = (tensor for name, tensor in state.items() if is_joined(name))
    return safetensors_size(named) + sum(tensor.numel() * tensor.element_size() for tensor in joined)


def safetensors_size(state: Mapping[str, Tensor]) -> int:
    """The size of the file that safetensors would write for `state`, without metadata.

    The header is compact JSON with each tensor's dtype, shape and offsets, padded to eight bytes; tensors lie by
    type, then by name (https://github.com/huggingface/safetensors#format).
    """
    header: dict[str, Any] = {}
    offset = 0
    for name in sorted(state, key=lambda name: (_PLACES[state[name].dtype], name)):
        tensor = state[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + (len(text) + 7) // 8 * 8 + offset


def _repeated_names(model: nn.Module) -> set[str]:
    """The names in the model's state whose tensor has an earlier name: of modules registered twice, of tied weights."""
    first: dict[int, str] = {}
    state = model.state_dict(keep_vars=True)
    return {name for name, tensor in state.items() if first.setdefault(id(tensor), name) != name}
