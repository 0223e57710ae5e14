"""Embeddings are rounded and never factored: found, compressed, trained, saved, and in the candidate table."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.candidates import Profile
from ranksearch.controls import control_plans
from ranksearch.errors import PlanError, StudyError
from ranksearch.finding import compressible_layers
from ranksearch.layers import count_macs
from ranksearch.plan import DENSE, LayerChoice, Plan
from ranksearch.quantization import Half, Int4, Int8, QuantizedEmbedding, WeightFormat, quantize_module
from ranksearch.session import make_profile
from ranksearch.weights import packed_bytes
from ranksearch.workbench import Workbench, open_workbench

FORMATS: dict[str, WeightFormat] = {
    "16": Half(), "8": Int8(), "4": Int4(), "symmetric 4": Int4(scheme="symmetric", group_size=64),
}  # fmt: skip


class Text(nn.Module):
    """Two tables of embeddings, one of which reads no example, a layer and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(300, 40, padding_idx=0), nn.Embedding(16, 40)
        self.layer, self.head = nn.Linear(40, 40), nn.Linear(40, 5)

    def forward(self, ids: Tensor) -> Tensor:
        states = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        return self.head((states + self.layer(states).relu()).mean(1))  # type: ignore[no-any-return]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def texts(n: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randint(0, 300, (n, 12)), torch.randint(0, 5, (n,))) for _ in range(4)]


def study(**space: Any) -> rs.StudySpec:
    model, batches = Text().eval(), texts()
    return rs.StudySpec(
        name="texts",
        model=lambda: model,
        data=lambda: rs.Data(calibration=batches, validation=batches),
        loss=F.cross_entropy,
        score=rs.top1,
        target=rs.Target(threads=1),
        space=rs.Space(weight_bits=[32, 8, 4], **space),
    )


def table_of(bench: Workbench) -> Profile:
    return make_profile(bench, bench.factorisations(), control_plans(bench), 1.0, lambda _: None)


class Tables(nn.Module):
    """Tables that take bits, and some that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.bounded = nn.Embedding(9, 4), nn.Embedding(9, 4, max_norm=1.0)
        self.sparse, self.unused = nn.Embedding(9, 4, sparse=True), nn.Embedding(9, 4)
        self.tied, self.head = nn.Embedding(9, 4), nn.Linear(4, 9, bias=False)
        self.head.weight = self.tied.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.plain(ids) + self.plain(ids) + self.bounded(ids) + self.sparse(ids) + self.tied(ids))  # type: ignore[no-any-return]


def test_tables_are_found_or_skipped_with_the_reason() -> None:
    found = compressible_layers(Tables(), torch.randint(0, 9, (2, 5)))
    assert not found.layers and list(found.all) == ["plain"]
    plain = found.embeddings["plain"]
    assert (plain.input_shape, plain.n_params, plain.n_calls) == ((2, 5), 36, 2)
    unsuited = "an Embedding with max_norm or sparse gradients is not supported"
    assert found.skipped == {
        "bounded": unsuited,
        "sparse": unsuited,
        "unused": "the example never runs it",
        "tied": "its weight is tied to another module's",
        "head": "its weight is tied to another module's",
    }


def test_looking_up_multiplies_nothing() -> None:
    rounded = rs.rebuild(Text(), Plan(layers={"words": LayerChoice(weight_bits=8)}))
    for model in (Text(), rounded):
        assert count_macs(model, torch.randint(0, 300, (1, 12))) == 12 * 40 * 40 + 40 * 5


@pytest.mark.parametrize(
    "choice", [LayerChoice(decomposition="svd", ranks=(4,)), LayerChoice(weight_bits=8, activation_bits=8)]
)
def test_an_embedding_takes_no_rank_and_no_rounded_inputs(choice: LayerChoice) -> None:
    with pytest.raises(PlanError, match="layer 'words' is an Embedding, whose inputs are indices: .* not "):
        rs.rebuild(Text(), Plan(layers={"words": choice}))


@settings(max_examples=30, deadline=None)
@given(
    n_rows=st.integers(1, 40), width=st.integers(1, 70), shape=st.lists(st.integers(0, 4), max_size=3),
    bits=st.sampled_from(sorted(FORMATS)),
)  # fmt: skip
def test_the_rows_asked_for_are_those_of_the_rounded_table(
    n_rows: int, width: int, shape: list[int], bits: str
) -> None:
    quantized = quantize_module(nn.Embedding(n_rows, width), FORMATS[bits], rounds_inputs=False)
    ids = torch.randint(0, n_rows, shape)
    assert torch.equal(quantized(ids), F.embedding(ids, quantized.rounded_weight))
    assert torch.equal(quantized(ids), quantized.in_float()(ids))


@pytest.mark.parametrize("bits", FORMATS)
def test_gradients_reach_the_rows_that_were_asked_for(bits: str) -> None:
    table = nn.Embedding(6, 8, padding_idx=0)
    quantized = quantize_module(table, FORMATS[bits], rounds_inputs=False)
    quantized(torch.tensor([[0, 2], [2, 5]])).sum().backward()
    assert isinstance(quantized, QuantizedEmbedding) and quantized.weight.grad is not None
    assert quantized.weight.grad.abs().sum(1).gt(0).tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_rounded_table_is_small_near_dense_and_read_again_to_the_bit(bits: int, tmp_path: Path) -> None:
    model, batches, choice = Text().eval(), texts(), LayerChoice(weight_bits=bits)
    plan = Plan(layers={"words": choice, "places": choice})
    compressed = rs.compress(model, plan, calibration=batches).eval()
    ids = batches[0][0]
    with torch.no_grad():
        dense, rounded = model(ids), compressed(ids)
    assert float((rounded - dense).norm() / dense.norm()) < {16: 1e-3, 8: 0.02, 4: 0.3}[bits]
    saved = packed_bytes(model) - packed_bytes(compressed)
    assert saved > 0.9 * 316 * 40 * (4 - {16: 2, 8: 1.1, 4: 0.65}[bits])
    rs.save(compressed, plan, tmp_path)
    with torch.no_grad():
        assert torch.equal(rs.load(tmp_path, Text().eval())(ids), rounded)


def test_the_candidate_table_has_each_tables_bits_and_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSEARCH_MAX_TIMING_SECONDS", "0.005")
    bench = open_workbench(study(ties=[["words", "places"]]))
    table = table_of(bench)
    assert [layer.name for layer in table.layers] == ["layer", "head", "words", "places"]
    words = table.layers[2]
    by_bits = {candidate.choice.bits: candidate for candidate in words.candidates}
    assert set(by_bits) == {"32/32", "8/32", "4/32"} and words.candidates[words.dense].choice == DENSE
    assert {c.latency_ms for c in by_bits.values()} == {0.0}
    assert {bits for bits, c in by_bits.items() if c.storage_only} == {"8/32", "4/32"}
    assert 0 == by_bits["32/32"].loss < by_bits["8/32"].loss < by_bits["4/32"].loss
    assert by_bits["32/32"].n_bytes > 3.5 * by_bits["8/32"].n_bytes > 6 * by_bits["4/32"].n_bytes
    assert table.ties == (("words", "places"),)


def test_controls_round_tables_where_size_counts() -> None:
    spec = study()
    plans = dict(control_plans(open_workbench(spec)))
    assert plans["control: 8 bits"].choice("words").bits == "8/32"
    assert plans["control: uniform 50%"].choice("words") == DENSE
    for_speed = dict(control_plans(open_workbench(replace(spec, objectives=("drop", "latency")))))
    assert for_speed["control: 8 bits"].choice("words") == DENSE


def test_tables_can_be_skipped_and_alone() -> None:
    with pytest.raises(StudyError, match="layers are layer, head, words, places"):
        open_workbench(study(skip=["wrods"]))
    assert not open_workbench(study(skip=["words", "places"])).found.embeddings
    bench = open_workbench(study(only=["words"]))
    assert list(bench.found.all) == ["words"]
    assert [layer.name for layer in table_of(bench).layers] == ["words"]
