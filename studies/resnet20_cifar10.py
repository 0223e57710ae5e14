"""ResNet-20 on CIFAR-10 for OpenVINO on two CPU threads.

Data and weights come from `$RANKSEARCH_DATA/cifar10` (cifar10_train.npz, cifar10_test.npz, resnet20-12fca82f.th), or
from torchvision's copy of CIFAR-10 in `$RANKSEARCH_CIFAR10` (default ./data), with the weights file beside it.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranksearch as rs

WEIGHTS = "resnet20-12fca82f.th"
WEIGHTS_URL = f"https://github.com/akamaster/pytorch_resnet_cifar10/raw/master/pretrained_models/{WEIGHTS}"
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
PADDING = 4  # pixels that an augmented crop may be off centre
BATCH_SIZE = 128


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without weights: subsample, pad the channels with zeros (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride, self.n_added = stride, channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.n_added:
            half = self.n_added // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, half))
        return F.relu(out + x)


class ResNet20(nn.Module):
    """He et al. (2015) for CIFAR-10: (N, 3, 32, 32) normalised images to (N, 10) logits, 0.27 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, stride=1)
        self.layer2 = _stage(16, 32, stride=2)
        self.layer3 = _stage(32, 64, stride=2)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(out.mean((2, 3)))


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    blocks = [BasicBlock(channels, channels, 1) for _ in range(2)]
    return nn.Sequential(BasicBlock(in_channels, channels, stride), *blocks)


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A re-iterable of (images, labels), kept as uint8 and normalised batch by batch, in order, every pass the same."""

    images: Tensor
    labels: Tensor
    batch_size: int = 500

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            rows = slice(start, start + self.batch_size)
            yield normalise(self.images[rows]), self.labels[rows]


@dataclass(frozen=True, kw_only=True)
class AugmentedBatches:
    """Shuffled, each image cropped and flipped at random on its own, the raw pixels padded *before* normalising:
    padded afterwards, zeros would mean grey and BatchNorm's statistics would be off by two points of accuracy.

    Without a seed by torch's global random numbers, anew at each pass; with one every pass is the same.
    """

    images: Tensor
    labels: Tensor
    batch_size: int = BATCH_SIZE
    seed: int | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.default_generator if self.seed is None else torch.Generator().manual_seed(self.seed)
        for rows in torch.randperm(len(self.labels), generator=random).split(self.batch_size):
            yield normalise(augment(self.images[rows], random)), self.labels[rows]


def normalise(images: Tensor) -> Tensor:
    """Float images of mean 0 and deviation 1 from uint8 ones, (N, 3, 32, 32)."""
    return (images.float() / 255 - MEAN) / STD


def augment(images: Tensor, random: torch.Generator) -> Tensor:
    """Each uint8 image, (N, 3, 32, 32), padded by 4, cropped at random, and flipped half of the time."""
    n, _, height, width = images.shape
    top, left = torch.randint(0, 2 * PADDING + 1, (2, n, 1), generator=random)
    flipped = torch.rand(n, 1, generator=random) < 0.5
    columns = torch.arange(width).expand(n, width)
    columns = left + torch.where(flipped, width - 1 - columns, columns)
    lines = top + torch.arange(height)
    padded = F.pad(images, (PADDING,) * 4)
    picked = padded[torch.arange(n)[:, None, None], :, lines[:, :, None], columns[:, None, :]]  # (N, H, W, 3)
    return picked.permute(0, 3, 1, 2)


def read_npz(path: Path) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, 32, 32) and labels of a file that holds the pixels as differences, which deflate halves."""
    with np.load(path) as file:
        pixels, labels = file["d"], file["y"].astype(np.int64)
    for axis in (2, 3):
        np.cumsum(pixels, axis, dtype=np.uint8, out=pixels)
    pixels[:, 0] += pixels[:, 1]
    pixels[:, 2] += pixels[:, 1]
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def read_torchvision(root: Path, train: bool) -> tuple[Tensor, Tensor]:
    """uint8 images (N, 3, 32, 32) and labels of torchvision's copy of CIFAR-10 under `root`."""
    try:
        from torchvision.datasets import CIFAR10

        dataset = CIFAR10(root, train=train, download=False)
    except (ImportError, RuntimeError, OSError) as error:
        raise rs.StudyError(missing(root)) from error
    return torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)


def missing(folder: Path) -> str:
    """What to say where data or weights are not found."""
    return (
        f"CIFAR-10 or {WEIGHTS} is not in {folder}: set RANKSEARCH_DATA to a folder whose cifar10/ holds "
        f"cifar10_train.npz, cifar10_test.npz and {WEIGHTS}; or `pip install torchvision`, run "
        f"torchvision.datasets.CIFAR10('data', download=True), put {WEIGHTS_URL} beside it, "
        "and set RANKSEARCH_CIFAR10 to that folder if it is not ./data"
    )


def folder() -> Path:
    """Where data and weights lie."""
    if home := os.environ.get("RANKSEARCH_DATA"):
        return Path(home) / "cifar10"
    return Path(os.environ.get("RANKSEARCH_CIFAR10", "data"))


def read_split(train: bool) -> tuple[Tensor, Tensor]:
    """All training or all test images and their labels."""
    file = folder() / f"cifar10_{'train' if train else 'test'}.npz"
    return read_npz(file) if file.is_file() else read_torchvision(folder(), train)


def load_data() -> rs.Data:
    """Calibration and fine-tuning on augmented training images; the checkpoint was chosen on the test images, whose
    first half is for the search and whose second half only for the report."""
    images, labels = read_split(train=True)
    test_images, test_labels = read_split(train=False)
    return rs.Data(
        calibration=AugmentedBatches(images=images[:10_000], labels=labels[:10_000], seed=0),
        train=AugmentedBatches(images=images, labels=labels),
        validation=Batches(images=test_images[:5000], labels=test_labels[:5000]),
        test=Batches(images=test_images[5000:], labels=test_labels[5000:]),
    )


def load_model() -> nn.Module:
    """The trained network, 91.7 % on the test images."""
    path = folder() / WEIGHTS
    if not path.is_file():
        raise rs.StudyError(missing(folder()))
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): tensor for name, tensor in state.items()})
    return model.eval()


study = rs.StudySpec(
    name="resnet20-cifar10-openvino",
    model=load_model,
    data=load_data,
    loss=F.cross_entropy,
    score=rs.top1,
    target=rs.Target(runtime="openvino", device="cpu", batch_size=32, threads=2, precision="f32"),
    goals=rs.Goals(max_drop="1%"),
    space=rs.Space(skip=["conv1"]),  # three input channels: nothing to factor, and the first layer is the touchiest
    # About 15 s a trial on two cores. So few steps want a small rate: at 0.1 they lose accuracy.
    recovery=rs.Recovery(steps=50, learning_rate=0.005),
    objectives=("drop", "latency", "bytes"),
    seed=0,
)
