"""Ranges of activation quantizers, from one pass over data."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import call_model, evaluating
from ranksearch.quantization.formats import Counts, best_range
from ranksearch.quantization.modules import activation_quantizers

N_BINS = 4096
MAX_COUNTED = 1 << 17


class RunningHistogram:
    """Counts of values in equal bins over -reach..reach; the reach doubles as larger values come.

    Of a large tensor a regular part is counted; `low` and `high` are those of all values.
    """

    def __init__(self) -> None:
        self.counts: Counts = np.zeros(N_BINS)
        self.reach = 0.0
        self.low = float("inf")
        self.high = float("-inf")

    def add(self, values: Tensor) -> None:
        """Counts the values of a tensor. Raises StudyError where one is not finite."""
        values = values.detach().float()
        low, high = (float(end) for end in torch.aminmax(values))
        if not np.isfinite(low) or not np.isfinite(high):
            raise StudyError("the activations are not finite (NaN or infinity)")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(-low, high))
        # An odd stride meets every channel, row and column of a large tensor.
        stride = (values.numel() // MAX_COUNTED) | 1
        counts = torch.histc(values.flatten()[::stride], N_BINS, -self.reach, self.reach)
        self.counts += counts.double().cpu().numpy()

    @property
    def centres(self) -> Counts:
        """The middle of each bin."""
        width = 2 * self.reach / N_BINS
        return np.asarray((np.arange(N_BINS) + 0.5) * width - self.reach, dtype=np.float64)

    def _widen(self, largest: float) -> None:
        if self.reach == 0.0:
            self.reach = largest or 1.0
        while largest > self.reach:
            # Pairs of bins merge exactly when the reach doubles, so no count is ever spread by guess.
            middle = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.pad(middle, N_BINS // 4)
            self.reach *= 2


def observe_ranges(
    model: nn.Module, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any] = call_model
) -> dict[str, tuple[float, float]]:
    """Sets every activation quantizer's range from one pass of `call(model, batch)` (in place), and gives them.

    Ranges have the least squared rounding error. Nothing is rounded at the inputs while observing. Raises
    StudyError, naming the quantizer, where it never ran or saw a value that is not finite.
    """
    quantizers = activation_quantizers(model)
    histograms = {name: RunningHistogram() for name in quantizers}
    try:
        for name, quantizer in quantizers.items():
            quantizer.observe = _named(name, histograms[name].add)
        with evaluating(model):
            for batch in batches:
                call(model, batch)
    finally:
        for quantizer in quantizers.values():
            quantizer.observe = None
    for name, histogram in histograms.items():
        if histogram.low > histogram.high:
            raise StudyError(f"quantizer {name!r} saw no data: no calibration batch ran it")
        quantizers[name].set_range(*best_range(histogram.counts, histogram.centres, histogram.low, histogram.high))
    return {name: quantizer.range for name, quantizer in quantizers.items()}


def _named(name: str, add: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def observe(values: Tensor) -> None:
        try:
            add(values)
        except StudyError as error:
            raise StudyError(f"quantizer {name!r}: {error}") from None

    return observe
