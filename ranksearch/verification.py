"""Check that an export folder does what it claims: alone, and with the study it came from."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from torch import Tensor

from ranksearch.errors import RankSearchError, StudyError
from ranksearch.export import (
    EXAMPLE,
    PLAN,
    RUNTIME,
    WEIGHTS,
    count_kernels,
    file_sha256,
    load,
    named_values,
)
from ranksearch.home import read_json
from ranksearch.layers import call_model, evaluating
from ranksearch.plan import Plan
from ranksearch.remeasure import Judge
from ranksearch.runtimes import get_runtime
from ranksearch.spec import Target
from ranksearch.trees import map_tensors
from ranksearch.workbench import Workbench

# On a machine that others share a ratio may move by this much between two processes.
LATENCY_TOLERANCE = 0.15


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that an export folder claims, whether it holds, and what was found."""

    name: str
    holds: bool
    found: str


def verify_folder(directory: Path) -> Iterator[Check]:
    """Checks hashes, sizes, and the artefact's kernels and output, without the study.

    Raises StudyError where the folder is no export.
    """
    record = read_json(directory / RUNTIME)
    if not record:
        raise StudyError(f"{directory} is no export folder: it has no {RUNTIME}")
    for name, digest in record["sha256"].items():
        path = directory / name
        holds = path.is_file() and file_sha256(path) == digest
        yield Check(name=f"{name} is unchanged", holds=holds, found=digest[:12] if holds else "differs or is missing")
    plan = Plan.read(directory / PLAN)
    size = (directory / WEIGHTS).stat().st_size if (directory / WEIGHTS).is_file() else 0
    if claimed := record.get("measured", {}).get("model_bytes"):
        yield Check(name="size is as claimed", holds=size == claimed, found=f"{size:,} of {claimed:,} bytes")
    target = Target(**record["target"])
    runtime = get_runtime(target.runtime)
    runtime.check(target)
    session = runtime.open(directory / record["artefact"], target)
    kernels = count_kernels(session.kernels())
    same_machine = runtime.fingerprint(target) == record["fingerprint"]
    yield Check(
        name="kernels are those that were timed",
        holds=kernels == record["kernels"] or not same_machine,
        found=_listed(kernels) + ("" if same_machine else " (another machine or version than that of the study)"),
    )
    inputs, expected = _read_example(directory)
    distance = _relative_distance(session.run(inputs), expected)
    # Integer kernels round differently on other processors; on the same one the artefact gives the same numbers.
    tolerance = 1e-3 if same_machine else 5e-2
    yield Check(
        name="the artefact gives the example's output",
        holds=distance <= tolerance,
        found=f"relative difference {distance:.1e} for plan {plan.hash()}",
    )


def verify_rebuilt(directory: Path, bench: Workbench) -> Iterator[Check]:
    """Checks that the study's model, rebuilt from the folder, gives the example's output in torch."""
    inputs, expected = _read_example(directory)
    try:
        model = load(directory, bench.model)
    except RankSearchError as error:
        yield Check(name="rebuilds from plan and weights", holds=False, found=str(error))
        return
    with evaluating(model):
        outputs = call_model(model, _tensors(inputs))
    distance = _relative_distance(outputs, expected)
    yield Check(
        name="rebuilt in torch it gives the example's output",
        holds=distance <= 5e-2,
        found=f"relative difference {distance:.1e}",
    )


def verify_measured(directory: Path, bench: Workbench) -> Iterator[Check]:
    """Checks accuracy on the runtime and latency against dense, measured now, with what the folder claims."""
    record = read_json(directory / RUNTIME)
    claimed = record.get("measured", {})
    session = bench.runtime.open(directory / record["artefact"], bench.spec.target)
    figures = Judge(bench).figures(session, claimed.get("dense_latency_ms") or 1.0)
    drop, high = figures["runtime_accuracy_drop"], claimed.get("drop_high")
    if high is None:
        high = claimed.get("accuracy_drop")
    assert drop is not None, "every score gives a drop"
    yield Check(
        name="the drop on validation data is within the claimed interval",
        holds=high is not None and drop <= high + 1e-9,
        found=f"{drop:.4f}, claimed {claimed.get('accuracy_drop')} and at most {high}",
    )
    ratio, claimed_ratio = figures["ratio_low"], claimed.get("ratio_high")
    assert ratio is not None, "every latency has an interval"
    yield Check(
        name="the latency is as claimed",
        holds=claimed_ratio is not None and ratio <= claimed_ratio * (1 + LATENCY_TOLERANCE),
        found=f"{figures['latency_ratio']:.3f}x of dense, claimed {claimed.get('latency_ratio')}",
    )


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{n}x {kernel}" for kernel, n in counts.items())


def _read_example(folder: Path) -> tuple[Any, dict[str, np.ndarray[Any, Any]]]:
    """The example's inputs as arrays, in the model's structure, and its outputs by name."""
    with safe_open(folder / EXAMPLE, framework="np") as file:
        kind = file.metadata()["inputs"]
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    named = {name.removeprefix("input."): array for name, array in arrays.items() if name.startswith("input.")}
    outputs = {name.removeprefix("output."): array for name, array in arrays.items() if name.startswith("output.")}
    return _INPUTS[kind](named), outputs


_INPUTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tensor": lambda named: named["0"],
    "tuple": lambda named: tuple(named[str(i)] for i in range(len(named))),
    "mapping": lambda named: named,
}


def _tensors(inputs: Any) -> Any:
    return map_tensors(inputs, lambda tensor: tensor)


def _relative_distance(outputs: Any, expected: Mapping[str, Any]) -> float:
    """The largest root mean square difference over the outputs, relative to the expected root mean square."""
    worst = 0.0
    for name, value in named_values(outputs).items():
        actual = value.detach().numpy() if isinstance(value, Tensor) else np.asarray(value)
        wanted = np.asarray(expected[name])
        scale = float(np.sqrt(np.mean(wanted.astype(np.float64) ** 2))) or 1.0
        worst = max(worst, float(np.sqrt(np.mean((actual.astype(np.float64) - wanted) ** 2))) / scale)
    return worst
