"""The GPU's check: its networks, the order of its rows, its table, and the whole of it on the CPU without OpenVINO."""

import json
import math
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from ranksearch.runtimes.pytorch.runtime import COMBINATIONS

BENCHMARKS = Path(__file__).parents[1] / "scripts" / "benchmarks"


@pytest.fixture(scope="module")
def rooms() -> Iterator[dict[str, Any]]:
    """The check's modules, which import each other by their bare names."""
    before = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import gpu_check
        import gpu_rows
        import gpu_subjects

        yield {"check": gpu_check, "networks": gpu_subjects, "rows": gpu_rows}
    finally:
        sys.path[:] = before


@pytest.fixture(scope="module")
def asked(rooms: dict[str, Any]) -> list[Any]:
    """What would be asked of a GPU, about the tiny subjects."""
    networks, layers = rooms["networks"].TINY_NETWORKS, rooms["networks"].TINY_LAYERS
    return list(rooms["rows"].questions(networks, layers, "cuda"))


@pytest.mark.parametrize(
    ("name", "n_params"), [("resnet18", 11_689_512), ("vgg16", 138_357_544), ("VisionTransformer", 86_567_656)]
)
def test_the_networks_have_the_published_number_of_parameters(rooms: dict[str, Any], name: str, n_params: int) -> None:
    with torch.device("meta"):
        network = getattr(rooms["networks"], name)()
    assert sum(parameter.numel() for parameter in network.parameters()) == n_params
    assert network.eval()(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 1000)


def test_networks_come_first_and_compiling_last(rooms: dict[str, Any], asked: list[Any]) -> None:
    networks = set(rooms["networks"].TINY_NETWORKS)
    assert asked[0].mode == "cuda_graph" and asked[0].subject in networks
    first_layer = next(i for i, question in enumerate(asked) if question.subject not in networks)
    assert all(question.subject not in networks for question in asked[first_layer:] if question.mode != "compile")
    modes = [question.mode for question in asked]
    assert set(modes[modes.index("compile") :]) == {"compile"}
    assert {(q.mode, q.precision) for q in asked} == {
        (mode, precision)
        for mode, precisions in COMBINATIONS["cuda"].items()
        for precision in precisions
        if precision != "default"
    }


def test_a_row_tells_ratio_and_times_and_one_that_cannot_be_had_tells_why(
    rooms: dict[str, Any], asked: list[Any]
) -> None:
    layers = set(rooms["networks"].TINY_LAYERS)
    question = next(q for q in asked if q.subject in layers and (q.mode, q.precision) == ("eager", "f32"))
    row = rooms["rows"].answer(question, "cpu", max_seconds=0.05)
    assert row.problem is None and row.choice.startswith("tucker2 (")
    assert row.ratio_low <= row.ratio <= row.ratio_high
    assert row.cold_ratio is None, "nothing is flushed on a CPU"
    question = next(q for q in asked if q.mode == "cuda_graph")
    row = rooms["rows"].answer(question, "cpu", max_seconds=0.05)
    assert row.ratio is None and "needs a CUDA device" in row.problem


def test_what_does_not_fit_the_time_is_counted(rooms: dict[str, Any]) -> None:
    rows, n_left_out = rooms["check"].run_table("cpu", deadline=time.monotonic() - 1)
    assert len(rows) == 1 and n_left_out > 10


def test_the_page_shows_every_row_and_how_many_are_left_out(rooms: dict[str, Any]) -> None:
    figures = {
        "subject": "a layer", "choice": "svd (16)", "mode": "eager", "precision": "f16", "dense_ms": 2.0,
        "dense_p95_ms": 2.5, "latency_ms": 1.0, "latency_p95_ms": 1.25, "ratio": 0.5, "ratio_low": 0.45,
        "ratio_high": 0.55, "cold_ratio": 0.75,
    }  # fmt: skip
    row = rooms["rows"].Row(**figures)
    refused = rooms["rows"].Row(subject="a net", choice="svd", mode="compile", precision="f32", problem="no compiler")
    page = rooms["check"].markdown(
        {
            "card": {"device": "NVIDIA H100", "driver": "570.1", "processor": "x"},
            "tests": {"passed": False, "said": "1 failed"},
            "study": {"seconds": 9.0, "n_front": 2, "fastest": "1x svd"},
            "rows": [asdict(row), asdict(refused)],
            "scope": "cuda: 2 rows, 7 left out",
        }
    )
    assert page[0] == "## NVIDIA H100: `scripts/gpu_check`"
    assert "7 left out" in page[2] and "driver 570.1" in page[2]
    assert any("FAILED (1 failed)" in line for line in page)
    cells = "2.000 (2.500) | 1.000 (1.250) | 0.50 (0.45 to 0.55) | 0.75"
    assert page[-2] == f"| a layer | svd (16) | eager | f16 | {cells} |"
    assert page[-1].startswith("| a net | svd | compile | f32 | no compiler |")


WITHOUT_OPENVINO = """
import runpy, sys
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        hidden = name.split(".")[0] in ("openvino", "onnx", "onnxruntime", "nncf")
        return None if hidden else self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
sys.path.insert(0, sys.argv[1])
sys.argv[:2] = ["gpu_check.py"]
runpy.run_path(sys.path[0] + "/gpu_check.py", run_name="__main__")
"""


@pytest.mark.slow
def test_the_whole_check_runs_without_openvino(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    words = ["--device", "cpu", "--seconds", "1", "--json", "--output", page]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_OPENVINO, str(BENCHMARKS), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    figures = json.loads(done.stdout.strip().splitlines()[-1])
    assert figures["study"]["n_front"] >= 1
    assert figures["holds"] and figures["tests"] is None
    assert len(figures["rows"]) == 1 and math.isfinite(figures["rows"][0]["ratio"])
    assert page.read_text().count("\n| tiny ") == 1


def test_a_device_that_is_not_there_ends_it_at_once() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_check.py"), "--device", "cuda:99"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "torch has no device 'cuda:99' here" in done.stderr
