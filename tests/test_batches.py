"""Small batches put together: the same examples in the same order, where the model takes them so."""

import torch
from torch import Tensor, nn

from ranksearch.batches import FEW_NUMBERS, merged


class OfTwoRows(nn.Module):
    """Written for one batch size, as models with a shape baked in are."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.reshape(2, 5).relu()


class Named(nn.Module):
    """Takes words and their mask by name."""

    def forward(self, words: Tensor, mask: Tensor) -> Tensor:
        return words * mask


class Pooled(nn.Module):
    """Gives one row for whatever it gets."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs.mean(0, keepdim=True)


def test_small_neighbours_become_one() -> None:
    batches = [{"words": torch.full((2, 5), i), "mask": torch.ones(2, 5)} for i in range(3)]
    (found,) = merged(Named(), batches)
    assert torch.equal(found["words"], torch.cat([batch["words"] for batch in batches]))
    assert found["mask"].shape == (6, 5)


def test_other_shapes_and_large_batches_stay_apart() -> None:
    batches = [torch.randn(2, 5), torch.randn(2, 6), torch.randn(1, 6), torch.randn(3, FEW_NUMBERS), torch.randn(1, 3)]
    found = list(merged(nn.Identity(), batches))
    assert [tuple(batch.shape) for batch in found] == [(2, 5), (3, 6), (3, FEW_NUMBERS), (1, 3)]
    assert torch.equal(found[1], torch.cat(batches[1:3]))


def test_what_is_no_row_of_an_example_is_not_put_together() -> None:
    batches = [(torch.randn(2, 5), torch.randn(7)) for _ in range(3)]
    assert len(list(merged(nn.Identity(), batches))) == 3


def test_a_model_of_one_batch_size_or_of_other_rows_gets_its_batches_as_they_are() -> None:
    batches = [torch.randn(2, 5) for _ in range(3)]
    for model in (OfTwoRows(), Pooled()):
        found = list(merged(model, batches))
        assert all(one is other for one, other in zip(found, batches, strict=True)), type(model).__name__
