"""Models as people write them: each is taken, or refused in a sentence that says what would do."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_study import Pairs, make_spec
from torch import Tensor, nn

from ranksearch.compression import compress
from ranksearch.errors import MeasurementError, StudyError
from ranksearch.finding import compressible_layers, irreplaceable_layers
from ranksearch.memory_format import channels_last, takes_channels_last
from ranksearch.plan import LayerChoice, Plan
from ranksearch.recovery import fine_tune
from ranksearch.recovery_settings import Recovery
from ranksearch.runtimes import get_runtime
from ranksearch.scores import top1
from ranksearch.scoring import score_model
from ranksearch.spec import Target
from ranksearch.surgery import copy_model
from ranksearch.trial_cost import estimate
from ranksearch.workbench import SessionModel, open_workbench


class Net(nn.Module):
    """Two convolutions and a classifier, which others change in a place or two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.classifier = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 10)

    def maps(self, images: Tensor) -> Tensor:
        return self.second(self.first(images).relu()).relu()

    def forward(self, images: Tensor) -> Any:
        return self.classifier(self.maps(images).mean((2, 3)))


class AlwaysDropping(Net):
    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(F.dropout(self.maps(images).mean((2, 3))))


class InAList(Net):
    def __init__(self) -> None:
        super().__init__()
        self.more = [nn.Conv2d(8, 8, 1)]

    def maps(self, images: Tensor) -> Tensor:
        return self.more[0](super().maps(images))


class Locked(Net):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Listening(Net):
    def __init__(self) -> None:
        super().__init__()
        self.heard: dict[str, Tensor] = {}
        self.first.register_forward_hook(lambda _module, _inputs, output: self.heard.update(first=output))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images) + self.heard["first"].mean()


class OfOneSize(Net):
    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.maps(images).view(100, 8, -1).mean(2))


class Centring(Net):
    """Changes its inputs, as a normalisation in place does."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.sub_(0.5).mul_(2))


class Branching(Net):
    def forward(self, images: Tensor) -> Tensor:
        found = super().forward(images)
        return found if found.sum() > 0 else -found


class GivingNothingBack(Net):
    def train(self, mode: bool = True) -> Any:
        super().train(mode)


class Keeping(Net):
    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []

    def maps(self, images: Tensor) -> Tensor:
        self.kept = [{"first": self.first(images)}]
        return super().maps(images)


class Auxiliary(Net):
    def forward(self, images: Tensor) -> Any:
        found = super().forward(images)
        return (found, found * 2) if self.training else found


class AskingForClasses(Net):
    def maps(self, images: Tensor) -> Tensor:
        found = super().maps(images)
        return found + 1 if isinstance(self.second, nn.Conv2d) else found


class ReadingWeights(Net):
    def forward(self, images: Tensor) -> Tensor:
        return F.linear(super().forward(images), self.classifier.weight.T)


class Striding(Net):
    def forward(self, images: Tensor) -> Tensor:
        maps = self.second(self.first(images))
        return self.classifier(maps.as_strided((len(images), 8, 16), (128, 16, 1)).mean(2))


@torch.jit.script
def gated(inputs: Tensor) -> Tensor:
    return torch.tanh(inputs) * torch.sigmoid(inputs)


class Gated(Net):
    def maps(self, images: Tensor) -> Tensor:
        return gated(super().maps(images))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.inner = nn.Embedding(40, 16), nn.Linear(16, 16)

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.inner(self.tokens(tokens)), self.tokens.weight)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.jit.script(Net()), "of TorchScript, whose layers cannot be replaced; give the nn.Module"),
        (AlwaysDropping, "other outputs for the same inputs the second time; F.dropout, for one, needs training="),
        (InAList, "weights that it does not register, such as layers in a plain list.*put them into an nn.ModuleList"),
        (Locked, "Locked cannot be copied: lock is a lock .*leave it out of the model"),
        (Listening, "a copy of the model raises KeyError .'first'. where the model itself does not; a hook"),
        (OfOneSize, "the model takes 100 examples, and not one alone .*x.view.x.size.0., -1."),
    ],
)
def test_what_cannot_be_searched_is_told_before_the_study(
    make: Callable[[], nn.Module], message: str, parts: dict[str, Pairs]
) -> None:
    with pytest.raises(StudyError, match=message):
        open_workbench(make_spec(make().eval(), parts))


def test_targets_that_a_loss_does_not_take_are_told_with_their_shapes(parts: dict[str, Pairs]) -> None:
    wanted = r"the loss raises ValueError for outputs float32 \(100, 10\) and targets int64 \(100,\): Target size"
    with pytest.raises(StudyError, match=wanted):
        open_workbench(make_spec(Net().eval(), parts, loss=nn.BCEWithLogitsLoss()))


def test_a_model_of_which_no_artefact_can_be_made_is_told_by_check(
    parts: dict[str, Pairs], capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(MeasurementError, match=r"torch\.export cannot export Branching"):
        estimate(make_spec(Branching().eval(), parts, target=Target(runtime="torch", batch_size=16, threads=1)))
    assert "Warning" not in capfd.readouterr().err


@pytest.mark.parametrize("make", [GivingNothingBack, Keeping, Gated])
def test_what_is_unusual_is_taken(make: Callable[[], nn.Module], parts: dict[str, Pairs]) -> None:
    model = make()
    model.eval()
    bench = open_workbench(make_spec(model, parts))
    assert set(bench.found.layers) == {"first", "second", "classifier"}
    inputs = bench.example
    session = bench.prepare(
        compress(bench.model, Plan(layers={"second": LayerChoice(decomposition="svd", ranks=(4,))}))
    )
    assert session.run(inputs.numpy()).shape == (16, 10)


def test_tensors_in_lists_are_copied_with_the_model() -> None:
    model = Keeping()
    model(torch.randn(2, 1, 8, 8))
    model.kept.append(np.array(["a", "word"]))
    kept = copy_model(model).kept
    assert torch.equal(kept[0]["first"], model.kept[0]["first"]) and not kept[0]["first"].requires_grad


@pytest.mark.parametrize("distillation_loss", [None, lambda outputs, wanted: (outputs - wanted).square().mean()])
def test_outputs_of_training_alone_are_the_losss_and_the_first_is_distilled(distillation_loss: Any) -> None:
    def loss(outputs: Any, targets: Tensor) -> Tensor:
        assert isinstance(outputs, tuple)
        return sum((F.cross_entropy(output, targets) for output in outputs), torch.zeros(()))

    model, batches = Auxiliary(), [(torch.randn(8, 1, 8, 8), torch.randint(0, 10, (8,)))]
    settings = Recovery(steps=2, learning_rate=0.01, distillation_loss=distillation_loss)
    losses = fine_tune(model, copy.deepcopy(model).eval(), batches, loss, settings, seed=0)
    assert len(losses) == 2 and np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("make", "name", "reason"),
    [
        (AskingForClasses, "second", "the model asks for its class"),
        (ReadingWeights, "classifier", "the model reads its weight"),
    ],
)
def test_layers_that_nothing_can_stand_in_for_are_skipped(
    make: Callable[[], nn.Module], name: str, reason: str
) -> None:
    model, example = make().eval(), torch.randn(3, 1, 8, 8)
    expected = model(example)
    found = irreplaceable_layers(model, example, compressible_layers(model, example).all)
    assert list(found) == [name] and reason in found[name]
    assert torch.equal(model(example), expected) and type(model.get_submodule(name)) in (nn.Conv2d, nn.Linear)


@pytest.mark.parametrize("make", [Net, Centring])
def test_layers_of_other_models_can_all_be_replaced(make: Callable[[], nn.Module]) -> None:
    model, example = make().eval(), torch.randn(3, 1, 8, 8)
    assert irreplaceable_layers(model, example, compressible_layers(model, example).all) == {}
    alone, rows = nn.Linear(4, 2).eval(), torch.randn(3, 4)
    assert irreplaceable_layers(alone, rows, compressible_layers(alone, rows).all) == {}


def test_a_table_that_is_multiplied_by_too_keeps_its_shape_in_eight_bits() -> None:
    model, tokens = Tied().eval(), torch.randint(0, 40, (4, 12))
    assert set(irreplaceable_layers(model, tokens, compressible_layers(model, tokens).all)) == {"tokens"}
    small = compress(model, Plan(layers={"tokens": LayerChoice(weight_bits=8, activation_bits=32)}))
    session = get_runtime("openvino").prepare(small, tokens, Target(batch_size=4, threads=1))
    with torch.no_grad():
        expected = model(tokens)
    assert np.abs(session.run(tokens.numpy()) - expected.numpy()).max() <= 0.05 * float(expected.abs().max())


@pytest.mark.parametrize("width", [1, 3])
def test_outputs_that_lose_their_first_axis_at_one_row_get_it_back(width: int) -> None:
    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, width)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.layer(inputs).squeeze()

    model, inputs = Squeezed().eval(), torch.randn(5, 6)
    session = get_runtime("openvino").prepare(model, inputs[:1], Target(batch_size=1, threads=1))
    with torch.no_grad():
        outputs = SessionModel(session, 1, model(inputs[:1]))(inputs)
        torch.testing.assert_close(outputs, model(inputs))


def test_numbers_that_are_read_in_order_keep_channels_where_they_are() -> None:
    model, images = Striding().eval(), torch.randn(4, 1, 8, 8)
    assert not takes_channels_last(model, lambda last: model(channels_last(images) if last else images))
    assert model.second.weight.is_contiguous()
    assert takes_channels_last(Net().eval(), lambda _last: 0) and not takes_channels_last(nn.Linear(2, 2), lambda _: 0)


def test_trying_the_order_of_channels_leaves_the_data_as_it_is() -> None:
    model, images = Centring().eval(), torch.rand(8, 1, 8, 8)
    with torch.no_grad():
        expected = model(images.clone())
    torch.testing.assert_close(score_model(model, [(images, torch.zeros(8, dtype=torch.long))], top1).outputs, expected)
