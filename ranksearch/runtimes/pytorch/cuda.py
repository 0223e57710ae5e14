"""CUDA devices as the torch runtime sees them: streams, events, captured graphs, and calls timed by the device."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import Any, Protocol, TypeVar, final

import torch
from torch import Tensor

T = TypeVar("T")


class Event(Protocol):
    """A moment on a device's stream, as torch.cuda.Event."""

    def record(self) -> None:
        """Marks the moment when the device comes here."""

    def elapsed_time(self, end_event: Any) -> float:
        """Milliseconds from this moment to that, once the device has passed both."""


class Accelerator(Protocol):
    """A device that works on while the host goes ahead."""

    place: torch.device

    def move(self, tensor: Tensor) -> Tensor:
        """The tensor on the device."""

    def current(self) -> AbstractContextManager[Any]:
        """While open, streams and events are those of this device."""

    def aside(self) -> AbstractContextManager[Any]:
        """While open, work goes to another stream, which waits for the current one, and it then for that."""

    def capture(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        """What replays the work of `call`, and the outputs that each replay writes."""

    def flusher(self, n_bytes: int) -> Callable[[], Any]:
        """What writes so many bytes on the device, and so drives all else out of its cache."""

    def event(self) -> Event:
        """An event that times."""

    def synchronise(self) -> None:
        """Waits until the device has done all that it was given."""


class Accelerators(Protocol):
    """The accelerators of this machine, by number."""

    def absence(self) -> str | None:
        """Why there is none; None where there is."""

    def count(self) -> int:
        """How many there are."""

    def capability(self, index: int) -> tuple[int, int]:
        """The compute capability, major and minor."""

    def facts(self, index: int) -> dict[str, str]:
        """What a latency depends on: name, capability, memory, driver and versions."""

    def open(self, index: int) -> Accelerator:
        """The device of that number."""


@final
class DeviceCall:
    """A call on a device, timed by the device itself; `settings` hold while it is made."""

    def __init__(
        self,
        call: Callable[[], Any],
        device: Accelerator,
        settings: AbstractContextManager[Any],
        flush: Callable[[], Any] | None = None,
    ) -> None:
        self._call = call
        self._device = device
        self._settings = settings
        self._flush = flush

    def cold(self, n_bytes: int) -> "DeviceCall":
        """The same call with `n_bytes`, the size of the device's cache or more, written before each that is timed."""
        return DeviceCall(self._call, self._device, self._settings, self._device.flusher(n_bytes))

    def __call__(self) -> None:
        with self._device.current(), self._settings:
            self._call()

    def device_seconds(self, n_calls: int) -> list[float]:
        """The seconds of each of so many calls in a row, from events around them; waits for the device once."""
        with self._device.current(), self._settings:
            spans = self._warm(n_calls) if self._flush is None else self._cold(n_calls, self._flush)
            self._device.synchronise()
        return [start.elapsed_time(end) / 1000 for start, end in spans]

    def _warm(self, n_calls: int) -> list[tuple[Event, Event]]:
        events = [self._device.event() for _ in range(n_calls + 1)]
        events[0].record()
        for event in events[1:]:
            self._call()
            event.record()
        return list(zip(events, events[1:], strict=False))

    def _cold(self, n_calls: int, flush: Callable[[], Any]) -> list[tuple[Event, Event]]:
        spans = [(self._device.event(), self._device.event()) for _ in range(n_calls)]
        for start, end in spans:
            flush()
            start.record()
            self._call()
            end.record()
        return spans


@final
class Cuda:
    """The GPUs that torch finds through CUDA."""

    def absence(self) -> str | None:
        if torch.version.cuda is None:
            return f"torch {torch.__version__} was built without CUDA; install a CUDA build of it"
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} finds no GPU; look at nvidia-smi and CUDA_VISIBLE_DEVICES"
        return None

    def count(self) -> int:
        return torch.cuda.device_count()

    def capability(self, index: int) -> tuple[int, int]:
        return torch.cuda.get_device_capability(index)

    def facts(self, index: int) -> dict[str, str]:
        properties = torch.cuda.get_device_properties(index)
        return {
            "device": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": str(properties.multi_processor_count),
            "memory_bytes": str(properties.total_memory),
            "cuda": str(torch.version.cuda),
            "cudnn": str(torch.backends.cudnn.version()),  # type: ignore[no-untyped-call]
            "driver": _driver(),
        }

    def open(self, index: int) -> "CudaDevice":
        return CudaDevice(index)


@final
class CudaDevice:
    """One GPU."""

    def __init__(self, index: int) -> None:
        self.place = torch.device("cuda", index)

    def move(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.place)

    def current(self) -> AbstractContextManager[Any]:
        return torch.cuda.device(self.place)

    @contextmanager
    def aside(self) -> Iterator[None]:
        current = torch.cuda.current_stream(self.place)
        stream = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            yield
        current.wait_stream(stream)

    def capture(self, call: Callable[[], T]) -> tuple[Callable[[], None], T]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = call()
        return graph.replay, outputs

    def flusher(self, n_bytes: int) -> Callable[[], Any]:
        return torch.empty(n_bytes, dtype=torch.uint8, device=self.place).zero_

    def event(self) -> Event:
        event: Event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        return event

    def synchronise(self) -> None:
        torch.cuda.synchronize(self.place)


@cache
def _driver() -> str:
    """The version of NVIDIA's driver, or `unknown` where nvidia-smi does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown"
    words = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return (done.stdout.split() or ["unknown"])[0]
