"""Modules of libraries that the tests do not need installed, as those libraries write them."""

import torch
from torch import Tensor, nn


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in transformers: its weight is (in, out)."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


def as_linear(layer: Conv1D) -> nn.Linear:
    """The nn.Linear of the same outputs."""
    linear = nn.Linear(layer.nx, layer.nf)
    with torch.no_grad():
        linear.weight.copy_(layer.weight.T)
        linear.bias.copy_(layer.bias)
    return linear


def as_image(layer: nn.Conv1d) -> nn.Conv2d:
    """The nn.Conv2d of height one that computes what a Conv1d does, on (N, C, 1, L)."""
    padding = layer.padding if isinstance(layer.padding, str) else (0, *layer.padding)
    image = nn.Conv2d(
        layer.in_channels,
        layer.out_channels,
        (1, *layer.kernel_size),
        stride=(1, *layer.stride),
        padding=padding,
        dilation=(1, *layer.dilation),
        groups=layer.groups,
        bias=layer.bias is not None,
        padding_mode=layer.padding_mode,
    )
    with torch.no_grad():
        image.weight.copy_(layer.weight.unsqueeze(2))
        if layer.bias is not None:
            image.bias.copy_(layer.bias)
    return image
