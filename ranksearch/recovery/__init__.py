"""Win back what compression cost: BatchNorm re-estimation and fine-tuning by distillation."""

from ranksearch.recovery.batchnorm import reestimate_batchnorm
from ranksearch.recovery.budget import count_steps
from ranksearch.recovery.fine_tuning import Step, diverged, fine_tune, recover

__all__ = ["Step", "count_steps", "diverged", "fine_tune", "recover", "reestimate_batchnorm"]
