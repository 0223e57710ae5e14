"""Which axes of a portable file's inputs take any size."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

BATCH, LENGTH = "batch", "length"


@dataclass(frozen=True, kw_only=True, slots=True)
class FreeAxes:
    """Whether the first axis, the batch, takes any size, and the second of texts, their length.

    Texts are integers of two axes, such as token ids; whatever else has as long a second axis, a mask of floats among
    them, goes along.
    """

    batch: bool = True
    length: bool = False

    def of(self, leaves: Sequence[Tensor]) -> list[dict[int, str]]:
        """For each input its free axes with their names."""
        length = text_length(leaves) if self.length else None
        return [
            ({0: BATCH} if self.batch and leaf.dim() else {})
            | ({1: LENGTH} if leaf.dim() > 1 and leaf.shape[1] == length else {})
            for leaf in leaves
        ]


STATIC, ANY_BATCH, ANY_BATCH_AND_LENGTH = FreeAxes(batch=False), FreeAxes(), FreeAxes(length=True)


def text_length(leaves: Sequence[Tensor]) -> int | None:
    """How long the texts among the inputs are; None where there are none."""
    texts = (leaf for leaf in leaves if leaf.dim() == 2 and not leaf.is_floating_point())
    return next((text.shape[1] for text in texts), None)


def cut(leaves: Sequence[Tensor], length: int) -> list[Tensor]:
    """The inputs with texts of that length, and what is as long as they are."""
    axes = ANY_BATCH_AND_LENGTH.of(leaves)
    return [leaf[:, :length] if 1 in free else leaf for leaf, free in zip(leaves, axes, strict=True)]
