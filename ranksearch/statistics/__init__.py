"""Statistics of a model's layers on calibration data: what factors are fitted to, and what predicts their loss."""

from ranksearch.statistics.calibration import collect
from ranksearch.statistics.checks import check_complete, check_statistics
from ranksearch.statistics.storing import from_tensors, to_tensors
from ranksearch.statistics.values import LayerStatistics, mean_change, predicted_loss

__all__ = [
    "LayerStatistics",
    "check_complete",
    "check_statistics",
    "collect",
    "from_tensors",
    "mean_change",
    "predicted_loss",
    "to_tensors",
]
