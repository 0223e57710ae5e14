"""Measured losses: a layer alone loses what the whole model with it changed loses, at a fraction of the work."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch import loss_meter
from ranksearch.factorisations import Factorisations
from ranksearch.finding import compressible_layers
from ranksearch.loss_meter import LossMeter
from ranksearch.loss_model import SMALLEST_LOSS
from ranksearch.plan import LayerChoice, Plan
from ranksearch.replaying import Replay
from ranksearch.statistics import collect

SVD = LayerChoice(decomposition="svd", ranks=(3,))
CHOICES = [SVD, SVD.with_bits(8, 8), LayerChoice(weight_bits=8, activation_bits=8), LayerChoice(weight_bits=4)]


class Network(nn.Module):
    """A plain layer, one whose input a sum reads as well, and one that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.ReLU(inplace=True))
        self.block = nn.Conv2d(8, 8, 3, padding=1)
        self.twice = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        values = self.stem(images)
        means = (values + self.block(values)).mean((2, 3))
        return self.head(self.twice(F.relu(self.twice(means))))


@pytest.fixture(scope="module")
def meter() -> LossMeter:
    torch.manual_seed(0)
    model = Network().eval()
    batches = [(torch.randn(24, 2, 6, 6), torch.randint(4, (24,))) for _ in range(4)]
    layers = compressible_layers(model, batches[0][0]).layers
    return LossMeter(
        model, batches, Factorisations(model, collect(model, layers, batches, F.cross_entropy)), F.cross_entropy
    )


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: choice.label)
@pytest.mark.parametrize("name", ["stem.0", "block", "twice", "head"])
def test_a_layer_alone_loses_what_the_model_loses(name: str, choice: LayerChoice, meter: LossMeter) -> None:
    info = compressible_layers(meter._model, torch.randn(2, 2, 6, 6)).layers[name]
    before = copy.deepcopy(meter._model.state_dict())
    loss = meter.of_layer(info, choice)
    assert loss == pytest.approx(meter.of_plan(Plan(layers={name: choice})), rel=1e-3)
    assert loss > SMALLEST_LOSS
    assert all(torch.equal(tensor, before[key]) for key, tensor in meter._model.state_dict().items())


@pytest.mark.parametrize("name", ["stem.0", "block", "head"])
def test_what_does_not_fit_the_memory_is_read_when_asked_for(name: str, meter: LossMeter) -> None:
    info = compressible_layers(meter._model, torch.randn(2, 2, 6, 6)).layers[name]
    forgetful = copy.copy(meter)
    forgetful._read = meter._listen({name}, max_bytes=0)
    assert not forgetful._read
    assert forgetful.of_layer(info, SVD) == meter.of_layer(info, SVD)
    assert list(forgetful._last_read) == [name]


def test_a_layer_too_large_to_keep_leaves_room_for_the_others(meter: LossMeter) -> None:
    head = 2 * 24 * 8 * 4  # batches, rows, inputs, bytes
    assert list(meter._listen({"stem.0", "block", "head"}, max_bytes=head)) == ["head"]


def test_the_rest_of_the_model_is_neither_copied_nor_compressed(
    meter: LossMeter, monkeypatch: pytest.MonkeyPatch
) -> None:
    compressed: list[nn.Module] = []
    compress = loss_meter.compress

    def listening(model: nn.Module, *arguments: object, **named: object) -> nn.Module:
        compressed.append(model)
        return compress(model, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(loss_meter, "compress", listening)
    layers = compressible_layers(meter._model, torch.randn(2, 2, 6, 6)).layers
    for name in layers:
        meter.of_layer(layers[name], SVD)
    whole = [model is meter._model for model in compressed]
    assert whole == [name == "twice" for name in layers], "only what runs twice needs the model around it"


def test_small_batches_are_judged_together() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).eval()
    batches = [(torch.randn(2, 5), torch.randint(3, (2,))) for _ in range(4)]
    layers = compressible_layers(model, batches[0][0]).layers
    factorisations = Factorisations(model, collect(model, layers, batches, F.cross_entropy))
    together = LossMeter(model, batches, factorisations, F.cross_entropy)
    loss = together.of_plan(Plan(layers={"0": SVD}))
    assert len(together._judging) == 1
    apart = copy.copy(together)
    apart._judging = [inputs for inputs, _ in batches[2:]]
    apart._replay = Replay(model, apart._judging)
    assert loss == pytest.approx(apart.of_plan(Plan(layers={"0": SVD})), rel=1e-4)
