"""How plans are trained, as a study script says it: values only."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, get_args

from ranksearch.errors import StudyError

OptimizerName = Literal["sgd", "adamw"]
ScheduleName = Literal["one_cycle", "cosine"]
ShrinkageForm = Literal["proximal", "subgradient"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """How long to train: in `steps` or `epochs`, and no longer than `seconds`; None bounds nothing."""

    epochs: float | None
    steps: int | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class NuclearNorm:
    """Low-rank regularisation: the weight of the layers' nuclear norms, in a training of so many steps.

    Every `interval` steps singular values shrink: in the form `proximal` all alike, in `subgradient` the large ones.
    """

    weight: float = 0.01
    steps: int = 2000
    interval: int = 20
    form: ShrinkageForm = "proximal"

    def __post_init__(self) -> None:
        if self.weight <= 0 or self.steps < 1 or self.interval < 1 or self.form not in get_args(ShrinkageForm):
            raise StudyError(
                f"{self}: weight, steps and interval must be positive, and form one of "
                f"{', '.join(get_args(ShrinkageForm))}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recovery:
    """The short fine-tuning of every trial, on `device`.

    The budget is in `epochs` or in `steps` (which wins), and ends after `seconds` where given; one epoch unless told.
    The loss is the task's and, of it, the share `distillation` towards the dense model's outputs, by
    `distillation_loss` (outputs, dense outputs) or what suits the task's loss; `layer_outputs` weighs how far the
    outputs of compressed layers are from dense's. `weight_decay` is on the product of a layer's factors.
    `optimizer` is sgd or adamw, `schedule` one_cycle or cosine. `fine_tune` (model, budget) trains instead, in place.
    `prepare` trains the dense model once, before anything is cut from it; dense stays what plans are compared with. In
    several `stages` a plan is cut in as many steps, an equal share of the budget after each.
    """

    epochs: float | None = None
    steps: int | None = None
    seconds: float | None = None
    learning_rate: float = 0.02
    optimizer: OptimizerName = "sgd"
    schedule: ScheduleName = "one_cycle"
    weight_decay: float = 1e-4
    distillation: float = 0.5
    distillation_loss: Callable[[Any, Any], Any] | None = None
    layer_outputs: float = 0.0
    device: str = "cpu"
    fine_tune: Callable[[Any, Budget], Any] | None = None
    prepare: NuclearNorm | None = None
    stages: int = 1

    def __post_init__(self) -> None:
        if self.epochs is None and self.steps is None and self.seconds is None:
            object.__setattr__(self, "epochs", 1.0)
        wrong = [
            f"{name}={value!r} must {demand}"
            for name, value, holds, demand in (
                *((n, v, v is None or v >= 0, "not be negative") for n, v in self._amounts().items()),
                ("learning_rate", self.learning_rate, self.learning_rate > 0, "be positive"),
                ("distillation", self.distillation, 0 <= self.distillation <= 1, "be a share from 0 to 1"),
                ("stages", self.stages, self.stages >= 1, "be at least 1"),
                ("optimizer", self.optimizer, self.optimizer in get_args(OptimizerName), "be sgd or adamw"),
                ("schedule", self.schedule, self.schedule in get_args(ScheduleName), "be one_cycle or cosine"),
            )
            if not holds
        ]
        if wrong:
            raise StudyError(f"Recovery: {'; '.join(wrong)}")

    def _amounts(self) -> dict[str, float | None]:
        names = "epochs", "steps", "seconds", "weight_decay", "layer_outputs"
        return {name: getattr(self, name) for name in names}

    def part(self, share: float) -> Self:
        """The same for a share of the budget; steps are whole, and at least one."""
        steps = None if self.steps is None else max(1, round(share * self.steps)) if self.steps else 0
        epochs, seconds = (None if amount is None else share * amount for amount in (self.epochs, self.seconds))
        return replace(self, steps=steps, epochs=epochs, seconds=seconds)

    @property
    def budget(self) -> Budget:
        """How long to train."""
        return Budget(epochs=self.epochs, steps=self.steps, seconds=self.seconds)
