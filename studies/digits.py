"""The embedded study: a small convolutional network on scikit-learn's digits, trained once and then cached.

Copy this file for a model of your own: ranksearch needs a trained model, data, a loss, a score, and where it must run.
"""

import os
import sys
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import safetensors.torch
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.cache import Cache, cache_directory, content_hash

SEED = int(os.environ.get("RANKSEARCH_DIGITS_SEED", "0"))  # of the training, so that a benchmark can repeat it
N_VALIDATION, N_TEST = 600, 400  # of 1,797 images; below 600 a drop of 1 % could hardly be told from none
# The two widths tried: (64, 128, 256, 256), 0.96 M weights, 99.6 % of the test images over two seeds;
# (96, 192, 192, 256), 0.94 M weights, 99.9 % (one image of 400 more), 1.25 times as long per batch in f32.
WIDTHS = (64, 128, 256, 256)
N_EPOCHS, BATCH_SIZE, MAX_LEARNING_RATE = 20, 64, 0.1


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A re-iterable of (images, labels): in order, or shuffled and each image shifted by up to a pixel.

    Shuffling without a seed draws from torch's global random numbers, anew at each pass.
    """

    images: Tensor
    labels: Tensor
    batch_size: int = 200
    shifted: bool = False
    seed: int | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.default_generator if self.seed is None else torch.Generator().manual_seed(self.seed)
        n = len(self.labels)
        order = torch.randperm(n, generator=random) if self.shifted else torch.arange(n)
        for rows in order.split(self.batch_size):
            images = shift(self.images[rows], random) if self.shifted else self.images[rows]
            yield images, self.labels[rows]


def shift(images: Tensor, random: torch.Generator) -> Tensor:
    """Each image, (N, 1, 8, 8), moved by its own share of a pixel; what comes in at the border is 0."""
    move = torch.eye(2, 3).repeat(len(images), 1, 1)
    move[:, :, 2] = (2 * torch.rand(len(images), 2, generator=random) - 1) * 2 / 8  # the 8 pixels span -1 to 1
    return F.grid_sample(images, F.affine_grid(move, list(images.shape), align_corners=False), align_corners=False)


def load_data() -> rs.Data:
    """One fixed split into training, validation and test images; calibration is on shifted training images."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16)[order]
    labels = torch.tensor(digits.target, dtype=torch.int64)[order]
    sizes = [N_TEST, N_VALIDATION, len(labels) - N_TEST - N_VALIDATION]
    pairs = zip(images.split(sizes), labels.split(sizes), strict=True)
    test, validation, train = ({"images": part, "labels": part_labels} for part, part_labels in pairs)
    return rs.Data(
        calibration=Batches(**train, batch_size=BATCH_SIZE, shifted=True, seed=0),
        validation=Batches(**validation),
        train=Batches(**train, batch_size=BATCH_SIZE, shifted=True),
        test=Batches(**test),
    )


def build_network() -> nn.Sequential:
    """Four 3x3 convolutions with BatchNorm, on 8x8 pixels and after one pooling on 4x4: 0.96 million weights."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    in_channels = 1
    for i, width in enumerate(WIDTHS, start=1):
        layers[f"conv{i}"] = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        layers[f"norm{i}"] = nn.BatchNorm2d(width)
        layers[f"relu{i}"] = nn.ReLU()
        if i == 2:
            layers["pool"] = nn.MaxPool2d(2)
        in_channels = width
    layers |= {"mean": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "classifier": nn.Linear(in_channels, 10)}
    return nn.Sequential(layers)


def train_network(seed: int, n_epochs: int = N_EPOCHS) -> nn.Sequential:
    """A network trained from scratch, less than a minute on two cores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network, batches = build_network().train(), load_data().train
        n_steps = n_epochs * sum(1 for _ in batches)
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0, momentum=0.9, nesterov=True, weight_decay=5e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LEARNING_RATE, n_steps)
        for images, labels in (batch for _ in range(n_epochs) for batch in batches):
            optimizer.zero_grad()
            # Smoothing keeps the outputs from saturating: where all is certain, no gradient tells layers apart.
            F.cross_entropy(network(images), labels, label_smoothing=0.05).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def load_model() -> nn.Sequential:
    """The trained network; the first call trains it and leaves its weights in the cache, later ones read them."""
    cache = Cache(directory=cache_directory() / "digits")
    key = content_hash([WIDTHS, N_EPOCHS, BATCH_SIZE, MAX_LEARNING_RATE, N_VALIDATION, N_TEST, SEED])
    weights = cache.get(key)
    if weights is None:
        print("digits: training the network, once (half a minute on two cores)", file=sys.stderr, flush=True)
        weights = safetensors.torch.save(train_network(SEED).state_dict())
        cache.put(key, weights)
    network = build_network()
    network.load_state_dict(safetensors.torch.load(weights))
    return network.eval()


study = rs.StudySpec(
    name="digits",
    model=load_model,
    data=load_data,
    loss=F.cross_entropy,
    score=rs.top1,
    target=rs.Target(runtime="openvino", device="cpu", batch_size=32, threads=1, precision="f32"),
    goals=rs.Goals(max_drop="1%"),
    recovery=rs.Recovery(steps=40, learning_rate=0.02),
    objectives=("drop", "latency", "bytes"),
    seed=0,
)
