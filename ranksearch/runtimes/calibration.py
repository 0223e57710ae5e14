"""Calibration data as the runtimes' own quantizers take it."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ranksearch.runtimes.structure import leaves_of

N_CALIBRATION_EXAMPLES = 300


def calibration_batches(inputs: Iterable[Any], n_rows: int) -> Iterator[list[NDArray[Any]]]:
    """The leaves of batches of exactly `n_rows` rows, until there are 300 examples or the inputs end."""
    held: list[Tensor] = []
    n_given = 0
    for batch in inputs:
        leaves = [torch.as_tensor(leaf) for leaf in leaves_of(batch)]
        held = [torch.cat(pair) for pair in zip(held, leaves, strict=True)] if held else leaves
        while len(held[0]) >= n_rows:
            yield [np.asarray(leaf[:n_rows].numpy()) for leaf in held]
            held, n_given = [leaf[n_rows:] for leaf in held], n_given + n_rows
            if n_given >= N_CALIBRATION_EXAMPLES:
                return
