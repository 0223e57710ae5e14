"""Networks of the shapes that people run, in plain torch with random weights: ResNets, VGG-16, ViT-B/16."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from common import study_script
from torch import Tensor, nn

VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


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


def resnet18(width: int = 64, n_blocks: tuple[int, ...] = (2, 2, 2, 2)) -> nn.Module:
    """For images of any size; `width` is that of the first stage. With (3, 4, 6, 3) blocks it is ResNet-34."""
    stages = [
        Block(width * (2 ** (max(stage - 1, 0) if i == 0 else stage)), width * 2**stage, 2 if stage and i == 0 else 1)
        for stage, count in enumerate(n_blocks)
        for i in range(count)
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


def cifar_resnet(depth: int, study: Mapping[str, Any] | None = None) -> nn.Module:
    """He et al.'s for CIFAR-10, as the study has ResNet-20: 6 n + 2 layers are n blocks in each of three stages."""
    parts = study or study_script("resnet20_cifar10")
    network, block, n_blocks = parts["ResNet20"](), parts["BasicBlock"], (depth - 2) // 6
    for stage, (before, width) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
        first = block(before, width, 1 if stage == 1 else 2)
        setattr(network, f"layer{stage}", nn.Sequential(first, *(block(width, width, 1) for _ in range(n_blocks - 1))))
    return network
