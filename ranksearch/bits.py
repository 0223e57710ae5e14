"""The bits that a layer is offered on a target."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ranksearch.layers import EmbeddingSpec, WeightSpec
from ranksearch.plan import LayerChoice, Option
from ranksearch.runtimes import AbstractRuntime
from ranksearch.runtimes.base import HALF_PRECISIONS, float_bits
from ranksearch.spec import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class OfferedBits:
    """Bits of weights and activations, and the options of rounding that come with them.

    `storage_only` where no kernel of the target computes with them: the file is smaller, and the layer no faster.
    """

    weight_bits: int
    activation_bits: int
    options: Mapping[str, Option] = field(default_factory=dict)
    storage_only: bool = False

    def of(self, choice: LayerChoice) -> LayerChoice:
        """The same decomposition in these bits."""
        return choice.with_bits(self.weight_bits, self.activation_bits, **self.options)


def offered_bits(
    runtime: AbstractRuntime, spec: WeightSpec, target: Target, weight_bits: Sequence[int], *, for_size: bool
) -> tuple[OfferedBits, ...]:
    """The bits on offer for a layer: of each count of weight bits every pair that a kernel runs.

    Where none does, one with activations in the target's float, for storage only, if size counts (`for_size`): all of
    an embedding's, with which nothing is computed.
    """
    supported = ((32, 32),) if isinstance(spec, EmbeddingSpec) else runtime.supported_bits(spec, target)
    offered = []
    for count in weight_bits:
        pairs = [pair for pair in supported if pair[0] == count]
        stored = [] if pairs or not for_size else [(count, float_bits(target))]
        options: dict[str, Option] = {}
        if count == 16 and target.precision in HALF_PRECISIONS:
            options["dtype"] = HALF_PRECISIONS[target.precision]
        offered += [
            OfferedBits(weight_bits=w, activation_bits=a, options=options, storage_only=(w, a) in stored)
            for w, a in pairs or stored
        ]
    return tuple(offered)
