"""The blocks of docs/decompositions.md run, its pictures are those that the script draws, and its costs are true."""

import re
import runpy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ranksearch.decompositions import DECOMPOSITIONS, Options, Ranks
from ranksearch.testing import convolution

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "decompositions.md"
TEXT = PAGE.read_text(encoding="utf-8")
S, T, K = 16, 24, 3

# The overview's formulas, without the bias.
COSTS: dict[str, Callable[..., int]] = {
    "svd": lambda r: r * (S * K**2 + T),
    "svd kernel_last": lambda r: r * (S + T * K**2),
    "spatial_svd": lambda r: r * K * (S + T),
    "tucker2": lambda rank_out, rank_in: rank_in * S + K**2 * rank_in * rank_out + rank_out * T,
    "cp": lambda r: r * (S + 2 * K + T),
    "tensor_train": lambda a, b, c: S * a + K * a * b + K * b * c + c * T,
    "depthwise_separable": lambda terms: terms * S * (K**2 + T),
    "blueprint_separable": lambda blueprints: blueprints * T * (S + K**2),
    "grouped_svd": lambda r: r * (S * K**2 + 2 * T),
    "harmonic": lambda patterns: patterns * S * (K**2 + T),
}
MAXIMA: dict[str, Ranks] = {
    "svd": (min(T, S * K**2),),
    "svd kernel_last": (min(S, T * K**2),),
    "spatial_svd": (min(S * K, T * K),),
    "tucker2": (min(T, S * K**2), min(S, T * K**2)),
    "cp": (K**2 * min(S, T),),
    "tensor_train": (S, K * min(S, T), T),
    "depthwise_separable": (min(K**2, T),),
    "blueprint_separable": (min(K**2, S),),
    "grouped_svd": (min(T, S * K**2 // 2),),
    "harmonic": (K**2,),
}
KNOWN = [key for key in COSTS if key.split()[0] in DECOMPOSITIONS]


@pytest.fixture
def own_table() -> Iterator[None]:
    """The page registers a decomposition, which no other test shall meet."""
    before = dict(DECOMPOSITIONS)
    yield
    DECOMPOSITIONS.clear()
    DECOMPOSITIONS.update(before)


def test_the_page_runs_from_top_to_bottom(own_table: None, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(blocks) == 2
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert "plain_svd" in DECOMPOSITIONS
    assert "break-even" in capsys.readouterr().out


def test_every_decomposition_has_its_section() -> None:
    sections = set(re.findall(r"^## (\w+)$", TEXT, re.MULTILINE))
    assert sections >= set(DECOMPOSITIONS) - {"none"}


def test_the_pictures_are_those_that_the_script_draws() -> None:
    script = runpy.run_path(str(ROOT / "scripts" / "draw_decompositions"))
    shown = set(re.findall(r"pictures/(\w+)\.svg", TEXT))
    assert shown == set(script["PICTURES"])
    for name, parts in script["PICTURES"].items():
        assert (script["FOLDER"] / f"{name}.svg").read_text(encoding="utf-8") == script["drawn"](name, parts)


@pytest.mark.parametrize("key", KNOWN)
def test_costs_and_maxima_are_those_of_the_overview(key: str) -> None:
    name, *folding = key.split()
    options: Options = {"folding": folding[0]} if folding else DECOMPOSITIONS[name].options[0]
    spec = convolution(S, T, (K, K))
    most = DECOMPOSITIONS[name].max_ranks(spec, options)
    assert most == MAXIMA[key]
    for ranks in (tuple(1 for _ in most), tuple(max(1, rank // 2) for rank in most), most):
        assert DECOMPOSITIONS[name].n_params(spec, ranks, options) == COSTS[key](*ranks) + T
