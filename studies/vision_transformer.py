"""A small vision transformer on CIFAR-10, for OpenVINO on two CPU threads.

The study trains it, once, for some minutes, and keeps it in the cache: to be compressed, not to be admired. Or `$MODEL`
names a trained one of transformers, or its folder, such as nateraw/vit-base-patch16-224-cifar10. Images come from where
studies/resnet20_cifar10.py takes them: `$RANKSEARCH_DATA/cifar10`, or torchvision's copy in `$RANKSEARCH_CIFAR10`.
"""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from resnet20_cifar10 import augment, read_split
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.cache import cache_directory, content_hash

try:
    from transformers import AutoConfig, AutoModelForImageClassification, ViTConfig, ViTForImageClassification
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    raise ImportError("this study needs transformers: pip install 'ranksearch[transformers]'") from error

disable_progress_bar()

IMAGE_SIZE = 32
N_EPOCHS, BATCH_SIZE, MAX_LEARNING_RATE = 4, 128, 1e-3
SIZES = {
    "image_size": IMAGE_SIZE,
    "patch_size": 8,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 512,
}


@dataclass(frozen=True, kw_only=True)
class Batches:
    """A re-iterable of (images, labels): in order, or shuffled and each image cropped and flipped on its own.

    Shuffling without a seed draws from torch's global random numbers, anew at each pass. Images are kept as uint8.
    """

    images: Tensor
    labels: Tensor
    size: int = IMAGE_SIZE
    augmented: bool = False
    seed: int | None = None

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        random = torch.default_generator if self.seed is None else torch.Generator().manual_seed(self.seed)
        n = len(self.labels)
        order = torch.randperm(n, generator=random) if self.augmented else torch.arange(n)
        for rows in order.split(BATCH_SIZE):
            images = augment(self.images[rows], random) if self.augmented else self.images[rows]
            yield normalise(images, self.size), self.labels[rows]


def normalise(images: Tensor, size: int) -> Tensor:
    """Float images from -1 to 1 of uint8 ones (N, 3, 32, 32), in the size that the model takes."""
    values = images.float() / 127.5 - 1
    if size == IMAGE_SIZE:
        return values
    return F.interpolate(values, size=(size, size), mode="bilinear", antialias=True)


def train_network(batches: Batches, n_epochs: int) -> nn.Module:
    """A vision transformer trained from scratch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = ViTForImageClassification(ViTConfig(num_labels=10, **SIZES)).train()
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.05)
        n_steps = n_epochs * -(-len(batches.labels) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LEARNING_RATE, n_steps)
        for images, labels in (batch for _ in range(n_epochs) for batch in batches):
            optimizer.zero_grad()
            F.cross_entropy(network(images).logits, labels, label_smoothing=0.1).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def trained_model() -> str:
    """The folder of the network that this study trains; made at the first call."""
    key = content_hash([N_EPOCHS, BATCH_SIZE, MAX_LEARNING_RATE, SIZES])
    folder = cache_directory() / "vision-transformer" / key
    if not folder.is_dir():
        images, labels = read_split(train=True)
        print("training the vision transformer, once (some minutes)", file=sys.stderr, flush=True)
        network = train_network(Batches(images=images, labels=labels, augmented=True), N_EPOCHS)
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        network.save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(aside)
    return str(folder)


def load_model() -> nn.Module:
    """The trained network, images (N, 3, H, W) in, logits (N, 10) out."""
    model = os.environ.get("MODEL") or trained_model()
    return rs.adapters.Classifier(AutoModelForImageClassification.from_pretrained(model, dtype="float32")).eval()


def load_data() -> rs.Data:
    """Augmented training images, and of the test images one half for the search, the other for the report."""
    size = AutoConfig.from_pretrained(os.environ["MODEL"]).image_size if "MODEL" in os.environ else IMAGE_SIZE
    images, labels = read_split(train=True)
    test_images, test_labels = read_split(train=False)
    return rs.Data(
        calibration=Batches(images=images[:10_000], labels=labels[:10_000], size=size, augmented=True, seed=0),
        train=Batches(images=images, labels=labels, size=size, augmented=True),
        validation=Batches(images=test_images[:5000], labels=test_labels[:5000], size=size),
        test=Batches(images=test_images[5000:], labels=test_labels[5000:], size=size),
    )


study = rs.StudySpec(
    name="vit-cifar10-openvino",
    model=load_model,
    data=load_data,
    loss=F.cross_entropy,
    score=rs.top1,
    target=rs.Target(runtime="openvino", device="cpu", batch_size=8, threads=2, precision="f32"),
    goals=rs.Goals(max_drop="1%"),
    space=rs.Space(ties=rs.adapters.TIES["vit"]),
    recovery=rs.Recovery(steps=50, learning_rate=5e-4, optimizer="adamw"),
    objectives=("drop", "latency", "bytes"),
    seed=0,
)
