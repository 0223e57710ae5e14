"""Win back what compression cost, by BatchNorm re-estimation and fine-tuning; prepare what is to be compressed."""

from ranksearch.recovery.batchnorm import reestimate_batchnorm
from ranksearch.recovery.budget import count_steps
from ranksearch.recovery.fine_tuning import Step, diverged, fine_tune, recover
from ranksearch.recovery.nuclear_norm import prepare_dense
from ranksearch.recovery.training_state import seeded

__all__ = ["Step", "count_steps", "diverged", "fine_tune", "prepare_dense", "recover", "reestimate_batchnorm", "seeded"]
