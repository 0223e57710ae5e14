"""The torch runtime on a real GPU."""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ranksearch.errors import MeasurementError, RuntimeUnavailableError
from ranksearch.latency import compare, measure_latency
from ranksearch.runtimes import DeviceTimed, get_runtime
from ranksearch.runtimes.pytorch.cuda import CudaDevice, DeviceCall
from ranksearch.runtimes.pytorch.runtime import COMBINATIONS, TorchRuntime
from ranksearch.spec import Target
from ranksearch.testing import check_runtime

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU here")]
RUNTIME = TorchRuntime()
TOLERANCE = {"f32": 1e-5, "tf32": 2e-3, "default": 2e-3, "f16": 5e-3, "bf16": 4e-2}
COMBINED = [(mode, precision) for mode, precisions in COMBINATIONS["cuda"].items() for precision in precisions]


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.cuda.empty_cache()


def on_gpu(**changes: Any) -> Target:
    return Target(**{"runtime": "torch", "device": "cuda", "batch_size": 4, "threads": 1} | changes)


def network(width: int = 32) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 10),
    ).eval()  # fmt: skip


@pytest.mark.parametrize(("mode", "precision"), COMBINED)
def test_outputs_are_those_of_the_cpu(mode: str, precision: str, tmp_path: Path) -> None:
    model, target = network(), on_gpu(mode=mode, precision=precision)
    RUNTIME.check(target)
    example, other = torch.randn(4, 3, 16, 16), torch.randn(4, 3, 16, 16)
    opened = RUNTIME.open(RUNTIME.serialise(model, example, target, tmp_path), target)
    for session in (RUNTIME.prepare(model, example, target), opened):
        call = session.bind(example.numpy())
        assert isinstance(call, DeviceTimed)
        assert min(call.device_seconds(5)) > 0
        for inputs in (example, other):
            with torch.no_grad():
                expected = model(inputs).numpy()
            got = session.run(inputs.numpy())
            call()
            assert np.abs(got - expected).max() <= TOLERANCE[precision] * np.abs(expected).max()
        word = {"eager": "eager", "compile": "inductor", "cuda_graph": "cuda_graph"}[mode]
        assert session.layer_kernels() == {
            "0": f"Conv2d {word}_{precision}", "3": f"Conv2d {word}_{precision}", "7": f"Linear {word}_{precision}",
        }  # fmt: skip


@pytest.mark.parametrize("mode", COMBINATIONS["cuda"])
def test_contract_holds(mode: str) -> None:
    check_runtime(get_runtime("torch"), on_gpu(mode=mode, batch_size=2))


def test_tf32_rounds_and_f32_does_not() -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("this GPU has no TF32")
    example = torch.randn(256, 1024)
    model = nn.Linear(1024, 256)
    with torch.no_grad():
        expected = nn.functional.linear(example.double(), model.weight.double(), model.bias.double()).numpy()
    off = {}
    for precision in ("f32", "tf32"):
        session = RUNTIME.prepare(model, example, on_gpu(precision=precision, batch_size=256))
        off[precision] = np.abs(session.run(example.numpy()) - expected).max()
    assert off["tf32"] > 10 * off["f32"]


@pytest.mark.parametrize("mode", ["eager", "cuda_graph"])
def test_the_device_times_more_work_as_longer(mode: str) -> None:
    # Sixty-four times the work of a layer that fills the GPU: far from any noise.
    layers = [nn.Linear(size, size, bias=False) for size in (1024, 8192)]
    seconds = []
    for layer in layers:
        example = torch.randn(2048, layer.in_features)
        call = RUNTIME.prepare(layer, example, on_gpu(mode=mode, batch_size=2048)).bind(example.numpy())
        assert isinstance(call, DeviceTimed)
        call()
        seconds.append(median(call.device_seconds(20)))
    assert seconds[1] > 4 * seconds[0]


def test_a_flushed_cache_is_not_part_of_the_time() -> None:
    layer, example, n_bytes = nn.Linear(256, 256), torch.randn(16, 256), 1 << 30
    call = RUNTIME.prepare(layer, example, on_gpu(mode="cuda_graph", batch_size=16)).bind(example.numpy())
    assert isinstance(call, DeviceCall)
    device = CudaDevice(0)
    flush = DeviceCall(device.flusher(n_bytes), device, nullcontext())
    # Writing a GiB takes a hundred times what this layer does.
    assert 2 * median(call.cold(n_bytes).device_seconds(20)) < median(flush.device_seconds(20))


def test_a_model_compares_to_itself_as_one() -> None:
    model, example = network(), torch.randn(4, 3, 16, 16)
    calls = [RUNTIME.prepare(model, example, on_gpu(mode="cuda_graph")).bind(example.numpy()) for _ in range(2)]
    latency = compare(*calls, max_seconds=2.0)
    assert 0.5 < latency.ratio < 2.0
    assert measure_latency(model, model, on_gpu(), example, max_seconds=1.0).latency_ms > 0


def test_too_little_memory_is_told() -> None:
    class Hungry(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs + torch.empty(1 << 42, device=inputs.device)[:1]

    with pytest.raises(MeasurementError, match="too little memory"):
        RUNTIME.prepare(Hungry(), torch.ones(1), on_gpu(batch_size=1))


def test_a_model_that_waits_for_the_device_cannot_be_captured() -> None:
    class Waiting(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs * float(inputs.sum())

    with pytest.raises(MeasurementError, match="Waiting cannot be captured as a CUDA graph"):
        RUNTIME.prepare(Waiting(), torch.ones(2), on_gpu(mode="cuda_graph", batch_size=1))


def test_a_gpu_beyond_the_last_is_refused_and_the_first_is_known_by_name() -> None:
    with pytest.raises(RuntimeUnavailableError, match="it has cpu, cuda:0"):
        RUNTIME.check(on_gpu(device=f"cuda:{torch.cuda.device_count()}"))
    facts = RUNTIME.fingerprint(on_gpu())
    assert facts["device"] == torch.cuda.get_device_name(0)
    assert facts == RUNTIME.fingerprint(on_gpu(device="cuda:0"))
    assert facts["driver"] and facts["cuda"] == torch.version.cuda
