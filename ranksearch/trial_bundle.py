"""A trial packed so that it can be run again elsewhere; no user code is run."""

import ast
import importlib.metadata
import io
import re
import sys
import zipfile
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from ranksearch import __version__
from ranksearch.errors import StudyError
from ranksearch.evaluation import FRONT_COLUMNS
from ranksearch.export import PLAN, RUNTIME
from ranksearch.home import StudyHome, read_json
from ranksearch.plan import Plan, Provenance
from ranksearch.search_result import read_result
from ranksearch.spec import Target
from ranksearch.trial_facts import TrialFacts

SCRIPT, TRIAL, REQUIREMENTS, README = "study.py", "trial.json", "requirements.txt", "README.md"
COMMAND = f"ranksearch evaluate {SCRIPT} {PLAN} --expect {TRIAL}"
# The earliest that a zip file can hold: the same trial gives the same bytes at any time.
EPOCH = (1980, 1, 1, 0, 0, 0)


def bundle_trial(
    home: StudyHome, trial: int, *, script: Path | None, storage: str | None
) -> tuple[dict[str, bytes], list[str]]:
    """The files of a trial's bundle by their names, and sentences on what may keep it from running as it did.

    `script` takes the place of the one that the study recorded. Raises StudyError where there is no such trial with
    values, its weights are gone, or the script is.
    """
    result, record = read_result(home, storage), read_json(home.study)
    row = next((row for row in result.rows if row["trial"] == trial), None)
    if row is None or row["accuracy"] is None:
        raise StudyError(f"there is no trial {trial} with values; `ranksearch front --all` lists them")
    plan, source = result.plans[trial], _read_script(record, script)
    facts = _facts(home, plan, row, record)
    provenance = Provenance(
        versions=facts.versions, seed=facts.seed, study=facts.study, trial=trial, sha256=facts.weights_sha256
    )
    names = _imported(source)
    notes = _missing(names, script or Path(record["script"]))
    if record.get("script_sha256", sha256(source).hexdigest()) != sha256(source).hexdigest():
        notes.append("The script is not the one that the study was last run by.")
    if any(full["trial"] == trial for full in result.full):
        notes.append("The trial's full training is another, by `ranksearch finish`; this is the trial itself.")
    texts = {
        # Without the quantizers, which every evaluation sets anew.
        PLAN: plan.model_copy(update={"provenance": provenance}).to_json(),
        TRIAL: facts.to_json(),
        REQUIREMENTS: _requirements(facts.versions, names),
        README: _readme(facts, str(row["summary"]), notes),
    }
    return {SCRIPT: source} | {name: text.encode() for name, text in texts.items()}, notes


def zipped(files: Mapping[str, bytes]) -> bytes:
    """The files as a zip: sorted, of one date, and not compressed, so that the same files give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, EPOCH)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # as on Linux, wherever it is written
            archive.writestr(entry, files[name])
    return buffer.getvalue()


def _read_script(record: Mapping[str, Any], script: Path | None) -> bytes:
    path = script or (Path(record["script"]) if record.get("script") else None)
    if path is None:
        raise StudyError("this study was run from Python and names no script; give one: ranksearch bundle STUDY.py")
    try:
        return path.read_bytes()
    except OSError as error:
        raise StudyError(f"the study script {path} cannot be read: {error.strerror}; name it where it lies") from None


def _facts(home: StudyHome, plan: Plan, row: Mapping[str, Any], record: Mapping[str, Any]) -> TrialFacts:
    """What the trial's kept folder and the study tell. Raises StudyError where the weights are gone."""
    folder = home.plan(plan.hash())
    written = (Plan.read(folder / PLAN).provenance if (folder / PLAN).is_file() else None) or Provenance()
    if written.sha256 is None:
        raise StudyError(
            f"the weights of trial {row['trial']} are gone, and with them what tells whether they come out again; "
            "bundle one of the front, whose weights are kept"
        )
    runtime = read_json(folder / RUNTIME)
    return TrialFacts(
        study=record["name"],
        trial=row["trial"],
        plan=plan.hash(),
        weights_sha256=written.sha256,
        seed=record["seed"] if written.seed is None else written.seed,
        torch_threads=runtime.get("torch_threads"),
        target=Target(**runtime["target"]),
        fingerprint=runtime.get("fingerprint", {}),
        versions=written.versions,
        figures={name: row[name] for name in FRONT_COLUMNS},
    )


def _imported(source: bytes) -> list[str]:
    """The top-level modules that a script imports, anywhere in it, beside Python's own and this package."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except (SyntaxError, ValueError) as error:
        raise StudyError(f"the study script cannot be read as Python: {error}") from None
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    return sorted({name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"ranksearch"})


def _missing(names: Sequence[str], script: Path) -> list[str]:
    """Of what the script imports, that which no package brings."""
    brought = importlib.metadata.packages_distributions()
    beside = {path.stem for path in script.resolve().parent.iterdir()}
    return [
        f"`{name}`, which {SCRIPT} imports, is not packed: "
        + ("it lies beside the script." if name in beside else "it is no package that is installed here.")
        for name in names
        if name not in brought
    ]


def _requirements(versions: Mapping[str, str], names: Sequence[str]) -> str:
    """The trial's versions, and those of here of what else the script imports."""
    brought = importlib.metadata.packages_distributions()
    here = {name: importlib.metadata.version(name) for module in names for name in brought.get(module, [])}
    then = {name: version for name, version in versions.items() if name not in ("python", "ranksearch")}
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in (here | then).items()}
    # What follows a plus names the build, which the index of Python's packages does not have.
    return "".join(f"{name}=={version.partition('+')[0]}\n" for name, version in sorted(pins.items()))


def _readme(facts: TrialFacts, summary: str, notes: Sequence[str]) -> str:
    ours, python = facts.versions.get("ranksearch", __version__), facts.versions.get("python", "3.11 or newer")
    told = "".join(f"- {note}\n" for note in notes)
    return f"""# Trial {facts.trial} of the study {facts.study}

{summary}

To run it again, with Python {python} in an environment of its own and a copy of ranksearch {ours}:

```sh
pip install -r {REQUIREMENTS}
pip install -c {REQUIREMENTS} PATH/TO/ranksearch
{COMMAND}
```

**{SCRIPT} is code, and runs with your rights: read it before you run it.**

The last command applies and trains the plan anew, with the trial's seed and as many threads in torch, and says whether
its weights are the same, bit for bit (exit code 0), or not (1). With other versions or on another kind of processor
they need not be: sums are taken in another order there. A training with a budget in seconds, or data that are shuffled
without a seed, give other weights each time. Latencies compare on one machine alone.

| file | what it is |
| --- | --- |
| {SCRIPT} | the study |
| {PLAN} | the plan |
| {TRIAL} | what the trial measured, and all that its weights depend on: seed, threads, versions, target, processor |
| {REQUIREMENTS} | versions |

Not in here:

- The trained model, the data, and whatever else the script reads.
{told}"""
