"""The study scripts load, their data is what a study's data must be, and their models are those they say."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import ranksearch as rs
from ranksearch.spec import Batches, load_study

STUDIES = Path(__file__).parents[1] / "studies"


def load_module(name: str) -> ModuleType:
    """The study script as a module, with its `study`."""
    load_study(STUDIES / f"{name}.py")
    return sys.modules[f"ranksearch_study_{name}"]


@pytest.fixture
def digits() -> ModuleType:
    return load_module("digits")


@pytest.fixture
def resnet20() -> ModuleType:
    return load_module("resnet20_cifar10")


def concatenated(batches: Batches | None) -> tuple[Tensor, Tensor]:
    assert batches is not None
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


def test_digits_splits_share_no_image(digits: ModuleType) -> None:
    data = digits.load_data()
    validation, test, train = data.validation.images, data.test.images, data.train.images
    assert (len(validation), len(test), len(train)) == (600, 400, 797)
    assert len(rows(validation) | rows(test) | rows(train)) == 1797


def test_digits_gives_images_of_one_channel_and_a_label_each(digits: ModuleType) -> None:
    for batches in (digits.load_data().calibration, digits.load_data().validation):
        images, labels = concatenated(batches)
        assert images.shape[1:] == (1, 8, 8) and images.dtype == torch.float32
        assert labels.shape == images.shape[:1] and set(labels.tolist()) == set(range(10))
        assert float(images.min()) >= 0 and float(images.max()) <= 1


@pytest.mark.parametrize("part", ["calibration", "validation", "test"])
def test_digits_gives_the_same_examples_twice(digits: ModuleType, part: str) -> None:
    batches = getattr(digits.load_data(), part)
    for first, second in zip(concatenated(batches), concatenated(batches), strict=True):
        assert torch.equal(first, second)


def test_digits_trains_on_other_shifts_at_each_pass_and_the_same_for_a_seed(digits: ModuleType) -> None:
    train = digits.load_data().train
    passes = []
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        passes.append(concatenated(train)[0])
    assert torch.equal(passes[0], passes[2])
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0], concatenated(train)[0])


def test_digits_shifts_by_at_most_a_pixel(digits: ModuleType) -> None:
    images = torch.zeros(100, 1, 8, 8)
    images[:, :, 3, 3] = 1
    shifted = digits.shift(images, torch.Generator().manual_seed(0))
    assert float(shifted[:, :, 2:5, 2:5].sum()) == pytest.approx(float(shifted.sum()))
    assert float(shifted.sum()) == pytest.approx(100, rel=1e-4)


def test_digits_network_has_about_a_million_weights(digits: ModuleType) -> None:
    network = digits.build_network()
    assert 800_000 <= sum(parameter.numel() for parameter in network.parameters()) <= 1_200_000
    assert network.eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


def test_digits_training_learns_and_depends_on_the_seed_alone(digits: ModuleType) -> None:
    before = torch.get_rng_state()
    networks = [digits.train_network(seed, n_epochs=1) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.get_rng_state())
    weights = [network.conv3.weight for network in networks]
    assert torch.allclose(weights[0], weights[1], atol=1e-4)
    assert not torch.allclose(weights[0], weights[2], atol=1e-4)


def test_digits_trains_once(digits: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANKSEARCH_CACHE", str(tmp_path))
    seeds = []

    def train_briefly(seed: int) -> torch.nn.Module:
        seeds.append(seed)
        return train(seed, n_epochs=1)

    train = digits.train_network
    monkeypatch.setattr(digits, "train_network", train_briefly)
    first, second = digits.study.model().state_dict(), digits.study.model().state_dict()
    monkeypatch.setattr(digits, "SEED", 1)
    other = digits.study.model().state_dict()
    assert seeds == [0, 1]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


@pytest.mark.slow
def test_a_quarter_of_the_digits_training_is_nearly_enough(digits: ModuleType) -> None:
    network = digits.train_network(seed=0, n_epochs=5)
    with torch.no_grad():
        right = [digits.study.score(network(images), labels) for images, labels in digits.load_data().test]
    assert float(torch.cat(right).mean()) > 0.95


def test_resnet20_crops_and_flips_each_image_on_its_own(resnet20: ModuleType) -> None:
    images = torch.randint(1, 256, (8, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(images, (4, 4, 4, 4))
    augmented = resnet20.augment(images, torch.Generator().manual_seed(1))
    kinds = set()
    for image, result in zip(padded, augmented, strict=True):
        [kind] = [kind for kind, crop in crops(image) if torch.equal(crop, result)]
        kinds.add(kind)
    assert len(kinds) > 4 and {flipped for *_, flipped in kinds} == {False, True}


def crops(padded: Tensor) -> Iterator[tuple[tuple[int, int, bool], Tensor]]:
    """All 32x32 crops of an image of 40x40, plain and flipped."""
    for top in range(9):
        for left in range(9):
            crop = padded[:, top : top + 32, left : left + 32]
            yield (top, left, False), crop
            yield (top, left, True), crop.flip(2)


def test_resnet20_has_the_papers_size(resnet20: ModuleType) -> None:
    network = resnet20.ResNet20().eval()
    assert sum(parameter.numel() for parameter in network.parameters()) == 269_722
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("variable", ["RANKSEARCH_DATA", "RANKSEARCH_CIFAR10"])
def test_resnet20_says_where_to_get_what_is_missing(
    resnet20: ModuleType, variable: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANKSEARCH_DATA", raising=False)
    monkeypatch.setenv(variable, str(tmp_path))
    for load in (resnet20.load_data, resnet20.load_model):
        with pytest.raises(rs.StudyError, match=r"RANKSEARCH_DATA.*torchvision.*https://.*RANKSEARCH_CIFAR10"):
            load()


@pytest.mark.data
@pytest.mark.skipif("RANKSEARCH_DATA" not in os.environ, reason="RANKSEARCH_DATA is not set")
def test_resnet20_reads_cifar10_and_scores_as_published(resnet20: ModuleType) -> None:
    images, labels = resnet20.read_split(train=False)
    assert images.shape == (10_000, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.bincount(labels).tolist() == [1000] * 10
    network = resnet20.load_model()
    first = next(iter(resnet20.Batches(images=images, labels=labels, batch_size=1000)))
    with torch.no_grad():
        accuracy = float(resnet20.study.score(network(first[0]), first[1]).mean())
    assert 0.90 <= accuracy <= 0.94
