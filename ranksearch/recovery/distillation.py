"""How far a student's outputs are from its teacher's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ranksearch.trees import is_classification, tensors

TEMPERATURE = 2.0


def distillation_loss(outputs: Any, teacher_outputs: Any, loss: Any) -> Tensor:
    """How far the student is from its teacher: T^2 KL at temperature 2 for class logits (N, C, ...), else the mean
    squared difference over the variance of the teacher's outputs."""
    if is_classification(loss):
        logits, wanted = outputs.float() / TEMPERATURE, teacher_outputs.float() / TEMPERATURE
        divergence = F.kl_div(logits.log_softmax(1), wanted.log_softmax(1), reduction="none", log_target=True)
        return TEMPERATURE**2 * divergence.sum(1).mean()
    pairs = zip(tensors(outputs), tensors(teacher_outputs), strict=True)
    shares = [_share_of_variance(new, old) for new, old in pairs if new.requires_grad]
    return torch.stack(shares).mean()


def _share_of_variance(outputs: Tensor, wanted: Tensor) -> Tensor:
    spread = wanted - wanted.mean(0) if len(wanted) > 1 else wanted
    return (outputs - wanted).float().square().mean() / spread.float().square().mean().clamp_min(1e-12)
