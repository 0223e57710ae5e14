"""Networks of the shapes that people run, in plain torch with random weights: ResNet-18, VGG-16, ViT-B/16."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """What is timed, and the shape of its input, batch included."""

    name: str
    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


class Block(nn.Module):
    """He et al.'s basic block."""

    def __init__(self, n_inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(n_inputs, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride != 1 or n_inputs != width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(n_inputs, width, 1, stride=stride, bias=False), nn.BatchNorm2d(width)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.bn2(self.conv2(inner)) + self.shortcut(inputs))


def resnet18(width: int = 64) -> nn.Module:
    """For images of any size; `width` is that of the first stage."""
    stages = [
        Block(width * (2 ** (max(stage - 1, 0) if i == 0 else stage)), width * 2**stage, 2 if stage and i == 0 else 1)
        for stage in range(4)
        for i in range(2)
    ]
    stem = [nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 1000)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *stages, *head)


def vgg16(divisor: int = 1) -> nn.Module:
    """For images of any size from 32 up; every width divided by `divisor`."""
    layers: list[nn.Module] = []
    n_inputs = 3
    for width in VGG16:
        if width == 0:
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(n_inputs, width // divisor, 3, padding=1), nn.ReLU()]
        n_inputs = width // divisor
    hidden = 4096 // divisor
    head = [nn.AdaptiveAvgPool2d(7), nn.Flatten(), nn.Linear(49 * n_inputs, hidden), nn.ReLU()]
    return nn.Sequential(*layers, *head, nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, 1000))


class Attention(nn.Module):
    """Self-attention over (N, tokens, width)."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, inputs: Tensor) -> Tensor:
        n_rows, n_tokens, width = inputs.shape
        heads = self.qkv(inputs).view(n_rows, n_tokens, 3, self.n_heads, width // self.n_heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(n_rows, n_tokens, width))


class Encoder(nn.Module):
    """A layer of a transformer, normalised first."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, n_heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, inputs: Tensor) -> Tensor:
        inner = inputs + self.attention(self.norm1(inputs))
        return inner + self.mlp(self.norm2(inner))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al.'s, for square images."""

    def __init__(self, width: int = 768, n_layers: int = 12, size: int = 224, patch: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.start = nn.Parameter(torch.zeros(1, 1, width))
        self.places = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, width))
        self.layers = nn.Sequential(*(Encoder(width, width // 64) for _ in range(n_layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.start.expand(len(tokens), -1, -1), tokens], dim=1) + self.places
        return self.head(self.norm(self.layers(tokens))[:, 0])


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
