"""A layer is factored once, and its factors are found again by what they were made from, and by nothing else."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_study import Pairs
from torch import Tensor, nn

from ranksearch import factorisations as room
from ranksearch.cache import Cache
from ranksearch.decompositions import DECOMPOSITIONS, Factorisation, Metric, Options
from ranksearch.decompositions.svd import SVD
from ranksearch.errors import DecompositionError, StudyError
from ranksearch.factorisations import Factorisations, Factors
from ranksearch.finding import compressible_layers
from ranksearch.layers import LayerSpec
from ranksearch.plan import LayerChoice
from ranksearch.statistics import LayerStatistics, collect

CHOICE = LayerChoice(decomposition="counted", ranks=(3,))


class CountedSVD(SVD):
    """It, counting how often it factors."""

    name = "counted"

    def __init__(self) -> None:
        self.count = 0

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        self.count += 1
        return super().factorise(weight, spec, options, metric)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> CountedSVD:
    method = CountedSVD()
    monkeypatch.setitem(DECOMPOSITIONS, "counted", method)
    return method


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6)).eval()


def batches(seed: int = 1) -> Pairs:
    random = torch.Generator().manual_seed(seed)
    return [(torch.randn(32, 3, 4, 4, generator=random), torch.zeros(32, dtype=torch.long))]


def statistics_of(model: nn.Module, seed: int = 1) -> dict[str, LayerStatistics]:
    data = batches(seed)
    return collect(model, compressible_layers(model, data[0][0][:1]).layers, data, F.cross_entropy)


def same(first: Factors, second: Factors) -> bool:
    pairs = zip((*first.weights, first.mean_change), (*second.weights, second.mean_change), strict=True)
    return all(
        (a is None and b is None) or (a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b))
        for a, b in pairs
    )


def test_what_was_cut_before_is_read_exactly_and_not_factored_again(counted: CountedSVD, tmp_path: Path) -> None:
    model = network()
    statistics, cache = statistics_of(model), Cache(directory=tmp_path)
    plain = Factorisations(model, statistics).factors("0", CHOICE)
    written = Factorisations(model, statistics, cache).factors("0", CHOICE)
    assert counted.count == 2
    again = Factorisations(network(), statistics_of(network()), cache)
    read = again.factors("0", CHOICE)
    assert counted.count == 2, "an equal model with equal statistics"
    assert same(plain, written) and same(written, read) and read.mean_change is not None
    read.weights[0].zero_()
    assert same(again.factors("0", CHOICE), plain), "they are the caller's own"


@pytest.mark.parametrize("what", ["weight", "statistics", "no statistics", "ranks", "options", "layer", "code"])
def test_what_factors_are_made_from_is_never_mistaken(
    what: str, counted: CountedSVD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, choice, layer = network(), CHOICE, "0"
    statistics, cache = statistics_of(model), Cache(directory=tmp_path)
    Factorisations(model, statistics, cache).factors(layer, choice)
    if what == "weight":
        with torch.no_grad():
            model[0].weight[0, 0, 0, 0] += 1e-6
    elif what == "statistics":
        statistics = statistics_of(model, seed=2)
    elif what == "no statistics":
        statistics = {}
    elif what == "ranks":
        choice = choice.model_copy(update={"ranks": (4,)})
    elif what == "options":
        choice = choice.model_copy(update={"options": {"folding": "kernel_last"}})
    elif what == "layer":
        layer = "3"
    else:
        monkeypatch.setattr(room, "_code_hash", lambda _method: "another version")
    found = Factorisations(model, statistics, cache).factors(layer, choice)
    assert counted.count == 2
    assert same(found, Factorisations(model, statistics).factors(layer, choice))


def test_a_damaged_entry_is_made_anew(counted: CountedSVD, tmp_path: Path) -> None:
    model = network()
    statistics, cache = statistics_of(model), Cache(directory=tmp_path)
    written = Factorisations(model, statistics, cache).factors("3", CHOICE)
    (entry,) = tmp_path.iterdir()
    entry.write_bytes(entry.read_bytes()[:-5])
    assert same(Factorisations(model, statistics, cache).factors("3", CHOICE), written)
    assert counted.count == 2


def test_a_cache_that_cannot_be_written_costs_time_alone(counted: CountedSVD, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    model = network()
    statistics = statistics_of(model)
    factorisations = Factorisations(model, statistics, Cache(directory=tmp_path / "file"))
    assert same(factorisations.factors("0", CHOICE), Factorisations(model, statistics).factors("0", CHOICE))


def test_a_method_whose_source_is_not_there_is_not_kept_on_disk(
    counted: CountedSVD, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "_code_hash", room._code_hash.__wrapped__)
    monkeypatch.setattr(CountedSVD, "__module__", "__main__.of.a.notebook")
    model = network()
    Factorisations(model, statistics_of(model), Cache(directory=tmp_path)).factors("0", CHOICE)
    assert counted.count == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("only_last", [False, True])
def test_memory_keeps_every_layer_or_the_last(only_last: bool, counted: CountedSVD) -> None:
    model = network()
    factorisations = Factorisations(model, statistics_of(model), only_last=only_last)
    first = factorisations.of("0", CHOICE)
    assert factorisations.of("0", CHOICE) is first
    factorisations.of("3", CHOICE)
    assert (factorisations.of("0", CHOICE) is first) == (not only_last)


@settings(max_examples=10, deadline=None)
@given(layer=st.sampled_from(["0", "3"]), rank=st.integers(1, 5), seed=st.integers(0, 3))
def test_every_method_is_read_as_it_was_written(
    layer: str, rank: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    model = network(seed)
    statistics, cache = statistics_of(model), Cache(directory=tmp_path_factory.mktemp("factors"))
    spec = compressible_layers(model, batches()[0][0]).layers[layer].spec
    for name, method in DECOMPOSITIONS.items():
        if name == "none" or method.refuse(spec) is not None:
            continue
        most = method.max_ranks(spec, {})
        choice = LayerChoice(decomposition=name, ranks=tuple(min(rank, largest) for largest in most))
        written = Factorisations(model, statistics, cache).factors(layer, choice)
        assert same(Factorisations(model, statistics, cache).factors(layer, choice), written), name


def test_a_layer_that_cannot_be_factored_is_named(tmp_path: Path) -> None:
    model = network()
    statistics = statistics_of(model)
    with torch.no_grad():
        model[3].weight[0, 0] = float("nan")
    with pytest.raises(DecompositionError, match="layer '3'"):
        Factorisations(model, statistics, Cache(directory=tmp_path)).factors(
            "3", LayerChoice(decomposition="svd", ranks=(2,))
        )
    assert not list(tmp_path.iterdir())


def test_statistics_of_another_model_are_refused() -> None:
    with pytest.raises(StudyError):
        Factorisations(nn.Sequential(nn.Linear(4, 4)), statistics_of(network()))
