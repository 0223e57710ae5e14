"""Low-rank regularisation: singular values of layers' foldings shrink while a model trains."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from ranksearch.errors import StudyError
from ranksearch.layers import in_eval_mode, layer_weight
from ranksearch.recovery.fine_tuning import diverged, fine_tune
from ranksearch.recovery_settings import NuclearNorm, Recovery
from ranksearch.spec import Batches
from ranksearch.surgery import copy_model

Folding = Callable[[Tensor], Tensor]

# How a weight (outputs, inputs, kernel's rows and columns) becomes the matrix whose rank a decomposition cuts: which of
# its axes are the matrix's rows; the others are its columns.
FOLDINGS: Mapping[str, tuple[int, ...]] = {"outputs": (0,), "inputs": (1,), "rows": (0, 3)}
# Which of them each decomposition cuts; what is not listed cuts the outputs.
FOLDINGS_OF: Mapping[str, tuple[str, ...]] = {
    "svd": ("outputs", "inputs"),
    "spatial_svd": ("rows",),
    "tucker2": ("outputs", "inputs"),
    "tensor_train": ("outputs", "rows", "inputs"),
    "cp": ("outputs", "rows", "inputs"),
}
ENERGY = 0.9  # of a matrix's squared norm, that the sub-gradient's singular vectors hold; as TRP has it


def foldings_of(decompositions: Collection[str], weight: Tensor) -> tuple[str, ...]:
    """The foldings of a weight that these decompositions cut, each once."""
    names = dict.fromkeys(f for d in decompositions if d != "none" for f in FOLDINGS_OF.get(d, ("outputs",)))
    is_spatial = weight.dim() == 4 and weight.shape[2] * weight.shape[3] > 1
    fitting = [name for name in names if is_spatial or name == "outputs"]
    return tuple(fitting) or ("outputs",)


def unfold(weight: Tensor, folding: str) -> Tensor:
    """The weight as the matrix of that folding, (rows, columns)."""
    axes = FOLDINGS[folding]
    moved = weight.movedim(axes, tuple(range(len(axes))))
    return moved.flatten(0, len(axes) - 1).flatten(1)


def fold(matrix: Tensor, folding: str, shape: torch.Size) -> Tensor:
    """The weight of that shape whose folding the matrix is."""
    axes = FOLDINGS[folding]
    others = [axis for axis in range(len(shape)) if axis not in axes]
    moved = matrix.reshape([shape[axis] for axis in (*axes, *others)])
    weight: Tensor = moved.movedim(tuple(range(len(axes))), axes)
    return weight


def shrink(matrix: Tensor, threshold: float) -> Tensor:
    """The matrix with its singular values less the threshold, none below zero: the proximal step of the nuclear norm.

    Cai, Candes and Shen, A Singular Value Thresholding Algorithm for Matrix Completion (2010).
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    shrunk: Tensor = (left * (values - threshold).clamp_min(0.0)) @ right
    return shrunk


def subgradient(matrix: Tensor) -> Tensor:
    """A sub-gradient of the nuclear norm: the product of the singular vectors that hold most of the matrix.

    Xu et al., TRP: Trained Rank Pruning for Efficient Deep Neural Networks (2020).
    """
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    held = values.square().cumsum(0) / values.square().sum().clamp_min(1e-30)
    rank = int((held < ENERGY).sum()) + 1
    directions: Tensor = left[:, :rank] @ right[:rank]
    return directions


@final
class Shrinkage:
    """Shrinks the foldings of some layers' weights every few steps, one folding of each after the other (in place)."""

    def __init__(
        self, model: nn.Module, names: Collection[str], decompositions: Collection[str], norm: NuclearNorm
    ) -> None:
        layers = [model.get_submodule(name) for name in names]
        self.layers = [(layer, foldings_of(decompositions, layer_weight(layer))) for layer in layers]
        self.norm = norm
        self.n_steps, self.n_turns = 0, 0

    @torch.no_grad()
    def apply(self, rate: float) -> None:
        """Called after every step of the optimiser, with its learning rate."""
        self.n_steps += 1
        if self.n_steps % self.norm.interval:
            return
        amount = rate * self.norm.weight * self.norm.interval
        for layer, foldings in self.layers:
            weight = layer_weight(layer)  # anew, since training moves weights in memory
            folding = foldings[self.n_turns % len(foldings)]
            matrix = unfold(weight, folding)
            new = shrink(matrix, amount) if self.norm.form == "proximal" else matrix - amount * subgradient(matrix)
            weight.copy_(fold(new, folding, weight.shape))
        self.n_turns += 1


def prepare_dense(
    model: nn.Module,
    batches: Batches,
    loss: Any,
    recovery: Recovery,
    names: Collection[str],
    decompositions: Collection[str],
    **options: Any,
) -> nn.Module:
    """A copy of the model whose layers `names` are of lower rank, trained towards the model itself.

    `options` are fine_tune's. Raises StudyError where the training diverges.
    """
    assert recovery.prepare is not None, "there is a preparation to make"
    prepared = copy_model(model)
    shrinkage = Shrinkage(prepared, names, decompositions, recovery.prepare)
    budget = dataclasses.replace(recovery, epochs=None, steps=recovery.prepare.steps, seconds=None)
    losses = fine_tune(prepared, model, batches, loss, budget, after_step=shrinkage.apply, **options)
    if diverged(losses):
        raise StudyError("preparing the dense model diverged; lower Recovery.learning_rate or NuclearNorm.weight")
    return in_eval_mode(prepared)
