"""What a study says and its functions give, checked before anything is made of it."""

import fnmatch
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn

from ranksearch.bits import offered_bits
from ranksearch.decompositions import get_decomposition
from ranksearch.errors import DecompositionError, StudyError
from ranksearch.finding import FoundLayers
from ranksearch.inputs import check_inputs, other_floats_given
from ranksearch.layers import WeightSpec, call_model, evaluating, other_floats
from ranksearch.plan import DENSE
from ranksearch.runtimes import AbstractRuntime
from ranksearch.scoring import same_twice, score_kind
from ranksearch.spec import Data, StudySpec, tied_layers
from ranksearch.trees import copied, count_rows, pick_rows, tensors

T = TypeVar("T")
MAX_CALIBRATION_EXAMPLES = 1024


def check_decompositions(spec: StudySpec) -> None:
    """Raises StudyError for one that there is not."""
    try:
        for name in spec.space.decompositions:
            get_decomposition(name)
    except DecompositionError as error:
        raise StudyError(f"study {spec.name!r}: Space.decompositions: {error}") from None


def given_by(spec: StudySpec, name: str, value: Any, wanted: type[T]) -> T:
    """What the study's function `name` gave. Raises StudyError where it is something else."""
    if not isinstance(value, wanted):
        raise StudyError(f"study {spec.name!r}: {name}() gave a {type(value).__name__}, not a {wanted.__name__}")
    return value


def take_calibration(spec: StudySpec, data: Data) -> list[tuple[Any, Any]]:
    """Whole batches until they hold what calibration needs. Raises StudyError where they cannot fill the example."""
    batch_size = spec.target.batch_size
    taken: list[tuple[Any, Any]] = []
    n_taken = 0
    for batch in data.calibration:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise StudyError(
                f"study {spec.name!r}: a calibration batch is a {type(batch).__name__}; give pairs (inputs, targets)"
            )
        taken.append((batch[0], batch[1]))
        n_taken += count_rows(batch[0])
        if n_taken >= max(MAX_CALIBRATION_EXAMPLES, batch_size):
            break
    if n_taken == 0:
        raise StudyError(f"study {spec.name!r}: the calibration data yields nothing")
    if n_taken < batch_size:
        raise StudyError(
            f"study {spec.name!r}: the calibration data has {n_taken} examples, fewer than "
            f"Target.batch_size={batch_size}; give more, or a smaller batch"
        )
    return taken


def check_python(spec: StudySpec, model: nn.Module) -> None:
    """Raises StudyError for a model of TorchScript, in whose layers' place nothing can be put."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            place = f"module {name!r}" if name else "the model"
            raise StudyError(
                f"study {spec.name!r}: {place} is a {type(module).__name__} of TorchScript, whose layers cannot be "
                "replaced; give the nn.Module that it was made from"
            )


def check_dense(spec: StudySpec, model: nn.Module, given: nn.Module, batch: tuple[Any, Any]) -> None:
    """Raises StudyError for other floats than float32, a batch that does not fit, weights that are not registered,
    outputs that differ from call to call, and a loss that is not finite.

    `model` is a copy of the study's own, `given`.
    """
    inputs, targets = batch
    if (told := other_floats(model)) is not None:
        raise StudyError(f"study {spec.name!r}: {told}")
    try:
        check_inputs(model, inputs)
        with evaluating(model):
            outputs = call_model(model, copied(inputs))
    except StudyError as error:
        raise StudyError(f"study {spec.name!r}: {error}") from None
    except RuntimeError as error:
        if (told := other_floats_given(model, inputs)) is None:
            raise
        raise StudyError(f"study {spec.name!r}: {told}") from error
    except (AttributeError, KeyError) as error:
        if not _runs(given, inputs):
            raise
        raise StudyError(
            f"study {spec.name!r}: a copy of the model raises {type(error).__name__} ({error}) where the model itself "
            "does not; a hook or a function that holds the model keeps its results there and not in a copy"
        ) from error
    _check_one_row(spec, model, inputs)
    try:
        with torch.no_grad():
            loss = torch.as_tensor(spec.loss(outputs, targets))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise StudyError(
            f"study {spec.name!r}: the loss raises {type(error).__name__} for outputs {_described(outputs)} and "
            f"targets {_described(targets)}: {first}"
        ) from error
    if loss.numel() != 1:
        raise StudyError(
            f"study {spec.name!r}: the loss has shape {tuple(loss.shape)}; it must be one number, the batch's mean"
        )
    if not np.isfinite(float(loss)):
        raise StudyError(
            f"study {spec.name!r}: the dense model's loss on calibration data is {float(loss)}; it must be finite"
        )


def _check_one_row(spec: StudySpec, model: nn.Module, inputs: Any) -> None:
    """Raises StudyError where the model takes no batch of one example, as layers are looked at, where it computes with
    weights that it does not register, and where it gives something else the second time.
    """
    row = pick_rows(inputs, slice(0, 1))
    try:
        with evaluating(model):
            outputs = call_model(model, copied(row))
        again = _in_frozen(model, copied(row))
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise StudyError(
            f"study {spec.name!r}: the model takes {count_rows(inputs)} examples, and not one alone ({first}); a "
            "batch's size is no number in a forward: x.view(x.size(0), -1)"
        ) from error
    if any(tensor.requires_grad for tensor in tensors(again)):
        raise StudyError(
            f"study {spec.name!r}: the model computes with weights that it does not register, such as layers in a "
            "plain list, which no copy, file or optimiser holds; put them into an nn.ModuleList"
        )
    if not _are_alike(outputs, again):
        raise StudyError(
            f"study {spec.name!r}: in eval mode the model gives other outputs for the same inputs the second time; "
            "F.dropout, for one, needs training=self.training"
        )


def _runs(model: nn.Module, inputs: Any) -> bool:
    try:
        with evaluating(model):
            call_model(model, inputs)
    except Exception:
        return False
    return True


def _in_frozen(model: nn.Module, inputs: Any) -> Any:
    """The outputs in eval mode with gradients, which none of the model's own parameters asks for."""
    asking = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        model.requires_grad_(False)
        with evaluating(model), torch.enable_grad():
            return call_model(model, inputs)
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


def _are_alike(outputs: Any, again: Any) -> bool:
    """Whether they differ by no more than sums in another order do."""
    pairs = zip(tensors(outputs), tensors(again), strict=True)
    return all(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-4, equal_nan=True) for a, b in pairs)


def _described(values: Any) -> str:
    """The kinds and shapes of the tensors in it."""
    told = [f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for t in tensors(values)]
    return ", ".join(told) or f"of type {type(values).__name__}"


def check_splits(spec: StudySpec, data: Data) -> None:
    """Raises StudyError for a split that yields nothing or not the same twice, or that the score does not read."""
    if data.tiebreak is not None and score_kind(spec.score) == "model":
        raise StudyError(
            f"study {spec.name!r}: a score of the kind evaluate(model) reads its own data and none of Data.tiebreak; "
            "leave `tiebreak` out, or give a score of outputs and targets"
        )
    for name in ("validation", "tiebreak", "test"):
        batches = getattr(data, name)
        if batches is not None:
            same_twice(batches, name)
    if data.train is not None and next(iter(data.train), None) is None:
        raise StudyError(f"study {spec.name!r}: the training data yields no example; leave `train` out, or fill it")


def check_ties(spec: StudySpec, found: FoundLayers, runtime: AbstractRuntime) -> None:
    """Raises StudyError where a layer, whatever its shape, takes no bits but float that those tied to it take."""
    for tied in tied_layers(spec.space.ties, list(found.all), found.skipped):
        offered = {name: _bits_of(spec, found.all[name].spec, runtime) for name in tied}
        shared = set.intersection(*offered.values())
        most = max(tied, key=lambda name: len(offered[name]))
        odd = min(tied, key=lambda name: len(offered[name] & offered[most]))
        if not shared - {DENSE.bits} and offered[most] - {DENSE.bits}:
            raise StudyError(
                f"Space.ties: on {spec.target.runtime} layer {odd!r} takes bits {_listed(offered[odd])} and {most!r}, "
                f"tied to it, {_listed(offered[most])}: they can share none but float; leave {odd!r} out of the tie"
            )


def _bits_of(spec: StudySpec, layer: WeightSpec, runtime: AbstractRuntime) -> set[str]:
    for_size = "bytes" in spec.objectives
    offered = offered_bits(runtime, layer, spec.target, spec.space.weight_bits, for_size=for_size)
    return {bits.of(DENSE).bits for bits in offered}


def _listed(bits: set[str]) -> str:
    return " and ".join(sorted(bits, key=lambda pair: [-int(count) for count in pair.split("/")])) or "none"


def selected(found: FoundLayers, spec: StudySpec) -> FoundLayers:
    """The found layers that the study's globs leave in. Raises StudyError for a glob that matches nothing."""
    names = [*found.all, *found.skipped]
    for glob in (*spec.space.only, *spec.space.skip):
        if not fnmatch.filter(names, glob):
            raise StudyError(f"the glob {glob!r} matches no layer; layers are {', '.join(found.all)}")
    reasons = {}
    for name in found.all:
        if spec.space.only and not any(fnmatch.fnmatch(name, glob) for glob in spec.space.only):
            reasons[name] = "not in Space.only"
        elif any(fnmatch.fnmatch(name, glob) for glob in spec.space.skip):
            reasons[name] = "in Space.skip"
    selected = found.without(reasons)
    if not selected.all:
        raise StudyError("Space.only and Space.skip leave no layer to compress")
    return selected
