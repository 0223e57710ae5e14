"""What calibration tells of a layer, and the loss that it predicts."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ranksearch.errors import StudyError


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """What calibration tells of one layer, with D inputs per output and T outputs.

    `input_covariance` (D, D) and `input_mean` (D,), float64: the centred second moment of the input patches, summed
    over positions and averaged over examples, and their mean per position; for a convolution in groups one of each
    per group, (groups, D, D) and (groups, D).
    `output_gradient_covariance` (T, T), float64: the mean over examples and positions of g g^T.
    `weight_gradients` (N, T, D) and `bias_gradients` (N, T), float32: dL_n/dW and dL_n/db of each example; None
    where they do not fit the memory. All gradients are None where no loss was given.
    """

    input_covariance: Tensor | None = None
    input_mean: Tensor | None = None
    output_gradient_covariance: Tensor | None = None
    weight_gradients: Tensor | None = None
    bias_gradients: Tensor | None = None


def predicted_loss(statistics: LayerStatistics, difference: Tensor, *, mean_absorbed: bool = False) -> float:
    """What it costs to change the layer's weight by `difference` (of the weight's shape), to second order.

    In nats of KL(dense || changed) for class logits, else in shares of the dense outputs' variance, as
    scoring.output_distance measures it. The exact form, 1/2 mean_n <D, dL_n/dW>^2, where there are gradients per
    example; else 1/2 tr(G_out D G_in D^T), which takes the mean as absorbed, and groups as independent of each
    other. `mean_absorbed`: the bias is corrected by D times the mean input. Raises StudyError where the statistics
    hold neither form.
    """
    rows = difference.detach().flatten(1)
    if statistics.weight_gradients is not None:
        changes = statistics.weight_gradients.flatten(1) @ rows.float().flatten()
        if mean_absorbed and statistics.bias_gradients is not None and statistics.input_mean is not None:
            changes -= statistics.bias_gradients @ mean_change(rows, statistics.input_mean).float()
        return 0.5 * float(changes.double().square().mean())
    outer, inner = statistics.output_gradient_covariance, statistics.input_covariance
    if outer is None or inner is None:
        raise StudyError("no loss can be predicted without gradients: collect the statistics with a loss")
    n_inputs = rows.shape[1]
    inner = inner.reshape(-1, n_inputs, n_inputs)
    n_groups, n_outputs = len(inner), len(rows) // len(inner)
    changed = rows.double().reshape(n_groups, n_outputs, n_inputs)
    blocks = outer.reshape(n_groups, n_outputs, n_groups, n_outputs).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return 0.5 * float(((blocks @ changed) * (changed @ inner)).sum())


def mean_change(difference: Tensor, input_mean: Tensor) -> Tensor:
    """How much each output's mean (T,), float64, changes with the weight's `difference`, of the weight's shape."""
    n_inputs = input_mean.shape[-1]
    means = input_mean.reshape(-1, n_inputs, 1)
    changed = difference.detach().double().reshape(len(means), -1, n_inputs)
    return torch.bmm(changed, means.to(changed)).flatten()
