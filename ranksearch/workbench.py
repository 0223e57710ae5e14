"""A study's model, data and target, made ready for trials."""

import copy
import fnmatch
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ranksearch.compression import Factorisations, count_params, packed_bytes
from ranksearch.errors import StudyError
from ranksearch.layers import (
    FoundLayers,
    call_model,
    compressible_layers,
    count_macs,
    evaluating,
)
from ranksearch.runtimes import AbstractRuntime, AbstractSession, get_runtime
from ranksearch.scoring import Scores, same_twice, score_model
from ranksearch.spec import Batches, Data, StudySpec
from ranksearch.statistics import collect
from ranksearch.trees import concatenate, count_rows, first_examples, map_tensors, pick_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Dense:
    """The dense model on the target: what every plan is compared with."""

    scores: Scores
    session: AbstractSession
    run: Callable[[], None]
    model_bytes: int
    n_params: int
    macs: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Workbench:
    """A study's model, data and target, made ready for trials. `train` is the calibration data where there is none."""

    spec: StudySpec
    model: nn.Module
    data: Data
    found: FoundLayers
    runtime: AbstractRuntime
    example: Any
    calibration: list[tuple[Any, Any]]
    dense: Dense

    @property
    def train(self) -> Batches:
        """What recovery trains on."""
        return self.data.calibration if self.data.train is None else self.data.train

    @property
    def weight_limit(self) -> int:
        """The largest int8 weight code that the target's kernels take."""
        return self.runtime.weight_limit(self.spec.target)

    def score(self, predict: nn.Module | Callable[[Any], Any], batches: Batches) -> Scores:
        """The study's score on `batches` of a model, run in eval mode, or of a function of its inputs."""
        return score_model(predict, batches, self.spec.score)

    def factorisations(self) -> Factorisations:
        """The factorisations of the layers, from one calibration pass."""
        statistics = collect(self.model, self.found.layers, self.calibration, self.spec.loss, seed=self.spec.seed)
        return Factorisations(self.model, statistics)


MAX_CALIBRATION_EXAMPLES = 1024


def open_workbench(spec: StudySpec) -> Workbench:
    """Loads the study's model and data, scores dense, and opens it on the target.

    Raises StudyError for a model without compressible layers, data that yields nothing or differs between passes,
    a NaN loss of dense, globs that match nothing; RuntimeUnavailableError for the target's runtime.
    """
    runtime = get_runtime(spec.target.runtime)
    runtime.check(spec.target)
    model = spec.model()
    if not isinstance(model, nn.Module):
        raise StudyError(f"study {spec.name!r}: model() gave a {type(model).__name__}, not a torch.nn.Module")
    model = copy.deepcopy(model).eval()
    data = spec.data()
    calibration = _take(data.calibration, MAX_CALIBRATION_EXAMPLES)
    if not calibration:
        raise StudyError(f"study {spec.name!r}: the calibration data yields nothing")
    _check_dense(model, spec, calibration[0])
    for name in ("validation", "test"):
        batches = getattr(data, name)
        if batches is not None:
            same_twice(batches, name)
    example = first_rows(calibration, spec.target.batch_size)
    found = _selected(compressible_layers(model, first_rows(calibration, 1)), spec)
    session = runtime.prepare(model, example, spec.target)
    scores = score_model(model, data.validation, spec.score)
    dense = Dense(
        scores=scores,
        session=session,
        run=session.bind(to_arrays(example)),
        model_bytes=packed_bytes(model),
        n_params=count_params(model),
        macs=count_macs(model, first_rows(calibration, 1)),
    )
    return Workbench(
        spec=spec,
        model=model,
        data=data,
        found=found,
        runtime=runtime,
        example=example,
        calibration=calibration,
        dense=dense,
    )


def session_predict(session: AbstractSession, batch_size: int) -> Callable[[Any], Any]:
    """The session as a function of torch inputs of any number of rows: it runs `batch_size` rows at a time."""

    def predict(inputs: Any) -> Any:
        n_rows = count_rows(inputs)
        outputs = []
        for start in range(0, n_rows, batch_size):
            # The last rows are repeated to fill the batch, and cut off again.
            rows = np.minimum(np.arange(start, start + batch_size), n_rows - 1)
            outputs.append(torch.as_tensor(session.run(to_arrays(pick_rows(inputs, torch.as_tensor(rows))))))
        return torch.cat(outputs)[:n_rows]

    return predict


def to_arrays(inputs: Any) -> Any:
    """A model's inputs as numpy arrays, in the same structure."""
    return map_tensors(inputs, lambda tensor: tensor.detach().cpu().numpy())


def first_rows(batches: Batches, n_rows: int) -> Any:
    """The first `n_rows` rows of the inputs of `batches`; fewer where the data ends before."""
    return concatenate(list(first_examples(batches, n_rows)))


def _take(batches: Batches, n_examples: int) -> list[tuple[Any, Any]]:
    """Whole batches until they hold `n_examples` rows."""
    taken: list[tuple[Any, Any]] = []
    n_taken = 0
    for inputs, targets in batches:
        taken.append((inputs, targets))
        n_taken += count_rows(inputs)
        if n_taken >= n_examples:
            break
    return taken


def _check_dense(model: nn.Module, spec: StudySpec, batch: tuple[Any, Any]) -> None:
    inputs, targets = batch
    with evaluating(model):
        loss = float(spec.loss(call_model(model, inputs), targets))
    if not np.isfinite(loss):
        raise StudyError(
            f"study {spec.name!r}: the dense model's loss on calibration data is {loss}; it must be finite"
        )


def _selected(found: FoundLayers, spec: StudySpec) -> FoundLayers:
    """The found layers that the study's globs leave in. Raises StudyError for a glob that matches nothing."""
    names = [*found.layers, *found.skipped]
    for glob in (*spec.space.only, *spec.space.skip):
        if not fnmatch.filter(names, glob):
            raise StudyError(f"the glob {glob!r} matches no layer; layers are {', '.join(found.layers)}")
    reasons = {}
    for name in found.layers:
        if spec.space.only and not any(fnmatch.fnmatch(name, glob) for glob in spec.space.only):
            reasons[name] = "not in Space.only"
        elif any(fnmatch.fnmatch(name, glob) for glob in spec.space.skip):
            reasons[name] = "in Space.skip"
    layers = {name: info for name, info in found.layers.items() if name not in reasons}
    if not layers:
        raise StudyError("Space.only and Space.skip leave no layer to compress")
    return FoundLayers(layers=layers, skipped={**found.skipped, **reasons})
