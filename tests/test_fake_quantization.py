"""Rounding to a grid in vector arithmetic gives what torch's own operators give."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranksearch.quantization.fake_quantization import fake_quantize

LEVELS = {"activations": (0, 255), "int8": (-127, 127), "int4": (0, 15)}


def by_torch(values: Tensor, scale: Tensor, zero_point: Tensor, lowest: int, highest: int) -> Tensor:
    if scale.dim():
        return torch.fake_quantize_per_channel_affine(values, scale, zero_point, 0, lowest, highest)
    return torch.fake_quantize_per_tensor_affine(values, scale, zero_point, lowest, highest)


@given(
    levels=st.sampled_from(sorted(LEVELS)),
    shape=st.lists(st.integers(1, 7), min_size=1, max_size=4),
    per_channel=st.booleans(),
    step=st.floats(1e-4, 10),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=150, deadline=None)
def test_values_and_gradients_are_those_of_torch(
    levels: str, shape: list[int], per_channel: bool, step: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    lowest, highest = LEVELS[levels]
    size = shape[:1] if per_channel else []
    scale = step * (0.1 + torch.rand(size, generator=generator))
    zero_point = torch.randint(lowest, highest + 1, size, generator=generator, dtype=torch.int32)
    # Ties as well: every third value lies halfway between two levels of the first step.
    values = torch.randn(shape, generator=generator) * step * (highest - lowest)
    values.view(-1)[::3] = (values.view(-1)[::3] / scale.view(-1)[0]).floor().add(0.5).mul(scale.view(-1)[0])
    pull = torch.randn(shape, generator=generator)
    ours, theirs = values.clone().requires_grad_(), values.clone().requires_grad_()
    given_back = fake_quantize(ours, scale, zero_point, lowest, highest)
    expected = by_torch(theirs, scale, zero_point, lowest, highest)
    assert torch.equal(given_back, expected)
    assert torch.equal(fake_quantize(values, scale, zero_point, lowest, highest), expected)
    given_back.backward(pull)  # type: ignore[no-untyped-call]
    expected.backward(pull)  # type: ignore[no-untyped-call]
    assert ours.grad is not None and theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)


def test_arguments_are_left_as_they_were() -> None:
    arguments = torch.randn(4, 3), torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
    before = copy.deepcopy(arguments)
    fake_quantize(*arguments, 0, 15)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))


@pytest.mark.parametrize("value", [1e30, -1e30, float("inf"), -float("inf")])
def test_what_is_too_large_ends_at_its_own_end(value: float) -> None:
    # Torch's operator gives the lowest level for all of these.
    rounded = fake_quantize(torch.tensor([value]), torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), -127, 127)
    assert float(rounded) == (63.5 if value > 0 else -63.5)


def test_what_is_no_number_stays_none() -> None:
    rounded = fake_quantize(torch.tensor([float("nan")]), torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), 0, 255)
    assert bool(rounded.isnan())


def test_other_floats_are_rounded_in_their_own_precision() -> None:
    scale, zero_point = torch.tensor([0.1, 0.2]), torch.zeros(2, dtype=torch.int32)
    values = torch.randn(2, 5, dtype=torch.float64)
    rounded = fake_quantize(values, scale, zero_point, -127, 127)
    assert rounded.dtype == torch.float64
    assert torch.equal(rounded, by_torch(values, scale, zero_point, -127, 127))


def test_converters_see_the_operator_that_they_know() -> None:
    scale, zero_point = torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
    traced = torch.jit.trace(lambda x: fake_quantize(x, scale, zero_point, 0, 255), torch.randn(3))  # type: ignore[no-untyped-call]
    assert "aten::fake_quantize_per_tensor_affine" in str(traced.graph)
