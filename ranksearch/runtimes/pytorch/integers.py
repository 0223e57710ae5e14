"""8-bit layers as products of integers: torch's own int8 matrix product, for Linear and 1x1 convolutions.

No integer convolution exists in torch. The product takes int8 on both sides, on CPUs and on CUDA, and survives
torch.export and torch.compile.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from ranksearch.layers import ConvSpec, LayerSpec
from ranksearch.quantization import (
    ActivationQuantizer,
    QuantizedLayer,
    activation_quantizers,
    quantized_layers,
    weight_codes,
)

Kind = Literal["cpu", "cuda"]
# Without these instructions oneDNN adds int8 products in 16 bits, or takes longer than float.
VNNI = ("avx512_vnni", "avx_vnni")
# What cuBLAS demands of an int8 product.
CUDA_MULTIPLE, CUDA_ROWS = 8, 17
# Activation codes are 0..255 in a plan and -128..127 in the product.
SHIFT = 128


def takes(spec: LayerSpec, kind: Kind, isa: str) -> bool:
    """Whether the int8 product runs a layer of this spec; `isa` are the CPU's instruction sets."""
    if isinstance(spec, ConvSpec) and not _is_pointwise(spec):
        return False
    if kind == "cuda":
        return not any(width % CUDA_MULTIPLE for width in spec.weight_shape[:2])
    return any(flag in isa.split() for flag in VNNI)


def integer_layers(model: nn.Module, kind: Kind, isa: str) -> dict[str, nn.Module]:
    """The 8-bit layers of the model that the int8 product runs, by name, as modules that call it."""
    quantized = {name: module for name, module in quantized_layers(model).items() if module.rounds_inputs}
    quantizers: dict[str, nn.Module] = {name: module.activation for name, module in quantized.items()}
    for moved in activation_quantizers(model).values():
        quantizers |= dict.fromkeys(moved.readers, moved)
    return {
        name: IntegerProduct(module, quantizer, least_rows=CUDA_ROWS if kind == "cuda" else 1)
        for name, module in quantized.items()
        if takes(module.spec, kind, isa) and isinstance(quantizer := quantizers[name], ActivationQuantizer)
    }


class IntegerProduct(nn.Module):
    """A quantized Linear or 1x1 convolution whose codes are multiplied as integers and summed in 32 bits.

    Fewer rows than `least_rows` are filled up with zeros. Outputs are of the inputs' type.
    """

    step: Tensor
    offset: Tensor

    def __init__(self, module: QuantizedLayer, quantizer: ActivationQuantizer, *, least_rows: int) -> None:
        super().__init__()
        scale, zero = float(quantizer.scale), int(quantizer.zero_point) - SHIFT
        grid_scale = module.grid.scale
        assert grid_scale is not None, "int8 has steps"
        codes = weight_codes(module.weight, grid_scale).flatten(1)
        step = grid_scale.detach() * scale
        # What the zero point adds to every sum of products, taken off beside the bias.
        shifted = zero * codes.sum(1, dtype=torch.int32) * step
        bias = torch.zeros_like(step) if module.bias is None else module.bias.detach().float()
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("step", step)
        self.register_buffer("offset", bias - shifted)
        self.input_scale, self.input_zero, self.least_rows = scale, zero, least_rows
        stride = module.spec.stride if isinstance(module.spec, ConvSpec) else ()
        self.picked: Any = (..., *(slice(None, None, each) for each in stride))
        self.channels = -1 - len(stride)
        # Hooks may round other tensors by the quantizers that the layer held.
        for name, held in module.named_children():
            self.add_module(name, held)

    def forward(self, inputs: Tensor) -> Tensor:
        rows = inputs[self.picked].movedim(self.channels, -1)
        outputs = self._product(rows.reshape(-1, rows.shape[-1])).to(inputs.dtype)
        return outputs.reshape(*rows.shape[:-1], -1).movedim(-1, self.channels)

    def _product(self, rows: Tensor) -> Tensor:
        """(n, in) to (n, out), in float32."""
        codes = (rows.float() * (1 / self.input_scale)).round() + self.input_zero
        integers = codes.clamp(-SHIFT, SHIFT - 1).to(torch.int8)
        missing = self.least_rows - len(integers)
        padded = functional.pad(integers, (0, 0, 0, missing)) if missing > 0 else integers
        sums: Tensor = torch._int_mm(padded, self.codes.t())
        return torch.addcmul(self.offset, sums[: len(integers)].float(), self.step)


def _is_pointwise(spec: ConvSpec) -> bool:
    padded = not isinstance(spec.padding, str) and any(spec.padding)
    return spec.groups == 1 and not padded and all(size == 1 for size in spec.kernel_size)
