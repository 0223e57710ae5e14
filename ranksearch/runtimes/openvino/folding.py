"""What a model computes of constants alone, computed once: OpenVINO leaves some of it."""

from typing import Any

from ranksearch.runtimes.openvino.runtime import core, load_openvino

MULTIPLYING = ("Convolution", "GroupConvolution", "MatMul")
# In float, rounded values among them: as integers it may fail on what is folded here.
IN_FLOAT = {"INFERENCE_PRECISION_HINT": "f32", "LP_TRANSFORMS_MODE": "OFF"}


def fold_products(model: Any) -> None:
    """Computes the products and the attention of an openvino.Model that read constants alone (in place).

    DETR's queries do so. OpenVINO 2026.4 folds no attention and no product of rounded values, and may then fail to
    compile what is behind them.
    """
    ov, changing = load_openvino(), set()
    for op in model.get_ordered_ops():
        reads_inputs = any(value.get_node().get_friendly_name() in changing for value in op.input_values())
        if op.get_type_name() == "ShapeOf" and op.input_value(0).get_partial_shape().is_static:
            # What is repeated for each row of a batch that is known.
            shape = list(op.input_value(0).get_shape())
            op.output(0).replace(ov.opset13.constant(shape, op.output(0).get_element_type()).output(0))
        elif op.get_type_name() == "Parameter" or reads_inputs:
            changing.add(op.get_friendly_name())
        elif op.get_type_name() in (*MULTIPLYING, "ScaledDotProductAttention"):
            (values,) = core().compile_model(ov.Model([op.output(0)], []), "CPU", IN_FLOAT)([]).values()
            op.output(0).replace(ov.opset13.constant(values).output(0))
