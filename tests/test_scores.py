"""Scores by name: what scikit-learn and SciPy say, and intervals out of what is kept of each batch."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import f1_score
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.errors import StudyError
from ranksearch.scores import pair_cosines
from ranksearch.scoring import paired_drop, score_model

LABELS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30)


def one_hot(labels: list[int], n_classes: int) -> Tensor:
    return F.one_hot(torch.tensor(labels), n_classes).float()


@given(LABELS)
@settings(max_examples=50)
def test_f1_is_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    chosen, labels = (list(column) for column in zip(*pairs, strict=True))
    expected = f1_score(labels, chosen, average="macro", zero_division=0)
    assert rs.macro_f1.function(one_hot(chosen, 4), torch.tensor(labels)) == pytest.approx(expected)
    chosen, labels = ([int(label > 1) for label in column] for column in (chosen, labels))
    expected = f1_score(labels, chosen, zero_division=0)
    assert rs.f1.function(one_hot(chosen, 2), torch.tensor(labels)) == pytest.approx(expected)
    logits = torch.tensor(chosen).float() - 0.5
    for single in (logits, logits[:, None]):
        assert rs.f1.function(single, torch.tensor(labels)[:, None]) == pytest.approx(expected)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=3, max_size=30))
@settings(max_examples=50)
def test_spearman_is_scipys_where_there_is_one(pairs: list[tuple[int, int]]) -> None:
    outputs, targets = (torch.tensor(column).float() for column in zip(*pairs, strict=True))
    found = rs.spearman.function(outputs[:, None], targets)
    if len(outputs.unique()) == 1 or len(targets.unique()) == 1:
        assert np.isnan(found)
    else:
        assert found == pytest.approx(spearmanr(outputs, targets).statistic)


def pairs_of(n: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of two rows for each target, which is their cosine and noise."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2 * n, 6, generator=generator)
    targets = F.cosine_similarity(rows[0::2], rows[1::2]) + 0.3 * torch.randn(n, generator=generator)
    return list(zip(rows.split(16), targets.split(8), strict=True))


def test_pairs_are_scored_and_resampled_as_pairs() -> None:
    batches = pairs_of(40)
    rows, targets = (torch.cat(column) for column in zip(*batches, strict=True))
    dense = score_model(nn.Identity(), batches, rs.pair_spearman)
    assert dense.n_examples == 2 * dense.n_judged, "two sentences are a pair"
    expected = spearmanr(F.cosine_similarity(rows[0::2], rows[1::2]), targets).statistic
    assert dense.value == pytest.approx(expected) and dense.n_examples == 80
    assert dense.corpus is not None and [len(part) for part in dense.corpus] == [40, 40]
    plan = score_model(lambda inputs: inputs + 0.5 * inputs.roll(1, 1), batches, rs.pair_spearman)
    drop = paired_drop(dense, plan, rs.pair_spearman, True, 0)
    reduced = rs.corpus_score(rs.spearman.function)
    of_cosines = [
        score_model(nn.Identity(), [pair_cosines(predict(rows), targets)], reduced)
        for predict in (lambda r: r, lambda r: r + 0.5 * r.roll(1, 1))
    ]
    assert drop == paired_drop(*of_cosines, reduced, True, 0)
    with pytest.raises(StudyError, match="3 rows and 2 targets are no pairs"):
        pair_cosines(torch.zeros(3, 2), torch.zeros(2))


def texts(lengths: list[int]) -> list[tuple[Tensor, Tensor]]:
    """Batches of one text each: logits (1, 5, 4) and tokens, of which as many count as `lengths` says."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in lengths:
        tokens = torch.randint(0, 5, (1, 4), generator=generator)
        tokens[:, length:] = -100
        batches.append((torch.randn(1, 5, 4, generator=generator), tokens))
    return batches


def test_perplexity_is_that_of_all_tokens_and_keeps_no_logits() -> None:
    batches = texts([4, 1, 2, 4])
    logits, tokens = (torch.cat(column) for column in zip(*batches, strict=True))
    mean = F.cross_entropy(logits, tokens)
    scores = score_model(nn.Identity(), batches, rs.perplexity, max_output_bytes=10)
    assert scores.value == pytest.approx(float(mean.exp())) and scores.outputs is None
    each = score_model(nn.Identity(), batches, rs.nll_per_token)
    expected = [float(F.cross_entropy(outputs, targets)) for outputs, targets in batches]
    assert each.per_example is not None and each.per_example.tolist() == pytest.approx(expected)
    assert rs.nll_per_token(logits[:1], torch.full((1, 4), -100)).tolist() == [0.0]


def test_a_worse_perplexity_is_a_drop_with_an_interval() -> None:
    batches = texts([4, 3, 4, 2] * 10)
    dense, plan = (score_model(model, batches, rs.perplexity) for model in (lambda x: x, lambda x: x.roll(1, 1)))
    drop = paired_drop(dense, plan, rs.perplexity, False, 0)
    assert drop.value == pytest.approx(plan.value - dense.value)
    assert drop.low is not None and drop.high is not None and drop.low < drop.value < drop.high


@pytest.mark.parametrize("given", [7, (torch.zeros(2),), (1.0, torch.zeros(2))])
def test_what_is_reduced_must_be_outputs_and_targets(given: Any) -> None:
    score = rs.corpus_score(lambda outputs, targets: 0.0, lambda outputs, targets: given)
    with pytest.raises(StudyError, match="batch 0 of the validation data; it must give"):
        score_model(nn.Identity(), texts([4]), score)
