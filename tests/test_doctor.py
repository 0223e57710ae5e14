"""What the machine runs, told of every runtime, one that is broken among them."""

from typing import Any

import pytest
from typer.testing import CliRunner

from ranksearch.cli import app
from ranksearch.doctor import LAYERS, diagnose, examine
from ranksearch.errors import RuntimeUnavailableError
from ranksearch.layers import layer_spec
from ranksearch.runtimes import RUNTIMES
from ranksearch.runtimes.pytorch.runtime import TorchRuntime
from ranksearch.spec import Target


class Broken:
    """A runtime whose library is there and fails as foreign libraries do."""

    name, module, extra = "broken", "torch", None

    def check_installed(self) -> None:
        raise OSError("libbroken.so: cannot open shared object file")


class Nowhere(TorchRuntime):
    """A runtime that is installed and has no device here."""

    def check(self, target: Target) -> None:
        raise RuntimeUnavailableError("there is no accelerator; plug one in")


def test_the_bits_are_those_that_the_runtimes_support() -> None:
    diagnosis = diagnose()
    assert [found.name for found in diagnosis.runtimes] == list(RUNTIMES)
    for found in diagnosis.runtimes:
        for label, layer in LAYERS.items():
            spec = layer_spec(layer)
            assert spec is not None
            supported = RUNTIMES[found.name].supported_bits(spec, Target(runtime=found.name))
            assert found.bits["cpu", label] == [f"{weight}/{activation}" for weight, activation in supported]
    assert diagnosis.machine["processor"] and diagnosis.machine["cores"]


@pytest.mark.parametrize(("runtime", "reason"), [(Broken(), "libbroken.so"), (Nowhere(), "plug one in")])
def test_a_runtime_that_fails_is_reported_with_its_reason(runtime: Any, reason: str) -> None:
    found = examine(runtime)
    assert found.missing is not None and reason in found.missing
    assert not found.targets and not found.bits


def test_the_command_names_runtimes_versions_targets_and_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RUNTIMES, "broken", Broken())
    told = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "200"})
    assert told.exit_code == 0, told.output
    for words in ("openvino", "2026.", "onnxruntime", "compile", "Conv2d 64, 3x3 depthwise", "32/32, 8/8"):
        assert words in told.output
    assert "broken: libbroken.so: cannot open shared object file" in told.output
