"""Commands beside the studies: doctor, ui, clean."""

import contextlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ranksearch.cache import cache_directory
from ranksearch.cli.options import study_home
from ranksearch.cli.stopping import Interrupts
from ranksearch.cli.terminal import err, print_table, say
from ranksearch.home import StudyHome, studies_in

if TYPE_CHECKING:
    from ranksearch.doctor import RuntimeReport


def begin_script(what: str, output: Path | None) -> None:
    """Writes a study script and says what to do with it."""
    from ranksearch.scaffold import SCAFFOLDS, write_script

    path = write_script(what, output)
    say(f"wrote {path}; read it, then: ranksearch check {path}")
    if not SCAFFOLDS[what.partition(":")[0]].tested:
        say("Its library was not at hand where ranksearch is tested, so try it before you trust it.")


def serve_ui(script: Path | None, name: str | None, *, home: Path, tracking_uri: str | None, port: int) -> None:
    """Serves MLflow until interrupted; a server that is running already is only pointed at."""
    from ranksearch.home_records import study_record
    from ranksearch.tracking import find_study, page_url, resolve_tracking_uri, serve

    place = study_home(script, name, home)
    uri = resolve_tracking_uri(tracking_uri)
    run = find_study(uri, None, place.name, identity=study_record(place).get("uid"))
    with contextlib.suppress(KeyboardInterrupt), Interrupts():
        with err.status("starting MLflow"):
            server = serve(uri, port)
        with server:
            url = page_url(server.url, run.experiment_id, run.run_id)
            say(url)
            _open_browser(url)
            if server.process is not None:
                say("Ctrl-C ends it.")
                server.process.wait()


def tell_machine() -> None:
    """The machine, and what each runtime runs on it."""
    from ranksearch.doctor import diagnose

    diagnosis = diagnose()
    print_table(["machine", ""], [[name, _plain(value)] for name, value in diagnosis.machine.items()])
    runtimes = [
        [found.name, found.version or "", device, mode, ", ".join(precisions)]
        for found in diagnosis.runtimes
        for (device, mode), precisions in found.targets.items()
    ]
    print_table(["runtime", "version", "device", "mode", "precisions"], runtimes)
    _print_bits(diagnosis.runtimes)
    for found in diagnosis.runtimes:
        if found.missing is not None:
            say(f"{found.name}: {found.missing}")


def _print_bits(runtimes: "Sequence[RuntimeReport]") -> None:
    """The bits that kernels run, layers downwards, runtimes and devices across."""
    places = [(found, device) for found in runtimes for device in dict.fromkeys(device for device, _ in found.bits)]
    layers = dict.fromkeys(layer for found in runtimes for _, layer in found.bits)
    rows = [[layer, *(", ".join(found.bits[device, layer]) for found, device in places)] for layer in layers]
    names = [f"{found.name} {device}" for found, device in places]
    print_table(["layer", *names], rows, title="weight/activation bits that kernels run")


def _plain(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def clean_up(home: Path, yes: bool) -> None:
    """Deletes caches and studies. Raises StudyError while one of them is run."""
    places = studies_in(home)
    doomed = [path for path in (cache_directory(), *(place.directory for place in places)) if path.is_dir()]
    if not doomed:
        say("There is nothing to delete.")
        return
    for path in doomed:
        say(str(path))
    if not yes and not typer.confirm("Delete these caches and studies?"):
        say("Nothing was deleted.")
        return
    _delete(places, doomed)


def _delete(places: list[StudyHome], doomed: list[Path]) -> None:
    """Deletes the folders, none while one of the studies is run."""
    from ranksearch.optimization import coordinator_lock

    with contextlib.ExitStack() as locks:
        for place in places:
            locks.enter_context(coordinator_lock(place.directory))
        for path in doomed:
            shutil.rmtree(path)
    say(f"Deleted {len(doomed)} folders.")


def _open_browser(url: str) -> None:
    """Where a person sits at this terminal; elsewhere a text browser might take it over."""
    if sys.stdout.isatty():
        import webbrowser

        webbrowser.open(url)
