"""Statistics of a model's layers on calibration data: what factors are fitted to, and what predicts their loss."""

from ranksearch.statistics.calibration import collect
from ranksearch.statistics.values import LayerStatistics, predicted_loss

__all__ = ["LayerStatistics", "collect", "predicted_loss"]
