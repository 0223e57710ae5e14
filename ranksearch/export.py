"""Save, load and verify compressed models."""

import hashlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from ranksearch.cache import content_hash, replacing, write_atomically
from ranksearch.compression import calibrate_ranges, rebuild
from ranksearch.disk import at_the_door, check_room
from ranksearch.errors import PlanError, StudyError
from ranksearch.home import read_json, write_json
from ranksearch.layers import call_model, evaluating, in_eval_mode
from ranksearch.load_example import LOAD_EXAMPLE, loading_script, with_ranksearch
from ranksearch.plan import Plan, Provenance, Quantizer
from ranksearch.quantization import activation_quantizers, freeze
from ranksearch.reading import check_own_files
from ranksearch.spec import Batches
from ranksearch.surgery import copy_model, unwrapped
from ranksearch.trees import named_tensors, tensors
from ranksearch.versions import package_versions
from ranksearch.weights import load_stored, stored_state
from ranksearch.workbench import Workbench, to_arrays

PLAN, WEIGHTS, RUNTIME, EXAMPLE, REPORT = (
    "plan.json",
    "model.safetensors",
    "runtime.json",
    "example.safetensors",
    "report.md",
)
# Weights may be stored in a wider type than the model's that they are loaded into.
MOST_TIMES, HEADER_BYTES = 4, 1 << 20
MAX_EXAMPLE_BYTES = 4 << 30
# An artefact holds as floats what the weights' file holds as bits.
ARTEFACT_TIMES = 4


def save(model: nn.Module, plan: Plan, directory: str | Path, *, calibration: Batches | None = None) -> Plan:
    """Writes `plan.json` and `model.safetensors`, packed bits, for a model that was compressed by `plan`.

    After training of one's own give `calibration` batches: the ranges of 8-bit activations are set anew by them, and
    what was written is read again and run on the first of them. Quantized weights are put onto their grid in place, so
    that what is saved is what the model computes. Gives the plan as written: with the ranges of its quantizers and the
    SHA-256 of the weights. With `calibration` raises PlanError where weights are not finite, or what is read gives
    other outputs.
    """
    model = unwrapped(model)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    if calibration is not None:
        _check_finite(model)
        calibrate_ranges(model, calibration)
    freeze(model)
    with replacing(folder / WEIGHTS) as aside:
        save_file(_apart(stored_state(model)), aside)
    if calibration is not None:
        _check_read_again(model, folder / WEIGHTS, calibration)
    provenance = plan.provenance or Provenance()
    written = plan.model_copy(
        update={
            "quantizers": _quantizers(model),
            "provenance": provenance.model_copy(
                update={"versions": package_versions(), "sha256": file_sha256(folder / WEIGHTS)}
            ),
        }
    )
    write_atomically(folder / PLAN, written.to_json().encode())
    return written


def _check_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise PlanError(f"tensor {name!r} holds NaN or infinity; save a model that was trained to finite weights")


def _check_read_again(model: nn.Module, weights: Path, calibration: Batches) -> None:
    """Raises PlanError where the file's weights do not give the model's outputs, to the bit."""
    again = copy_model(model)
    load_stored(again, load_file(weights))
    inputs = next(iter(calibration))[0]
    with evaluating(model), evaluating(again):
        outputs = [tensors(call_model(module, inputs)) for module in (model, again)]
    if not all(torch.equal(before, after) for before, after in zip(*outputs, strict=True)):
        raise PlanError(f"{weights} does not give the outputs of the model that it was written from")


def load(directory: str | Path, model: nn.Module) -> nn.Module:
    """A compressed copy of `model`, the dense model or one of its architecture, with the weights of an export folder.

    It is trainable, and computes exactly what was saved. Raises PlanError where the folder is damaged or does not
    fit the model.
    """
    folder = Path(directory)
    _check_own(folder)
    plan = Plan.read(folder / PLAN)
    expected = plan.provenance.sha256 if plan.provenance else None
    if not (folder / WEIGHTS).is_file():
        raise PlanError(f"{folder / WEIGHTS} is missing; export the plan again")
    if expected is not None and file_sha256(folder / WEIGHTS) != expected:
        raise PlanError(f"{folder / WEIGHTS} is not the file that {PLAN} names by its SHA-256; export the plan again")
    loaded = rebuild(model, plan)
    _check_size(folder / WEIGHTS, MOST_TIMES * sum(tensor.nbytes for tensor in loaded.state_dict().values()))
    try:
        load_stored(loaded, load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, KeyError) as error:
        raise PlanError(f"{folder / WEIGHTS} does not fit the model: {str(error).splitlines()[0]}") from None
    return in_eval_mode(loaded)


def _check_own(folder: Path) -> None:
    try:
        check_own_files(folder)
    except (OSError, ValueError) as error:
        raise PlanError(f"{folder} cannot be read: {error}") from None


def _check_size(path: Path, most: int) -> None:
    """Raises PlanError for a file that is larger than it can be, before memory is taken for it."""
    if (n_bytes := path.stat().st_size) > most + HEADER_BYTES:
        raise PlanError(f"{path} has {n_bytes:,} bytes, and {most:,} at most fit; export the plan again")


def write_bundle(bench: Workbench, plan: Plan, model: nn.Module, directory: Path) -> None:
    """Writes a finished plan's folder: plan, packed weights, the target's artefact, an example and its output.

    And `load_example.py`, since the modules that it spells out are here.
    Written aside and renamed, so that a folder of this name is whole.
    """
    target, runtime = bench.spec.target, bench.runtime
    plan = plan.model_copy(update={"target": asdict(target), "provenance": Provenance(seed=bench.spec.seed)})
    with written_aside(directory) as folder:
        save(model, plan, folder)
        artefact = runtime.serialise(model, bench.example, target, folder)
        session = runtime.open(artefact, target)
        _write_example(folder, bench.example, session.run(to_arrays(bench.example)))
        (folder / LOAD_EXAMPLE).write_text(loading_script(plan, model, bench.example), encoding="utf-8")
        write_json(
            folder / RUNTIME,
            {
                "target": asdict(target),
                "options": runtime.options(target),
                # On them the weights depend, to the bit.
                "torch_threads": torch.get_num_threads(),
                "fingerprint": runtime.fingerprint(target),
                "artefact": artefact.name,
                "kernels": count_kernels(session.kernels()),
                "stayed_float": bench.stayed_float(model, session),
                "sha256": {path.name: file_sha256(path) for path in sorted(folder.iterdir())},
            },
        )


def export_bundle(
    bundle: Path,
    destination: Path,
    measured: Mapping[str, Any],
    report: Callable[[Mapping[str, int]], str],
    provenance: Provenance,
    force: bool,
    add: Callable[[Path], None] = lambda _folder: None,
) -> None:
    """Copies a finished plan's folder to `destination` with its figures, its report and an example of loading it.

    `add` may put more files beside them; where it fails nothing is written. `report` makes the report, given the files
    and their bytes. Raises StudyError where `destination` is not empty and `force` is not given, or it holds something
    else than an earlier export, which is never deleted; and where the bundle is gone.
    """
    if not (bundle / PLAN).is_file():
        raise StudyError(f"the weights of this plan are gone ({bundle}); choose another trial, or run it again")
    _check_destination(destination, force)
    _check_own(bundle)
    plan = Plan.read(bundle / PLAN)
    # What the weights were made with, and not what the study began with.
    written = (plan.provenance or Provenance()).model_dump(include={"versions", "sha256", "seed"}, exclude_none=True)
    plan = plan.model_copy(update={"provenance": provenance.model_copy(update=written)})
    with at_the_door(destination, "choose another folder"), written_aside(destination) as folder:
        for path in filter(Path.is_file, bundle.iterdir()):
            shutil.copy2(path, folder / path.name)
        (folder / PLAN).write_text(plan.to_json(), encoding="utf-8")
        if not (folder / LOAD_EXAMPLE).is_file():
            reason = "An earlier version, which knew no other way, tried this plan."
            (folder / LOAD_EXAMPLE).write_text(with_ranksearch(reason), encoding="utf-8")
        add(folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.name != RUNTIME}
        (folder / REPORT).write_text(report(sizes), encoding="utf-8")
        runtime = {**read_json(folder / RUNTIME), "measured": dict(measured)}
        runtime["sha256"] = {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != RUNTIME}
        runtime["checksum"] = content_hash(runtime)
        write_json(folder / RUNTIME, runtime)


def _check_destination(destination: Path, force: bool) -> None:
    if destination.exists() and not destination.is_dir():
        raise StudyError(f"{destination} is a file; choose a folder")
    found = {path.name for path in destination.iterdir()} if destination.exists() else set()
    if found and not force:
        raise StudyError(f"{destination} exists and is not empty; choose another folder, or pass --force")
    if found and not {PLAN, RUNTIME} <= found:
        raise StudyError(f"{destination} is no earlier export, so --force does not replace it; choose another folder")


@contextmanager
def written_aside(directory: Path) -> Iterator[Path]:
    """A temporary folder beside `directory` that takes its place when the block ends well."""
    directory = directory.resolve()
    directory.parent.mkdir(parents=True, exist_ok=True)
    mark = uuid.uuid4().hex
    aside, old = (directory.with_name(f".{directory.name}.{mark}.{part}") for part in ("new", "old"))
    aside.mkdir()
    try:
        yield aside
        if directory.exists():
            directory.rename(old)
        aside.rename(directory)
    except Exception as error:
        # Libraries that write files themselves may tell no more than that they failed.
        _check_not_full(aside, directory, error)
        raise
    finally:
        if old.exists() and not directory.exists():
            old.rename(directory)
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _check_not_full(aside: Path, directory: Path, error: Exception) -> None:
    """Raises OSError from the `error` where a full disk is behind it, as the room for what was to be written tells."""
    try:
        check_room(aside, ARTEFACT_TIMES * sum(path.stat().st_size for path in aside.iterdir()))
    except OSError as full:
        raise OSError(full.errno, full.strerror, str(directory)) from error


def sweep(folder: Path) -> None:
    """Removes what a process was killed in the middle of writing aside; only for who alone writes there."""
    for left in folder.glob(".*.new"):
        shutil.rmtree(left, ignore_errors=True)
    for old in folder.glob(".*.old"):
        name = old.name.removeprefix(".").rsplit(".", 2)[0]
        if (folder / name).exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            # It was killed between the two renames.
            old.rename(folder / name)


def _apart(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors each in memory of its own, in plain order, as safetensors wants them."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}


def _quantizers(model: nn.Module) -> tuple[Quantizer, ...]:
    return tuple(
        Quantizer(where=name, output_of=found.output_of, readers=found.readers, low=found.range[0], high=found.range[1])
        for name, found in activation_quantizers(model).items()
    )


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def count_kernels(kernels: Mapping[str, str]) -> dict[str, int]:
    """How many nodes run each kind of kernel."""
    counts: dict[str, int] = {}
    for kernel in kernels.values():
        counts[kernel] = counts.get(kernel, 0) + 1
    return dict(sorted(counts.items()))


def _write_example(folder: Path, inputs: Any, outputs: Any) -> None:
    tensors = {f"input.{name}": tensor for name, tensor in named_values(inputs).items()}
    tensors |= {f"output.{name}": torch.as_tensor(array) for name, array in named_values(outputs).items()}
    kind = "mapping" if isinstance(inputs, Mapping) else "tuple" if isinstance(inputs, tuple | list) else "tensor"
    save_file(_apart(tensors), folder / EXAMPLE, metadata={"inputs": kind})


def read_example(folder: str | Path) -> tuple[Any, dict[str, torch.Tensor]]:
    """The example of an export folder: its inputs as the model takes them, and the outputs by name.

    Raises PlanError where it is missing or damaged.
    """
    path = Path(folder) / EXAMPLE
    try:
        _check_size(path, MAX_EXAMPLE_BYTES)
        with safe_open(path, framework="pt") as file:
            kind = (file.metadata() or {})["inputs"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
        inputs = {name.removeprefix("input."): tensor for name, tensor in tensors.items() if name.startswith("input.")}
        outputs = {name.removeprefix("output."): value for name, value in tensors.items() if name.startswith("output.")}
        return _INPUTS[kind](inputs), outputs
    except (SafetensorError, OSError, KeyError) as error:
        raise PlanError(f"{path} cannot be read as an example: {error}; export the plan again") from None


_INPUTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tensor": lambda named: named["0"],
    "tuple": lambda named: tuple(named[str(i)] for i in range(len(named))),
    "mapping": lambda named: named,
}


def named_values(values: Any) -> dict[str, Any]:
    """The tensors of inputs or outputs by name or place: `0`, `1`, ...; nested ones as `states.0`."""
    return dict(named_tensors(values))
