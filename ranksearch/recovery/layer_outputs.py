"""How far the outputs of compressed layers are from those of the layers whose place they take."""

from types import TracebackType
from typing import Any, Self, final

import torch
from torch import Tensor, nn

from ranksearch.layers import layer_spec


@final
class LayerOutputs:
    """A context in which both models note what the layers give that differ between them.

    `distance` is of the calls since it was asked last.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
        names = [name for name, module in teacher.named_modules() if layer_spec(module) is not None]
        modules = dict(model.named_modules())
        # A layer that was factored or quantized is of another class.
        changed = [name for name in names if type(modules.get(name)) is not type(teacher.get_submodule(name))]
        self.pairs = [(modules[name], teacher.get_submodule(name)) for name in changed if name in modules]
        self.outputs: dict[nn.Module, list[Tensor]] = {}

    def __enter__(self) -> Self:
        modules = [module for pair in self.pairs for module in pair]
        self._handles = [module.register_forward_hook(self._note) for module in modules]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()

    def distance(self) -> Tensor:
        """The squared difference of a layer's outputs over the square of the teacher's, their mean over layers."""
        shares = [
            (new.float() - old.float()).square().mean() / old.float().square().mean().clamp_min(1e-12)
            for student, teacher in self.pairs
            for new, old in zip(self.outputs.get(student, []), self.outputs.get(teacher, []), strict=False)
        ]
        self.outputs.clear()
        return torch.stack(shares).mean() if shares else torch.zeros(())

    def _note(self, module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self.outputs.setdefault(module, []).append(output)
