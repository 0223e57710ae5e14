"""Pooling windows as converters take them."""

from typing import Any

from torch import Tensor, nn

POOLS = (nn.AvgPool2d, nn.MaxPool2d)


def fit_windows(model: nn.Module) -> nn.Module:
    """The model (in place) whose pooling windows, where they reach beyond the input, are cut to it when it is run.

    Torch takes such a window where `ceil_mode` lets it hang over, as transformers' EfficientNet pools whatever is
    left; OpenVINO refuses it.
    """
    for module in model.modules():
        if isinstance(module, POOLS) and module.ceil_mode:
            module.register_forward_pre_hook(_fit)
    return model


def _fit(pool: Any, inputs: tuple[Tensor, ...]) -> None:
    sizes = [int(size) for size in inputs[0].shape[-2:]]  # numbers, also where tracing would give tensors
    kernel, stride, padding, dilation = (
        _pair(value) for value in (pool.kernel_size, pool.stride, pool.padding, getattr(pool, "dilation", 1))
    )
    # The next window would begin beyond the input: there is but this one, and nothing else for it to see.
    over = [
        k > size <= step and pad == 0 and gap == 1
        for k, size, step, pad, gap in zip(kernel, sizes, stride, padding, dilation, strict=True)
    ]
    if any(over):
        pool.kernel_size = tuple(size if o else k for size, k, o in zip(sizes, kernel, over, strict=True))
        pool.stride = tuple(size if o else step for size, step, o in zip(sizes, stride, over, strict=True))


def _pair(value: int | tuple[int, int]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else value
