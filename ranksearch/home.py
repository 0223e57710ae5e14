"""Where a study's state lies on disk: names of files, nothing more."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ranksearch.cache import write_atomically
from ranksearch.errors import StudyError
from ranksearch.reading import is_file_name, parse_json, read_own_text, shown
from ranksearch.spec import MOVED_ASIDE

DEFAULT_HOME = Path(".ranksearch")


@dataclass(frozen=True, slots=True)
class StudyHome:
    """The folder of one study.

    `study.json` holds how it began, on which target and by which script, `journal.log` the trials, `candidates.json`
    the candidate table, `controls.json` what a user has without a search, `remeasured.json` the front on test data,
    `report.html` what the last run found; `plans/` holds weights and artefact of each finished plan. `full.json` and
    `full/` are of those that were trained in full, `other_targets/` of the front where it was measured elsewhere.
    """

    directory: Path

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def journal(self) -> Path:
        return self.directory / "journal.log"

    @property
    def candidates(self) -> Path:
        return self.directory / "candidates.json"

    @property
    def controls(self) -> Path:
        return self.directory / "controls.json"

    @property
    def remeasured(self) -> Path:
        return self.directory / "remeasured.json"

    @property
    def study(self) -> Path:
        return self.directory / "study.json"

    @property
    def plans(self) -> Path:
        return self.directory / "plans"

    @property
    def report(self) -> Path:
        return self.directory / "report.html"

    @property
    def full(self) -> Path:
        return self.directory / "full.json"

    def other_target(self, key: str) -> Path:
        """What was measured on another target, by its plans."""
        return self.directory / "other_targets" / f"{key}.json"

    def fully_trained(self, plan_hash: str) -> Path:
        """The folder of one plan that was trained in full."""
        return self.directory / "full" / plan_hash

    def plan(self, plan_hash: str) -> Path:
        """The folder of one plan: its weights, its artefact and what was measured."""
        return self.plans / plan_hash


def shown_script(home: StudyHome, record: Mapping[str, Any]) -> str:
    """The study's script as a report names it: from the folder that holds the home, where it lies below that."""
    script, base = record.get("script"), home.directory.resolve().parent.parent
    if not script:
        return "STUDY.py"
    return str(Path(script).relative_to(base)) if Path(script).is_relative_to(base) else str(script)


def read_json(path: Path) -> dict[str, Any]:
    """The file's object, {} where there is no file. Raises StudyError where it is damaged."""
    try:
        content = parse_json(read_own_text(path))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} cannot be read: {error}; restore it, or start over with --new") from None
    if not isinstance(content, dict):
        raise StudyError(f"{path} holds no JSON object; restore it, or start over with --new")
    return content


def artefact_of(folder: Path) -> Path | None:
    """The artefact in a plan's folder, by its record; None where there is none. Raises StudyError for one elsewhere."""
    name = read_json(folder / "runtime.json").get("artefact")
    if name is None:
        return None
    if not isinstance(name, str) or not is_file_name(name):
        raise StudyError(f"{folder / 'runtime.json'} names a file {shown(name)}, which is none of its folder's")
    return folder / name


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes aside, then renames."""
    write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def studies_in(home: Path) -> list[StudyHome]:
    """The studies under `home`, the most recently touched first; those that --new moved aside are left out."""
    found = [study for study in _folders(home) if not MOVED_ASIDE.search(study.name)]
    return sorted(found, key=lambda study: study.study.stat().st_mtime, reverse=True)


def find_study(home: Path, name: str | None) -> StudyHome:
    """The study of that name, or the only one. Raises StudyError that lists what there is."""
    studies = studies_in(home)
    # Not home / name: `..` and other paths would lead out of the home.
    named = [study for study in _folders(home) if study.name == name]
    if named:
        return named[0]
    if name is None and len(studies) == 1:
        return studies[0]
    listed = ", ".join(sorted(study.name for study in studies)) or "none; start one with `ranksearch run STUDY.py`"
    wanted = f"no study {name!r}" if name is not None else "more than one study" if studies else "no study"
    raise StudyError(f"{wanted} in {home} (there: {listed}); name a script or --study NAME, and --home where it lies")


def _folders(home: Path) -> list[StudyHome]:
    return [StudyHome(file.parent) for file in home.glob("*/study.json")]
