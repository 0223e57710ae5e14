"""Size: the file of a plan with layers of b bits, beside b bits for each of their weights and all that comes with them.

Target: at most 1.05 times the sum of b * weights / 8, scales, zero points, and the other tensors. What the runtimes'
own files hold is told, and not judged. Random weights: neither changes a byte.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from latency_networks import Network, cifar_resnet, digits, resnet34

from ranksearch.compression import rebuild
from ranksearch.controls import uniform_plan
from ranksearch.export import WEIGHTS, save
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.quantization import quantized_modules
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target
from ranksearch.weights import stored_state

MOST = 1.05
ARTEFACTS = {"openvino": "*.bin", "onnxruntime": "*.onnx"}
ROUNDINGS: dict[str, LayerChoice] = {
    "16/32": DENSE.with_bits(16, 32),
    "8/8": DENSE.with_bits(8, 8),
    "8/32": DENSE.with_bits(8, 32),
    "4/32 affine, 32": DENSE.with_bits(4, 32),
    "4/32 affine, 64": DENSE.with_bits(4, 32, group_size=64),
    "4/32 symmetric, 32": DENSE.with_bits(4, 32, scheme="symmetric"),
}
FACTORED = ("8/8", "4/32 affine, 32")


def answer(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Bytes of each plan's file over what its bits amount to."""
    # The digits' network has few weights, so that the file's header counts: it is judged from 32 layers up.
    networks = [digits()] if arguments.quick else [*(cifar_resnet(depth) for depth in arguments.depths), resnet34()]
    most = 1.15 if arguments.quick else MOST
    rows = [_row(network, name, plan) for network in networks for name, plan in _plans(network)]
    judged = [row for row in rows if row["n_layers"] >= 32 or arguments.quick]
    return {
        "rows": rows,
        "target": {"most": most},
        "holds": bool(judged) and all(row["ratio"] <= most for row in judged),
        "scope": "model.safetensors as written, beside bits of weights, scales, zero points and the other tensors; "
        "judged for networks of 32 layers or more" + (", but for the digits' network here" if arguments.quick else ""),
    }, [_line(row) for row in rows]


def _plans(network: Network) -> Iterator[tuple[str, Plan]]:
    for name, rounding in ROUNDINGS.items():
        yield name, Plan(layers=dict.fromkeys(network.layers, rounding))
    factored = uniform_plan(network.layers, ("tucker2", "svd"), 0.5, None)
    for name in FACTORED:
        bits = ROUNDINGS[name].weight_bits, ROUNDINGS[name].activation_bits
        yield (
            f"tucker2 50 %, {name}",
            Plan(layers={n: choice.with_bits(*bits) for n, choice in factored.layers.items()}),
        )


def _row(network: Network, name: str, plan: Plan) -> dict[str, Any]:
    model = rebuild(network.model, plan).eval()
    with tempfile.TemporaryDirectory() as directory:
        save(model, plan, directory)
        written = (Path(directory) / WEIGHTS).stat().st_size
    artefacts = {}
    for runtime, pattern in ARTEFACTS.items():
        with tempfile.TemporaryDirectory() as directory:
            target = Target(runtime=runtime, batch_size=len(network.example), threads=1)
            get_runtime(runtime).serialise(model, network.example, target, Path(directory))
            artefacts[runtime] = sum(path.stat().st_size for path in Path(directory).glob(pattern))
    expected = _bits_and_all_else(model)
    return {
        "network": network.name,
        "plan": name,
        "n_layers": len(network.layers) + 1,
        "bytes": written,
        "expected_bytes": expected,
        "ratio": written / expected,
        "artefact_bytes": artefacts,
    }


def _bits_and_all_else(model: torch.nn.Module) -> int:
    """Bits of the rounded weights, and the bytes of all other tensors as they are stored, scales included."""
    rounded = {f"{name}.weight": module for name, module in quantized_modules(model).items()}
    return sum(
        -(-rounded[name].weight.numel() * rounded[name].weight_format.bits // 8)
        if name in rounded
        else tensor.numel() * tensor.element_size()
        for name, tensor in stored_state(model).items()
    )


def _line(row: dict[str, Any]) -> str:
    artefacts = ", ".join(f"{runtime} {size / 1e3:,.0f} kB" for runtime, size in row["artefact_bytes"].items())
    name = row["network"].partition(" ")[0]
    bits = f"{row['bytes'] / 1e3:8,.1f} kB, {row['ratio']:.3f} of its bits"
    return f"  {name:10} {row['plan']:28} {bits}; {artefacts}"
