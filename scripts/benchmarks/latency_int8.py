"""Int8: do our 8-bit layers run as fast as those of OpenVINO's own quantizer, and factored ones faster?"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from networks import resnet18

from ranksearch.compression import rebuild
from ranksearch.finding import LayerInfo, compressible_layers
from ranksearch.latency import Latency, compare
from ranksearch.plan import LayerChoice, Plan
from ranksearch.quantization import quantized_modules, shared_tensors
from ranksearch.runtimes import get_runtime, stayed_float
from ranksearch.spec import Target

INT8 = LayerChoice(weight_bits=8, activation_bits=8)
THREADS, BATCH_SIZE, N_BLOCKS, MAX_SECONDS = 2, 8, 20, 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """The largest latency ratios to NNCF's int8."""

    dense: float
    tucker2: float


TARGETS = Targets(dense=1.1, tucker2=1 / 1.4)
# On small images the rest of the network rules: what is asked is that int8 kernels are taken.
QUICK_TARGETS = Targets(dense=1.25, tucker2=1.25)


def answer(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Latencies of ResNet-18-shaped networks with random weights, all interleaved with NNCF's int8."""
    if arguments.quick:
        return _answer(32, 64, QUICK_TARGETS, "ResNet-18 of half the widths at 64x64")
    return _answer(64, 224, TARGETS, "ResNet-18 at 224x224")


def tucker2_quarter(layers: Mapping[str, LayerInfo]) -> Plan:
    """Every layer at 8 bits, and every 3x3 convolution by Tucker-2 with a quarter of its channels."""
    return Plan(layers={name: _quartered(info) for name, info in layers.items()})


def _quartered(info: LayerInfo) -> LayerChoice:
    if getattr(info.spec, "kernel_size", None) != (3, 3):
        return INT8
    n_outputs, n_inputs = info.spec.weight_shape[:2]
    ranks = (n_outputs // 4, n_inputs // 4)
    return LayerChoice(decomposition="tucker2", ranks=ranks, weight_bits=8, activation_bits=8)


def _answer(width: int, side: int, targets: Targets, what: str) -> tuple[dict[str, Any], list[str]]:
    torch.manual_seed(0)
    model = resnet18(width).eval()
    runtime, target = get_runtime("openvino"), Target(batch_size=BATCH_SIZE, threads=THREADS)
    example = torch.randn(BATCH_SIZE, 3, side, side, generator=torch.Generator().manual_seed(0))
    layers, shared = compressible_layers(model, example[:1]).layers, shared_tensors(model, example[:1])
    own = runtime.quantize_own(model, [example], example, target).bind(example.numpy())
    limit = runtime.weight_limit(target)

    def against_own(plan: Plan | None) -> tuple[Latency, dict[str, str]]:
        candidate = model if plan is None else rebuild(model, plan, limit, shared).eval()
        session = runtime.prepare(candidate, example, target)
        in_float = stayed_float(quantized_modules(candidate), session.layer_kernels())
        run = session.bind(example.numpy())
        return compare(run, own, n_blocks=N_BLOCKS, max_seconds=MAX_SECONDS), in_float

    plans = {
        "dense f32": None,
        "dense 8/8": Plan(layers=dict.fromkeys(layers, INT8)),
        "tucker2 C/4 8/8": tucker2_quarter(layers),
    }
    measured = {name: against_own(plan) for name, plan in plans.items()}
    rows = {name: {**asdict(latency), "stayed_float": in_float} for name, (latency, in_float) in measured.items()}
    ratios = {name: latency.ratio for name, (latency, _) in measured.items()}
    lines = [
        f"  {name:16} {row['ratio']:.3f} ({row['ratio_low']:.3f} to {row['ratio_high']:.3f}) of NNCF's int8, "
        f"{row['latency_ms']:.1f} ms; {len(row['stayed_float'])} 8-bit layers in float"
        for name, row in rows.items()
    ]
    return {
        "rows": rows,
        "target": asdict(targets),
        "holds": ratios["dense 8/8"] <= targets.dense and ratios["tucker2 C/4 8/8"] <= targets.tucker2,
        "scope": f"{what}, batch {BATCH_SIZE}, random weights, OpenVINO, {THREADS} threads, beside NNCF's int8",
    }, lines
