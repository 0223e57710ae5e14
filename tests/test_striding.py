"""Rounded pointwise convolutions of a stride on several threads of OpenVINO, where its own kernel is wrong at times."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ranksearch.compression import compress
from ranksearch.plan import LayerChoice, Plan
from ranksearch.runtimes import get_runtime
from ranksearch.runtimes.openvino.conversion import to_openvino
from ranksearch.spec import Target

# A race shows in about every third session, and run of one.
N_RUNS = 12
INT8 = LayerChoice(weight_bits=8, activation_bits=8)
RUNTIME, TARGET = get_runtime("openvino"), Target(batch_size=4, threads=2, precision="f32")


class Branches(nn.Module):
    """A residual block of a stride behind a pooling, which pools integers: its shortcut reads no quantizer itself."""

    def __init__(self, n_channels: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, n_channels, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.conv = nn.Conv2d(n_channels, 32, 3, stride=2, padding=1)
        self.shortcut = nn.Conv2d(n_channels, 32, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        pooled = self.stem(x)
        return torch.relu(self.conv(pooled)) + self.shortcut(pooled)


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "8 channels": (lambda: nn.Sequential(nn.Conv2d(8, 16, 1, stride=2)), (4, 8, 16, 16)),
    "24 channels": (lambda: nn.Sequential(nn.Conv2d(24, 16, 1, stride=(1, 2))), (4, 24, 16, 16)),
    "one axis": (lambda: nn.Sequential(nn.Conv1d(40, 16, 1, stride=2)), (4, 40, 64)),
    "behind a pooling": (lambda: Branches(24), (4, 3, 32, 32)),
}


@pytest.fixture(params=CASES)
def rounded(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module, Tensor]:
    """A network, it in 8 bits, and an example."""
    torch.manual_seed(0)
    make, shape = CASES[request.param]
    model, example = make().eval(), torch.randn(shape)
    return model, _rounded(model, example), example


def _rounded(model: nn.Module, example: Tensor) -> nn.Module:
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Conv1d | nn.Conv2d)]
    plan = Plan(layers=dict.fromkeys(layers, INT8))
    return compress(model, plan, calibration=[(example, None)], weight_limit=RUNTIME.weight_limit(TARGET)).eval()


def test_every_session_gives_what_torch_gives(rounded: tuple[nn.Module, nn.Module, Tensor]) -> None:
    _, model, example = rounded
    with torch.no_grad():
        expected = model(example).numpy()
    for _ in range(N_RUNS):
        given = RUNTIME.prepare(model, example, TARGET).run(example.numpy())
        assert np.abs(given - expected).max() < 0.02 * np.abs(expected).max()


def test_every_run_of_openvinos_own_int8_gives_the_same(rounded: tuple[nn.Module, nn.Module, Tensor]) -> None:
    pytest.importorskip("nncf")
    model, _, example = rounded
    session = RUNTIME.quantize_own(model, [example], example, TARGET)
    expected = session.run(example.numpy())
    for _ in range(N_RUNS):
        np.testing.assert_array_equal(session.run(example.numpy()), expected)


def test_only_what_would_be_wrong_is_sliced(rounded: tuple[nn.Module, nn.Module, Tensor]) -> None:
    model, in_integers, example = rounded
    assert _kinds(to_openvino(in_integers, example)).count("StridedSlice") == 1
    assert "StridedSlice" not in _kinds(to_openvino(model, example)), "float"
    wider, example = nn.Sequential(nn.Conv2d(16, 16, 1, stride=2)).eval(), torch.randn(4, 16, 16, 16)
    assert "StridedSlice" not in _kinds(to_openvino(_rounded(wider, example), example)), "a multiple of 16"


def _kinds(converted: Any) -> list[str]:
    return [op.get_type_name() for op in converted.get_ops()]
