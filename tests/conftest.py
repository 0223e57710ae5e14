"""What several tests share: a study that went through everything that can stop it, and a tiny one, opened."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import Commands, Searched, search_through_kills
from tiny_study import Pairs, make_spec, split, trained
from torch import nn

from ranksearch.factorisations import Factorisations
from ranksearch.workbench import Workbench, open_workbench

pytest_plugins = ["postgres", "tracked_study"]

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # Tests in other processes time on the device as well: its lock is a file in this folder, so each has its own.
    tempfile.tempdir = os.environ["TMPDIR"] = str(Path(tempfile.gettempdir()) / f"ranksearch-{worker}")
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    # Of the terminal that the tests were started in: what is tested writes to files.
    os.environ.pop("COLUMNS", None)

# Layers this small: a second thread waits longer than it works, above all beside other processes.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    """The command line in processes of its own, which need not import everything each time."""
    with Commands(tmp_path_factory.mktemp("cache")) as started:
        yield started


@pytest.fixture(scope="session")
def searched(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Searched:
    """The tiny study, killed and stopped at many moments, and gone on with until it had its four trials."""
    return search_through_kills(commands, tmp_path_factory.mktemp("searched"))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test reads or fills the user's cache."""
    directory = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("RANKSEARCH_CACHE", str(directory))
    return directory


@pytest.fixture(scope="session")
def parts() -> dict[str, Pairs]:
    """The data of the tiny study."""
    return split()


@pytest.fixture(scope="session")
def model(parts: dict[str, Pairs]) -> nn.Sequential:
    """Its trained network, shared by all tests: none may change it."""
    return trained(parts["train"])


@pytest.fixture(scope="session")
def bench(model: nn.Sequential, parts: dict[str, Pairs]) -> Workbench:
    """It, opened on OpenVINO."""
    return open_workbench(make_spec(model, parts))


@pytest.fixture(scope="session")
def factorisations(bench: Workbench) -> Factorisations:
    """Its layers, factored for every rank; in memory alone, since `own_cache` has not begun yet."""
    return Factorisations(bench.model, bench.factorisations().statistics)
