"""Put modules in the place of others."""

from collections.abc import Mapping

from torch import nn


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
