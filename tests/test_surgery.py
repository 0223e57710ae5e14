"""Replacing modules, those that are registered more than once included."""

import pytest
import torch
from standins import Conv1D, as_linear
from torch import nn

from ranksearch.surgery import replace_modules


class Shared(nn.Module):
    """One layer under two names, and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.blocks = nn.ModuleList([nn.Sequential(self.first, nn.ReLU()), nn.Linear(4, 4)])


def test_replaces_by_dotted_name_and_leaves_the_rest() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 2))
    kept, new = model[1], nn.Linear(4, 4)
    assert replace_modules(model, {"0.0": new}) is model
    assert model[0][0] is new
    assert model[1] is kept


def test_replaces_a_shared_module_wherever_it_is_registered() -> None:
    model, new = Shared(), nn.Linear(4, 4)
    replace_modules(model, {"second": new})
    assert model.first is new
    assert model.second is new
    assert model.blocks[0][0] is new
    assert model.blocks[1] is not new


def test_a_linear_takes_the_place_of_the_conv1d_of_transformers() -> None:
    model, inputs = nn.Sequential(Conv1D(6, 4), nn.GELU(), nn.Linear(6, 2)), torch.randn(2, 5, 4)
    before = model(inputs)
    replace_modules(model, {"0": as_linear(model[0])})
    assert type(model[0]) is nn.Linear
    torch.testing.assert_close(model(inputs), before)


def test_a_replacement_may_hold_what_it_replaces() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    old = model[0]
    replace_modules(model, {"0": nn.Sequential(old, nn.ReLU())})
    assert model[0][0] is old
    assert model(torch.zeros(1, 4)).shape == (1, 4)


def test_replacing_the_root_gives_the_replacement() -> None:
    new = nn.Linear(4, 4)
    assert replace_modules(nn.Linear(4, 4), {"": new}) is new


@pytest.mark.parametrize("name", ["3", "0.weight", "0.nothing"])
def test_a_name_that_is_not_there_is_a_key_error_and_changes_nothing(name: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    old = model[0]
    with pytest.raises(KeyError, match="no module"):
        replace_modules(model, {"0": nn.ReLU(), name: nn.ReLU()})
    assert model[0] is old
