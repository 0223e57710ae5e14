"""What one layer sees: the moments of its inputs and of the loss gradients."""

import math

import torch
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.finding import LayerInfo
from ranksearch.layers import LayerSpec, first_argument
from ranksearch.statistics.patches import (
    by_group,
    channels_first,
    count_groups,
    count_positions,
    count_taps,
    output_rows,
    sampled_patches,
    tap_patches,
)
from ranksearch.statistics.values import LayerStatistics

# Patches are made for as many examples at once as give this many numbers: 16 MB, which the caches nearly hold.
CHUNK_NUMBERS = 1 << 22
# Multiply-adds for one layer's covariance; beyond, a random sample of its positions stands for all.
COVARIANCE_MACS = 1e11
# The same for copies: a convolution in many groups multiplies little, and would do nothing but copy patches.
COVARIANCE_COPIES = 1 << 24


class Collector:
    """Listens to one layer and adds up what it sees; mutable, and gone when `collect` returns."""

    def __init__(self, info: LayerInfo, max_examples: int, n_exact: int, seed: int) -> None:
        n_outputs, *rest = info.spec.weight_shape
        n_inputs = math.prod(rest)
        self.spec: LayerSpec = info.spec
        self.n_groups = count_groups(info.spec)
        self.moment = torch.zeros(self.n_groups, n_inputs, n_inputs, dtype=torch.float64)
        self.total = torch.zeros(self.n_groups, n_inputs, dtype=torch.float64)
        self.outer = torch.zeros(n_outputs, n_outputs, dtype=torch.float64)
        self.weight_gradients = torch.zeros(n_exact, n_outputs, n_inputs)
        self.bias_gradients = torch.zeros(n_exact, n_outputs)
        self.n_positions = self.n_gradient_positions = 0
        self.n_gradient_rows = 0
        self.by_example = n_exact > 0
        self.max_rows = max(_affordable_rows(self.n_groups, n_inputs), 4 * n_inputs) / max_examples
        self.generator = torch.Generator().manual_seed(seed)
        self.n_rows, self.n_before, self.with_gradients = 0, 0, False
        # While torch.utils.checkpoint runs a part of the model once more, on the way back.
        self.runs_again = False

    def start(self, n_rows: int, n_before: int, *, with_gradients: bool) -> None:
        """The next call is for `n_rows` examples, after `n_before`."""
        self.n_rows, self.n_before, self.with_gradients = n_rows, n_before, with_gradients
        self.runs_again = False

    def __call__(
        self, _module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor], output: Tensor
    ) -> None:
        inputs = first_argument(arguments, named).detach()
        if not self.runs_again:
            self._add_inputs(inputs, count_positions(self.spec, output))
        if self.with_gradients and output.requires_grad:
            output.register_hook(lambda gradient: self._add_gradients(inputs, gradient))  # type: ignore[no-untyped-call]

    def _add_inputs(self, inputs: Tensor, n_positions: int) -> None:
        n_kept = min(max(1, int(self.max_rows * self.n_rows / len(inputs))), n_positions)
        for chunk in torch.split(inputs, self._chunk_size(inputs)):
            if n_kept < n_positions:
                kept = torch.randperm(n_positions, generator=self.generator)[:n_kept]
                index = (n_positions * torch.arange(len(chunk))[:, None] + kept).flatten().to(inputs.device)
                patches = sampled_patches(self.spec, chunk, index).float()
            else:
                patches = tap_patches(self.spec, chunk).flatten(0, 1).float()
            self.n_positions += len(chunk) * n_positions
            weight = n_positions / n_kept
            rows = by_group(self.spec, patches)
            self.moment.add_(torch.bmm(rows.mT, rows).cpu(), alpha=weight)
            total = patches.new_ones(1, len(patches)) @ patches
            self.total += weight * by_group(self.spec, total)[:, 0].cpu().double()

    def _add_gradients(self, inputs: Tensor, gradient: Tensor) -> None:
        gradient = gradient.detach()
        rows = output_rows(self.spec, gradient).float()
        flat = rows.reshape(-1, rows.shape[-1])
        self.outer += (flat.T @ flat).cpu()
        self.n_gradient_positions += len(flat)
        self.by_example &= len(inputs) % self.n_rows == 0
        n_kept = min(self.n_rows, len(self.weight_gradients) - self.n_before)
        if not self.by_example or n_kept <= 0:
            return
        self.n_gradient_rows = self.n_before + n_kept
        # A layer may see several rows per example (windows, tokens), one example's after the other's.
        repeats = len(inputs) // self.n_rows
        size = max(1, self._chunk_size(inputs) // repeats)
        for start in range(0, n_kept, size):
            stop = min(start + size, n_kept)
            block = slice(start * repeats, stop * repeats)
            target = slice(self.n_before + start, self.n_before + stop)
            by_example = rows[block].reshape(stop - start, -1, rows.shape[-1])
            patches = tap_patches(self.spec, inputs[block]).float()
            patches = patches.reshape(stop - start, -1, patches.shape[-1])
            self.weight_gradients[target] += self._per_example(by_example, patches).cpu()
            self.bias_gradients[target] += by_example.sum(1).cpu()

    def _per_example(self, gradients: Tensor, patches: Tensor) -> Tensor:
        """(N, T, D) out of (N, positions, T) and (N, positions, taps of all channels)."""
        if self.n_groups == 1:
            return channels_first(self.spec, torch.bmm(gradients.transpose(1, 2), patches))
        n, positions, _ = gradients.shape
        gradients = gradients.reshape(n, positions, self.n_groups, -1)
        by_groups = torch.einsum("npgt,gnpd->ngtd", gradients, by_group(self.spec, patches)).flatten(1, 2)
        return channels_first(self.spec, by_groups)

    def _chunk_size(self, inputs: Tensor) -> int:
        return max(1, CHUNK_NUMBERS // max(1, inputs[0].numel() * count_taps(self.spec)))

    def result(self, name: str, n_examples: int) -> LayerStatistics:
        """What was seen; it takes the collector's own memory, as a wide layer's moments are gigabytes."""
        covariance, mean = self._input_moments(name, n_examples)
        if self.n_gradient_positions == 0:
            return LayerStatistics(input_covariance=covariance, input_mean=mean)
        outer = self.outer.div_(self.n_gradient_positions)
        _check_finite(outer, f"layer {name!r}: the gradients of the loss")
        kept = self.n_gradient_rows if self.by_example else 0
        return LayerStatistics(
            input_covariance=covariance,
            input_mean=mean,
            output_gradient_covariance=outer,
            weight_gradients=self.weight_gradients[:kept] if kept else None,
            bias_gradients=self.bias_gradients[:kept] if kept else None,
        )

    def _input_moments(self, name: str, n_examples: int) -> tuple[Tensor, Tensor]:
        if self.n_positions == 0:
            raise StudyError(f"layer {name!r} never runs on the calibration data; leave it out with Space(skip=[...])")
        mean = channels_first(self.spec, self.total) / self.n_positions
        covariance = channels_first(self.spec, channels_first(self.spec, self.moment).mT)
        covariance.baddbmm_(mean[:, :, None], mean[:, None, :], alpha=-self.n_positions).div_(n_examples)
        _check_finite(covariance, f"layer {name!r}: its inputs on the calibration data")
        return (covariance[0], mean[0]) if self.n_groups == 1 else (covariance, mean)


def count_moment_bytes(spec: LayerSpec) -> int:
    """What the moments of a layer's inputs and of the gradients at its outputs take."""
    n_outputs, *rest = spec.weight_shape
    return 8 * (count_groups(spec) * math.prod(rest) ** 2 + n_outputs**2)


def _affordable_rows(n_groups: int, n_inputs: int) -> int:
    """Over how many positions of all examples a covariance is summed, with `n_inputs` in each of the groups."""
    rows = int(COVARIANCE_MACS / (n_groups * n_inputs**2))
    return rows if n_groups == 1 else min(rows, max(COVARIANCE_COPIES // (n_groups * n_inputs), 64 * n_inputs))


def _check_finite(values: Tensor, what: str) -> None:
    # A sum tells without a copy of the values, unless it overflows.
    if not bool(values.sum().isfinite()) and not bool(values.isfinite().all()):
        raise StudyError(f"{what} are not all finite numbers; look for inf or nan in the data and the weights")
