"""The bits that layers are offered on a target."""

from typing import Any, cast

import pytest

from ranksearch.bits import OfferedBits, offered_bits
from ranksearch.layers import LinearSpec
from ranksearch.plan import DENSE, LayerChoice
from ranksearch.runtimes import AbstractRuntime
from ranksearch.spec import Target

SPEC = LinearSpec(in_features=64, out_features=64, bias=True)


class Kernels:
    """A runtime that says which bits it runs, and nothing else."""

    def __init__(self, *bits: tuple[int, int]) -> None:
        self.bits = bits

    def supported_bits(self, _spec: Any, _target: Target) -> tuple[tuple[int, int], ...]:
        return self.bits


def offer(
    *kernels: tuple[int, int], weight_bits: tuple[int, ...], precision: str = "f32", for_size: bool = True
) -> Any:
    runtime = cast(AbstractRuntime, Kernels(*kernels))
    found = offered_bits(runtime, SPEC, Target(precision=precision), weight_bits, for_size=for_size)
    return [(b.weight_bits, b.activation_bits, b.storage_only) for b in found]


def test_every_pair_that_a_kernel_runs_is_offered_and_others_for_storage() -> None:
    kernels = (32, 32), (8, 8), (8, 32)
    assert offer(*kernels, weight_bits=(32, 8)) == [(32, 32, False), (8, 8, False), (8, 32, False)]
    assert offer(*kernels, weight_bits=(4, 16)) == [(4, 32, True), (16, 32, True)]
    assert offer(*kernels, weight_bits=(4, 8), for_size=False) == [(8, 8, False), (8, 32, False)]


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("f16", "float16")])
def test_activations_are_those_of_the_targets_float(precision: str, dtype: str) -> None:
    assert offer((32, 32), weight_bits=(8,), precision=precision) == [(8, 16, True)]
    runtime = cast(AbstractRuntime, Kernels((32, 32), (16, 16)))
    (half,) = offered_bits(runtime, SPEC, Target(precision=precision), (16,), for_size=True)
    assert half == OfferedBits(weight_bits=16, activation_bits=16, options={"dtype": dtype})
    assert half.of(DENSE) == LayerChoice(weight_bits=16, activation_bits=16, options={"dtype": dtype})
