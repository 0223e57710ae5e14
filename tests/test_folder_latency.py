"""An export is timed without its study: on its own target, on others, and beside another export."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from command_line import Commands
from tiny_study import plans

import ranksearch as rs
from ranksearch.errors import MeasurementError, RuntimeUnavailableError, StudyError
from ranksearch.export import export_bundle, load, read_example, write_bundle
from ranksearch.folder_latency import compare_folders, time_folder
from ranksearch.latency import time_alone
from ranksearch.plan import Plan, Provenance
from ranksearch.portable import write_portable
from ranksearch.runtimes import AbstractRuntime
from ranksearch.workbench import Workbench

CLAIMED = {"latency_ms": 1.5, "latency_ratio": 0.25}


class Exports:
    """Writes exports of a network's plans, each with the portable files that are named."""

    def __init__(self, bench: Workbench, place: Path) -> None:
        self.bench = bench
        self.place = place

    def write(self, name: str, plan: Plan, formats: list[str], *, dynamic: bool = True) -> Path:
        bench, bundle = self.bench, self.place / f"{name}-bundle"
        compressed = rs.compress(bench.model, plan, calibration=bench.calibration).eval()
        write_bundle(bench, plan, compressed, bundle)

        def add(folder: Path) -> None:
            write_portable(load(folder, bench.model), read_example(folder)[0], folder, formats, dynamic=dynamic)

        measured = {**CLAIMED, "model_bytes": 0}
        export_bundle(bundle, self.place / name, measured, lambda _files: "", Provenance(study="tiny"), False, add)
        return self.place / name


@pytest.fixture(scope="module")
def exports(bench: Workbench, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(bench, tmp_path_factory.mktemp("exports"))


@pytest.fixture(scope="module")
def small(exports: Exports) -> Path:
    return exports.write("small", plans()["float"], ["onnx", "openvino", "pt2"])


@pytest.fixture(scope="module")
def bare(exports: Exports) -> Path:
    return exports.write("bare", plans()["8 bits"], [])


@pytest.fixture(scope="module")
def static(exports: Exports) -> Path:
    return exports.write("static", plans()["float"], ["onnx", "openvino", "pt2"], dynamic=False)


FILES = {"openvino": "portable.xml", "onnxruntime": "portable.onnx", "torch": "portable.pt2"}


def test_the_folders_own_target_is_the_default(bare: Path, bench: Workbench) -> None:
    found = time_folder(bare, max_seconds=0.05)
    assert (found.file, found.target, found.claimed_target) == ("model.xml", bench.spec.target, bench.spec.target)
    assert found.is_right and found.output_distance is not None and found.output_distance < 1e-3
    assert found.claimed == CLAIMED and found.differs == ()
    times = found.times
    assert 0 < times.low_ms <= times.median_ms <= times.high_ms and times.n_calls >= 6
    assert times.p95_ms >= times.low_ms


@pytest.mark.parametrize("runtime", list(FILES))
@pytest.mark.parametrize("n_rows", [1, 16, 21])
def test_another_target_takes_the_portable_file(runtime: str, n_rows: int, small: Path, bench: Workbench) -> None:
    target = replace(bench.spec.target, runtime=runtime, batch_size=n_rows, threads=1)
    found = time_folder(small, target, trusted=True, max_seconds=0.02)
    own = runtime == "openvino" and n_rows == 16
    assert found.file == ("model.xml" if own else FILES[runtime])
    assert (found.output_distance is None) == (n_rows != 16) and found.is_right


@pytest.mark.parametrize("runtime", list(FILES))
def test_a_batch_that_the_file_does_not_take_is_told(runtime: str, static: Path, bench: Workbench) -> None:
    target = replace(bench.spec.target, runtime=runtime, batch_size=5)
    with pytest.raises(MeasurementError):
        time_folder(static, target, trusted=True)
    if runtime != "openvino":
        assert time_folder(static, replace(target, batch_size=16), trusted=True, max_seconds=0.02).is_right


def test_what_is_not_there_is_told_with_what_writes_it(bare: Path, bench: Workbench) -> None:
    target = bench.spec.target
    for changes, option in (({"runtime": "onnxruntime"}, "--onnx"), ({"runtime": "torch"}, "--pt2")):
        with pytest.raises(StudyError, match=f"ranksearch export STUDY.py -o DIR {option}"):
            time_folder(bare, replace(target, **changes))
    with pytest.raises(StudyError, match="no portable.xml, which openvino at batch 3 takes.*--openvino"):
        time_folder(bare, replace(target, batch_size=3))
    with pytest.raises(RuntimeUnavailableError, match="no runtime 'abacus'"):
        time_folder(bare, replace(target, runtime="abacus"))
    with pytest.raises(MeasurementError, match="Target.threads is 4096"):
        time_folder(bare, replace(target, threads=4096))


def test_a_batch_that_would_take_all_memory_is_refused(bench: Workbench, small: Path) -> None:
    target = replace(bench.spec.target, batch_size=10**12, threads=1)
    with pytest.raises(StudyError, match=r"a batch of 1,000,000,000,000 examples has .* bytes; give"):
        time_folder(small, target)


def test_another_machine_and_a_wrong_output_are_told(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import ranksearch.folder_latency as room

    record = room.read_record(bare)
    elsewhere = record.model_copy(update={"fingerprint": record.fingerprint | {"isa": "none", "openvino": "1"}})
    monkeypatch.setattr(room, "read_record", lambda _directory: elsewhere)
    inputs, outputs = read_example(bare)
    monkeypatch.setattr(room, "read_example", lambda _directory: (inputs, {"0": outputs["0"] + 10}))
    found = time_folder(bare, max_seconds=0.02)
    assert set(found.differs) == {"isa", "openvino"} and not found.is_right
    # Versions of another runtime say nothing.
    assert room._differing(elsewhere, replace(record.target, runtime="torch")) == ("isa",)


def test_two_folders_are_timed_side_by_side(bare: Path, small: Path, bench: Workbench) -> None:
    latency = compare_folders(bare, small, bench.spec.target, max_seconds=0.1)
    assert latency.ratio_low <= latency.ratio <= latency.ratio_high and latency.reference_ms > 0
    one_row = replace(bench.spec.target, batch_size=1)
    with pytest.raises(StudyError, match=f"{bare.name} has no portable.xml"):
        compare_folders(small, bare, one_row)


def test_the_command_tells_what_it_timed_and_what_is_claimed(
    commands: Commands, bare: Path, small: Path, tmp_path: Path
) -> None:
    ended = commands.run(tmp_path, "bench", bare, "--against", small)
    assert ended.code == 0, ended.err
    for part in ("model.xml, openvino on cpu", "median ", "95 % of calls", "claims 1.5 ms, 0.250x of dense",
                 f"against {small}: ", "No dense model was timed"):  # fmt: skip
        assert part in ended.out, ended.out
    ended = commands.run(tmp_path, "bench", small, "--target", "runtime=onnxruntime,threads=1", "--json")
    found = json.loads(ended.out)
    assert (found["file"], found["target"]["threads"], found["against"]) == ("portable.onnx", 1, None)
    ended = commands.run(tmp_path, "bench", small, "--target", "runtime=torch")
    assert ended.code == 2 and "can run code as it is opened; pass --trust" in ended.err
    assert commands.run(tmp_path, "bench", small, "--target", "runtime=torch", "--trust").code == 0
    ended = commands.run(tmp_path, "bench", tmp_path / "nowhere")
    assert ended.code == 2 and "there is no export folder" in ended.err


class Ticks:
    """A clock that calls move."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.now, self.seconds = 0.0, seconds

    def call(self) -> None:
        self.now += next(self.seconds)

    def __call__(self) -> float:
        return self.now


def endless(*seconds: float) -> Iterator[float]:
    while True:
        yield from seconds


def test_times_alone_are_those_of_calls() -> None:
    clock = Ticks(endless(*[0.010] * 9, 0.030))
    times = time_alone(clock.call, max_seconds=2.0, block_seconds=0.2, clock=clock)
    assert times.median_ms == pytest.approx(10.0) and (times.low_ms, times.high_ms) == pytest.approx((10.0, 10.0))
    assert times.p95_ms == pytest.approx(30.0) and times.n_calls > 100
    slow = Ticks(endless(1.0, 3.0))
    times = time_alone(slow.call, max_seconds=2.0, block_seconds=0.2, clock=slow)
    assert times.n_calls == 6 and (times.low_ms, times.high_ms) == pytest.approx((1000.0, 3000.0))
    stopped = Ticks(endless(0.0))
    with pytest.raises(MeasurementError, match="the clock does not advance"):
        time_alone(stopped.call, clock=stopped)
    with pytest.raises(MeasurementError, match="the model failed while it was timed"):
        time_alone(Ticks(iter([1.0])).call)


class Own(AbstractRuntime):
    """A runtime of a user's that knows nothing of portable files."""

    name = "own"
    module = "torch"
    check = supported_bits = options = fingerprint = prepare = serialise = open = lambda *_arguments: None


def test_a_runtime_that_reads_no_portable_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(RuntimeUnavailableError, match="runtime 'own' reads no portable file"):
        Own().open_portable(tmp_path / "portable.onnx", None, rs.Target(runtime="own"))
