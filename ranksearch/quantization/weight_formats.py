"""How weights are rounded and kept: 16-bit floats, 8-bit integers per output, 4-bit integers per group of inputs.

A weight is (T, ...), outputs first. Its grid is what its rounding is fitted to: steps and zero points.
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ranksearch.quantization.fake_quantization import fake_quantize
from ranksearch.quantization.formats import CODE_LIMIT, N_CLIPPINGS, per_channel, weight_codes, weight_scale

Floats = NDArray[np.float32]

GROUP_SIZE = 32
N_LEVELS = 16
SYMMETRIC_ZERO = 8  # of codes 0..15, the middle
CLIPPINGS = tuple(float(share) for share in np.linspace(1.0, 0.5, 16))
# What a group of zeros steps by, in the place of zero.
SMALLEST_STEP = 1e-30


class Grid(NamedTuple):
    """Steps and zero points of a weight's rounding; None where its format has none."""

    scale: Tensor | None = None
    zero_point: Tensor | None = None


class Levels(NamedTuple):
    """What each weight (T, D) may become: its step times an integer from lowest to highest."""

    step: Tensor
    lowest: Tensor
    highest: Tensor


class WeightFormat(abc.ABC):
    """A way to round a weight; `dtype` is what a file holds it in."""

    bits: ClassVar[int]

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """The type of the packed weight."""

    @abc.abstractmethod
    def fit(self, weight: Tensor, *, clips: bool = True) -> Grid:
        """The grid that rounds `weight` with the least squared error; without `clips`, quickly, one that covers it."""

    @abc.abstractmethod
    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        """The weight on its grid, in float; its gradient passes straight through where it is not clipped."""

    @abc.abstractmethod
    def pack(self, weight: Tensor, grid: Grid) -> Tensor:
        """The weight's bits as a file holds them."""

    @abc.abstractmethod
    def unpack(self, packed: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
        """The float weight of this shape that `pack` was given, on its grid, to the bit."""

    def levels(self, grid: Grid, shape: torch.Size) -> Levels | None:
        """The levels of a weight of this shape; None where they are not evenly spaced."""
        return None

    def pack_grid(self, grid: Grid) -> Grid:
        """The grid as a file holds it."""
        return grid

    def unpack_grid(self, packed: Grid, shape: torch.Size) -> Grid:
        """The grid that `pack_grid` was given, for a weight of this shape."""
        return packed


@final
@dataclass(frozen=True, slots=True)
class Half(WeightFormat):
    """16-bit floats; values beyond the largest become it."""

    bits: ClassVar[int] = 16
    dtype: torch.dtype = torch.float16

    def fit(self, weight: Tensor, *, clips: bool = True) -> Grid:
        return Grid()

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        return _straight_through(weight, self.pack(weight, grid).to(weight.dtype))

    def pack(self, weight: Tensor, grid: Grid) -> Tensor:
        largest = torch.finfo(self.dtype).max
        return weight.detach().clamp(-largest, largest).to(self.dtype)

    def unpack(self, packed: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
        return packed.float()


@final
@dataclass(frozen=True, slots=True)
class Int8(WeightFormat):
    """Codes of -limit..limit, a step for each output."""

    bits: ClassVar[int] = 8
    limit: int = CODE_LIMIT

    def __post_init__(self) -> None:
        if not 1 <= self.limit <= CODE_LIMIT:
            raise ValueError(f"weight_limit is {self.limit}; it must be between 1 and {CODE_LIMIT}")

    @property
    def dtype(self) -> torch.dtype:
        return torch.int8

    def fit(self, weight: Tensor, *, clips: bool = True) -> Grid:
        return self.unpack_grid(Grid(scale=weight_scale(weight, self.limit, N_CLIPPINGS if clips else 1)), weight.shape)

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        scale = _known(grid.scale)
        if self.limit < CODE_LIMIT:
            # Clamped here, since runtimes know no quantizer of so few levels.
            bound = per_channel(scale * self.limit, weight)
            weight = weight.clamp(-bound, bound)
        zero = _known(grid.zero_point)
        return fake_quantize(weight, scale, zero, -CODE_LIMIT, CODE_LIMIT)

    def pack(self, weight: Tensor, grid: Grid) -> Tensor:
        return weight_codes(weight, _known(grid.scale), self.limit)

    def unpack(self, packed: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
        return packed.float() * per_channel(_known(grid.scale), packed)

    def levels(self, grid: Grid, shape: torch.Size) -> Levels:
        step = _known(grid.scale)[:, None].expand(shape[0], shape[1:].numel())
        highest = torch.full_like(step, self.limit)
        return Levels(step=step, lowest=-highest, highest=highest)

    def pack_grid(self, grid: Grid) -> Grid:
        return Grid(scale=grid.scale)

    def unpack_grid(self, packed: Grid, shape: torch.Size) -> Grid:
        scale = _known(packed.scale)
        return Grid(scale=scale, zero_point=torch.zeros_like(scale, dtype=torch.int32))


@final
@dataclass(frozen=True, slots=True)
class Int4(WeightFormat):
    """Codes of 0..15, a step for each group of `group_size` inputs of an output; the last group may be smaller.

    The zero point is the middle in the scheme `symmetric`, and each group's own in `affine`. Inputs count over
    channels, then taps. Steps are bfloat16, which has float32's range. A file packs two codes a byte, the even one
    in the lower half, across outputs, so that no rank is padded.
    """

    bits: ClassVar[int] = 4
    group_size: int = GROUP_SIZE
    scheme: Literal["symmetric", "affine"] = "affine"

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    def fit(self, weight: Tensor, *, clips: bool = True) -> Grid:
        # numpy: many short steps, for which torch's threads wait longer than they work.
        groups = self._grouped(weight.detach().float()).cpu().numpy()
        best, clippings = _best_affine if self.scheme == "affine" else _best_symmetric, CLIPPINGS if clips else (1.0,)
        scale, zero = best(groups, clippings)
        shape = len(weight), -1
        return Grid(
            scale=torch.from_numpy(scale).reshape(shape).to(weight.device),
            zero_point=torch.from_numpy(zero).reshape(shape).to(weight.device),
        )

    def round(self, weight: Tensor, grid: Grid) -> Tensor:
        scale, zero = _known(grid.scale).flatten(), _known(grid.zero_point).flatten()
        groups = fake_quantize(self._grouped(weight), scale, zero, 0, N_LEVELS - 1)
        return groups.reshape(weight.shape[0], -1)[:, : weight[0].numel()].reshape(weight.shape)

    def codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """The codes 0..15 (T, D) of the weight."""
        scale, zero = _known(grid.scale).reshape(-1, 1), _known(grid.zero_point).reshape(-1, 1)
        codes = (self._grouped(weight.detach().float()) / scale).round() + zero
        return codes.clamp(0, N_LEVELS - 1).to(torch.uint8).reshape(len(weight), -1)[:, : weight[0].numel()]

    def pack(self, weight: Tensor, grid: Grid) -> Tensor:
        return pack_nibbles(self.codes(weight, grid))

    def unpack(self, packed: Tensor, grid: Grid, shape: torch.Size) -> Tensor:
        codes = unpack_nibbles(packed, shape.numel()).reshape(shape[0], -1)
        scale, zero = self._by_weight(grid, shape)
        return ((codes.int() - zero).float() * scale).reshape(shape)

    def levels(self, grid: Grid, shape: torch.Size) -> Levels:
        scale, zero = self._by_weight(grid, shape)
        return Levels(step=scale, lowest=-zero.to(scale), highest=(N_LEVELS - 1 - zero).to(scale))

    def pack_grid(self, grid: Grid) -> Grid:
        zero = pack_nibbles(_known(grid.zero_point).to(torch.uint8)) if self.scheme == "affine" else None
        return Grid(scale=_known(grid.scale).to(torch.bfloat16), zero_point=zero)

    def unpack_grid(self, packed: Grid, shape: torch.Size) -> Grid:
        scale = _known(packed.scale).float()
        if self.scheme == "symmetric":
            return Grid(scale=scale, zero_point=torch.full_like(scale, SYMMETRIC_ZERO, dtype=torch.int32))
        zero = unpack_nibbles(_known(packed.zero_point), scale.numel()).int().reshape(scale.shape)
        return Grid(scale=scale, zero_point=zero)

    def _by_weight(self, grid: Grid, shape: torch.Size) -> tuple[Tensor, Tensor]:
        """Step and zero point of each weight, (T, D)."""
        spread = (_known(values).repeat_interleave(self.group_size, dim=1) for values in (grid.scale, grid.zero_point))
        scale, zero = (values[:, : shape[1:].numel()] for values in spread)
        return scale, zero

    def _grouped(self, weight: Tensor) -> Tensor:
        """The weight as (T * groups, group_size), its last groups filled up with zeros."""
        rows = weight.flatten(1)
        missing = -rows.shape[1] % self.group_size
        return functional.pad(rows, (0, missing)).reshape(-1, self.group_size)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes 0..15 of any shape as bytes (n,), two in each, the even one in the lower half."""
    flat = functional.pad(codes.flatten(), (0, codes.numel() % 2))
    return flat[::2] | (flat[1::2] << 4)


def unpack_nibbles(packed: Tensor, count: int) -> Tensor:
    """The `count` codes (n,) that pack_nibbles was given."""
    return torch.stack([packed & (N_LEVELS - 1), packed >> 4], dim=1).flatten()[:count]


def _best_symmetric(groups: Floats, clippings: Sequence[float]) -> tuple[Floats, NDArray[np.int32]]:
    """Steps and zero points (n,) of `groups` (n, m): codes -8..7 around the middle."""
    reach = np.abs(groups).max(1)
    zero = np.full(len(groups), SYMMETRIC_ZERO, dtype=np.int32)
    # A largest value at -8 instead of 7 costs no clipping where it is negative, and a little where it is not.
    tried = [(_steps(reach * clipping / 7.0), zero) for clipping in clippings]
    return _least_error(groups, tried)


def _best_affine(groups: Floats, clippings: Sequence[float]) -> tuple[Floats, NDArray[np.int32]]:
    """Steps and zero points (n,) of `groups` (n, m): each covers its own range, and zero exactly."""
    low, high = np.minimum(groups.min(1), 0.0), np.maximum(groups.max(1), 0.0)
    tried = []
    for clipping in clippings:
        step = _steps((high - low) * clipping / (N_LEVELS - 1))
        exact = -low * clipping / step
        tried += [
            (step, np.clip(rounded, 0, N_LEVELS - 1).astype(np.int32)) for rounded in (np.floor(exact), np.ceil(exact))
        ]
    return _least_error(groups, tried)


def _steps(values: Floats) -> Floats:
    """The values as bfloat16 holds them, positive."""
    steps = torch.from_numpy(np.maximum(values, SMALLEST_STEP).astype(np.float32))
    return np.asarray(steps.to(torch.bfloat16).float().numpy())


def _least_error(groups: Floats, tried: list[tuple[Floats, NDArray[np.int32]]]) -> tuple[Floats, NDArray[np.int32]]:
    """For each group (n, m) the step and the zero point, of those tried, that round it with the least squared error."""
    best_step, best_zero = tried[0]
    best_error = np.full(len(groups), np.inf, dtype=np.float32)
    # One array, and floats alone, for what would else be made anew a dozen times, in twice the bits.
    difference = np.empty_like(groups)
    for step, zero in tried:
        steps, zeros = step[:, None], zero[:, None].astype(np.float32)
        np.divide(groups, steps, out=difference)
        np.rint(difference, out=difference)
        np.clip(difference, -zeros, N_LEVELS - 1 - zeros, out=difference)
        difference *= steps
        difference -= groups
        error = np.einsum("ij,ij->i", difference, difference)
        better = error < best_error
        best_step, best_zero = np.where(better, step, best_step), np.where(better, zero, best_zero)
        best_error = np.where(better, error, best_error)
    return best_step, best_zero


def _straight_through(weight: Tensor, rounded: Tensor) -> Tensor:
    """`rounded` in value, to the bit, and `weight` in gradient."""
    return rounded + (weight - weight.detach()) if weight.requires_grad else rounded


def _known(values: Tensor | None) -> Tensor:
    assert values is not None, "the format's grid has it"
    return values
