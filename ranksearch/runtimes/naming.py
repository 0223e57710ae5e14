"""Which modules of a model are its layers: those whose weights a runtime multiplies by."""

from torch import nn

from ranksearch.layers import layer_spec
from ranksearch.quantization import quantized_layers


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The model's plain and quantized layers by dotted name, factors as well, each module once."""
    plain = {name: module for name, module in model.named_modules() if layer_spec(module) is not None}
    return {**plain, **quantized_layers(model)}
