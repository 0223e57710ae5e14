"""How weights are rounded: errors, grids, packed bits, and what no weight may break."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ranksearch.quantization import Half, Int4, Int8, WeightFormat
from ranksearch.quantization.weight_formats import pack_nibbles, unpack_nibbles

FOUR_BITS = [Int4(group_size=size, scheme=scheme) for size in (32, 64) for scheme in ("affine", "symmetric")]  # type: ignore[arg-type]
FORMATS: list[WeightFormat] = [Half(), Half(torch.bfloat16), Int8(), Int8(64), *FOUR_BITS]
SHAPES = [(1, 1), (3, 1), (5, 31), (4, 32), (6, 33), (2, 3, 3, 3), (7, 1, 3, 3), (4, 9, 5)]


def _rounded(weights: WeightFormat, weight: Tensor) -> Tensor:
    return weights.round(weight, weights.fit(weight))


@pytest.mark.parametrize("weights", FORMATS, ids=repr)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_packed_bits_give_back_the_rounded_weight(weights: WeightFormat, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape)
    grid = weights.fit(weight)
    rounded = weights.round(weight, grid)
    packed = weights.pack(weight, grid)
    kept = weights.unpack_grid(weights.pack_grid(grid), weight.shape)
    assert packed.dtype == weights.dtype
    assert torch.equal(weights.unpack(packed, kept, weight.shape), rounded)
    assert all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(grid, kept, strict=True))
    # What lies on the grid stays there.
    assert torch.equal(weights.round(rounded, grid), rounded)
    assert torch.equal(weights.pack(rounded, grid), packed)


@pytest.mark.parametrize("weights", FORMATS, ids=repr)
def test_fewer_bits_err_more_but_not_much(weights: WeightFormat) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    error = float((_rounded(weights, weight) - weight).norm() / weight.norm())
    low, high = {16: (1e-5, 3e-3), 8: (3e-3, 3e-2), 4: (5e-2, 1.1e-1)}[weights.bits]
    assert low < error < high


def test_smaller_groups_and_a_zero_point_err_less() -> None:
    weight = torch.rand(16, 256, generator=torch.Generator().manual_seed(0))  # no sign changes: a zero point pays
    error = {w: float((_rounded(w, weight) - weight).norm()) for w in FOUR_BITS}
    assert error[Int4(group_size=32)] < error[Int4(group_size=64)]
    assert error[Int4()] < error[Int4(scheme="symmetric")]


@given(st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**31), st.sampled_from(FOUR_BITS))
@settings(max_examples=60, deadline=None)
def test_four_bits_err_no_more_than_half_a_step_of_the_whole_range(
    rows: int, columns: int, seed: int, weights: Int4
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 10 ** torch.randn(rows, 1, generator=generator)
    for group, rounded in zip(
        weight.split(weights.group_size, 1), _rounded(weights, weight).split(weights.group_size, 1), strict=True
    ):
        reach = (
            group.abs().amax(1)
            if weights.scheme == "symmetric"
            else group.clamp_min(0).amax(1) - group.clamp_max(0).amin(1)
        )
        step = reach / (7 if weights.scheme == "symmetric" else 15) * 1.01  # bfloat16 rounds steps by up to 0.4 %
        affine_slack = 0.5 if weights.scheme == "affine" else 0.0  # the zero point is rounded as well
        plain = step * (0.5 + affine_slack) * group.shape[1] ** 0.5
        assert bool(((rounded - group).norm(dim=1) <= plain + 1e-12).all())


@given(st.lists(st.integers(0, 15), max_size=40))
def test_nibbles_come_back(codes: list[int]) -> None:
    packed = pack_nibbles(torch.tensor(codes, dtype=torch.uint8))
    assert packed.numel() == (len(codes) + 1) // 2
    assert unpack_nibbles(packed, len(codes)).tolist() == codes


@pytest.mark.parametrize("weights", FORMATS, ids=repr)
@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3, 40), torch.full((3, 40), 1e-20), torch.eye(3, 40) * 1e6, torch.full((2, 33), -5.0)],
    ids=["zeros", "tiny", "outliers", "constant"],
)
def test_no_weight_gives_anything_but_finite_numbers(weights: WeightFormat, weight: Tensor) -> None:
    grid = weights.fit(weight)
    assert grid.scale is None or bool((grid.scale > 0).all() and grid.scale.isfinite().all())
    rounded = weights.round(weight, grid)
    assert bool(rounded.isfinite().all())
    assert bool((rounded[weight == 0] == 0).all())
    largest = 65504.0 if weights == Half() else float("inf")
    torch.testing.assert_close(rounded, weight.clamp(-largest, largest), rtol=0.08, atol=1e-7)


def test_float16_holds_what_is_too_large_at_its_end() -> None:
    assert _rounded(Half(), torch.tensor([[1e6, -1e6, 1.0]])).tolist() == [[65504.0, -65504.0, 1.0]]


@pytest.mark.parametrize("weights", FORMATS, ids=repr)
def test_gradients_pass_straight_through(weights: WeightFormat) -> None:
    weight = torch.randn(4, 40, requires_grad=True)
    pull = torch.randn(4, 40)
    (weights.round(weight, weights.fit(weight.detach())) * pull).sum().backward()  # type: ignore[no-untyped-call]
    assert weight.grad is not None
    passed = weight.grad == pull
    assert bool((passed | (weight.grad == 0)).all())
    assert float(passed.float().mean()) > 0.8


def test_a_limit_out_of_range_is_refused() -> None:
    for limit in (0, 128):
        with pytest.raises(ValueError, match=f"weight_limit is {limit}"):
            Int8(limit)
