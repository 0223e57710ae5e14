"""Commands about export folders: export, verify, bench."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ranksearch.cli.options import changed_target, study_home
from ranksearch.cli.terminal import say
from ranksearch.errors import RankSearchError, StudyError
from ranksearch.home import StudyHome
from ranksearch.spec import Goals, Target, load_study

if TYPE_CHECKING:
    from ranksearch.folder_latency import FolderLatency
    from ranksearch.latency import Latency

EXIT_CHECK_FAILED = 1

Row = dict[str, Any]


def export_choice(
    script: Path | None,
    name: str | None,
    output: Path,
    *,
    goals: Mapping[str, Any],
    minimize: str,
    trial: int | None,
    run_id: str | None,
    force: bool,
    home: Path,
    storage: str | None,
    formats: Sequence[str] = (),
    dynamic: bool = True,
    register: str | None = None,
    tracking_uri: str | None = None,
) -> None:
    """Chooses a plan and writes it, and in other formats too; registers its model in MLflow where asked."""
    from ranksearch.study_export import export_plan

    wanted = [*formats, *([] if register is None else ["register"])]
    if wanted and script is None:
        raise StudyError(
            f"--{wanted[0]} rebuilds your model, which the study's script makes: ranksearch export STUDY.py"
        )

    def add(folder: Path) -> None:
        if script is not None and formats:
            _write_portable(script, folder, formats, dynamic)

    place = study_home(script, name, home)
    row, note = export_plan(
        place,
        output,
        goals=Goals(**goals),
        minimize=minimize,
        trial=trial,
        run_id=run_id,
        force=force,
        storage=storage,
        tracking_uri=tracking_uri,
        add=add,
    )
    say(f"exported trial {row['trial']} to {output}: {row['summary']}")
    say(note)
    if script is not None and register is not None:
        _register(script, place, output, register, row, tracking_uri)


def _register(script: Path, place: StudyHome, folder: Path, name: str, row: Row, tracking_uri: str | None) -> None:
    """Registers an export's model in MLflow, below the run of its trial."""
    from ranksearch.export import load, read_example
    from ranksearch.runtimes.pytorch.pt2 import exportable
    from ranksearch.study_export import run_of_export
    from ranksearch.tracking.registry import register_model

    run_id = run_of_export(place, row, folder, tracking_uri)
    model, (inputs, _) = load(folder, load_study(script).model()), read_example(folder)
    say(f"registered {register_model(exportable(model), inputs, name, run_id, tracking_uri)}")


def _write_portable(script: Path, folder: Path, formats: Sequence[str], dynamic: bool) -> None:
    """Writes an export's model in other formats beside its own."""
    from ranksearch.export import load, read_example
    from ranksearch.portable import write_portable

    model = load(folder, load_study(script).model())
    inputs, _ = read_example(folder)
    for written in write_portable(model, inputs, folder, formats, dynamic=dynamic):
        say(f"wrote {written.path.name}, of {written.takes}, which gives torch's outputs on the example")
        if written.note is not None:
            say(f"  its length is the example's: {written.note}")


def verify_export(directory: Path, script: Path | None, trusted: bool = False) -> None:
    """Prints each check; exits 1 where one does not hold. Who brings the study trusts its exports."""
    from ranksearch.verification import Check, verify_folder, verify_measured, verify_rebuilt

    if not directory.is_dir():
        raise StudyError(f"there is no export folder {directory}")
    checks: list[Check] = []
    try:
        checks.extend(verify_folder(directory, trusted=trusted or script is not None))
    except RankSearchError as error:
        checks.append(Check(name="it can be read and run", holds=False, found=str(error)))
    if script is not None and all(check.holds for check in checks):
        from ranksearch.workbench import open_workbench

        bench = open_workbench(load_study(script))
        checks += [*verify_rebuilt(directory, bench), *verify_measured(directory, bench)]
    for check in checks:
        say(f"{check.word}  {check.name}: {check.found}")
    if not all(check.holds for check in checks):
        raise typer.Exit(EXIT_CHECK_FAILED)
    skipped = " as far as it was checked" if any(check.skipped for check in checks) else ""
    say(f"{directory} does what it claims{skipped}.")


def time_export(
    directory: Path, target_text: str | None, against: Path | None, *, trusted: bool, as_json: bool
) -> None:
    """Prints how long a folder takes here, and beside another where asked; exits 1 where its output is wrong."""
    from ranksearch.export_record import read_record
    from ranksearch.folder_latency import compare_folders, time_folder

    for folder in (directory, against):
        if folder is not None and not folder.is_dir():
            raise StudyError(f"there is no export folder {folder}")
    target = read_record(directory).target
    target = target if target_text is None else changed_target(target_text, target)
    found = time_folder(directory, target, trusted=trusted)
    beside = None if against is None else compare_folders(directory, against, target, trusted=trusted)
    if as_json:
        typer.echo(json.dumps(asdict(found) | {"against": None if beside is None else asdict(beside)}, indent=1))
    else:
        _say_times(directory, found, against, beside)
    if not found.is_right:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _say_times(directory: Path, found: "FolderLatency", against: Path | None, beside: "Latency | None") -> None:
    _say_alone(directory, found)
    if beside is not None:
        say(
            f"against {against}: {beside.ratio:.3f}x [{beside.ratio_low:.3f}, {beside.ratio_high:.3f}], "
            f"{beside.latency_ms:.3g} ms to {beside.reference_ms:.3g} ms side by side in {beside.n_blocks} blocks"
        )
    say(f"No dense model was timed beside it: `ranksearch verify {directory} --study STUDY.py` does that.")


def _say_alone(directory: Path, found: "FolderLatency") -> None:
    """What was measured of a folder, beside what it claims."""
    times = found.times
    say(f"{directory / found.file}, {_told_target(found.target)}:")
    say(
        f"median {times.median_ms:.3g} ms [{times.low_ms:.3g}, {times.high_ms:.3g}], "
        f"95 % of calls within {times.p95_ms:.3g} ms, {times.n_calls} calls"
    )
    say(
        f"It claims {found.claimed['latency_ms']:.3g} ms, {found.claimed['latency_ratio']:.3f}x of dense, "
        f"for {_told_target(found.claimed_target)}."
    )
    if found.differs:
        say(f"That was another machine or version: {', '.join(found.differs)} differ.")
    if found.output_distance is None:
        say("At another batch than the example's its output was not compared.")
    else:
        verdict = "it gives the example's output" if found.is_right else "FAILS: it gives another output than recorded"
        say(f"{verdict}: relative difference {found.output_distance:.1e}")


def _told_target(target: Target) -> str:
    """The target in words."""
    threads = "" if target.threads is None else f", {target.threads} threads" if target.threads > 1 else ", 1 thread"
    cores = "" if target.cores is None else f" on cores {target.cores}"
    mode = "" if target.mode == "eager" else f" {target.mode}"
    where = f"{target.runtime}{mode} on {target.device}"
    return f"{where}, {target.precision}, batch {target.batch_size}{threads}{cores}"
