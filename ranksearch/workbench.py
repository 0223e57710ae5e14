"""A study's model, data and target, made ready for trials."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from ranksearch.cache import Cache, cache_directory
from ranksearch.compression import count_params
from ranksearch.device import check_cores, device_lock, timed_cores
from ranksearch.factorisations import Factorisations
from ranksearch.finding import FoundLayers, compressible_layers, irreplaceable_layers, unread_layers
from ranksearch.latency import Latency, compare_all, timed_call
from ranksearch.layers import call_model, count_macs, evaluating, in_eval_mode
from ranksearch.preparation import prepare_source, with_weights
from ranksearch.quantization import SharedTensors, quantized_layers, shared_tensors
from ranksearch.recovery import Step, seeded
from ranksearch.runtimes import AbstractRuntime, AbstractSession, get_runtime, stayed_float, stayed_whole
from ranksearch.scoring import Scores, score_model
from ranksearch.spec import Batches, Data, StudySpec
from ranksearch.statistics import LayerStatistics, collect
from ranksearch.study_checks import (
    check_decompositions,
    check_dense,
    check_python,
    check_splits,
    check_ties,
    given_by,
    selected,
    take_calibration,
)
from ranksearch.surgery import copy_model, wrappers
from ranksearch.trees import arranged, concatenate, count_rows, first_examples, map_tensors, pick_rows, tensors
from ranksearch.weights import packed_bytes

# Factors of a dozen candidates per layer take a few times the model.
MAX_FACTOR_BYTES = 4 << 30


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
    """A study's model, data and target, made ready for trials. `train` is the calibration data where there is none.

    `source` is what plans are cut from: the dense `model`, or it as Recovery.prepare made it. `shared` tells of the
    tensors that several read, on which the quantizers of 8-bit plans sit, `weight_limit` is the largest int8 weight
    code that the target's kernels take, `notes` what the user should hear of the model.
    """

    spec: StudySpec
    model: nn.Module
    source: nn.Module
    data: Data
    found: FoundLayers
    shared: SharedTensors
    runtime: AbstractRuntime
    example: Any
    calibration: list[tuple[Any, Any]]
    dense: Dense
    weight_limit: int
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> Batches:
        """What recovery trains on."""
        return self.data.recovery

    def prepare(self, model: nn.Module) -> AbstractSession:
        """The model on the target, its threads on the target's cores where it names any."""
        with timed_cores(self.spec.target):
            return self.runtime.prepare(model, self.example, self.spec.target)

    def open(self, artefact: Path) -> AbstractSession:
        """A serialised model on the target, likewise."""
        with timed_cores(self.spec.target):
            return self.runtime.open(artefact, self.spec.target)

    def compare(self, session: AbstractSession, **options: Any) -> Latency:
        """The session's latency beside dense's, alone on the device; options are those of latency.compare_all."""
        return self.compare_all([session], **options)[0]

    def compare_all(self, sessions: Sequence[AbstractSession], **options: Any) -> list[Latency]:
        """The latency of each beside the others' and dense's."""
        target, arrays = self.spec.target, to_arrays(self.example)
        calls = [timed_call(session, arrays, target) for session in sessions]
        with timed_cores(target), device_lock(target):
            return compare_all(calls, self.dense.run, seed=self.spec.seed, **options)

    def stayed_float(self, model: nn.Module, session: AbstractSession) -> dict[str, str]:
        """The model's 8- and 4-bit layers that the session, opened from it, runs in float, with the kernel of each."""
        quantized = {name: module for name, module in quantized_layers(model).items() if module.weight_format.bits < 16}
        if not quantized:
            return {}
        # To tell its kernels a runtime may have to run the model again.
        kernels = session.layer_kernels()
        rounded = [name for name, module in quantized.items() if module.rounds_inputs]
        return stayed_float(rounded, kernels) | stayed_whole(quantized.keys() - rounded, kernels)

    def as_model(self, session: AbstractSession) -> "SessionModel":
        """The session as a module whose outputs are arranged as the dense model's, so that a score reads both alike."""
        with evaluating(self.model):
            like = call_model(self.model, self.example)
        return SessionModel(session, self.spec.target.batch_size, like).eval()

    def score(self, predict: nn.Module | Callable[[Any], Any], batches: Batches) -> Scores:
        """The study's score on `batches` of a model, run in eval mode, or of a function of its inputs."""
        return score_model(predict, batches, self.spec.score)

    def factorisations(self, statistics: Mapping[str, LayerStatistics] | None = None) -> Factorisations:
        """The factorisations of the layers; the factors cut from them are kept on disk.

        From these statistics, or one calibration pass.
        """
        cache = Cache(directory=cache_directory() / "factors", max_bytes=MAX_FACTOR_BYTES)
        return self._factorisations(self.source, statistics or self._collect(self.source), cache)

    def factorisations_of(self, source: nn.Module) -> Factorisations:
        """Those of another model of the same layers, from a calibration pass of its own."""
        return self._factorisations(source, self._collect(source), None)

    def _collect(self, source: nn.Module) -> dict[str, LayerStatistics]:
        return collect(source, self.found.layers, self.calibration, self.spec.loss, seed=self.spec.seed)

    def _factorisations(
        self, source: nn.Module, statistics: Mapping[str, LayerStatistics], cache: Cache | None
    ) -> Factorisations:
        return Factorisations(source, statistics, cache, only_last=True)


def open_workbench(
    spec: StudySpec,
    on_step: Callable[[Step], None] = lambda _step: None,
    *,
    prepared: Mapping[str, Tensor] | None = None,
    weight_limit: int | None = None,
) -> Workbench:
    """Loads the study's model and data, scores dense, opens it on the target, and prepares what plans are cut from.

    `on_step` hears of the preparation, which is left out where the `prepared` model's weights are given; the
    `weight_limit` is that of the runtime here, unless given.

    Raises StudyError for a model without compressible layers or of other floats than float32, data that yields
    nothing, too little or not the same twice, a NaN loss of dense, globs that match nothing;
    RuntimeUnavailableError for the target's runtime.
    """
    check_cores(spec.target)
    with timed_cores(spec.target):
        runtime = get_runtime(spec.target.runtime)
        runtime.check(spec.target)
    check_decompositions(spec)
    # What draws random numbers draws the same ones in every process: a resume's, and a worker's.
    with seeded(spec.seed, torch.device("cpu")):
        given = given_by(spec, "model", spec.model(), nn.Module)
        check_python(spec, given)
        model = in_eval_mode(copy_model(given))
        data = given_by(spec, "data", spec.data(), Data)
        calibration = take_calibration(spec, data)
    check_dense(spec, model, given, calibration[0])
    check_splits(spec, data)
    example = first_rows(calibration, spec.target.batch_size)
    # On the example, so that layers are timed at the batch size of the target.
    found = compressible_layers(model, example)
    found = found.without(irreplaceable_layers(model, example, found.all))
    found = selected(found.without(unread_layers(model, first_rows(calibration, 1), found.all)), spec)
    with timed_cores(spec.target):
        check_ties(spec, found, runtime)
        session = runtime.prepare(model, example, spec.target)
    scores = score_model(model, data.validation, spec.score)
    dense = Dense(
        scores=scores,
        session=session,
        run=timed_call(session, to_arrays(example), spec.target),
        model_bytes=packed_bytes(model),
        n_params=count_params(model),
        macs=count_macs(model, first_rows(calibration, 1)),
    )
    return Workbench(
        spec=spec,
        model=model,
        source=(
            prepare_source(spec, model, data, calibration, list(found.layers), on_step)
            if prepared is None
            else with_weights(model, prepared)
        ),
        data=data,
        found=found,
        shared=shared_tensors(model, first_rows(calibration, 1)),
        runtime=runtime,
        example=example,
        calibration=calibration,
        dense=dense,
        weight_limit=runtime.weight_limit(spec.target) if weight_limit is None else weight_limit,
        notes=_notes(given),
    )


@final
class SessionModel(nn.Module):
    """An opened model as a module of torch inputs of any number of rows: it runs `batch_size` rows at a time.

    Its outputs are arranged as those of torch's model are, which `like` shows; without one as the session gives them.
    """

    def __init__(self, session: AbstractSession, batch_size: int, like: Any = None) -> None:
        super().__init__()
        self.like = like
        self.session = session
        self.batch_size = batch_size

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The outputs as tensors."""
        given = named or (inputs if len(inputs) > 1 else inputs[0])
        n_rows = count_rows(given)
        outputs = []
        for start in range(0, n_rows, self.batch_size):
            # The last rows are repeated to fill the batch, and cut off again.
            rows = torch.arange(start, start + self.batch_size).clamp(max=n_rows - 1)
            outputs.append(map_tensors(self.session.run(to_arrays(pick_rows(given, rows))), self._with_rows))
        together = pick_rows(concatenate(outputs), slice(n_rows))
        return together if self.like is None else arranged(self.like, tensors(together))

    def _with_rows(self, values: Any) -> Tensor:
        """An output as a tensor; of one row a model that squeezes its outputs drops their first axis too."""
        output = torch.as_tensor(values)
        squeezed = self.batch_size == 1 and output.shape[:1] != (1,)
        return output[None] if squeezed else output


def to_arrays(inputs: Any) -> Any:
    """A model's inputs as numpy arrays, in the same structure."""
    return map_tensors(inputs, lambda tensor: tensor.detach().cpu().numpy())


def first_rows(batches: Batches, n_rows: int) -> Any:
    """The first `n_rows` rows of the inputs of `batches`; fewer where the data ends before."""
    return concatenate(list(first_examples(batches, n_rows)))


def _notes(model: nn.Module) -> tuple[str, ...]:
    if not (around := wrappers(model)):
        return ()
    return (f"the model is taken out of {' and '.join(around)}; layers bear the names that they have inside",)
