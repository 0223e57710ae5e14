"""Scores, distances and paired intervals."""

import functools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.scores import top1
from ranksearch.scoring import (
    Scores,
    is_classification,
    output_distance,
    paired_drop,
    same_twice,
    score_kind,
    score_model,
)
from ranksearch.spec import corpus_score


def batches_of(n: int = 10, size: int = 4, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(n, 3, generator=generator), torch.randint(0, 3, (n,), generator=generator)
    return list(zip(inputs.split(size), targets.split(size), strict=True))


def scores_of(values) -> Scores:
    values = np.asarray(values, dtype=np.float64)
    return Scores(
        value=float(values.mean()), per_example=values, n_examples=len(values), n_judged=len(values), outputs=None,
        targets=None,
    )  # fmt: skip


def correlation(outputs, targets) -> float:
    return float(np.corrcoef(outputs[:, 0].numpy(), targets.numpy())[0, 1])


def test_top1_of_a_model():
    model, batches = nn.Sequential(nn.Dropout(0.9)).train(), batches_of()
    scores = score_model(model, batches, top1)
    inputs, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert model.training, "the mode comes back"
    assert scores.n_examples == 10 and torch.equal(scores.outputs, inputs) and torch.equal(scores.targets, targets)
    assert scores.per_example.tolist() == (inputs.argmax(1) == targets).double().tolist()
    assert scores.value == scores.per_example.mean()
    assert score_model(model, batches, top1, max_output_bytes=10).outputs is None


def test_a_runtime_gives_arrays_and_mappings():
    def run(inputs):
        return {"logits": inputs.numpy(), "rest": (inputs.numpy(),)}

    scores = score_model(run, batches_of(), lambda outputs, targets: top1(outputs["logits"], targets))
    assert scores.value == score_model(nn.Identity(), batches_of(), top1).value
    assert scores.outputs["rest"][0].shape == (10, 3)


def test_kinds_of_score():
    assert score_kind(top1) == score_kind(lambda outputs, targets, k=5: None) == "example"
    assert score_kind(corpus_score(correlation)) == "corpus"
    assert score_kind(lambda model: 0.5) == score_kind(lambda model, verbose=False: 0.5) == "model"
    assert score_kind(functools.partial(lambda data, model: 0.5, None)) == "model"
    assert score_kind(lambda *args: None) == "example"


def test_corpus_and_model_scores():
    batches = batches_of(40)
    scores = score_model(nn.Identity(), batches, corpus_score(correlation))
    inputs, targets = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
    assert scores.value == pytest.approx(correlation(inputs, targets)) and scores.per_example is None
    model = nn.Linear(3, 1)
    own = score_model(model, batches, lambda given: 0.25 if given is model else 0.0)
    assert own.value == 0.25 and own.outputs.shape == (40, 1)
    assert paired_drop(own, own, lambda given: 0.0, True, 0).low is None


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda o, t: o, r"batch 0 of the test data has shape \(4, 3\)"),
        (lambda o, t: o.mean(), r"shape \(\), not one number for each of its 4 examples"),
        (lambda o, t: o[:, 0] * math.nan, "4 of 4 examples in batch 0 .* not a finite number"),
        (corpus_score(lambda o, t: math.nan), "score of the test data is nan"),
        (lambda model: math.inf, "score of the test data is inf"),
    ],
)
def test_wrong_scores_are_refused(score, message):
    with pytest.raises(StudyError, match=message):
        score_model(nn.Identity(), batches_of(), score, source="test")


def test_no_data_is_refused():
    with pytest.raises(StudyError, match="the validation data yields no example"):
        score_model(nn.Identity(), [], top1)


def test_outputs_of_many_lengths():
    batches = [(torch.randn(2, length), torch.zeros(2)) for length in (3, 4)]
    assert score_model(nn.Identity(), batches, lambda o, t: o.mean(1)).outputs is None
    with pytest.raises(StudyError, match="do not fit together"):
        score_model(nn.Identity(), batches, corpus_score(correlation))


@pytest.mark.parametrize(("worse", "better"), [(0.03, 0.01), (0.10, 0.06), (0.005, 0.002), (0.0, 0.0)])
@pytest.mark.parametrize("n", [100, 1000])
def test_the_interval_of_flips_covers_the_true_drop(worse, better, n):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        kind = random.choice(3, size=n, p=[worse, better, 1 - worse - better])
        dense = np.where(kind == 0, 1.0, np.where(kind == 1, 0.0, random.random(n) < 0.9))
        plan = np.where(kind == 0, 0.0, np.where(kind == 1, 1.0, dense))
        drop = paired_drop(scores_of(dense), scores_of(plan), top1, True, 0)
        assert drop.low < drop.value < drop.high
        covered += drop.low <= worse - better <= drop.high
    assert covered >= 450


@pytest.mark.parametrize("n", [4, 30, 500])
def test_the_interval_of_real_scores_covers_the_true_drop(n):
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(500):
        dense = random.normal(3, 1, n)
        drop = paired_drop(scores_of(dense), scores_of(dense - random.normal(0.1, 0.2, n)), top1, True, 0)
        covered += drop.low <= 0.1 <= drop.high
    assert covered >= 450


def test_the_interval_of_a_corpus_score_covers_the_true_drop():
    random = np.random.default_rng(0)
    score = corpus_score(correlation)
    covered = 0
    for _ in range(30):
        signal, noise = random.normal(size=(2, 80))
        dense, plan = signal + 0.2 * noise, signal + 0.2 * noise + random.normal(0, 0.5, 80)
        scores = [
            score_model(nn.Identity(), [(torch.tensor(o)[:, None], torch.tensor(signal))], score) for o in (dense, plan)
        ]
        drop = paired_drop(*scores, score, True, 0)
        covered += drop.low <= 1 / math.sqrt(1.04) - 1 / math.sqrt(1.29) <= drop.high
    assert covered >= 26


def test_no_interval_is_of_zero_width():
    batches = batches_of(40)
    for score in (top1, lambda o, t: o[:, 0], lambda o, t: 0 * o[:, 0], corpus_score(correlation)):
        scores = score_model(nn.Identity(), batches, score)
        drop = paired_drop(scores, scores, score, True, 0)
        assert drop.value == 0 and drop.low < 0 < drop.high
        assert drop.high < 0.2
        assert paired_drop(scores, scores, score, True, 0) == drop
    one = scores_of([0.7])
    assert paired_drop(one, one, top1, True, 0).low < 0


def test_lower_may_be_better():
    dense, plan = scores_of([0.5, 0.7, 0.2]), scores_of([0.6, 0.9, 0.4])
    drop = paired_drop(dense, plan, top1, False, 0)
    assert drop.value == pytest.approx(0.5 / 3) and drop.low <= drop.value <= drop.high
    assert paired_drop(dense, plan, top1, True, 0).value == -drop.value
    with pytest.raises(StudyError, match="dense was scored on 3 examples, the plan on 2"):
        paired_drop(dense, scores_of([1, 2]), top1, True, 0)


def test_output_distance():
    dense, other = torch.randn(50, 4), torch.randn(50, 4)
    kl = F.kl_div(other.log_softmax(1), dense.log_softmax(1), log_target=True, reduction="batchmean")
    assert output_distance(other, dense, F.cross_entropy) == pytest.approx(float(kl), rel=1e-5)
    assert output_distance(other, dense, nn.CrossEntropyLoss()) == pytest.approx(float(kl), rel=1e-5)
    assert output_distance(dense, dense, F.cross_entropy) == 0
    mean = dense.mean(0).expand_as(dense)
    assert output_distance(mean, dense, F.mse_loss) == pytest.approx(1)
    assert output_distance({"a": mean, "b": (dense,)}, {"a": dense, "b": (dense,)}, F.mse_loss) == pytest.approx(0.5)
    maps = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    assert output_distance(*maps, F.cross_entropy) > 0


def test_which_losses_mean_classes():
    assert is_classification(functools.partial(F.cross_entropy, label_smoothing=0.1))
    assert not is_classification(F.mse_loss)
    assert not is_classification(lambda outputs, targets: F.cross_entropy(outputs, targets))


def test_data_must_be_the_same_twice():
    same_twice(batches_of())
    with pytest.raises(StudyError, match="read only once"):
        same_twice(iter(batches_of()))
    with pytest.raises(StudyError, match="yields no example"):
        same_twice([])

    class Noisy:
        def __iter__(self):
            yield from batches_of()[:1]
            yield torch.randn(4, 3), torch.zeros(4)

    with pytest.raises(StudyError, match="test data differs between two passes, first in batch 1"):
        same_twice(Noisy(), "test")


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distance_of_values_is_a_share_of_their_variance_at_any_scale(scale: float, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    dense, change = (torch.randn(40, 7, generator=random, dtype=torch.float64) for _ in range(2))
    outputs = dense + 0.01 * change
    wanted = 1e-4 * float(change.square().mean() / (dense - dense.mean(0)).square().mean())
    found = output_distance((scale * outputs).to(dtype), (scale * dense).to(dtype), F.mse_loss)
    assert found == pytest.approx(wanted, rel=1e-4)


def test_detections_are_judged_by_the_image_however_many_they_are() -> None:
    images = [(torch.randn(2, 3), torch.zeros(2)) for _ in range(3)]
    found = score_model(
        lambda inputs: [{"boxes": torch.randn(5, 4)} for _ in inputs], images, corpus_score(lambda *_: 0.5)
    )
    assert found.n_examples == found.n_judged == 6


class Flattening(nn.Module):
    """Reads the numbers of its activations in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.classifier = nn.Conv2d(2, 6, 3), nn.Linear(216, 4)
        self.were_last: list[bool] = []

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.convolution(images)
        self.were_last.append(not self.convolution.weight.is_contiguous())
        return self.classifier(hidden.view(len(hidden), -1))


def test_a_model_is_scored_with_channels_last_only_where_it_takes_them_so() -> None:
    model, batches = Flattening(), [(torch.randn(8, 2, 8, 8), torch.randint(0, 4, (8,))) for _ in range(2)]
    with torch.no_grad():
        expected = torch.cat([model(inputs) for inputs, _ in batches])
    model.were_last.clear()
    outputs = score_model(model, batches, top1).outputs
    assert torch.equal(outputs, expected) and model.were_last == [False, True, False, False]
    # Maps of 8 by 8 as outputs: scores get them in order, as they would without.
    model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1))
    strides = []

    def score(outputs: Tensor, _targets: Tensor) -> Tensor:
        strides.append(model[0].weight.is_contiguous())
        return outputs.view(len(outputs), -1).mean(1)

    score_model(model, batches, score)
    assert strides == [False, False] and model[0].weight.is_contiguous()


class Striding(nn.Module):
    """Reads numbers where they would be in order, and says nothing where they are not."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 6, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.convolution(images)
        return hidden.as_strided((len(images), 6, 36), (216, 36, 1)).amax(2)


def test_a_model_that_would_silently_give_other_outputs_keeps_its_channels() -> None:
    model, images = Striding(), torch.randn(8, 2, 8, 8)
    with torch.no_grad():
        expected = model(images)
    assert torch.equal(score_model(model, [(images, torch.zeros(8, dtype=torch.long))], top1).outputs, expected)
