"""A study that takes seconds, and the command that runs it, started from a process that has imported everything."""

import importlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path

# What a run imports on its way; a child that is forked after this starts at once.
MODULES = (
    "matplotlib.backends.backend_agg", "mlflow.artifacts", "mlflow.store.tracking.sqlalchemy_store", "alembic.command",
    "openvino.frontend.pytorch", "pandas", "plotly.graph_objects", "plotly.io", "ranksearch.run", "torch._dynamo",
)  # fmt: skip

SCRIPT = """
import time

import torch
import torch.nn.functional as F
from torch import nn

import ranksearch as rs

generator = torch.Generator().manual_seed(0)
rows = torch.randn(192, 32, generator=generator)
labels = (rows[:, :4] @ torch.randn(4, 4, generator=generator)).argmax(1)
batches = list(zip(rows.split(64), labels.split(64)))


def load_model():
    torch.manual_seed(0)
    hidden = [layer for _ in range({n_layers}) for layer in (nn.Linear(32, 32), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(32, 4))


def fine_tune(model, budget):
    time.sleep({sleep_s})


study = rs.StudySpec(
    name="small",
    model=load_model,
    data=lambda: rs.Data(calibration=batches[:1], validation=batches[1:2], test=batches[2:]),
    loss=F.cross_entropy,
    score=rs.top1,
    target=rs.Target(runtime="torch", batch_size=4, threads=1),
    space=rs.Space(decompositions=("none", "svd"), rank_multiple=4),
    recovery=rs.Recovery(fine_tune=fine_tune),
)
"""


def write_script(folder: Path, *, n_layers: int = 3, sleep_s: float = 0.0) -> Path:
    """The study's script, whose trainings only sleep."""
    script = folder / "study.py"
    script.write_text(SCRIPT.format(n_layers=n_layers, sleep_s=sleep_s), encoding="utf-8")
    return script


def import_all() -> None:
    """What commands need; threads that would not survive a fork are not started by it."""
    for module in MODULES:
        importlib.import_module(module)


def start(folder: Path, *words: str, log: Path, **environment: str) -> int:
    """`ranksearch WORDS` in `folder`, in a child in a session of its own; its process number."""
    pid = os.fork()
    if pid:
        return pid
    _run(folder, words, log, environment)
    raise AssertionError("the child has ended")


def _run(folder: Path, words: tuple[str, ...], log: Path, environment: Mapping[str, str]) -> None:
    code = 1
    try:
        os.setsid()
        os.chdir(folder)
        os.environ.update(environment)
        written = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(written, 1)
        os.dup2(written, 2)
        sys.argv = ["ranksearch", *words]
        from ranksearch.cli import main

        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0) if isinstance(end.code, int | None) else 1
    finally:
        sys.stdout.flush()
        os._exit(code)
