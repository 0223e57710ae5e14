"""The job files of studies/: Slurm's is run, with stand-ins; what Kubernetes' says is compared with ours."""

import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

from ranksearch.cli import EXIT_BAD_INPUT, EXIT_NO_PLAN, app
from ranksearch.cli.exporting import EXIT_CHECK_FAILED
from ranksearch.cli.options import duration_s
from ranksearch.cli.searching import EXIT_STOPPED

STUDIES = Path(__file__).parents[1] / "studies"
SBATCH, KUBERNETES = STUDIES / "slurm.sbatch", STUDIES / "kubernetes.yaml"

# Ends with CODE, or with 75 once it is asked to; says what it was given, and each signal that it got.
RANKSEARCH = """#!/bin/bash
printf '%s\\n' "$@" >> arguments
trap 'echo USR1 >> signals; exit 75' USR1
trap 'echo TERM >> signals; exit 75' TERM
touch ready
[[ -n $CODE ]] && exit "$CODE"
for _ in {1..400}; do sleep 0.05; done
"""
SCONTROL = """#!/bin/bash
echo "$@" >> requeued
"""


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a command, as our command line reads them; what it does not know raises."""
    assert words[0] == "ranksearch"
    command = typer.main.get_command(app).commands[words[1]]  # type: ignore[attr-defined]
    return dict(command.make_context(words[1], words[2:]).params)


def start(folder: Path, code: str) -> "subprocess.Popen[bytes]":
    """Slurm's job in a folder, with stand-ins on its path."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("ranksearch", RANKSEARCH), ("scontrol", SCONTROL)):
        (programs / name).write_text(text, encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}", "SLURM_JOB_ID": "41", "SLURM_CPUS_PER_TASK": "2", "CODE": code,
    }  # fmt: skip
    return subprocess.Popen(["bash", SBATCH, "study.py", "--trials", "9"], cwd=folder, env=environment)


def said(folder: Path, name: str) -> list[str]:
    path = folder / name
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


@pytest.mark.parametrize(("code", "requeued"), [(0, []), (1, []), (2, []), (3, []), (75, ["requeue 41"])])
def test_slurm_queues_again_what_was_stopped_and_nothing_else(tmp_path: Path, code: int, requeued: list[str]) -> None:
    assert start(tmp_path, str(code)).wait(timeout=30) == code
    assert said(tmp_path, "requeued") == requeued


@pytest.mark.parametrize(("name", "requeued"), [("USR1", ["requeue 41"]), ("TERM", [])])
def test_slurms_signal_reaches_the_study_once(tmp_path: Path, name: str, requeued: list[str]) -> None:
    job = start(tmp_path, "")
    give_up = time.monotonic() + 30
    while not (tmp_path / "ready").exists():
        assert time.monotonic() < give_up
        time.sleep(0.02)
    job.send_signal(signal.Signals[f"SIG{name}"])
    assert job.wait(timeout=30) == EXIT_STOPPED
    assert said(tmp_path, "signals") == [name]
    assert said(tmp_path, "requeued") == requeued


def test_slurms_command_is_ours_and_ends_in_time(tmp_path: Path) -> None:
    start(tmp_path, "0").wait(timeout=30)
    options = parsed(["ranksearch", *said(tmp_path, "arguments")])
    assert (options["trials"], options["home"]) == (9, tmp_path / ".ranksearch")
    (lead,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", SBATCH.read_text(encoding="utf-8"), re.MULTILINE)
    assert duration_s(options["grace"], "--grace") < int(lead)
    shown = re.search(r"sbatch studies/slurm.sbatch (.*)", SBATCH.read_text(encoding="utf-8"))
    assert shown and parsed(["ranksearch", "run", *shlex.split(shown[1])])["trials"] == 200


@pytest.fixture(scope="module")
def kinds() -> dict[str, dict[str, Any]]:
    documents = yaml.safe_load_all(KUBERNETES.read_text(encoding="utf-8"))
    return {document["kind"]: document for document in documents}


def test_kubernetes_command_is_ours_and_ends_in_time(kinds: dict[str, Any]) -> None:
    pod = kinds["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    options = parsed(container["command"])
    assert duration_s(options["grace"], "--grace") < pod["terminationGracePeriodSeconds"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(options["home"]).startswith(mounts["state"]), "what a study is must outlive its pod"
    assert str(options["script"]).startswith(mounts["study"])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts.keys() == volumes.keys()
    claim = volumes["state"]["persistentVolumeClaim"]["claimName"]
    assert claim == kinds["PersistentVolumeClaim"]["metadata"]["name"]


def test_kubernetes_passwords_come_from_its_secret(kinds: dict[str, Any]) -> None:
    (container,) = kinds["Job"]["spec"]["template"]["spec"]["containers"]
    from_secret = {entry["name"] for entry in container["env"] if "secretKeyRef" in entry.get("valueFrom", {})}
    assert from_secret == {"OPTUNA_STORAGE", "MLFLOW_TRACKING_URI"}
    run = typer.main.get_command(app).commands["run"]  # type: ignore[attr-defined]
    assert from_secret <= {param.envvar for param in run.params}
    assert {"RANKSEARCH_CACHE", "OMP_NUM_THREADS"} <= {entry["name"] for entry in container["env"]}


def test_kubernetes_starts_again_what_was_stopped_and_nothing_else(kinds: dict[str, Any]) -> None:
    job = kinds["Job"]["spec"]
    by_action = {
        rule["action"]: rule["onExitCodes"]["values"]
        for rule in job["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    ends = [EXIT_CHECK_FAILED, EXIT_BAD_INPUT, EXIT_NO_PLAN]
    assert by_action == {"FailJob": ends, "Count": [EXIT_STOPPED]}
    # Without these two Kubernetes refuses the policy, or never tries again.
    assert job["template"]["spec"]["restartPolicy"] == "Never" and job["backoffLimit"] > 0


def test_an_option_that_there_is_not_fails() -> None:
    with pytest.raises(Exception, match="No such option: --grase"):
        parsed(["ranksearch", "run", "study.py", "--grase=60s"])
