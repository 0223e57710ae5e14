"""Win back what compression cost: BatchNorm re-estimation and short fine-tuning by distillation."""

from ranksearch.recovery.batchnorm import reestimate_batchnorm
from ranksearch.recovery.budget import count_steps
from ranksearch.recovery.fine_tuning import diverged, fine_tune

__all__ = ["count_steps", "diverged", "fine_tune", "reestimate_batchnorm"]
