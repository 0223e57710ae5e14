"""What scripts/gpu_check times: networks whole, and layers alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from networks import VisionTransformer, resnet18, vgg16
from torch import nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is timed, and the shape of its input, batch included."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


NETWORKS = (
    Subject(name="ResNet-18 at 224, batch 32", build=resnet18, shape=(32, 3, 224, 224)),
    Subject(name="ResNet-18 at 224, batch 1", build=resnet18, shape=(1, 3, 224, 224)),
    Subject(name="VGG-16 at 224, batch 32", build=vgg16, shape=(32, 3, 224, 224)),
    Subject(name="ViT-B/16 at 224, batch 32", build=VisionTransformer, shape=(32, 3, 224, 224)),
)
TINY_NETWORKS = (
    Subject(name="tiny ResNet-18 at 32, batch 2", build=lambda: resnet18(16), shape=(2, 3, 32, 32)),
    Subject(name="tiny VGG-16 at 32, batch 2", build=lambda: vgg16(16), shape=(2, 3, 32, 32)),
    Subject(
        name="tiny ViT at 32, batch 2",
        build=lambda: VisionTransformer(width=64, n_layers=1, size=32),
        shape=(2, 3, 32, 32),
    ),
)


def _conv(width: int, size: int, batch: int) -> Subject:
    return Subject(
        name=f"Conv2d {width} -> {width}, 3x3 at {size}, batch {batch}",
        build=lambda: nn.Sequential(nn.Conv2d(width, width, 3, padding=1)),
        shape=(batch, width, size, size),
    )


def _linear(n_inputs: int, n_outputs: int, batch: int) -> Subject:
    return Subject(
        name=f"Linear {n_inputs} -> {n_outputs}, {batch} rows",
        build=lambda: nn.Sequential(nn.Linear(n_inputs, n_outputs)),
        shape=(batch, n_inputs),
    )


CONVOLUTIONS: Mapping[int, int] = {64: 56, 128: 28, 256: 14, 512: 7}
LAYERS = (
    *(_conv(width, size, 32) for width, size in CONVOLUTIONS.items()),
    _linear(768, 3072, 32 * 197),
    _linear(4096, 4096, 2048),
)
TINY_LAYERS = (_conv(64, 8, 2), _linear(128, 128, 8))
