"""Short fine-tuning: the task's loss and distillation from the dense model."""

import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ranksearch.errors import StudyError
from ranksearch.recovery.budget import Spending, count_steps, endless
from ranksearch.recovery.distillation import Teacher
from ranksearch.recovery.layer_outputs import LayerOutputs
from ranksearch.recovery.trainer import Trainer
from ranksearch.recovery.training_state import in_training, is_finite, seeded
from ranksearch.recovery_settings import Recovery
from ranksearch.spec import Batches
from ranksearch.surgery import copy_model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A step of training as it ends: its number from 1, the share of the budget that is spent, its loss."""

    number: int
    share: float
    loss: float


def recover(
    model: nn.Module, teacher: nn.Module, batches: Batches, loss: Any, recovery: Recovery, **options: Any
) -> list[float]:
    """Fine-tunes the model in place, by the study's own function where Recovery names one, and gives each step's loss.

    `options` are fine_tune's. Of a function of the study's own no losses are known. Raises StudyError where it leaves
    weights that are not finite.
    """
    if recovery.fine_tune is None:
        return fine_tune(model, teacher, batches, loss, recovery, **options)
    device = torch.device(recovery.device)
    with seeded(options["seed"], device), in_training(model, device):
        recovery.fine_tune(model, recovery.budget)
    if not is_finite(model):
        raise StudyError("the study's own fine_tune left weights that are not finite; lower its learning rate")
    return []


def fine_tune(
    model: nn.Module,
    teacher: nn.Module,
    batches: Batches,
    loss: Any,
    recovery: Recovery,
    *,
    seed: int,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[Step], None] = lambda _step: None,
    after_step: Callable[[float], None] = lambda _rate: None,
    autocast: bool | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> list[float]:
    """Trains the model in place towards its task and its teacher, and gives the loss of every step.

    Factors are balanced first, and the weight of a factored layer decays as a whole. Never leaves a weight that is
    not finite: where the loss or a gradient is not, or the loss grows without bound, the best weights so far come
    back, training stops, and the last loss is inf or nan (`diverged` tells). `should_stop` is asked before each step,
    `after_step` told the learning rate of each that was taken.
    `autocast` computes in bfloat16; unless told, where the device does so fast. Python's, numpy's and torch's global
    random numbers are set to `seed`, and afterwards are as before. Raises StudyError where there is nothing to train
    or nothing to train on.
    """
    n_steps = count_steps(batches, recovery)
    if n_steps == 0 or recovery.seconds == 0:
        return []
    device = torch.device(recovery.device)
    # A teacher that is the student itself, or lies on another device, is copied: the user's model is never changed.
    if teacher is model or any(p.device != device for p in teacher.parameters()):
        teacher = copy_model(teacher).to(device)
    # What layers give is held in memory: noted only where it is asked for.
    noted = LayerOutputs(model, teacher) if recovery.layer_outputs else nullcontext()
    with seeded(seed, device), in_training(model, device), noted as layers:
        # Layers give their outputs only where the teacher runs.
        fixed = _is_fixed(batches) and not recovery.layer_outputs
        trainer = Trainer(model, Teacher(teacher, fixed), loss, recovery, layers, after_step, autocast)
        spending = Spending(n_steps=n_steps, seconds=recovery.seconds, clock=clock, started=clock())
        losses: list[float] = []
        for inputs, targets in endless(batches):
            if should_stop():
                break
            losses.append(trainer.step(spending.share(len(losses)), inputs, targets))
            share = spending.share(len(losses))
            on_step(Step(number=len(losses), share=share, loss=losses[-1]))
            if share >= 1 or diverged(losses):
                break
        if not diverged(losses) and not is_finite(model):
            losses.append(math.inf)
        if diverged(losses):
            trainer.restore()
            logger.warning("fine-tuning diverged at step %d; the best weights came back", len(losses))
    return losses


def _is_fixed(batches: Batches) -> bool:
    """Whether every epoch gives the very same objects: a list of pairs holds them."""
    return isinstance(batches, list | tuple) and all(isinstance(batch, list | tuple) for batch in batches)


def diverged(losses: list[float]) -> bool:
    """Whether the fine-tuning that gave these losses ended early because a number was not finite."""
    return bool(losses) and not math.isfinite(losses[-1])
