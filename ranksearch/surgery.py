"""Put modules in the place of others, copy models, and take them out of what is wrapped around them."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from ranksearch.errors import StudyError

# The wrappers that run another model and are none themselves, by the name under which they hold it.
_WRAPPERS = {
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "OptimizedModule": "_orig_mod",  # torch.compile's
}


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> nn.Module:
    """The model with each named module replaced in place, at every place where that module is registered.

    Returns the model, or the replacement itself where the root (name "") is replaced. Raises KeyError for a
    name that the model does not have.
    """
    by_identity = {id(_submodule(model, name)): new for name, new in replacements.items()}
    if id(model) in by_identity:
        return by_identity[id(model)]
    # named_children() skips a module that one parent registers twice: walk the registrations themselves.
    for parent in list(model.modules()):
        for child_name, child in list(parent._modules.items()):
            if id(child) in by_identity:
                parent._modules[child_name] = by_identity[id(child)]
    return model


def _submodule(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise KeyError(f"{type(model).__name__} has no module {name!r}") from None


def unwrapped(model: nn.Module) -> nn.Module:
    """The model without what torch.compile, DataParallel and DistributedDataParallel put around it or its modules.

    Itself, or what it wraps, where no module inside is wrapped or compiled; else a copy.
    """
    inside = model
    while (inner := _wrapped(inside)) is not None:
        inside = inner
    hidden = any(_wrapped(module) is not None or _is_compiled(module) for module in inside.modules())
    return copy_model(inside) if hidden else inside


def wrappers(model: nn.Module) -> tuple[str, ...]:
    """The kinds of wrappers around the model and its modules, each once."""
    kinds = {}
    for module in model.modules():
        if _is_compiled(module) or type(module).__name__ == "OptimizedModule":
            kinds["torch.compile"] = True
        elif _wrapped(module) is not None:
            kinds[type(module).__name__] = True
    return tuple(kinds)


def copy_model(model: nn.Module) -> nn.Module:
    """A copy of the model without wrappers; weights that are computed before each call are copied as they are now."""
    # torch copies no tensor that was computed, such as what weight_norm sets.
    memo: dict[int, Any] = {
        id(tensor): tensor.detach().clone()
        for module in model.modules()
        for tensor in _tensors_within(vars(module))
        if not tensor.is_leaf
    }
    try:
        for module in reversed(list(model.modules())):
            if (inner := _wrapped(module)) is not None:
                memo[id(module)] = copy.deepcopy(inner, memo)
        return copy.deepcopy(model, memo)
    except (TypeError, RuntimeError) as error:
        raise StudyError(f"{type(model).__name__} cannot be copied: {_uncopied(model, error)}") from error


def _tensors_within(value: Any) -> Iterator[Tensor]:
    """The tensors of what an object holds, in whatever lists and mappings; not those of its modules.

    Not trees.tensors, which makes tensors of arrays: a model may hold such as no tensor can be, of words for one.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors_within(inner)
    elif isinstance(value, list | tuple | set):
        for inner in value:
            yield from _tensors_within(inner)


def _uncopied(model: nn.Module, error: Exception) -> str:
    """Which attribute copy.deepcopy does not copy, and what would do."""
    first = str(error).strip().partition("\n")[0]
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if attribute in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value)
            except Exception:
                place = ".".join(filter(None, (name, attribute)))
                return f"{place} is a {type(value).__name__} ({first}); leave it out of the model"
    return first


def _wrapped(module: nn.Module) -> nn.Module | None:
    """What a wrapper runs; None for any other module."""
    if not type(module).__module__.startswith("torch."):
        return None
    return module._modules.get(_WRAPPERS.get(type(module).__name__, ""))


def _is_compiled(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return module._compiled_call_impl is not None
