"""The command line as users run it, in processes that are killed where the tests say, and the tiny study they run."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

TRIALS = 4

# What takes a command seconds to import, some of it at the first call of something else.
SLOW_MODULES = (
    "torch._dynamo", "mlflow.artifacts", "mlflow.store.tracking.sqlalchemy_store", "alembic.command", "pandas",
    "matplotlib.figure", "matplotlib.backends.backend_agg", "plotly.graph_objects", "plotly.io",
    "openvino.frontend.pytorch", "nncf", "ranksearch.run", "ranksearch.trial_cost", "ranksearch.verification",
)  # fmt: skip

STUDY = """
import torch
import torch.nn.functional as F
from torch import nn

import ranksearch as rs

generator = torch.Generator().manual_seed(0)
images = torch.rand(256, 3, 8, 8, generator=generator)
labels = torch.randint(0, 4, (256,), generator=generator)
batches = list(zip(images.split(32), labels.split(32)))


def load_model():
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))


def load_data():
    return rs.Data(calibration=batches[:2], validation=batches[2:5], test=batches[5:])


study = rs.StudySpec(
    name="tiny",
    model=load_model,
    data=load_data,
    loss=F.cross_entropy,
    score=rs.top1,
    target=rs.Target(runtime="openvino", batch_size=4, threads=1),
    goals=rs.Goals(max_drop="60%"),
    recovery=rs.Recovery(steps=2),
)
"""


def write_study(folder: Path, *changes: tuple[str, str], after: str = "") -> Path:
    """The tiny study's script in `folder`, with each (old, new) text exchanged, and `after` at its end."""
    text = STUDY
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    script = folder / "study.py"
    script.write_text(text + textwrap.dedent(after), encoding="utf-8")
    return script


@dataclass(frozen=True, kw_only=True)
class Ended:
    """What a command left behind."""

    code: int
    out: str
    err: str


@dataclass(frozen=True, kw_only=True)
class Running:
    """A command that runs: its process, and the files that it writes to."""

    pid: int
    out: Path
    err: Path

    def wait_for(self, text: str, timeout_s: float = 60.0) -> None:
        """Until standard output holds the text."""
        give_up = time.monotonic() + timeout_s
        while text not in self.out.read_text(encoding="utf-8"):
            assert time.monotonic() < give_up, f"no {text!r} in {self.out.read_text(encoding='utf-8')}"
            time.sleep(0.02)

    def send(self, number: int) -> None:
        """A signal."""
        os.kill(self.pid, number)


class Commands:
    """Runs `ranksearch ...` in children of one process that has imported everything, and nothing else, already."""

    def __init__(self, cache: Path) -> None:
        # Shared, so that the layers' latencies are measured once.
        self.cache = cache
        # A quick look at each latency: these tests are not about figures.
        environment = os.environ | {
            "RANKSEARCH_MAX_TIMING_SECONDS": "0.1",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            # One thread each: on a busy machine two threads of a network this small wait for each other.
            "OMP_NUM_THREADS": "1",
        }
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._n_started = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(timeout=10)
        if self._server.stdout is not None:
            self._server.stdout.close()

    def start(self, folder: Path, *words: str | Path, **environment: str) -> Running:
        """`ranksearch WORDS` in `folder`; see `_arm` for SIGNAL_AT."""
        self._n_started += 1
        logs = {name: folder / f"{self._n_started}.{name}" for name in ("out", "err")}
        argv = ["ranksearch", *map(str, words)]
        environment = {"RANKSEARCH_CACHE": str(self.cache)} | environment
        for log in logs.values():
            log.touch()
        paths = {name: str(log) for name, log in logs.items()}
        return Running(pid=self._ask(start=argv, folder=str(folder), environment=environment, **paths), **logs)

    def wait(self, running: Running) -> Ended:
        """How the command ended; a code below 0 is the signal that ended it."""
        code = self._ask(wait=running.pid)
        out, err = (log.read_text(encoding="utf-8") for log in (running.out, running.err))
        return Ended(code=code, out=out, err=err)

    def run(self, folder: Path, *words: str | Path, **environment: str) -> Ended:
        """Start to end."""
        return self.wait(self.start(folder, *words, **environment))

    def _ask(self, **question: Any) -> int:
        assert self._server.stdin is not None and self._server.stdout is not None
        self._server.stdin.write(json.dumps(question) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@dataclass(frozen=True, kw_only=True)
class Searched:
    """A finished study: its folder, its script, and how each of the runs ended that it took."""

    folder: Path
    script: Path
    ended: dict[str, Ended]

    @property
    def home(self) -> Path:
        return self.folder / ".ranksearch"

    @property
    def tracking_uri(self) -> str:
        return f"sqlite:///{self.folder / 'mlflow.db'}"


# Where a run is killed, or asked to stop: the n-th time that it comes to a function.
MOMENTS = {
    "killed in the profile": ("ranksearch.profiling:ProfileMaker._candidates:2", signal.SIGKILL, "30s"),
    "killed in a trial": ("ranksearch.ladder:Evaluator._fine_tune:2", signal.SIGKILL, "30s"),
    "killed before MLflow knew": ("ranksearch.tracking.tracker:Tracker.trial_finished:3", signal.SIGKILL, "30s"),
    "killed between trials": ("ranksearch.tracking.tracker:Tracker.update_front:2", signal.SIGKILL, "30s"),
    "SIGTERM without grace": ("ranksearch.ladder:Evaluator._fine_tune:1", signal.SIGTERM, "0s"),
    "SIGUSR1 with grace": ("ranksearch.ladder:Evaluator._fine_tune:1", signal.SIGUSR1, "60s"),
    "SIGINT with grace": ("ranksearch.ladder:Evaluator._fine_tune:1", signal.SIGINT, "60s"),
    "killed at the end": ("ranksearch.run:_remeasure_front:1", signal.SIGKILL, "30s"),
}


def search_through_kills(commands: Commands, folder: Path) -> Searched:
    """The same command again and again, until nothing stops it."""
    script = write_study(folder)
    # Other tests may have profiled this study: with a cache of its own it is profiled here, and killed meanwhile.
    own_cache = str(folder / "cache")
    words = ("run", script.name, "--trials", str(TRIALS), "--grace")
    ended = {
        name: commands.run(folder, *words, grace, SIGNAL_AT=f"{where}:{int(number)}", RANKSEARCH_CACHE=own_cache)
        for name, (where, number, grace) in MOMENTS.items()
    }
    ended["at last"] = commands.run(folder, *words, "30s", RANKSEARCH_CACHE=own_cache)
    return Searched(folder=folder, script=script, ended=ended)


def _arm(moment: str) -> None:
    """Has this process sent a signal the n-th time that it comes to a function: `module:function:n:signal`."""
    import importlib

    module, path, nth, number = moment.split(":")
    *parents, name = path.split(".")
    owner = importlib.import_module(module)
    for parent in parents:
        owner = getattr(owner, parent)
    original, calls = getattr(owner, name), []

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == int(nth):
            os.kill(os.getpid(), int(number))
        return original(*arguments, **options)

    setattr(owner, name, counting)


def _child(question: dict[str, Any]) -> None:
    """The command, in place of this process."""
    from ranksearch.cli import main

    os.chdir(question["folder"])
    moment = question["environment"].pop("SIGNAL_AT", None)
    os.environ.update(question["environment"])
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(question[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = question["start"]
    if moment is not None:
        _arm(moment)
    code = 0
    try:
        main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    """Starts and waits for commands, as standard input says."""
    import importlib

    for module in SLOW_MODULES:
        importlib.import_module(module)
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        question = json.loads(line)
        if "wait" in question:
            answer = os.waitstatus_to_exitcode(os.waitpid(question["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                _child(question)
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    _serve()
