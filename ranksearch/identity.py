"""What a study is made of, as hashes: what may not change when it is resumed."""

import inspect
from typing import Any

from ranksearch.cache import content_hash
from ranksearch.candidates import Profile
from ranksearch.spec import CorpusScore
from ranksearch.trees import tensors
from ranksearch.workbench import Workbench


def study_identity(bench: Workbench, profile: Profile) -> dict[str, str]:
    """Hashes of model, data, target, space, objectives, recovery, loss, score and candidate table, by their names."""
    spec = bench.spec
    return {
        "model": content_hash(*_model_parts(bench)),
        "data": content_hash(*_data_parts(bench)),
        "target": content_hash(repr(spec.target)),
        "space": content_hash(repr(spec.space)),
        "objectives": ", ".join(spec.objectives),
        "recovery": content_hash(repr(spec.recovery)),
        "loss": function_identity(spec.loss),
        "score": function_identity(spec.score),
        "candidate table": profile.hash(),
    }


def function_identity(function: Any) -> str:
    """The function's name, and a hash of its source where there is one."""
    if isinstance(function, CorpusScore):
        return f"corpus {function_identity(function.function)}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    try:
        source = inspect.getsource(function if callable(function) and inspect.isroutine(function) else type(function))
    except (OSError, TypeError):
        return name
    return f"{name} {content_hash(source)[:12]}"


def _model_parts(bench: Workbench) -> list[bytes]:
    """Names and bytes of the dense model's parameters and buffers."""
    parts = []
    for name, tensor in bench.model.state_dict().items():
        parts += [name.encode(), tensor.detach().cpu().contiguous().view(-1).numpy().tobytes()]
    return parts


def _data_parts(bench: Workbench) -> list[bytes]:
    """The bytes of the validation data; calibration and train may shuffle and augment."""
    return [
        tensor.detach().cpu().contiguous().numpy().tobytes()
        for inputs, targets in bench.data.validation
        for tensor in (*tensors(inputs), *tensors(targets))
    ]
