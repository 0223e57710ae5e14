"""How far a student's outputs are from its teacher's."""

from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.layers import call_model, evaluating
from ranksearch.trees import is_classification, tensors

TEMPERATURE = 2.0
MAX_KEPT_BYTES = 1 << 28


@final
class Teacher:
    """The dense model's outputs; those of inputs that are `fixed`, held by their owner, are computed once.

    Kept until they fill a quarter of a gibibyte; batches beyond are computed anew.
    """

    def __init__(self, model: nn.Module, fixed: bool) -> None:
        self._model = model
        self._fixed = fixed
        self._kept: dict[int, Any] = {}
        self._n_bytes = 0

    def outputs(self, given: Any, inputs: Any) -> Any:
        """The outputs for `inputs`, which are what the data gave on the model's device."""
        if id(given) in self._kept:
            return self._kept[id(given)]
        with evaluating(self._model):
            outputs = call_model(self._model, inputs)
        size = sum(tensor.nbytes for tensor in tensors(outputs))
        if self._fixed and self._n_bytes + size <= MAX_KEPT_BYTES:
            self._kept[id(given)] = outputs
            self._n_bytes += size
        return outputs


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
