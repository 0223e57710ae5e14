"""Estimate BatchNorm's running statistics anew: compressed layers give other means and variances."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ranksearch.layers import call_model, evaluating
from ranksearch.recovery.training_state import seeded
from ranksearch.scoring import output_distance
from ranksearch.spec import Batches
from ranksearch.trees import count_rows, first_examples


def reestimate_batchnorm(
    model: nn.Module,
    batches: Batches,
    dense: nn.Module,
    held_out: Batches,
    loss: Any,
    *,
    n_examples: int = 2048,
    n_held_out: int = 512,
    seed: int = 0,
) -> bool:
    """Re-estimates BatchNorm's means and variances in place on the first `n_examples`; True where that was kept.

    The old ones come back unless the new bring the outputs nearer to the dense ones on the first `n_held_out`
    examples of `held_out`. `batches` may shuffle and augment, by global random numbers, which `seed` sets.
    """
    norms = batchnorms(model)
    if not norms:
        return False
    inputs = list(first_examples(held_out, n_held_out))
    wanted = _outputs(dense, inputs)
    before = _distance(_outputs(model, inputs), wanted, loss)
    old = [{name: buffer.clone() for name, buffer in norm.named_buffers()} for norm in norms]
    with seeded(seed, torch.device("cpu")):
        _estimate(model, norms, batches, n_examples)
    if _distance(_outputs(model, inputs), wanted, loss) < before:
        return True
    for norm, buffers in zip(norms, old, strict=True):
        for name, buffer in norm.named_buffers():
            buffer.copy_(buffers[name])
    return False


def batchnorms(model: nn.Module) -> list[_BatchNorm]:
    """The BatchNorm layers that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]


def _estimate(model: nn.Module, norms: list[_BatchNorm], batches: Batches, n_examples: int) -> None:
    """Averages the statistics of batches; everything but BatchNorm stays in eval mode, dropout for one."""
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's word for the plain average over batches
            norm.train()
        try:
            for inputs in first_examples(batches, n_examples):
                if count_rows(inputs) > 1:  # one example has no variance
                    call_model(model, inputs)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def _outputs(model: nn.Module, inputs: list[Any]) -> list[Any]:
    with evaluating(model):
        return [call_model(model, batch) for batch in inputs]


def _distance(outputs: list[Any], wanted: list[Any], loss: Any) -> float:
    """The mean over batches, weighted by their examples."""
    sizes = [count_rows(batch) for batch in wanted]
    distances = [output_distance(new, old, loss) for new, old in zip(outputs, wanted, strict=True)]
    weighted = torch.tensor(distances, dtype=torch.float64) * torch.tensor(sizes)
    total: Tensor = weighted.sum() / max(sum(sizes), 1)
    return float(total)
