"""Inputs and outputs of models as flat lists of leaves, and back: one value, a tuple, or a mapping."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ranksearch.errors import MeasurementError

Kind = Literal["single", "tuple", "mapping"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """How leaves are arranged; `names` are a mapping's keys, else their positions."""

    kind: Kind
    names: tuple[str, ...]

    def arrange(self, leaves: Sequence[Any]) -> Any:
        """The leaves as the model gives or takes them."""
        if self.kind == "mapping":
            return dict(zip(self.names, leaves, strict=True))
        return tuple(leaves) if self.kind == "tuple" else leaves[0]


def structure_of(values: Any) -> Structure:
    """How `values` are arranged. Raises MeasurementError where one is nested or no array, which no runtime takes."""
    if isinstance(values, Mapping):
        structure = Structure(kind="mapping", names=tuple(str(name) for name in values))
    elif isinstance(values, tuple | list):
        structure = Structure(kind="tuple", names=tuple(str(i) for i in range(len(values))))
    else:
        structure = Structure(kind="single", names=("0",))
    for name, leaf in zip(structure.names, leaves_of(values), strict=True):
        if not isinstance(leaf, int | float) and getattr(leaf, "shape", None) is None:
            raise MeasurementError(
                f"element {name!r} of the model's inputs or outputs is a {type(leaf).__name__}; "
                "use a tensor, a tuple of tensors, or a mapping of names to tensors"
            )
    return structure


def port_names(structure: Structure, side: str, taken: Sequence[str] = ()) -> list[str]:
    """Names of a file's inputs or outputs: a mapping's keys, but none that is taken; else `side_0`, `side_1` ..."""
    if structure.kind != "mapping":
        return [f"{side}_{name}" for name in structure.names]
    return [f"{side}_{name}" if name in taken else name for name in structure.names]


def leaves_of(values: Any) -> list[Any]:
    """The leaves in order."""
    if isinstance(values, Mapping):
        return list(values.values())
    return list(values) if isinstance(values, tuple | list) else [values]


def named_shapes(inputs: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of arrays by the names that they bear in portable files."""
    names = port_names(structure_of(inputs), "input")
    return {name: tuple(leaf.shape) for name, leaf in zip(names, leaves_of(inputs), strict=True)}


def named_leaves(inputs: Any, wanted: Sequence[str]) -> dict[str, Any]:
    """The leaves of `inputs` by name, in the order that is `wanted`. Raises MeasurementError where names differ."""
    leaves = dict(zip(structure_of(inputs).names, leaves_of(inputs), strict=True))
    if set(leaves) != set(wanted):
        raise MeasurementError(f"inputs are {list(leaves)}; the model takes {list(wanted)}")
    return {name: leaves[name] for name in wanted}


def check_fits(name: str, sizes: Sequence[int | None], wanted: Sequence[int]) -> None:
    """Raises MeasurementError where a file whose input has these sizes, None for any, cannot take the wanted ones."""
    fits = len(sizes) == len(wanted) and all(size in (None, of) for size, of in zip(sizes, wanted, strict=True))
    if not fits:
        shown = ", ".join("any" if size is None else str(size) for size in sizes)
        raise MeasurementError(
            f"input {name!r} of the file has shape ({shown}), not {tuple(wanted)}; export it again, without --static"
        )


def check_shape(name: str, found: Sequence[int], wanted: Sequence[int]) -> None:
    """Raises MeasurementError where an input's shape is not the one that the model was prepared for."""
    if tuple(found) != tuple(wanted):
        raise MeasurementError(f"input {name!r} has shape {tuple(found)}; the model was prepared for {tuple(wanted)}")
