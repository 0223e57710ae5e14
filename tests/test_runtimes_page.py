"""The blocks of docs/runtimes.md run, and its table is what the runtimes say of themselves."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ranksearch.errors import RuntimeUnavailableError
from ranksearch.runtimes import RUNTIMES, get_runtime
from ranksearch.spec import Target

PAGE = Path(__file__).parents[1] / "docs" / "runtimes.md"
TEXT = PAGE.read_text(encoding="utf-8")


@pytest.fixture
def own_table() -> Iterator[None]:
    """The page registers a runtime, which no other test shall meet."""
    before = dict(RUNTIMES)
    yield
    RUNTIMES.clear()
    RUNTIMES.update(before)


def test_the_page_runs_from_top_to_bottom(own_table: None) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert get_runtime("torchscript").name == "torchscript"


@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino", "torch"])
def test_the_tables_modes_and_precisions_on_the_cpu_are_those_there_are(runtime: str) -> None:
    rows = re.findall(rf"^\| `{runtime}` \| CPU[^|]*\|([^|]*)\|([^|]*)\|", TEXT, re.MULTILINE)
    assert len(rows) == 1
    modes, precisions = re.findall(r"`(\w+)`", rows[0][0]), rows[0][1].strip().split(", ")
    for mode in ("eager", "compile", "cuda_graph", "tensorrt"):
        for precision in ("f32", "tf32", "bf16", "f16", "default"):
            target = Target(runtime=runtime, mode=mode, precision=precision)
            if mode in modes and precision in precisions:
                RUNTIMES[runtime].check(target)
            else:
                with pytest.raises(RuntimeUnavailableError):
                    RUNTIMES[runtime].check(target)
