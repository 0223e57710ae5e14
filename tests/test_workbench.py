"""A study opened: what its functions may give, and what is said where they do not."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_study import Pairs, make_spec
from torch import Tensor, nn

from ranksearch.errors import RuntimeUnavailableError, StudyError
from ranksearch.scoring import score_model
from ranksearch.spec import Data, Space, Target, corpus_score
from ranksearch.workbench import SessionModel, Workbench, first_rows, open_workbench, to_arrays

Open = Callable[..., Workbench]


@pytest.fixture
def opened(model: nn.Sequential, parts: dict[str, Pairs]) -> Open:
    return lambda **changes: open_workbench(make_spec(model, parts, **changes))


def test_a_workbench_holds_what_trials_need(bench: Workbench, model: nn.Sequential) -> None:
    assert bench.model is not model and not bench.model.training
    assert list(bench.found.layers) == ["0", "3", "8", "10"]
    assert bench.example.shape == (16, 1, 8, 8)
    assert bench.dense.scores.value > 0.9 and bench.dense.scores.n_examples == 600
    assert bench.dense.n_params == sum(p.numel() for p in model.parameters())
    assert bench.dense.macs == 9 * 16 * 64 + 9 * 16 * 24 * 16 + 96 * 32 + 320
    assert bench.train is bench.data.train
    assert bench.score(bench.model, bench.data.validation).value == bench.dense.scores.value


def test_the_users_model_keeps_its_mode(model: nn.Sequential, parts: dict[str, Pairs]) -> None:
    model.train()
    try:
        open_workbench(make_spec(model, parts))
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


def test_what_draws_random_numbers_draws_the_same_every_time(opened: Open, parts: dict[str, Pairs]) -> None:
    def data() -> Data:
        rows, labels = parts["train"][0]
        order = torch.randperm(len(rows))
        return Data(calibration=[(rows[order], labels[order]), *parts["train"][1:]], validation=parts["validation"])

    torch.manual_seed(7)
    first, between, second = opened(data=data), torch.rand(1), opened(data=data)
    torch.manual_seed(7)
    assert torch.equal(first.calibration[0][0], second.calibration[0][0])
    assert torch.equal(between, torch.rand(1)), "nobody else's random numbers are touched"


def test_a_score_that_reads_its_own_data_has_no_use_for_a_tie_break(opened: Open, bench: Workbench) -> None:
    data = replace(bench.data, tiebreak=bench.data.test)
    assert opened(data=lambda: data).data.tiebreak is bench.data.test
    with pytest.raises(StudyError, match=r"reads its own data and none of Data.tiebreak; leave `tiebreak` out"):
        opened(data=lambda: data, score=lambda model: 0.5)


def test_without_train_recovery_takes_the_calibration_data(bench: Workbench) -> None:
    assert replace(bench, data=replace(bench.data, train=None)).train is bench.data.calibration


class Shuffled:
    """Another order at every pass."""

    def __init__(self, batches: Pairs) -> None:
        self.batches = batches
        self.n_passes = 0

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.n_passes += 1
        return iter(self.batches[self.n_passes % 2 :] + self.batches[: self.n_passes % 2])


DATA: list[tuple[str, Callable[[Pairs], Any], str]] = [
    ("calibration", lambda _: [], "the calibration data yields nothing"),
    ("calibration", lambda b: [x for x, _ in b], r"a calibration batch is a Tensor; give pairs \(inputs, targets\)"),
    ("calibration", lambda b: [(b[0][0][:3], b[0][1][:3])], "has 3 examples, fewer than Target.batch_size=16"),
    ("validation", lambda _: [], "the validation data yields no example"),
    ("validation", iter, "the validation data can be read only once"),
    ("validation", Shuffled, "the validation data differs between two passes, first in batch 0"),
    ("test", Shuffled, "the test data differs between two passes"),
    ("test", lambda _: [], "the test data yields no example"),
]


@pytest.mark.parametrize(("split", "damage", "message"), DATA)
def test_data_that_cannot_be_used(
    split: str, damage: Callable[[Pairs], Any], message: str, opened: Open, parts: dict[str, Pairs]
) -> None:
    data = Data(calibration=parts["train"], validation=parts["validation"], test=parts["test"])
    with pytest.raises(StudyError, match=message):
        opened(data=lambda: replace(data, **{split: damage(parts["validation"])}))


SPECS: list[tuple[dict[str, Any], str]] = [
    ({"model": lambda: {"state": "dict"}}, r"model\(\) gave a dict, not a Module"),
    ({"data": lambda: ([], [])}, r"data\(\) gave a tuple, not a Data"),
    ({"model": lambda: nn.Sequential(nn.Flatten(), nn.ReLU())}, "no layer that can be compressed"),
    ({"loss": lambda o, t: F.cross_entropy(o, t) * float("nan")}, "loss on calibration data is nan"),
    ({"loss": lambda o, t: F.cross_entropy(o, t, reduction="none")}, r"the loss has shape \(100,\)"),
    ({"score": lambda o, t: F.cross_entropy(o, t)}, r"shape \(\), not one number for each of its 100 examples"),
    ({"score": lambda o, t: o.softmax(1)}, r"shape \(100, 10\), not one number"),
    ({"score": lambda o, t: o[:, 0] * float("nan")}, "is not a finite number"),
    ({"score": corpus_score(lambda o, t: float("nan"))}, "is nan, not a finite number"),
    ({"space": Space(only=("layer4.*",))}, "the glob 'layer4.*' matches no layer; layers are 0, 3, 8, 10"),
    ({"space": Space(skip=("3", "conv*"))}, r"the glob 'conv\*' matches no layer"),
    ({"space": Space(only=("3",), skip=("3",))}, "leave no layer to compress"),
    ({"space": Space(decompositions=("svd", "qr"))}, "Space.decompositions: there is no decomposition 'qr'; known are"),
]


@pytest.mark.parametrize(("changes", "message"), SPECS)
def test_a_study_that_cannot_be_used_says_why(changes: dict[str, Any], message: str, opened: Open) -> None:
    with pytest.raises(StudyError, match=message):
        opened(**changes)


def test_a_runtime_that_is_not_there(opened: Open) -> None:
    with pytest.raises(RuntimeUnavailableError, match="'tensorrt'; there are onnxruntime, openvino, torch"):
        opened(target=Target(runtime="tensorrt"))
    with pytest.raises(RuntimeUnavailableError, match="no precision 'int8'.*f32"):
        opened(target=Target(precision="int8"))


def test_globs_choose_layers_and_say_why_others_are_left(opened: Open) -> None:
    # A tie of a layer that is left is no fault.
    found = opened(space=Space(skip=("1*",), only=("3", "8", "10"), ties=(("0", "3"),))).found
    assert list(found.layers) == ["3", "8"]
    assert found.skipped == {"0": "not in Space.only", "10": "in Space.skip"}


@pytest.mark.parametrize("n_rows", [1, 16, 17, 40])
def test_a_session_takes_any_number_of_rows(n_rows: int, bench: Workbench) -> None:
    inputs = first_rows(bench.data.validation, n_rows)
    predict = SessionModel(bench.dense.session, bench.spec.target.batch_size)
    with torch.no_grad():
        assert torch.allclose(predict(inputs), bench.model(inputs), atol=1e-3)


class Several(nn.Module):
    """Two inputs, two outputs, by name or by place."""

    def __init__(self, by_name: bool) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.by_name = by_name

    def forward(self, left: Tensor, right: Tensor) -> Any:
        outputs = self.layer(left), self.layer(right).relu()
        return dict(zip(("left", "right"), outputs, strict=True)) if self.by_name else outputs


@pytest.mark.parametrize("by_name", [False, True])
def test_sessions_of_several_inputs_and_outputs(by_name: bool, bench: Workbench) -> None:
    model = Several(by_name).eval()

    def inputs(n: int) -> Any:
        pair = torch.randn(n, 6), torch.randn(n, 6)
        return dict(zip(("left", "right"), pair, strict=True)) if by_name else pair

    predict = SessionModel(bench.runtime.prepare(model, inputs(4), bench.spec.target), 4)
    batches = [(inputs(7), torch.zeros(7)) for _ in range(2)]

    def score(outputs: Any, targets: Tensor) -> Tensor:
        left, right = outputs.values() if by_name else outputs
        return left.sum(1) + right.sum(1) + targets

    on_runtime, in_torch = score_model(predict, batches, score), score_model(model, batches, score)
    assert on_runtime.value == pytest.approx(in_torch.value, abs=1e-3) and on_runtime.n_examples == 14


def test_a_score_of_the_model_may_use_a_session_as_one(bench: Workbench, parts: dict[str, Pairs]) -> None:
    def evaluate(model: Any) -> float:
        model.eval()
        with torch.no_grad():
            return float(sum((model(x).argmax(1) == y).sum() for x, y in parts["validation"])) / 600

    predict = SessionModel(bench.dense.session, bench.spec.target.batch_size)
    assert score_model(predict, parts["validation"], evaluate).value == pytest.approx(evaluate(bench.model), abs=0.01)


def test_inputs_become_arrays_of_the_same_structure() -> None:
    arrays = to_arrays({"a": torch.ones(2), "b": (torch.zeros(3), torch.zeros(1))})
    assert arrays["a"].tolist() == [1, 1] and [array.shape for array in arrays["b"]] == [(3,), (1,)]
