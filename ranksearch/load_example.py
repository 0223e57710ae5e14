"""The script in an export folder that shows how its model is loaded: with torch alone where that suffices."""

from collections.abc import Iterator, Mapping, Sequence
from textwrap import indent
from typing import Any

from torch import nn

from ranksearch.factored import Factored, is_chain
from ranksearch.plan import Plan

LOAD_EXAMPLE = "load_example.py"


def loading_script(plan: Plan, model: nn.Module, inputs: Any) -> str:
    """The text of `load_example.py` for a `model` that was compressed by `plan` and takes such `inputs`.

    It needs torch and safetensors alone where no layer is quantized and torch's own modules stand for each, else
    ranksearch.
    """
    quantized = [name for name, choice in plan.changes().items() if choice.weight_bits < 32]
    if quantized:
        return with_ranksearch(
            f"Layers are quantized, {quantized[0]!r} the first, for which torch has no modules of its own."
        )
    statements: list[str] = []
    for name in plan.changes():
        module = model.get_submodule(name)
        made = _constructor(module)
        if made is None:
            return with_ranksearch(f"Layer {name!r} holds modules that are not torch's own.")
        statements += _replacement(made, [name, *_other_names(model, name)])
    layers = "".join(f"{indent(statement, '    ')}\n" for statement in statements)
    return _WITH_TORCH.replace("$CALL", _call(inputs)).replace("$LAYERS", layers)


def with_ranksearch(reason: str) -> str:
    """The script that loads any export, by ranksearch; `reason` is the sentence that says why it takes that."""
    # Names of layers are the user's: nothing in them may end the docstring.
    return _WITH_RANKSEARCH.replace("$REASON", reason.replace("\\", "/").replace('"', "'"))


def _replacement(made: str, names: Sequence[str]) -> Iterator[str]:
    """The statements that put a layer at its place, and at every other where the model has it."""
    first, *others = (ascii(name) for name in names)
    if names[0] == "":
        yield f"model = {made}"
        return
    yield f"model.set_submodule({first}, {made})"
    for other in others:
        yield f"model.set_submodule({other}, model.get_submodule({first}))"


def _other_names(model: nn.Module, name: str) -> list[str]:
    """Where else the model has the layer of this name."""
    module = model.get_submodule(name)
    return [other for other, found in model.named_modules(remove_duplicate=False) if found is module and other != name]


def _constructor(module: nn.Module) -> str | None:
    """The call that makes such a module, None where it is not one of torch's plain layers or chains."""
    if is_chain(module):
        parts = [_constructor(part) for part in module]
        if None in parts or list(module._modules) != [str(i) for i in range(len(parts))]:
            return None
        lines = "".join(f"{indent(str(part), '    ')},\n" for part in parts)
        return f"{'Factored' if type(module) is Factored else 'nn.Sequential'}(\n{lines})"
    arguments = _arguments(module)
    if arguments is None:
        return None
    # A fixed basis stays what it is in later training.
    frozen = "" if any(parameter.requires_grad for parameter in module.parameters()) else ".requires_grad_(False)"
    return f"nn.{type(module).__name__}({', '.join(arguments)}){frozen}"


def _arguments(module: nn.Module) -> list[str] | None:
    """What makes a Linear or a convolution like this one, those left out that torch assumes; None for any other."""
    if type(module) is nn.Linear:
        sizes: list[Any] = [module.in_features, module.out_features]
        options: dict[str, Any] = {}
    elif type(module) is nn.Conv1d or type(module) is nn.Conv2d:
        sizes = [module.in_channels, module.out_channels, module.kernel_size]
        n_axes = len(module.kernel_size)
        assumed: dict[str, Any] = {"stride": (1,) * n_axes, "padding": (0,) * n_axes, "dilation": (1,) * n_axes}
        assumed |= {"groups": 1, "padding_mode": "zeros"}
        options = {name: getattr(module, name) for name in assumed if getattr(module, name) != assumed[name]}
    else:
        return None
    if module.bias is None:
        options["bias"] = False
    arguments = [repr(size) for size in sizes] + [f"{name}={value!r}" for name, value in options.items()]
    dtype = str(module.weight.dtype)
    return arguments if dtype == "torch.float32" else [*arguments, f"dtype={dtype}"]


def _call(inputs: Any) -> str:
    """How the model is called on `inputs`, a mapping of the example's tensors by name."""
    if isinstance(inputs, Mapping):
        return "model(**inputs)"
    n_inputs = len(inputs) if isinstance(inputs, tuple | list) else 1
    places = ", ".join(f'inputs["{i}"]' for i in range(n_inputs))
    return f"model({places})"


_WITH_TORCH = '''"""Loads this compressed model with torch and safetensors alone, and runs its example.

    python load_example.py MODEL.py:FUNCTION

FUNCTION, in whatever Python file, makes the dense model whose layers were compressed: its architecture, with any
weights. In a program of your own:

    from load_example import compressed

    model = compressed(make_dense_model())
"""

import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import is_dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, load_model
from torch import nn

HERE = Path(__file__).resolve().parent


class Factored(nn.Sequential):
    """A layer's factors, one after the other."""

    @property
    def weight(self) -> torch.Tensor:
        """Nothing, in the factors' type: all that models read of a layer's weight, if any."""
        return self[-1].weight.detach().new_empty(0)


def compressed(model: nn.Module) -> nn.Module:
    """The dense model, changed in place: the compressed layers at their places, and the weights of this folder."""
$LAYERS    load_model(model, str(HERE / "model.safetensors"))
    return model.eval()


def dense_model(where: str) -> nn.Module:
    """What `MODEL.py:FUNCTION` makes."""
    path, _, function = where.rpartition(":")
    if not Path(path).is_file():
        sys.exit("usage: python load_example.py MODEL.py:FUNCTION, a function that makes the dense model")
    sys.path.insert(0, str(Path(path).resolve().parent))
    spec = importlib.util.spec_from_file_location("dense_model_file", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return getattr(module, function)()


def named(outputs: object, prefix: str = "") -> dict[str, torch.Tensor]:
    """Outputs by name, or by their places; what is nested by dotted names."""
    if isinstance(outputs, torch.Tensor):
        return {prefix[:-1] or "0": outputs}
    if isinstance(outputs, Mapping):
        children = outputs.items()
    elif isinstance(outputs, (tuple, list)):
        children = enumerate(outputs)
    else:
        children = vars(outputs).items() if is_dataclass(outputs) else ()
    return {name: found for key, value in children for name, found in named(value, f"{prefix}{key}.").items()}


def main() -> None:
    model = compressed(dense_model(sys.argv[1] if len(sys.argv) == 2 else ""))
    example = load_file(str(HERE / "example.safetensors"))
    inputs = {name[len("input."):]: tensor for name, tensor in example.items() if name.startswith("input.")}
    expected = {name[len("output."):]: tensor for name, tensor in example.items() if name.startswith("output.")}
    with torch.no_grad():
        outputs = named($CALL)
    differences = [float((outputs[name].double() - expected[name].double()).abs().max()) for name in expected]
    print("largest difference to the recorded output:", max(differences))


if __name__ == "__main__":
    main()
'''

_WITH_RANKSEARCH = '''"""Loads this compressed model into its study's architecture, and runs its example.

    python load_example.py STUDY.py

It needs ranksearch. $REASON
"""

import sys
from pathlib import Path

import torch

import ranksearch as rs
from ranksearch.export import named_values, read_example
from ranksearch.layers import call_model
from ranksearch.spec import load_study

if len(sys.argv) != 2:
    sys.exit("usage: python load_example.py STUDY.py, the script of the study that this was exported from")
here = Path(__file__).parent
model = rs.load(here, load_study(sys.argv[1]).model())
inputs, expected = read_example(here)
with torch.no_grad():
    outputs = named_values(call_model(model, inputs))
differences = [float((outputs[name] - expected[name]).abs().max()) for name in expected]
print("largest difference to the recorded output:", max(differences))
'''
