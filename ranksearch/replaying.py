"""A model that runs again and again on the same inputs, one layer changed: what runs before the layer is replayed."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from ranksearch.layers import call_model, evaluating
from ranksearch.surgery import replace_modules
from ranksearch.trees import map_tensors, tensors

# What is kept of a model's inside, for all batches together.
MAX_BYTES = 1 << 29
# Relative to the largest output; replayed and computed numbers are the same but for the order of sums.
TOLERANCE = 1e-5


@dataclass(kw_only=True, slots=True)
class _Pass:
    """One pass of the model: when each module began and ended, and what those gave that ran once."""

    begun: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)

    def before(self, name: str) -> dict[str, Any]:
        """What the outermost modules gave that had ended when the module of this name began."""
        start = self.begun.get(name, 0)
        over = {other for other in self.given if self.ended[other] < start}
        return {other: self.given[other] for other in over if not any(parent in over for parent in _parents(other))}


@final
class Replay:
    """A model on some batches; `outputs` are its own, batch by batch.

    Of its modules' outputs so many are kept as `max_bytes` hold; none where replaying them gives other outputs, as of
    a model whose modules hand on more than they return.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], max_bytes: int = MAX_BYTES) -> None:
        self._model, self._batches = model, batches
        self._passes: list[_Pass] = []
        self.outputs: list[Any] = []
        for inputs in batches:
            recorded, output = _record(model, inputs, max_bytes // len(batches))
            self._passes.append(recorded)
            self.outputs.append(output)
        if not self._is_faithful():
            self._passes = [_Pass(begun=recorded.begun) for recorded in self._passes]

    def outputs_with(self, name: str, module: nn.Module) -> list[Any]:
        """The model's outputs with `module` in the place of the one of this name; the model is itself again after."""
        with evaluating(self._model), _in_place_of(self._model, name, module):
            return [
                self._run(inputs, recorded.before(name))
                for inputs, recorded in zip(self._batches, self._passes, strict=True)
            ]

    def _run(self, inputs: Any, given: dict[str, Any]) -> Any:
        with ExitStack() as stack:
            for name, output in given.items():
                stack.enter_context(_giving(self._model.get_submodule(name), output))
            return call_model(self._model, inputs)

    def _is_faithful(self) -> bool:
        with evaluating(self._model):
            for inputs, recorded, wanted in zip(self._batches, self._passes, self.outputs, strict=True):
                if not recorded.given:
                    continue
                try:
                    found = self._run(inputs, recorded.before(max(recorded.begun, key=recorded.begun.__getitem__)))
                except Exception:  # whatever a model's own code raises
                    return False
                pairs = list(zip(tensors(found), tensors(wanted), strict=True))
                if not all(one.shape == other.shape and _are_near(one, other) for one, other in pairs):
                    return False
        return True


def _record(model: nn.Module, inputs: Any, max_bytes: int) -> tuple[_Pass, Any]:
    """A pass and the model's outputs; modules that run several times, or give more than tensors, are not kept."""
    recorded, n_calls, clock, left = _Pass(), Counter[str](), 0, max_bytes

    def begin(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any) -> None:
            nonlocal clock
            clock += 1
            recorded.begun.setdefault(name, clock)
            n_calls[name] += 1

        return hook

    def end(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            nonlocal clock, left
            clock += 1
            recorded.ended[name] = clock
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(output))
            if n_calls[name] == 1 and _is_plain(output) and size <= left:
                left -= size
                # What is done to it in place later is none of it.
                recorded.given[name] = map_tensors(output, torch.clone)

        return hook

    with ExitStack() as stack, evaluating(model):
        for name, module in model.named_modules():
            if name:
                stack.callback(module.register_forward_pre_hook(begin(name)).remove)
                stack.callback(module.register_forward_hook(end(name)).remove)
        output = call_model(model, inputs)
    for name, count in n_calls.items():
        if count > 1:
            recorded.given.pop(name, None)
    return recorded, output


@contextmanager
def _in_place_of(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    original = model.get_submodule(name)
    replace_modules(model, {name: module})
    try:
        yield
    finally:
        replace_modules(model, {name: original})


@contextmanager
def _giving(module: nn.Module, output: Any) -> Iterator[None]:
    """While open, the module gives a copy of this and computes nothing."""
    own = vars(module).get("forward")
    module.forward = lambda *_arguments, **_named: map_tensors(output, torch.clone)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def _is_plain(output: Any) -> bool:
    parts = output if isinstance(output, tuple) else (output,)
    return all(part is None or isinstance(part, Tensor) for part in parts)


def _are_near(found: Tensor, wanted: Tensor) -> bool:
    if not found.numel():
        return True
    difference, scale = (found - wanted).abs().max(), wanted.abs().max()
    return bool(difference <= TOLERANCE * scale)


def _parents(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
