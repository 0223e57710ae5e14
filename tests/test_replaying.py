"""A model with one module changed gives what it would, and runs nothing that comes before that module."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranksearch.layers import call_model, evaluating
from ranksearch.replaying import Replay
from ranksearch.trees import tensors


class Block(nn.Module):
    """Changes its input in place, and gives a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, values: Tensor) -> tuple[Tensor, None]:
        inside = self.second(F.relu_(self.norm(self.first(values))))
        values += inside
        return values, None


class Network(nn.Module):
    """Blocks, a layer that runs twice, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.twice, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, values: Tensor) -> dict[str, Tensor]:
        values = self.twice(self.stem(values))
        for block in self.blocks:
            values = block(values)[0]
        return {"states": values, "kinds": self.head(self.twice(values))}


def batches() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 4), torch.randn(3, 4)]


def outputs(model: nn.Module) -> list[list[Tensor]]:
    with evaluating(model):
        return [tensors(call_model(model, inputs)) for inputs in batches()]


def calls_of(model: nn.Module, run: Any) -> list[str]:
    """The linear layers that computed something meanwhile, in their order."""
    seen: list[str] = []
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}

    def counting(name: str, module: nn.Module) -> Any:
        forward = type(module).forward
        return lambda *given: (seen.append(name), forward(module, *given))[1]

    for name, module in layers.items():
        module.forward = counting(name, module)
    run()
    for module in layers.values():
        del module.forward
    return seen


LAYERS = [name for name, module in Network().named_modules() if isinstance(module, nn.Linear)]


@pytest.mark.parametrize("max_bytes", [1 << 20, 2000, 0])
@pytest.mark.parametrize("name", LAYERS)
def test_a_changed_model_gives_what_it_would(name: str, max_bytes: int) -> None:
    model = Network().eval()
    replay, dense = Replay(model, batches(), max_bytes), outputs(model)
    width = model.get_submodule(name).weight.shape
    other = nn.Linear(width[1], width[0])
    found = [tensors(output) for output in replay.outputs_with(name, other)]
    for own, wanted in zip([tensors(o) for o in replay.outputs], dense, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(own, wanted, strict=True))
    assert model.get_submodule(name) is not other and not any("forward" in vars(m) for m in model.modules())
    again = outputs(model)
    assert all(torch.equal(a, b) for one, two in zip(again, dense, strict=True) for a, b in zip(one, two, strict=True))
    model.set_submodule(name, other)
    for own, wanted in zip(found, outputs(model), strict=True):
        for one, two in zip(own, wanted, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)


def test_only_what_comes_behind_runs_again() -> None:
    model = Network().eval()
    replay = Replay(model, batches()[:1])
    changed = nn.Linear(6, 6)
    ran = calls_of(model, lambda: replay.outputs_with("blocks.1.second", changed))
    assert ran == ["twice", "blocks.2.first", "blocks.2.second", "twice", "head"], "what runs twice is computed"
    everything = calls_of(model, lambda: Replay(model, batches()[:1], 0).outputs_with("blocks.1.second", changed))
    assert len([name for name in everything if name == "stem"]) == 2


class Whispering(nn.Module):
    """Its parts hand on more than they return."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.heard: list[Tensor] = []
        self.first.register_forward_hook(lambda _m, inputs, _o: self.heard.append(inputs[0]))
        self.inner = Listening(self.heard)

    def forward(self, values: Tensor) -> Tensor:
        self.heard.clear()
        return self.second(self.inner(self.first(values)))  # type: ignore[no-any-return]


class Listening(nn.Module):
    """Clears what was said, so that it cannot be left out."""

    def __init__(self, heard: list[Tensor]) -> None:
        super().__init__()
        self.heard, self.layer = heard, nn.Linear(4, 4)

    def forward(self, values: Tensor) -> Tensor:
        self.heard[:] = [self.heard[0] * 2]
        return self.layer(values)  # type: ignore[no-any-return]


class Summing(Whispering):
    """Reads, at its end, what its parts have said."""

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values) + self.heard[0]


def test_modules_that_hand_on_more_than_they_return_are_computed() -> None:
    torch.manual_seed(0)
    model = Summing().eval()
    replay, other = Replay(model, batches()), nn.Linear(4, 4)
    found = replay.outputs_with("second", other)
    model.second = other
    for one, [two] in zip(found, outputs(model), strict=True):
        torch.testing.assert_close(one, two)
