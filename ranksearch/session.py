"""A study as it stands: measured at its start and kept in its home, read again when it is resumed."""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from ranksearch.bits import offered_bits
from ranksearch.cache import Cache, cache_directory, write_atomically
from ranksearch.candidates import Profile
from ranksearch.controls import control_plans
from ranksearch.device import device_lock
from ranksearch.errors import StudyError
from ranksearch.export import file_sha256
from ranksearch.factorisations import Factorisations
from ranksearch.home import StudyHome, read_json, write_json
from ranksearch.home_records import read_profile, study_record
from ranksearch.identity import profile_identity
from ranksearch.layer_timing import LayerTimer, PlanTimer
from ranksearch.loss_meter import LossMeter
from ranksearch.machine import machine_state, machine_warnings
from ranksearch.optimization import published
from ranksearch.plan import Plan
from ranksearch.profiling import ProfileMaker
from ranksearch.remeasure import target_record
from ranksearch.runtimes import differing_keys
from ranksearch.spec import Target, tied_layers
from ranksearch.staircase import measure_staircase
from ranksearch.trees import count_rows
from ranksearch.versions import package_versions
from ranksearch.workbench import Workbench

N_OPENINGS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Session:
    """What a run needs beside the workbench; the figures are those of the study's start."""

    uid: str
    dense_accuracy: float
    dense_latency_ms: float
    noise_floor: float
    factorisations: Factorisations
    controls: list[tuple[str, Plan]]
    profile: Profile


def prepare(bench: Workbench, home: StudyHome, stage: Callable[[str], None]) -> Session:
    """Begins a study, or reads how it was begun. Raises StudyError where it was timed on another machine."""
    for note in bench.notes:
        stage(f"note: {note}")
    record = study_record(home)
    if record:
        _check_machine(record, target_record(bench), bench.spec.name)
    stage("calibration: one pass over the dense model")
    factorisations = bench.factorisations()
    controls = control_plans(bench)
    if record:
        profile = read_profile(home)
    else:
        stage("measuring dense and the noise floor")
        before = machine_state(bench.spec.target)
        latency_ms, noise = dense_latency(bench)
        for warning in machine_warnings(before, machine_state(bench.spec.target)):
            stage(f"warning: {warning}")
        profile = make_profile(bench, factorisations, controls, latency_ms, lambda name: stage(f"profiling {name}"))
        record = _begin(bench, home, profile, latency_ms, noise)
    return Session(
        uid=record["uid"],
        dense_accuracy=record["dense_accuracy"],
        dense_latency_ms=record["dense_latency_ms"],
        noise_floor=record["noise_floor"],
        factorisations=factorisations,
        controls=controls,
        profile=profile,
    )


def adopt(home: StudyHome, storage: str, name: str) -> None:
    """Begins in a home that is empty as another coordinator of the study began: with its record and its table."""
    if home.study.exists() or (found := published(storage, name)) is None:
        return
    record, table = found
    write_atomically(home.candidates, table.encode())
    write_json(home.study, record)


def beginning(home: StudyHome) -> tuple[dict[str, Any], str]:
    """The study's record, without what is of this machine alone, and its table."""
    record = read_json(home.study)
    for name in ("script", "last_run"):
        record.pop(name, None)
    return record, home.candidates.read_text(encoding="utf-8")


def remember_run(home: StudyHome, script: str | Path | None, settings: Mapping[str, str]) -> None:
    """Records the study script's path, for commands that name it later, what it holds now, and the run's settings."""
    path = None if script is None else Path(script).resolve()
    known = {"script": path and str(path), "script_sha256": path and file_sha256(path), "last_run": dict(settings)}
    record = read_json(home.study)
    if record | known != record:
        write_json(home.study, record | known)


def start_over(home: StudyHome) -> None:
    """Moves an earlier study of this home aside; nothing of it is deleted."""
    if not home.study.exists() and not home.journal.exists():
        return
    number = 1
    while (aside := home.directory.with_name(f"{home.name}.old-{number}")).exists():
        number += 1
    home.directory.rename(aside)


def dense_latency(bench: Workbench) -> tuple[float, float]:
    """Dense's latency on the target in ms, and the noise floor: how far the same model differs from itself.

    It is opened anew several times: where its memory lies makes a difference too.
    """
    times = [bench.compare(bench.prepare(bench.model), n_blocks=20, max_seconds=1.0) for _ in range(N_OPENINGS)]
    noise = max(abs(end - 1) for latency in times for end in (latency.ratio_low, latency.ratio_high))
    return float(np.median([latency.reference_ms for latency in times])), noise


def make_profile(
    bench: Workbench,
    factorisations: Factorisations,
    controls: Sequence[tuple[str, Plan]],
    dense_latency_ms: float,
    on_layer: Callable[[str], None],
) -> Profile:
    """The candidate table of an opened study; at once where it was made before, of the same and on this machine."""
    spec, target = bench.spec, bench.spec.target
    plans = [plan for _, plan in controls]
    tables, key = Cache(directory=cache_directory() / "profiles"), profile_identity(bench, plans)
    if (known := _kept_table(tables, key)) is not None:
        return known
    cache = Cache(directory=cache_directory() / "latency")
    timing: dict[str, Any] = {"runtime": bench.runtime, "target": target, "cache": cache}
    with device_lock(target):
        on_layer("the rank staircase")
        multiple = spec.space.rank_multiple or measure_staircase(**timing).multiple
        maker = ProfileMaker(
            model=bench.source,
            layers=bench.found.all,
            factorisations=factorisations,
            meter=LossMeter(
                bench.source, bench.calibration, factorisations, spec.loss, weight_limit=bench.weight_limit
            ),
            space=replace(spec.space, rank_multiple=multiple),
            objectives=spec.objectives,
            bits=lambda layer: offered_bits(
                bench.runtime, layer, target, spec.space.weight_bits, for_size="bytes" in spec.objectives
            ),
            time_layer=LayerTimer(**timing),
            time_plan=PlanTimer(
                model=bench.model, example=bench.example, dense=bench.dense.session, shared=bench.shared, **timing
            ),
        )
        table = maker.make(plans, dense_latency_ms, bench.dense.model_bytes, on_layer)
    table = table.model_copy(update={"ties": tied_layers(spec.space.ties, list(bench.found.all), bench.found.skipped)})
    tables.put(key, table.to_json().encode())
    return table


def _kept_table(tables: Cache, key: str) -> Profile | None:
    """The table in the cache; None where there is none, or a damaged one."""
    kept = tables.get(key)
    try:
        return None if kept is None else Profile.from_json(kept.decode())
    except (StudyError, UnicodeDecodeError):
        return None


def _check_machine(record: dict[str, Any], now: dict[str, Any], name: str) -> None:
    """Raises StudyError where the same target is another machine now; another target is told as a difference."""
    then, here = record["fingerprint"], now["fingerprint"]
    differing = [f"{key} {then.get(key)}, now {here[key]}" for key in differing_keys(then, here)]
    if differing and Target(**record["target"]) == Target(**now["target"]):
        raise StudyError(
            f"study {name!r} was timed elsewhere ({'; '.join(differing)}), and latencies of two machines cannot be "
            "compared; go on there, or start over with --new"
        )


def _begin(bench: Workbench, home: StudyHome, profile: Profile, latency_ms: float, noise: float) -> dict[str, Any]:
    """Writes the table and then the study's record: a study whose record exists has its table."""
    record = {
        "name": bench.spec.name,
        "seed": bench.spec.seed,
        "uid": uuid.uuid4().hex,
        "objectives": list(bench.spec.objectives),
        "dense_latency_ms": latency_ms,
        "noise_floor": noise,
        "dense_accuracy": bench.dense.scores.value,
        "dense_bytes": bench.dense.model_bytes,
        "model": {
            "name": type(bench.model).__name__,
            "n_params": bench.dense.n_params,
            "macs": bench.dense.macs,
            "n_layers": len(bench.found.all),
        },
        "data": {
            "calibration": sum(count_rows(inputs) for inputs, _ in bench.calibration),
            "validation": bench.dense.scores.n_judged,
            "test": bench.data.test is not None,
        },
        "versions": package_versions(),
        "skipped": dict(bench.found.skipped),
        "machine": machine_state(bench.spec.target),
        **target_record(bench),
    }
    write_atomically(home.candidates, profile.to_json().encode())
    write_json(home.study, record)
    return record
