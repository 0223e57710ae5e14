"""The networks whose latencies are predicted: random weights and inputs, as neither changes how long a model takes."""

import runpy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from common import ROOT
from torch import Tensor, nn

from ranksearch.layers import LayerInfo, compressible_layers

WIDTHS = (64, 64, 128, 256, 512)


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A model in eval mode, an input of the batch size that it is timed at, and its layers but the first.

    The first has three input channels, or one: nothing to factor.
    """

    name: str
    model: nn.Module
    example: Tensor
    layers: dict[str, LayerInfo]


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, projected by a 1x1 where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut: nn.Module = nn.Identity()
        if in_channels != channels:
            projection = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class ResNet18(nn.Module):
    """He et al. (2015) for ImageNet: (N, 3, 224, 224) to (N, 1000) logits, 11.7 million weights."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, WIDTHS[0], 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        stages = zip(WIDTHS, WIDTHS[1:], strict=False)
        self.stages = nn.Sequential(
            *(nn.Sequential(Block(b, w, 1 if i == 0 else 2), Block(w, w, 1)) for i, (b, w) in enumerate(stages))
        )
        self.fc = nn.Linear(WIDTHS[-1], 1000)

    def forward(self, x: Tensor) -> Tensor:
        stem = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, stride=2, padding=1)
        return self.fc(self.stages(stem).mean((2, 3)))


def cifar_resnet(depth: int, batch_size: int = 32) -> Network:
    """The studies' ResNet-20, or a deeper one: 6 n + 2 layers are n blocks in each of three stages."""
    study = runpy.run_path(str(ROOT / "studies" / "resnet20_cifar10.py"))
    torch.manual_seed(0)
    model, block, n_blocks = study["ResNet20"](), study["BasicBlock"], (depth - 2) // 6
    for stage, (before, width) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
        first = block(before, width, 1 if stage == 1 else 2)
        setattr(model, f"layer{stage}", nn.Sequential(first, *(block(width, width, 1) for _ in range(n_blocks - 1))))
    return _network(f"ResNet-{depth}", model, torch.randn(batch_size, 3, 32, 32))


def resnet18(batch_size: int = 1) -> Network:
    """ResNet-18 for ImageNet."""
    torch.manual_seed(0)
    return _network(f"ResNet-18 at 224x224, batch {batch_size}", ResNet18(), torch.randn(batch_size, 3, 224, 224))


def digits(batch_size: int = 32) -> Network:
    """The embedded study's network."""
    torch.manual_seed(0)
    study = runpy.run_path(str(ROOT / "studies" / "digits.py"))
    return _network("digits", study["build_network"](), torch.randn(batch_size, 1, 8, 8))


def _network(name: str, model: nn.Module, example: Tensor) -> Network:
    found = dict(compressible_layers(model.eval(), example).layers)
    first = next(iter(found))
    return Network(name=name, model=model, example=example, layers={n: i for n, i in found.items() if n != first})
