"""What calibration tells of a layer, and the loss that it predicts."""

from dataclasses import dataclass

from torch import Tensor

from ranksearch.errors import StudyError


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerStatistics:
    """What calibration tells of one layer, with D inputs per output and T outputs.

    `input_covariance` (D, D) and `input_mean` (D,), float64: the centred second moment of the input patches, summed
    over positions and averaged over examples, and their mean per position; None for grouped convolutions.
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
    example; else 1/2 tr(G_out D G_in D^T), which takes the mean as absorbed. `mean_absorbed`: the bias is corrected
    by D times the mean input. Raises StudyError where the statistics hold neither form.
    """
    rows = difference.detach().flatten(1)
    if statistics.weight_gradients is not None:
        changes = statistics.weight_gradients.flatten(1) @ rows.float().flatten()
        if mean_absorbed and statistics.bias_gradients is not None and statistics.input_mean is not None:
            changes -= statistics.bias_gradients @ (rows.double() @ statistics.input_mean).float()
        return 0.5 * float(changes.double().square().mean())
    outer, inner = statistics.output_gradient_covariance, statistics.input_covariance
    if outer is None or inner is None:
        raise StudyError("no loss can be predicted without gradients: collect the statistics with a loss")
    rows = rows.double()
    return 0.5 * float(((outer @ rows) * (rows @ inner)).sum())
