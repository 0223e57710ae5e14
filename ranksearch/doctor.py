"""What this machine can run: its processor and GPUs, the runtimes, their targets, and the bits that kernels take."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ranksearch.errors import RankSearchError
from ranksearch.layers import layer_spec
from ranksearch.machine import machine_state
from ranksearch.runtimes import RUNTIMES, AbstractRuntime
from ranksearch.runtimes.base import host_fingerprint
from ranksearch.spec import Target

MODES = ("eager", "compile", "cuda_graph", "tensorrt")
DEVICES = ("cpu", "gpu", "cuda")
PRECISIONS = ("f32", "default", "tf32", "bf16", "f16")
LAYERS: Mapping[str, nn.Module] = {
    "Linear 256 to 256": nn.Linear(256, 256),
    "Conv2d 3 to 64, 3x3": nn.Conv2d(3, 64, 3),
    "Conv2d 64 to 64, 3x3": nn.Conv2d(64, 64, 3),
    "Conv2d 64 to 64, 1x1": nn.Conv2d(64, 64, 1),
    "Conv2d 64, 3x3 depthwise": nn.Conv2d(64, 64, 3, groups=64),
    "Conv1d 64 to 64, 3": nn.Conv1d(64, 64, 3),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RuntimeReport:
    """What a runtime runs here; `missing` says why it does not.

    `targets` lists by device and mode the precisions, `bits` by device and layer the weight and activation bits for
    which a kernel runs it.
    """

    name: str
    version: str | None = None
    missing: str | None = None
    targets: Mapping[tuple[str, str], Sequence[str]]
    bits: Mapping[tuple[str, str], Sequence[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Diagnosis:
    """The machine as it is now, and its runtimes."""

    machine: Mapping[str, float | str]
    runtimes: Sequence[RuntimeReport]


def diagnose() -> Diagnosis:
    """Asks the machine and every runtime of the table, a user's own as well."""
    # Of a target with a GPU, so that GPUs are told of where there are any.
    facts = host_fingerprint() | machine_state(Target(device="cuda"))
    return Diagnosis(machine=facts, runtimes=[examine(runtime) for runtime in RUNTIMES.values()])


def examine(runtime: AbstractRuntime) -> RuntimeReport:
    """What this runtime runs here. Nothing is raised: a runtime that fails is reported with its reason."""
    try:
        runtime.check_installed()
        targets = _targets(runtime)
        if not targets:
            runtime.check(Target(runtime=runtime.name))  # which says why not
        version = runtime.fingerprint(targets[0]).get(runtime.module) if targets else None
        return RuntimeReport(
            name=runtime.name, version=version, targets=_grouped(targets), bits=_bits(runtime, targets)
        )
    except (RankSearchError, RuntimeError, ImportError, OSError) as error:
        # A broken installation fails in whatever way its library chooses; the others are reported all the same.
        return RuntimeReport(name=runtime.name, missing=str(error), targets={}, bits={})


def _targets(runtime: AbstractRuntime) -> list[Target]:
    found = []
    for device, mode, precision in itertools.product(DEVICES, MODES, PRECISIONS):
        target = Target(runtime=runtime.name, device=device, mode=mode, precision=precision)
        try:
            runtime.check(target)
        except RankSearchError:
            continue
        found.append(target)
    return found


def _grouped(targets: Sequence[Target]) -> dict[tuple[str, str], list[str]]:
    grouped: dict[tuple[str, str], list[str]] = {}
    for target in targets:
        grouped.setdefault((target.device, target.mode), []).append(target.precision)
    return grouped


def _bits(runtime: AbstractRuntime, targets: Sequence[Target]) -> dict[tuple[str, str], list[str]]:
    """The bits of each layer on the first target of each device."""
    first = {target.device: target for target in reversed(targets)}
    found = {}
    for device, target in first.items():
        for label, layer in LAYERS.items():
            spec = layer_spec(layer)
            assert spec is not None, "these are plain layers"
            found[device, label] = [
                f"{weight}/{activation}" for weight, activation in runtime.supported_bits(spec, target)
            ]
    return found
