"""One step of training after the other: the loss of task and teacher, the optimiser, the best weights so far."""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import call_model
from ranksearch.memory_format import channels_last, in_order, outputs_of_two_rows, takes_channels_last
from ranksearch.recovery.batchnorm import batchnorms
from ranksearch.recovery.budget import SCHEDULES
from ranksearch.recovery.distillation import Teacher, distillation_loss
from ranksearch.recovery.factors import ProductDecay
from ranksearch.recovery.layer_outputs import LayerOutputs
from ranksearch.recovery.training_state import bfloat16_is_fast, is_finite, snapshot
from ranksearch.recovery_settings import Recovery
from ranksearch.trees import count_rows, map_tensors

MOMENTUM = 0.9
MAX_GRADIENT_NORM = 5.0
# A smoothed loss that has grown this many times over the first one will not come back in a short budget.
DIVERGED = 10.0
N_SNAPSHOTS = 10

Groups = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Optimizer:
    """How an optimiser is made, and whether it decays weights apart from their gradients."""

    make: Callable[[Groups], torch.optim.Optimizer]
    decays_apart: bool


OPTIMIZERS: Mapping[str, Optimizer] = {
    "sgd": Optimizer(
        make=lambda groups: torch.optim.SGD(groups, lr=1.0, momentum=MOMENTUM, nesterov=True), decays_apart=False
    ),
    "adamw": Optimizer(make=lambda groups: torch.optim.AdamW(groups, lr=1.0), decays_apart=True),
}


class Trainer:
    """The optimiser and the best weights so far; mutable, and gone when `fine_tune` returns."""

    def __init__(
        self,
        model: nn.Module,
        teacher: Teacher,
        loss: Any,
        recovery: Recovery,
        layers: LayerOutputs | None,
        after_step: Callable[[float], None],
        autocast: bool | None,
    ) -> None:
        self.model, self.teacher, self.loss, self.recovery, self.layers = model, teacher, loss, recovery, layers
        self.after_step = after_step
        self.autocast = bfloat16_is_fast(torch.device(recovery.device)) if autocast is None else autocast
        self.norms = batchnorms(model)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        if not self.parameters:
            raise StudyError(f"{type(model).__name__} has no parameter that requires a gradient; nothing to fine-tune")
        self.decay = ProductDecay(model, recovery.weight_decay)
        chosen = OPTIMIZERS[recovery.optimizer]
        self.decays_apart = chosen.decays_apart
        self.optimizer = chosen.make(_groups(self.parameters, self.decay, recovery.weight_decay))
        # Until the first batch tells.
        self.channels_last: bool | None = None
        self.best_loss, self.best = math.inf, snapshot(model)
        self.losses: list[float] = []
        self.n_judged, self.n_snapshots = 0, 0

    def step(self, share: float, inputs: Any, targets: Any) -> float:
        """The loss of one step, `share` of the budget being spent; inf or nan where the step was not taken."""
        rate = self.recovery.learning_rate * SCHEDULES[self.recovery.schedule](share)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for norm in self.norms:
            norm.train(count_rows(inputs) > 1)  # one example has no variance
        self.optimizer.zero_grad(set_to_none=True)
        total = self._loss(inputs, map_tensors(targets, lambda t: t.to(self.recovery.device)))
        value = float(total.detach())
        if not math.isfinite(value):
            return value
        total.backward()  # type: ignore[no-untyped-call]
        norm_of_gradient = float(nn.utils.clip_grad_norm_(self.parameters, MAX_GRADIENT_NORM))
        if not math.isfinite(norm_of_gradient):
            return math.inf
        self._remember(value, share)
        if self._is_diverging():
            return math.inf
        self.decay.apply(rate if self.decays_apart else None)
        self.optimizer.step()
        self.after_step(rate)
        return value

    def restore(self) -> None:
        """Puts the best weights back, in place."""
        self.model.load_state_dict(self.best)

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        recovery = self.recovery
        outputs, wanted = map(_plain, self._arranged(inputs))
        distil = recovery.distillation_loss or functools.partial(distillation_loss, loss=self.loss)
        total: Tensor = (1 - recovery.distillation) * self.loss(outputs, targets)
        if recovery.distillation:
            total = total + recovery.distillation * distil(_main(outputs, wanted), wanted)
        return total if self.layers is None else total + recovery.layer_outputs * self.layers.distance()

    def _arranged(self, inputs: Any) -> tuple[Any, Any]:
        """The outputs with channels last, unless the first batch did not go through so."""
        if self.channels_last is None:
            self.channels_last = takes_channels_last(self.model, functools.partial(self._tried, inputs))
            try:
                self._forget()
                return self._outputs(inputs, self.channels_last)
            except Exception:
                # In train mode a model may do what it does not in eval mode.
                if not self.channels_last:
                    raise
                self._forget()
                self.channels_last = False
                in_order(self.model)
        return self._outputs(inputs, self.channels_last)

    def _tried(self, inputs: Any, is_channels_last: bool) -> Any:
        placed = map_tensors(inputs, lambda t: t.to(self.recovery.device))
        return outputs_of_two_rows(self.model, channels_last(placed) if is_channels_last else placed)

    def _forget(self) -> None:
        """What layers gave in a call that counts for nothing."""
        if self.layers is not None:
            self.layers.outputs.clear()

    def _outputs(self, given: Any, is_channels_last: bool) -> tuple[Any, Any]:
        """The model's and, where it is asked, the teacher's."""
        inputs = map_tensors(given, lambda t: t.to(self.recovery.device))
        if is_channels_last:
            inputs = channels_last(inputs)
        device_type = torch.device(self.recovery.device).type
        with torch.autocast(device_type, dtype=torch.bfloat16, enabled=self.autocast):
            is_taught = self.recovery.distillation > 0 or self.layers is not None
            wanted = self.teacher.outputs(given, inputs) if is_taught else None
            return call_model(self.model, inputs), wanted

    def _remember(self, value: float, share: float) -> None:
        """Keeps the weights, before they change, whenever the mean loss since the last look is the lowest so far."""
        self.losses.append(value)
        if share * N_SNAPSHOTS < self.n_snapshots + 1:
            return
        since = self.losses[self.n_judged :]
        self.n_judged, self.n_snapshots = len(self.losses), int(share * N_SNAPSHOTS)
        mean = sum(since) / len(since)
        if mean < self.best_loss and is_finite(self.model):
            self.best_loss, self.best = mean, snapshot(self.model)

    def _is_diverging(self) -> bool:
        window = 5
        if len(self.losses) < 2 * window:
            return False
        first, last = (sum(part) / window for part in (self.losses[:window], self.losses[-window:]))
        return last > DIVERGED * max(first, 1.0)


def _groups(parameters: list[nn.Parameter], decay: ProductDecay, weight_decay: float) -> Groups:
    """Weights decay, factors in a way of their own, biases and BatchNorm's scales do not."""
    decaying = {id(p) for p in parameters if p.dim() >= 2 and p not in decay}
    return [
        {"params": [p for p in parameters if id(p) in decaying], "weight_decay": weight_decay},
        {"params": [p for p in parameters if id(p) not in decaying], "weight_decay": 0.0},
    ]


def _main(outputs: Any, wanted: Any) -> Any:
    """Of a model that in training gives auxiliary outputs too the one that its teacher gives: the first."""
    if isinstance(wanted, Tensor) and isinstance(outputs, tuple | list) and outputs:
        first = outputs[0]
        if isinstance(first, Tensor) and first.shape == wanted.shape:
            return first
    return outputs


def _plain(outputs: Any) -> Any:
    """Outputs as losses know them, in float32 and in order; of structures that are the user's own, as they are."""
    if type(outputs) not in (Tensor, tuple, list, dict):
        return outputs
    return map_tensors(outputs, lambda t: t.float().contiguous() if t.is_floating_point() else t)
