"""The networks whose latencies are predicted: random weights and inputs, as neither changes how long a model takes."""

from dataclasses import dataclass

import networks
import torch
from common import study_script
from torch import Tensor, nn

from ranksearch.finding import LayerInfo, compressible_layers


@dataclass(frozen=True, kw_only=True, eq=False)
class Network:
    """A model in eval mode, an input of the batch size that it is timed at, and its layers but the first.

    The first has three input channels, or one: nothing to factor.
    """

    name: str
    model: nn.Module
    example: Tensor
    layers: dict[str, LayerInfo]


def cifar_resnet(depth: int, batch_size: int = 32) -> Network:
    """The study's ResNet-20, or a deeper one."""
    torch.manual_seed(0)
    model = networks.cifar_resnet(depth)
    return _network(f"ResNet-{depth}", model, torch.randn(batch_size, 3, 32, 32))


def resnet18(batch_size: int = 1) -> Network:
    """ResNet-18 for ImageNet."""
    torch.manual_seed(0)
    return _network(
        f"ResNet-18 at 224x224, batch {batch_size}", networks.resnet18(), torch.randn(batch_size, 3, 224, 224)
    )


def resnet34(batch_size: int = 1) -> Network:
    """ResNet-34 for ImageNet."""
    torch.manual_seed(0)
    model = networks.resnet18(n_blocks=(3, 4, 6, 3))
    return _network(f"ResNet-34 at 224x224, batch {batch_size}", model, torch.randn(batch_size, 3, 224, 224))


def digits(batch_size: int = 32) -> Network:
    """The embedded study's network."""
    torch.manual_seed(0)
    study = study_script("digits")
    return _network("digits", study["build_network"](), torch.randn(batch_size, 1, 8, 8))


def _network(name: str, model: nn.Module, example: Tensor) -> Network:
    found = dict(compressible_layers(model.eval(), example).layers)
    first = next(iter(found))
    return Network(name=name, model=model, example=example, layers={n: i for n, i in found.items() if n != first})
