"""What plans are cut from: the dense model, or it as Recovery.prepare makes it, once for all studies alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ranksearch.cache import Cache, cache_directory, content_hash
from ranksearch.recovery import Step, prepare_dense
from ranksearch.spec import Data, StudySpec
from ranksearch.surgery import copy_model
from ranksearch.trees import tensor_bytes, tensors

MAX_BYTES = 4 << 30
# Settings of the recovery that make no difference to the preparation.
OTHERS = ("epochs", "steps", "seconds", "fine_tune")


def prepare_source(
    spec: StudySpec,
    model: nn.Module,
    data: Data,
    calibration: Sequence[tuple[Any, Any]],
    names: Sequence[str],
    on_step: Callable[[Step], None],
) -> nn.Module:
    """The model itself, or a copy that was trained to lower ranks; the weights of that are kept in the cache.

    They are found again by model, calibration data, settings and seed.
    """
    recovery, decompositions = spec.recovery, spec.space.decompositions
    if recovery.prepare is None:
        return model
    cache = Cache(directory=cache_directory() / "prepared", max_bytes=MAX_BYTES)
    held = [*model.state_dict().values(), *(tensor for batch in calibration for tensor in tensors(batch))]
    used = [field.name for field in fields(recovery) if field.name not in OTHERS]
    settings = {name: repr(getattr(recovery, name)) for name in used}
    key = content_hash(
        torch.__version__, repr(model), settings, spec.seed, list(names), list(decompositions), *map(tensor_bytes, held)
    )
    kept = cache.get(key)
    if kept is not None and (known := _filled(model, kept)) is not None:
        return known
    prepared = prepare_dense(
        model, data.recovery, spec.loss, recovery, names, decompositions, seed=spec.seed, on_step=on_step
    )
    cache.put(key, safetensors.torch.save(weights_of(prepared)))
    return prepared


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """The model's tensors, those that share memory once for each name, as they can be written."""
    return {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in model.state_dict().items()}


def with_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the model with these weights."""
    copied = copy_model(model)
    copied.load_state_dict(weights)
    return copied


def _filled(model: nn.Module, kept: bytes) -> nn.Module | None:
    """A copy of the model with the weights that were kept; None where they are damaged."""
    try:
        return with_weights(model, safetensors.torch.load(kept))
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        return None
