"""An ONNX graph under change: its constants, and who makes and who reads each value. Without torch."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ranksearch.runtimes.structure import check_fits

Array = NDArray[Any]
FOLDED_CASTS = (np.uint8, np.int8)


class Graph:
    """Nodes and constants by name; `store` writes both back into the model, in an order in which they can run."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        self._nodes: dict[int, Any] = {}
        self._makers: dict[str, Any] = {}
        self._readers: dict[str, dict[int, Any]] = {}
        self._n_made = 0
        self.outputs = [value.name for value in model.graph.output]
        for node in model.graph.node:
            if not self._is_constant(node):
                self.add(node)

    def nodes(self, *kinds: str) -> list[Any]:
        """The nodes of these kinds, as they are at this moment."""
        return [node for node in self._nodes.values() if node.op_type in kinds]

    def constant(self, name: str) -> Array | None:
        """The value of that name where it is constant."""
        from onnx import numpy_helper

        tensor = self._tensors.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def add_constant(self, values: Array, name: str = "constant") -> str:
        """The name of a new constant, a free one that starts with `name`."""
        from onnx import numpy_helper

        name = self.fresh(name) if name in self._tensors else name
        self._tensors[name] = numpy_helper.from_array(np.array(values, order="C"), name)
        return name

    def fresh(self, name: str) -> str:
        """A name that no value has yet."""
        self._n_made += 1
        return f"{name.split('::')[0]}::{self._n_made}"

    def maker(self, name: str, *kinds: str) -> Any:
        """The node that makes the value, where it is of one of these kinds; else None."""
        node = self._makers.get(name)
        return node if node is not None and node.op_type in kinds else None

    def readers(self, name: str) -> list[Any]:
        """The nodes that read the value."""
        return list(self._readers.get(name, {}).values())

    def only_reader(self, name: str, *kinds: str) -> Any:
        """The one node that reads the value, where it is alone, of one of these kinds, and the value no output."""
        readers = self.readers(name)
        alone = len(readers) == 1 and name not in self.outputs and readers[0].op_type in kinds
        return readers[0] if alone else None

    def add(self, node: Any) -> Any:
        """The node, now part of the graph."""
        self._nodes[id(node)] = node
        self._makers.update(dict.fromkeys(node.output, node))
        for name in (*node.input, *_read_inside(node)):
            self._readers.setdefault(name, {})[id(node)] = node
        return node

    def remove(self, node: Any) -> None:
        """Takes the node out of the graph."""
        del self._nodes[id(node)]
        for name in node.output:
            self._makers.pop(name, None)
        for name in (*node.input, *_read_inside(node)):
            self._readers[name].pop(id(node), None)

    def change(self, node: Any, *, inputs: list[str] | None = None, output: str | None = None) -> None:
        """Gives the node other inputs, or another name to its output."""
        self.remove(node)
        if inputs is not None:
            node.input[:] = inputs
        if output is not None:
            node.output[0] = output
        self.add(node)

    def redirect(self, before: str, after: str) -> None:
        """Makes all that read the value `before` read `after`."""
        for node in self.readers(before):
            self.change(node, inputs=[after if name == before else name for name in node.input])

    def store(self) -> None:
        """Writes nodes and constants back into the model (in place), without those that nothing reads."""
        # Copied first: a message that is cleared takes its nodes with it.
        nodes = [_copied(node) for node in self._in_order()]
        wanted = {name for node in nodes for name in (*node.input, *_read_inside(node))}.union(self.outputs)
        tensors = [_copied(tensor) for name, tensor in self._tensors.items() if name in wanted]
        for field, values in ((self._model.graph.node, nodes), (self._model.graph.initializer, tensors)):
            del field[:]
            field.extend(values)

    def _in_order(self) -> Iterator[Any]:
        """What the outputs need, each node after those that it reads."""
        done: set[int] = set()
        for output in self.outputs:
            waiting = [(self._makers.get(output), False)]
            while waiting:
                node, are_inputs_done = waiting.pop()
                if node is None or id(node) in done:
                    continue
                if are_inputs_done:
                    done.add(id(node))
                    yield node
                else:
                    waiting.append((node, True))
                    waiting.extend((self._makers.get(name), False) for name in (*node.input, *_read_inside(node)))

    def _is_constant(self, node: Any) -> bool:
        """Notes what a Constant, the copy of one, or its cast to 8 bits makes; says whether the node was one."""
        from onnx import helper

        if node.op_type == "Constant" and node.attribute[0].name == "value":
            self._tensors[node.output[0]] = _copied(node.attribute[0].t, name=node.output[0])
            return True
        known = self._tensors.get(node.input[0]) if node.op_type in ("Identity", "Cast") else None
        if known is None or node.output[0] in self.outputs:
            return False
        if node.op_type == "Identity":
            # torch.onnx stores equal tensors once; each layer needs its own name.
            self._tensors[node.output[0]] = _copied(known, name=node.output[0])
            return True
        dtype = helper.tensor_dtype_to_np_dtype(node.attribute[0].i)
        values = self.constant(node.input[0])
        if dtype not in FOLDED_CASTS or values is None:
            return False
        self.add_constant(values.astype(dtype), node.output[0])
        return True


def attributes(node: Any) -> dict[str, Any]:
    """The node's attributes by name, as they are handed to another node."""
    from onnx import helper

    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def make_node(kind: str, inputs: list[str], output: str, **settings: Any) -> Any:
    """A node of one output, named after it."""
    from onnx import helper

    return helper.make_node(kind, inputs, [output], name=output, **settings)


def _read_inside(node: Any) -> Iterator[str]:
    """What the branches of an If or a Loop read."""
    for attribute in node.attribute:
        for inner in attribute.g.node if attribute.HasField("g") else ():
            yield from inner.input
            yield from _read_inside(inner)


def _copied(message: Any, name: str | None = None) -> Any:
    copy = type(message)()
    copy.CopyFrom(message)
    if name is not None:
        copy.name = name
    return copy


def with_shapes(model: bytes, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """The serialised model for inputs of these shapes by name. Raises MeasurementError where they do not fit it."""
    import onnx

    # From bytes: what a model keeps in files of its own is not read, wherever those lie.
    changed = onnx.load_from_string(model)
    constants = {tensor.name for tensor in changed.graph.initializer}
    for port in changed.graph.input:
        if port.name in constants:
            continue
        sizes, wanted = port.type.tensor_type.shape.dim, shapes.get(port.name, ())
        check_fits(port.name, [size.dim_value if size.HasField("dim_value") else None for size in sizes], wanted)
        for size, value in zip(sizes, wanted, strict=True):
            size.dim_value = value
    found: bytes = changed.SerializeToString()
    return found
