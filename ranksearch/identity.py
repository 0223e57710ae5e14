"""What a study is made of, as hashes: what may not change when it is resumed."""

import functools
import inspect
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.cache import content_hash
from ranksearch.candidates import Profile
from ranksearch.decompositions import DECOMPOSITIONS
from ranksearch.plan import Plan
from ranksearch.recovery_settings import Recovery
from ranksearch.spec import CorpusScore
from ranksearch.trees import tensor_bytes, tensors
from ranksearch.workbench import Workbench

# What must be that of the study, for its plans' weights to be of this model and its scores to compare.
OF_THE_WEIGHTS = ("model", "data", "score")


def study_identity(bench: Workbench, profile: Profile) -> dict[str, str]:
    """Hashes of model, data, target, space, objectives, recovery, loss, score and candidate table, by their names."""
    return {**workbench_identity(bench), "candidate table": profile.hash()}


def workbench_identity(bench: Workbench) -> dict[str, str]:
    """The same without the candidate table: what a study script alone decides."""
    spec = bench.spec
    return {
        "model": content_hash(*_model_parts(bench.model)),
        "data": content_hash(*_data_parts(bench)),
        "target": content_hash(repr(spec.target)),
        "space": content_hash(repr(spec.space)),
        "objectives": ", ".join(spec.objectives),
        "recovery": _recovery_identity(spec.recovery),
        "loss": function_identity(spec.loss),
        "score": function_identity(spec.score),
    }


def _recovery_identity(recovery: Recovery) -> str:
    """A hash of its settings; functions of the user's by name and source, since their repr is an address."""
    functions = {f.name: value for f in fields(recovery) if callable(value := getattr(recovery, f.name))}
    settings = {f.name: repr(getattr(recovery, f.name)) for f in fields(recovery) if f.name not in functions}
    return content_hash(settings, {name: function_identity(value) for name, value in functions.items()})


def profile_identity(bench: Workbench, controls: Sequence[Plan]) -> str:
    """A hash of all that a candidate table is made from, the machine and this package's code included."""
    spec = bench.spec
    methods = [function_identity(DECOMPOSITIONS[name]) for name in spec.space.decompositions]
    calibration = [_tensor_hash(tensor) for batch in bench.calibration for tensor in tensors(batch)]
    return content_hash(
        *(file.read_bytes() for file in sorted(Path(__file__).parent.rglob("*.py"))),
        torch.__version__,
        bench.runtime.fingerprint(spec.target),
        repr(spec.target),
        repr(bench.model),
        [*_model_parts(bench.source), *calibration, *methods],
        [repr(spec.space), spec.objectives, function_identity(spec.loss), spec.seed],
        [plan.hash() for plan in controls],
    )


def function_identity(function: Any) -> str:
    """The function's name, and a hash of its source where there is one."""
    if isinstance(function, CorpusScore):
        reduced = "" if function.reduce is None else f" of {function_identity(function.reduce)}"
        return f"corpus {function_identity(function.function)}{reduced}"
    if isinstance(function, functools.partial):
        settings = {"args": repr(function.args), "keywords": repr(sorted(function.keywords.items()))}
        return f"partial {function_identity(function.func)} {content_hash(settings)[:12]}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        source = inspect.getsource(function if inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        return name
    return f"{name} {content_hash(source)[:12]}"


def _model_parts(model: nn.Module) -> list[str]:
    """Names and hashes of the model's parameters and buffers."""
    return [f"{name} {_tensor_hash(tensor)}" for name, tensor in model.state_dict().items()]


def _data_parts(bench: Workbench) -> list[str]:
    """The hashes of the validation data; calibration and train may shuffle and augment."""
    return [_tensor_hash(tensor) for batch in bench.data.validation for tensor in tensors(batch)]


def _tensor_hash(tensor: Tensor) -> str:
    return content_hash(str(tensor.dtype), list(tensor.shape), tensor_bytes(tensor))
