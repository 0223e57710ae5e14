"""Strides that OpenVINO's kernels for rounded values get wrong."""

from typing import Any

from ranksearch.runtimes.openvino.runtime import load_openvino

# The kernel takes blocks of 8 channels, two at a time.
BLOCK = 8
# What gives rounded values where it is given some.
PASSING_ON = ("AvgPool", "Concat", "MaxPool", "Relu", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


def slice_strides(model: Any) -> None:
    """Has rounded pointwise convolutions of a stride read every so many positions by a slice instead (in place).

    Without AVX-512, several threads of OpenVINO 2026.4 share the copy that such a convolution makes of its input where
    channels are an odd multiple of 8, and its outputs are wrong at times. Others keep their stride, which is faster.
    """
    ov = load_openvino()
    for op in model.get_ordered_ops():
        if op.get_type_name() != "Convolution" or not _is_wrong(op):
            continue
        strides, source = op.get_attributes()["strides"], op.input_value(0)
        # Fewer positions are rounded where nothing else reads them.
        before = source.get_node().get_type_name() == "FakeQuantize" and len(source.get_target_inputs()) == 1
        port = source.get_node().input(0) if before else op.input(0)
        n_axes = 2 + len(strides)
        begin, steps = ov.opset13.constant([0] * n_axes), ov.opset13.constant([1, 1, *strides])
        every = [1] * n_axes
        sliced = ov.opset13.strided_slice(port.get_source_output(), begin, begin, steps, every, every)
        port.replace_source_output(sliced.output(0))
        op.set_attribute("strides", [1] * len(strides))
    model.validate_nodes_and_infer_types()


def _is_wrong(op: Any) -> bool:
    shape, found = op.input_value(1).get_partial_shape(), op.get_attributes()
    if shape.is_dynamic or not _is_rounded(op.input_value(0)):
        return False
    _, n_inputs, *window = (size.get_length() for size in shape)
    return (
        n_inputs % (2 * BLOCK) == BLOCK
        and set(window) == {1}
        and max(found["strides"]) > 1
        and not any((*found["pads_begin"], *found["pads_end"]))
    )


def _is_rounded(value: Any) -> bool:
    while (node := value.get_node()).get_type_name() in PASSING_ON:
        value = node.input_value(0)
    return bool(node.get_type_name() == "FakeQuantize")
