"""The torch runtime's work on a GPU, proved against a stand-in that computes on the CPU and notes every step."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.runtimes import DeviceTimed
from ranksearch.runtimes.pytorch.cuda import DeviceCall
from ranksearch.runtimes.pytorch.engines import N_WARM_UP_CALLS
from ranksearch.runtimes.pytorch.runtime import COMBINATIONS, TorchRuntime
from ranksearch.runtimes.structure import leaves_of
from ranksearch.spec import Target

# What each step takes on the stand-in's own clock.
CALL_SECONDS, FLUSH_SECONDS = 0.002, 0.5


class Steps(list[str]):
    """The steps in order, with the clock of the device that they run on."""

    clock = 0.0

    def add(self, step: str, seconds: float = 0.0) -> None:
        self.append(step)
        self.clock += seconds


class RecordedEvent:
    def __init__(self, steps: Steps) -> None:
        self._steps = steps

    def record(self) -> None:
        self._steps.add("record")
        self._moment = self._steps.clock

    def elapsed_time(self, end_event: "RecordedEvent") -> float:
        return 1000 * (end_event._moment - self._moment)


class RecordedDevice:
    """Computes on the CPU; a captured graph is computed again at every replay, into the same outputs."""

    place = torch.device("cpu")

    def __init__(self, steps: Steps, capturable: bool = True) -> None:
        self._steps = steps
        self._capturable = capturable

    def move(self, tensor: Tensor) -> Tensor:
        self._steps.add("move")
        return tensor.clone()

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    @contextmanager
    def aside(self) -> Iterator[None]:
        self._steps.add("aside")
        yield
        self._steps.add("joined")

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        if not self._capturable:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        self._steps.add("capture")
        outputs = call()

        def replay() -> None:
            self._steps.add("replay")
            with torch.inference_mode():
                for held, new in zip(leaves_of(outputs), leaves_of(call()), strict=True):
                    held.copy_(new)

        return replay, outputs

    def flusher(self, n_bytes: int) -> Callable[[], None]:
        return lambda: self._steps.add(f"flush {n_bytes}", FLUSH_SECONDS)

    def event(self) -> RecordedEvent:
        return RecordedEvent(self._steps)

    def synchronise(self) -> None:
        self._steps.add("synchronise")


class RecordedGpus:
    def __init__(self, steps: Steps, *, n_gpus: int = 1, capability: tuple[int, int] = (9, 0), **device: Any) -> None:
        self._steps, self._n_gpus, self._capability, self._device = steps, n_gpus, capability, device

    def absence(self) -> str | None:
        return None if self._n_gpus else "torch finds no GPU"

    def count(self) -> int:
        return self._n_gpus

    def capability(self, index: int) -> tuple[int, int]:
        return self._capability

    def facts(self, index: int) -> dict[str, str]:
        return {"device": f"GPU {index}"}

    def open(self, index: int) -> RecordedDevice:
        return RecordedDevice(self._steps, **self._device)


class Doubled(nn.Module):
    """Doubles its input and notes when, and how float32 is then multiplied."""

    steps = Steps()
    settings: list[tuple[str, bool]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.layer.weight.copy_(2 * torch.eye(2))

    def forward(self, inputs: Tensor) -> Tensor:
        self.steps.add("call", CALL_SECONDS)
        self.settings.append((torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32))
        return self.layer(inputs)


@pytest.fixture
def steps() -> Steps:
    Doubled.steps = Steps()
    Doubled.settings.clear()
    return Doubled.steps


def on_gpu(**changes: Any) -> Target:
    return Target(**{"runtime": "torch", "device": "cuda", "batch_size": 1, "threads": 1} | changes)


def rows(value: float) -> np.ndarray[Any, Any]:
    return np.full((1, 2), value, np.float32)


EXAMPLE = torch.ones(1, 2)
WARM_UP = ["aside", *["call"] * N_WARM_UP_CALLS, "joined", "capture", "call"]


@pytest.mark.parametrize("mode", ["eager", "cuda_graph"])
@pytest.mark.parametrize("precision", ["f32", "bf16"])
def test_outputs_follow_the_inputs(steps: Steps, mode: str, precision: str) -> None:
    runtime = TorchRuntime(RecordedGpus(steps))
    session = runtime.prepare(Doubled(), EXAMPLE, on_gpu(mode=mode, precision=precision))
    call = session.bind(rows(9.0))
    for value in (1.0, 3.0):
        outputs = session.run(rows(value))
        assert outputs.dtype == np.float32
        np.testing.assert_array_equal(outputs, rows(2 * value))
        call()
        np.testing.assert_array_equal(outputs, rows(2 * value))


def test_a_graph_is_warmed_up_aside_then_captured_and_each_call_replays_it(steps: Steps) -> None:
    runtime = TorchRuntime(RecordedGpus(steps))
    session = runtime.prepare(Doubled(), EXAMPLE, on_gpu(mode="cuda_graph"))
    assert steps == ["move", *WARM_UP]
    steps.clear()
    call = session.bind(rows(3.0))
    assert steps == ["move", *WARM_UP], "the inputs are moved once, before anything is timed"
    assert isinstance(call, DeviceTimed)
    steps.clear()
    call()
    assert steps == ["replay", "call"]


@pytest.mark.parametrize(("mode", "work"), [("eager", ["call"]), ("cuda_graph", ["replay", "call"])])
def test_the_device_times_calls_between_events_and_is_waited_for_once(steps: Steps, mode: str, work: list[str]) -> None:
    runtime = TorchRuntime(RecordedGpus(steps))
    call = runtime.prepare(Doubled(), EXAMPLE, on_gpu(mode=mode)).bind(rows(3.0))
    assert isinstance(call, DeviceTimed)
    steps.clear()
    seconds = call.device_seconds(3)
    assert seconds == pytest.approx([CALL_SECONDS] * 3)
    assert steps == ["record", *[*work, "record"] * 3, "synchronise"]


def test_a_cold_cache_is_made_outside_the_timed_calls(steps: Steps) -> None:
    warm = TorchRuntime(RecordedGpus(steps)).prepare(Doubled(), EXAMPLE, on_gpu()).bind(rows(3.0))
    assert isinstance(warm, DeviceCall)
    call = warm.cold(64)
    steps.clear()
    assert call.device_seconds(2) == pytest.approx([CALL_SECONDS] * 2)
    assert steps == ["flush 64", "record", "call", "record"] * 2 + ["synchronise"]
    steps.clear()
    call()
    assert steps == ["call"]
    assert warm.device_seconds(1) == pytest.approx([CALL_SECONDS])
    assert "flush 64" not in steps


@pytest.mark.parametrize("mode", ["eager", "cuda_graph"])
@pytest.mark.parametrize(
    ("precision", "settings"),
    [("f32", ("highest", False)), ("tf32", ("high", True)), ("default", ("highest", True)), ("f16", ("highest", True))],
)
def test_tf32_is_as_the_precision_says_and_the_process_keeps_its_own(
    steps: Steps, mode: str, precision: str, settings: tuple[str, bool]
) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    # Neither of these is any precision's.
    torch.set_float32_matmul_precision("medium")
    torch.backends.cudnn.allow_tf32 = not settings[1]
    try:
        runtime = TorchRuntime(RecordedGpus(steps))
        call = runtime.prepare(Doubled(), EXAMPLE, on_gpu(mode=mode, precision=precision)).bind(rows(1.0))
        call()
        assert isinstance(call, DeviceTimed)
        call.device_seconds(2)
        assert set(Doubled.settings) == {settings}
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("medium", not settings[1])
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_kernels_are_told_by_layer(steps: Steps) -> None:
    runtime = TorchRuntime(RecordedGpus(steps))
    kernels = {
        mode: runtime.prepare(Doubled(), EXAMPLE, on_gpu(mode=mode, precision="tf32")).layer_kernels()
        for mode in ("eager", "cuda_graph")
    }
    assert kernels == {"eager": {"layer": "Linear eager_tf32"}, "cuda_graph": {"layer": "Linear cuda_graph_tf32"}}


def test_a_file_is_opened_in_the_mode_of_the_target(steps: Steps, tmp_path: Path) -> None:
    runtime = TorchRuntime(RecordedGpus(steps))
    target = on_gpu(mode="cuda_graph")
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    session = runtime.open(runtime.serialise(model, EXAMPLE, target, tmp_path), target)
    assert "capture" in steps
    with torch.no_grad():
        np.testing.assert_allclose(session.run(rows(3.0)), model(torch.as_tensor(rows(3.0))).numpy(), rtol=1e-5)
    assert session.layer_kernels() == {"0": "Linear cuda_graph_f32"}


def test_what_cannot_be_captured_is_told(steps: Steps) -> None:
    runtime = TorchRuntime(RecordedGpus(steps, capturable=False))
    with pytest.raises(MeasurementError, match="Doubled cannot be captured.*is capturing; use mode 'eager'"):
        runtime.prepare(Doubled(), EXAMPLE, on_gpu(mode="cuda_graph"))


class Hungry(nn.Module):
    def forward(self, inputs: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB.\nGPU 0 has ...")


@pytest.mark.parametrize("mode", ["eager", "cuda_graph"])
def test_too_little_memory_is_told_with_the_batch_size(steps: Steps, mode: str) -> None:
    runtime = TorchRuntime(RecordedGpus(steps))
    with pytest.raises(MeasurementError, match=r"'cuda' has too little memory.*batch size 4 \(CUDA.*80 GiB.\)"):
        runtime.prepare(Hungry(), EXAMPLE, on_gpu(mode=mode, batch_size=4))


@pytest.mark.parametrize(
    ("target", "gpus", "message"),
    [
        (on_gpu(), {"n_gpus": 0}, "no device 'cuda' here: torch finds no GPU; it has cpu"),
        (on_gpu(device="cuda:2"), {"n_gpus": 2}, "no device 'cuda:2' here; it has cpu, cuda:0, cuda:1"),
        (on_gpu(precision="tf32"), {"capability": (7, 5)}, "does not multiply in tf32: .* is 7.5, and 8.0 would do"),
        (on_gpu(precision="bf16"), {"capability": (7, 0)}, "does not multiply in bf16"),
    ],
)
def test_gpus_that_are_not_there_are_told(steps: Steps, target: Target, gpus: dict[str, Any], message: str) -> None:
    with pytest.raises(RuntimeUnavailableError, match=message):
        TorchRuntime(RecordedGpus(steps, **gpus)).check(target)


def test_gpus_that_are_there_are_taken(steps: Steps) -> None:
    runtime = TorchRuntime(RecordedGpus(steps, n_gpus=2))
    for mode, precisions in COMBINATIONS["cuda"].items():
        for precision in precisions if mode != "compile" else ():
            runtime.check(on_gpu(mode=mode, precision=precision, device="cuda:1"))
    assert runtime.fingerprint(on_gpu(device="cuda:1"))["device"] == "GPU 1"
    assert runtime.fingerprint(on_gpu())["device"] == "GPU 0"
