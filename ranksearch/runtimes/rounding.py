"""Rounded weights as runtimes take them: fixed, so that nothing rounds them again at every run."""

from torch import nn

from ranksearch.quantization import Int8, QuantizedModule, freeze, quantized_modules
from ranksearch.surgery import replace_modules


def stored_layers(model: nn.Module) -> dict[str, QuantizedModule]:
    """The layers and embeddings of the model, by name, whose weights alone are rounded."""
    return {name: module for name, module in quantized_modules(model).items() if not module.rounds_inputs}


def fix_weights(model: nn.Module) -> nn.Module:
    """The model with its weights on their grids (in place).

    Layers whose inputs are rounded stay quantized modules, without a clamp of their weights; the others, which compute
    in float, become plain layers of the rounded weights.
    """
    freeze(model)
    plain = {}
    for name, module in quantized_modules(model).items():
        if module.rounds_inputs:
            module.weight_format = Int8()
        else:
            plain[name] = module.in_float()
    return replace_modules(model, plain)
