"""The plain modules that take a layer's place: convolutions that filter, and such as only mix channels."""

from collections.abc import Collection

from torch import nn

from ranksearch.layers import ConvSpec, LayerSpec, LinearSpec

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
_CONVOLUTIONS: dict[int, type[nn.Conv1d] | type[nn.Conv2d]] = {1: nn.Conv1d, 2: nn.Conv2d}


def pointwise(spec: LayerSpec, n_inputs: int, n_outputs: int, *, groups: int = 1, bias: bool = False) -> Layer:
    """A layer of the spec's kind that mixes channels only: 1x1 for a convolution, a Linear (without groups) else."""
    if isinstance(spec, LinearSpec):
        assert groups == 1, "a Linear has no groups"
        return nn.Linear(n_inputs, n_outputs, bias=bias)
    return filtering(spec, n_inputs, n_outputs, axes=(), groups=groups, bias=bias)


def filtering(
    spec: ConvSpec,
    n_inputs: int,
    n_outputs: int,
    *,
    axes: Collection[int] = (0, 1),
    groups: int = 1,
    bias: bool = False,
) -> nn.Conv1d | nn.Conv2d:
    """A convolution with the spec's kernel, stride, padding and dilation along `axes`, and none of them elsewhere."""

    def along(values: tuple[int, ...], other: int) -> tuple[int, ...]:
        return tuple(value if axis in axes else other for axis, value in enumerate(values))

    # torch's words hold for a kernel of one pixel too, which they pad by nothing.
    padding = spec.padding if isinstance(spec.padding, str) else along(spec.padding, 0)
    return _CONVOLUTIONS[len(spec.kernel_size)](
        n_inputs,
        n_outputs,
        along(spec.kernel_size, 1),  # type: ignore[arg-type]
        stride=along(spec.stride, 1),  # type: ignore[arg-type]
        padding=padding,  # type: ignore[arg-type]
        dilation=along(spec.dilation, 1),  # type: ignore[arg-type]
        groups=groups,
        bias=bias,
        padding_mode=spec.padding_mode,
    )


def chain(*modules: Layer) -> nn.Sequential:
    """The modules one after the other, the last one's bias set to zero."""
    last = modules[-1]
    assert last.bias is not None, "the last factor always carries the layer's bias"
    nn.init.zeros_(last.bias)
    return nn.Sequential(*modules)
