"""Which kernels ONNX Runtime runs, from its own profile of one run. Without torch."""

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ranksearch.runtimes.base import stayed_float
from ranksearch.runtimes.onnx.session import layer_of, open_session

KERNEL = "_kernel_time"
MULTIPLYING = re.compile(r"\w*(Conv|Gemm|MatMul)")
# What a convolution on blocked channels has behind the name of what it makes.
BLOCKED = "_nchwc"
DTYPES = {"float": "f32", "float16": "f16", "bfloat16": "bf16", "double": "f64", "uint8": "u8", "int8": "i8"}
# What ONNX Runtime calls the types of a model's inputs.
INPUT_DTYPES: dict[str, type[Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int16)": np.int16,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


def executed_kernels(model: bytes, provider: str, device_id: int, settings: Any) -> dict[str, str]:
    """Each node that runs, with its operator, its provider and the type that it takes: `QLinearConv cpu_u8`."""
    with tempfile.TemporaryDirectory() as directory:
        settings.enable_profiling = True
        settings.profile_file_prefix = str(Path(directory) / "profile")
        session = open_session(model, provider, device_id, settings)
        session.run(None, {port.name: np.zeros(port.shape, INPUT_DTYPES[port.type]) for port in session.get_inputs()})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(KERNEL):
            told = event["args"]
            name = event["name"].removesuffix(KERNEL) or f"{told['op_name']}_{told['node_index']}"
            kernels[name] = f"{told['op_name']} {_device(told['provider'])}_{_dtype(told)}{_compressed_weight(told)}"
    return kernels


def kernels_of_layers(kernels: Mapping[str, str], layers_of_outputs: Mapping[str, str]) -> dict[str, str]:
    """The kernel of each layer; of one that runs several times a kernel that is not int8, where there is one.

    `layers_of_outputs` tells which layers make outputs of the model, whose names are not theirs to choose.
    """
    found: dict[str, set[str]] = {}
    for node, kernel in kernels.items():
        named = layer_of(node)
        layer = named if named is not None else layers_of_outputs.get(node.removesuffix(BLOCKED))
        if layer is not None and MULTIPLYING.match(kernel):
            found.setdefault(layer, set()).add(kernel)
    return {name: min(own, key=lambda k: (not stayed_float([k], {k: k}), k)) for name, own in found.items()}


def _device(provider: str) -> str:
    return provider.removesuffix("ExecutionProvider").lower()


def _compressed_weight(told: dict[str, Any]) -> str:
    return " packed weights" if told["op_name"] == "MatMulNBits" else ""


def _dtype(told: dict[str, Any]) -> str:
    """The type of the first input, which is what a node multiplies."""
    types = [dtype for shape in told["input_type_shape"] for dtype in shape]
    return DTYPES.get(types[0], types[0]) if types else "none"
