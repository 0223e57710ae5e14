"""Short fine-tuning: half the task's loss, half distillation from the dense model."""

import copy
import logging
import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import call_model, evaluating
from ranksearch.recovery.batchnorm import batchnorms
from ranksearch.recovery.budget import count_steps, one_cycle, repeated
from ranksearch.recovery.distillation import distillation_loss
from ranksearch.spec import Batches, Recovery
from ranksearch.trees import count_rows, map_tensors

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4
MAX_GRADIENT_NORM = 5.0
# A smoothed loss that has grown this many times over the first one will not come back in a short budget.
DIVERGED = 10.0
N_SNAPSHOTS = 10

logger = logging.getLogger(__name__)


def fine_tune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    loss: Any,
    recovery: Recovery,
    *,
    seed: int,
    should_stop: Callable[[], bool] | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
    autocast: bool = False,
) -> list[float]:
    """Trains the model in place towards its task and its teacher, and gives the loss of every step.

    Never leaves a weight that is not finite: where the loss or a gradient is not, or the loss grows without bound,
    the best weights so far come back, training stops, and the last loss is inf or nan (`diverged` tells).
    `on_step` is given (step, number of steps, loss). `should_stop` is asked before each step. `autocast` computes in
    bfloat16. Python's, numpy's and torch's global random numbers are set to `seed`, and afterwards are as before.
    Raises StudyError where there is nothing to train or nothing to train on.
    """
    n_steps = count_steps(batches, recovery)
    if n_steps == 0:
        return []
    device = torch.device(recovery.device)
    home = next(model.parameters()).device
    # A teacher that is the student itself, or lies on another device, is copied: the user's model is never changed.
    if teacher is model or any(p.device != device for p in teacher.parameters()):
        teacher = copy.deepcopy(teacher).to(device)
    with seeded(seed, device), _training(model, device, home):
        trainer = _Trainer(model, teacher, loss, n_steps, recovery, autocast)
        losses: list[float] = []
        for inputs, targets in repeated(batches, n_steps):
            if should_stop is not None and should_stop():
                break
            losses.append(trainer.step(len(losses), inputs, targets))
            if on_step is not None:
                on_step(len(losses), n_steps, losses[-1])
            if diverged(losses):
                break
        if not diverged(losses) and not _is_finite(model):
            losses.append(math.inf)
        if diverged(losses):
            trainer.restore()
            logger.warning("fine-tuning diverged at step %d of %d; the best weights came back", len(losses), n_steps)
    return losses


def diverged(losses: list[float]) -> bool:
    """Whether the fine-tuning that gave these losses ended early because a number was not finite."""
    return bool(losses) and not math.isfinite(losses[-1])


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Global random numbers from `seed`; afterwards they go on as if nothing had been drawn."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002 - users' data may draw from it
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


class _Trainer:
    """The optimiser and the best weights so far; mutable, and gone when `fine_tune` returns."""

    def __init__(
        self, model: nn.Module, teacher: nn.Module, loss: Any, n_steps: int, recovery: Recovery, autocast: bool
    ) -> None:
        self.model, self.teacher, self.loss = model, teacher, loss
        self.n_steps, self.recovery, self.autocast = n_steps, recovery, autocast
        self.norms = batchnorms(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise StudyError(f"{type(model).__name__} has no parameter that requires a gradient; nothing to fine-tune")
        self.optimizer = torch.optim.SGD(_groups(self.parameters), lr=1.0, momentum=MOMENTUM, nesterov=True)
        self.channels_last = _is_convolutional(model)
        self.best_loss, self.best = math.inf, _snapshot(model)
        self.recent: list[float] = []
        self.first = math.inf

    def step(self, step: int, inputs: Any, targets: Any) -> float:
        """The loss of one step; inf or nan where the step was not taken."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.recovery.learning_rate * one_cycle(step, self.n_steps)
        for norm in self.norms:
            norm.train(count_rows(inputs) > 1)  # one example has no variance
        self.optimizer.zero_grad(set_to_none=True)
        total = self._loss(self._placed(inputs), map_tensors(targets, lambda t: t.to(self.recovery.device)))
        value = float(total.detach())
        if not math.isfinite(value):
            return value
        total.backward()  # type: ignore[no-untyped-call]
        norm_of_gradient = float(nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM))
        if not math.isfinite(norm_of_gradient):
            return math.inf
        self._remember(value)
        if self._is_diverging():
            return math.inf
        self.optimizer.step()
        return value

    def restore(self) -> None:
        """Puts the best weights back, in place."""
        self.model.load_state_dict(self.best)

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        device_type = torch.device(self.recovery.device).type
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=self.autocast):
            with evaluating(self.teacher):
                wanted = call_model(self.teacher, inputs)
            outputs = call_model(self.model, inputs)
        total: Tensor = 0.5 * self.loss(outputs, targets) + 0.5 * distillation_loss(outputs, wanted, self.loss)
        return total

    def _placed(self, inputs: Any) -> Any:
        def place(tensor: Tensor) -> Tensor:
            tensor = tensor.to(self.recovery.device)
            images = self.channels_last and tensor.dim() == 4
            return tensor.contiguous(memory_format=torch.channels_last) if images else tensor

        return map_tensors(inputs, place)

    def _remember(self, value: float) -> None:
        """Keeps the weights, before they change, whenever the mean loss of the last steps is the lowest so far."""
        self.recent.append(value)
        interval = max(1, self.n_steps // N_SNAPSHOTS)
        if len(self.recent) % interval:
            return
        mean = sum(self.recent[-interval:]) / interval
        if mean < self.best_loss and _is_finite(self.model):
            self.best_loss, self.best = mean, _snapshot(self.model)

    def _is_diverging(self) -> bool:
        window = 5
        if len(self.recent) < 2 * window:
            return False
        first, last = (sum(part) / window for part in (self.recent[:window], self.recent[-window:]))
        return last > DIVERGED * max(first, 1.0)


@contextmanager
def _training(model: nn.Module, device: torch.device, home: torch.device) -> Iterator[None]:
    """The model in train mode on `device`; its modes, device and memory format come back."""
    modes = {module: module.training for module in model.modules()}
    convolutional = _is_convolutional(model)
    model.train().to(device)
    if convolutional:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    try:
        yield
    finally:
        model.to(home)
        if convolutional:
            # safetensors writes contiguous tensors only.
            model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        model.zero_grad(set_to_none=True)
        for module, training in modes.items():
            module.training = training


def _groups(parameters: list[nn.Parameter]) -> list[dict[str, Any]]:
    """Weights decay, biases and BatchNorm's scales do not."""
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def _is_convolutional(model: nn.Module) -> bool:
    """Whether channels-last suits the model; torch refuses it to weights of five dimensions."""
    dimensions = {p.dim() for p in model.parameters()}
    return 4 in dimensions and 5 not in dimensions


def _snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _is_finite(model: nn.Module) -> bool:
    state = [t for t in model.state_dict().values() if t.is_floating_point()]
    return all(bool(t.isfinite().all()) for t in state)
