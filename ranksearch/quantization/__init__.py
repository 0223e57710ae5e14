"""Rounded layers: the arithmetic, the modules that run it, ranges from data, and the packed bits of a file."""

from ranksearch.quantization.error_compensation import compensated
from ranksearch.quantization.formats import CODE_LIMIT, weight_codes, weight_scale
from ranksearch.quantization.modules import (
    ActivationQuantizer,
    QuantizedConv1d,
    QuantizedConv2d,
    QuantizedEmbedding,
    QuantizedLayer,
    QuantizedLinear,
    QuantizedModule,
    activation_quantizers,
    freeze,
    quantize_module,
    quantized_layers,
    quantized_modules,
    round_outputs,
)
from ranksearch.quantization.packing import is_joined, load_packed, packed_state
from ranksearch.quantization.placement import RoundedOutputs, SharedTensors, rounded_outputs, shared_tensors
from ranksearch.quantization.ranges import observe_ranges
from ranksearch.quantization.weight_formats import Half, Int4, Int8, WeightFormat

__all__ = [
    "CODE_LIMIT",
    "ActivationQuantizer",
    "Half",
    "Int4",
    "Int8",
    "QuantizedConv1d",
    "QuantizedConv2d",
    "QuantizedEmbedding",
    "QuantizedLayer",
    "QuantizedLinear",
    "QuantizedModule",
    "RoundedOutputs",
    "SharedTensors",
    "WeightFormat",
    "activation_quantizers",
    "compensated",
    "freeze",
    "is_joined",
    "load_packed",
    "observe_ranges",
    "packed_state",
    "quantize_module",
    "quantized_layers",
    "quantized_modules",
    "round_outputs",
    "rounded_outputs",
    "shared_tensors",
    "weight_codes",
    "weight_scale",
]
