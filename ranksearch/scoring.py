"""A model scored on data, the distance of its outputs to the dense ones, and paired intervals of the drop."""

import hashlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.intervals import bootstrap_interval, flips_interval, mean_interval
from ranksearch.layers import call_model, evaluating
from ranksearch.memory_format import channels_last_weights
from ranksearch.spec import Batches, CorpusScore, Score
from ranksearch.trees import concatenate, count_rows, is_classification, map_tensors, pick_rows, tensor_bytes, tensors

Predict = Callable[[Any], Any]
ScoreKind = Literal["example", "corpus", "model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A model's score and what it is made of.

    `per_example` is (n_examples,) where the score is one number per example. `outputs` and `targets` hold all
    examples in order; None where batches cannot be put together, or outputs would take more than the memory allowed.
    `corpus` are the outputs and targets that a corpus score is of, reduced where it reduces them. `n_judged` is how
    many the score is made of: the examples, or of sentences that are judged in pairs the pairs.
    """

    value: float
    per_example: NDArray[np.float64] | None
    n_examples: int
    outputs: Any
    targets: Any
    n_judged: int
    corpus: tuple[Any, Any] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drop:
    """How much worse than dense, in score units, with its 95 % interval; None where the score allows none."""

    value: float
    low: float | None
    high: float | None


def score_kind(score: Score) -> ScoreKind:
    """How a study's score is called: on all outputs at once, on the model itself, or on each batch of outputs."""
    if isinstance(score, CorpusScore):
        return "corpus"
    try:
        parameters = inspect.signature(score).parameters.values()
    except ValueError:
        return "example"  # functions written in C may show no signature
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    variadic = any(p.kind is inspect.Parameter.VAR_POSITIONAL for p in parameters)
    return "model" if len(required) == 1 and not variadic else "example"


def score_model(
    predict: Predict | nn.Module,
    batches: Batches,
    score: Score,
    *,
    source: str = "validation",
    max_output_bytes: int = 1 << 30,
) -> Scores:
    """The score over `batches` (called `source` in errors), and the outputs that gave it.

    `predict` is a model, run in eval mode, or inputs -> outputs; a score of the kind evaluate(model) gets it as it
    is. Raises StudyError where the data yields nothing, the score has the wrong shape, or is not a finite number.
    """
    kind, reduce = score_kind(score), score.reduce if isinstance(score, CorpusScore) else None
    parts: list[tuple[Any, Any]] = []
    reduced: list[tuple[Any, Any]] = []
    values: list[NDArray[np.float64]] = []
    n_examples, n_bytes = 0, 0
    needs_outputs = kind == "corpus" and reduce is None
    with _predicting(predict) as run:
        for index, (inputs, targets) in enumerate(batches):
            outputs = map_tensors(run(inputs), lambda t: t.detach().cpu().contiguous())
            n_rows = count_rows(inputs)
            n_examples += n_rows
            if kind == "example":
                assert not isinstance(score, CorpusScore), "told by score_kind"
                values.append(_example_scores(score, outputs, targets, n_rows, f"batch {index} of the {source} data"))
            if reduce is not None:
                reduced.append(_reduced(reduce(outputs, targets), f"batch {index} of the {source} data"))
            n_bytes += sum(t.numel() * t.element_size() for t in tensors(outputs))
            if needs_outputs or n_bytes <= max_output_bytes:
                parts.append((outputs, targets))
    if n_examples == 0:
        raise StudyError(f"the {source} data yields no example")
    together = _together(parts, required=needs_outputs, complete=n_bytes <= max_output_bytes)
    per_example = np.concatenate(values) if values else None
    corpus = _together(reduced, required=True, complete=True) if reduced else together
    value = _value(predict, score, per_example, corpus, source)
    return Scores(
        value=value,
        per_example=per_example,
        n_examples=n_examples,
        outputs=together[0],
        targets=together[1],
        n_judged=count_rows(corpus[0]) if reduced else n_examples,
        corpus=corpus if kind == "corpus" else None,
    )


def paired_drop(dense: Scores, plan: Scores, score: Score, higher_is_better: bool, seed: int) -> Drop:
    """How much worse the plan scores than dense on the same examples, with its paired 95 % interval.

    Scores of 0 or 1 get Agresti and Min's, other numbers per example Student's, a corpus score the bootstrap over
    examples; none of them has zero width where nothing changes. A score of the kind evaluate(model) gets none.
    Raises StudyError where the two were not scored on equally many examples.
    """
    if dense.n_examples != plan.n_examples:
        raise StudyError(
            f"dense was scored on {dense.n_examples} examples, the plan on {plan.n_examples}; "
            "validation and test data must give the same examples at every pass"
        )
    sign = 1.0 if higher_is_better else -1.0
    value = sign * (dense.value - plan.value)
    if dense.per_example is not None and plan.per_example is not None:
        interval = _paired_interval(dense.per_example, plan.per_example, sign)
    elif isinstance(score, CorpusScore):
        interval = _corpus_interval(dense, plan, score, sign, seed)
    else:
        return Drop(value=value, low=None, high=None)
    if interval is None:
        return Drop(value=value, low=None, high=None)
    return Drop(value=value, low=min(interval[0], value), high=max(interval[1], value))


def output_distance(outputs: Any, dense_outputs: Any, loss: Any) -> float:
    """How far outputs are from the dense ones.

    For class logits (N, C, ...) under cross-entropy the mean KL(dense || outputs) in nats; else the mean squared
    change over the dense outputs' variance across examples, averaged over the tensors of the output.
    """
    if is_classification(loss):
        logits = tensors(outputs)[0].double().log_softmax(1)
        dense_logits = tensors(dense_outputs)[0].double().log_softmax(1)
        return float((dense_logits.exp() * (dense_logits - logits)).sum(1).mean())
    pairs = list(zip(tensors(outputs), tensors(dense_outputs), strict=True))
    shares = [_share_of_variance(new, old) for new, old in pairs if old.is_floating_point()]
    return sum(shares) / max(len(shares), 1)


def same_twice(batches: Batches, source: str = "validation") -> None:
    """Raises StudyError unless two passes over `batches` give the same examples in the same order."""
    first, second = ([_digest(batch) for batch in batches] for _ in range(2))
    if not first:
        raise StudyError(f"the {source} data yields no example")
    if not second:
        raise StudyError(
            f"the {source} data can be read only once; give a list, a DataLoader or an object that starts anew"
        )
    if first != second:
        number = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), len(second))
        raise StudyError(
            f"the {source} data differs between two passes, first in batch {number}; "
            "turn off shuffling and augmentation, scores are compared example by example"
        )


@contextmanager
def _predicting(predict: Predict | nn.Module) -> Iterator[Predict]:
    if isinstance(predict, nn.Module):
        with evaluating(predict), ExitStack() as stack:
            arranged = False

            def run(inputs: Any) -> Any:
                nonlocal arranged
                if not arranged:
                    stack.enter_context(channels_last_weights(predict, inputs))
                    arranged = True
                return call_model(predict, inputs)

            yield run
    else:
        with torch.no_grad():
            yield predict


def _example_scores(
    score: Callable[..., Any], outputs: Any, targets: Any, n_rows: int, where: str
) -> NDArray[np.float64]:
    result = score(outputs, targets)
    values = np.asarray(result.detach().cpu() if isinstance(result, Tensor) else result, dtype=np.float64)
    if values.shape != (n_rows,):
        raise StudyError(
            f"the score of {where} has shape {values.shape}, not one number for each of its {n_rows} examples "
            f"({n_rows},); for a score of all outputs at once use corpus_score(...)"
        )
    if not np.isfinite(values).all():
        n_bad = int((~np.isfinite(values)).sum())
        raise StudyError(f"the score of {n_bad} of {n_rows} examples in {where} is not a finite number")
    return values


def _reduced(given: Any, where: str) -> tuple[Any, Any]:
    """What a corpus score's `reduce` gave. Raises StudyError unless it is a pair of outputs and targets."""
    if not isinstance(given, tuple) or len(given) != 2 or not count_rows(given[0]):
        raise StudyError(
            f"the score's reduce gave {type(given).__name__} {given!r:.80} for {where}; it must give (outputs, targets)"
        )
    return given


def _together(parts: list[tuple[Any, Any]], *, required: bool, complete: bool) -> tuple[Any, Any]:
    """All outputs and all targets; (None, None) where they do not fit together and need not."""
    if not required and not complete:
        return None, None
    try:
        return concatenate([outputs for outputs, _ in parts]), concatenate([targets for _, targets in parts])
    except StudyError:
        if required:
            raise
        return None, None


def _value(
    predict: Predict | nn.Module,
    score: Score,
    per_example: NDArray[np.float64] | None,
    together: tuple[Any, Any],
    source: str,
) -> float:
    if per_example is not None:
        return float(per_example.mean())
    value = float(score.function(*together) if isinstance(score, CorpusScore) else score(predict))
    if not np.isfinite(value):
        raise StudyError(f"the score of the {source} data is {value}, not a finite number")
    return value


def _paired_interval(dense: NDArray[np.float64], plan: NDArray[np.float64], sign: float) -> tuple[float, float] | None:
    if np.isin(dense, (0.0, 1.0)).all() and np.isin(plan, (0.0, 1.0)).all():
        n_worse, n_better = int((sign * (dense - plan) > 0).sum()), int((sign * (dense - plan) < 0).sum())
        return flips_interval(n_worse, n_better, len(dense))
    return mean_interval(sign * (dense - plan), spread=float(dense.std()) or abs(float(dense.mean())) or 1.0)


def _corpus_interval(
    dense: Scores, plan: Scores, score: CorpusScore, sign: float, seed: int
) -> tuple[float, float] | None:
    def pick(tree: Any, rows: NDArray[np.int64]) -> Any:
        examples_are_objects = isinstance(tree, list) and not tensors(tree)
        return [tree[i] for i in rows] if examples_are_objects else pick_rows(tree, torch.from_numpy(rows))

    assert dense.corpus is not None and plan.corpus is not None, "kept for every corpus score"
    (dense_outputs, all_targets), (plan_outputs, _) = dense.corpus, plan.corpus

    def both(rows: NDArray[np.int64]) -> tuple[float, float]:
        targets = pick(all_targets, rows)
        dense_value = float(score.function(pick(dense_outputs, rows), targets))
        return dense_value, sign * (dense_value - float(score.function(pick(plan_outputs, rows), targets)))

    return bootstrap_interval(both, dense.n_judged, seed)


def _share_of_variance(outputs: Tensor, dense_outputs: Tensor) -> float:
    """Mean squares in single precision at least: the logits of a language model take milliseconds so, not 100."""
    precision = torch.promote_types(dense_outputs.dtype, torch.float32)
    new, old = outputs.to(precision), dense_outputs.to(precision)
    spread = old - old.mean(0) if old.dim() and len(old) > 1 else old
    return _mean_square(new - old) / max(_mean_square(spread), 1e-30)


def _mean_square(values: Tensor) -> float:
    flat = values.flatten()
    total = float(flat @ flat)
    # Squares overflow long before the values do.
    return (total if np.isfinite(total) else float(flat.double().square().sum())) / max(flat.numel(), 1)


def _digest(batch: tuple[Any, Any]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors(batch):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
