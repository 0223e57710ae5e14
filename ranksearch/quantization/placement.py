"""Quantizers sit on tensors: one that several read is rounded once, where it is produced.

Integer kernels then hand integers on to each other, residual additions included. With a quantizer at each reader such
a tensor stays float for the addition, which then runs apart from the convolution before it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from ranksearch.layers import call_model, evaluating, first_argument, layer_spec
from ranksearch.trees import tensors

# A tensor by its identity and its version: an operation in place makes another one of it.
Key = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sum:
    """What an addition adds: results of layers, by the module that gives each, and tensors that others read as well.

    `results` maps a layer to the module (its BatchNorm, or itself) whose output is the addend; `tensors` are modules.
    """

    results: Mapping[str, str]
    tensors: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SharedTensors:
    """The tensors that a layer reads and something else as well, each named by the module whose output it is.

    `inputs` maps each such layer to that module; `sums` tells of those that an addition makes.
    """

    inputs: Mapping[str, str] = field(default_factory=dict)
    sums: Mapping[str, Sum] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundedOutputs:
    """Where quantizers sit that are not at the input of their own layer: layer to the module whose output is rounded.

    The quantizers in `inputs` round what the layers read, those in `results` what an addition reads of theirs.
    """

    inputs: Mapping[str, str]
    results: Mapping[str, str]


def shared_tensors(model: nn.Module, example: Any) -> SharedTensors:
    """The model's shared tensors, found by one run on `example`.

    A tensor's module is the outermost that gives just this tensor and runs once. Missing are tensors that no such
    module gives, that the model takes or gives, and those of layers that run more than once.
    """
    trace = _Trace({module: name for name, module in model.named_modules() if layer_spec(module) is not None})
    with evaluating(model), trace.listening(model), trace:
        outputs = call_model(model, example)
    return trace.shared(outputs)


def rounded_outputs(shared: SharedTensors, quantized: Iterable[str]) -> RoundedOutputs:
    """Where the quantizers of these layers sit: a shared tensor is rounded if every layer that reads it is quantized.

    The addends of a rounded sum are rounded where all of them can be, so that integer kernels do the addition.
    """
    layers = set(quantized)
    in_float = {module for layer, module in shared.inputs.items() if layer not in layers}
    inputs = {layer: module for layer, module in shared.inputs.items() if module not in in_float}
    rounded = set(inputs.values())
    results: dict[str, str] = {}
    for module, addition in shared.sums.items():
        if module in rounded and layers >= set(addition.results) and rounded >= set(addition.tensors):
            results.update(addition.results)
    return RoundedOutputs(inputs=inputs, results=results)


@final
class _Trace(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes who reads each tensor, what it is made from, and which modules give it; mutable, and used once."""

    def __init__(self, layers: Mapping[nn.Module, str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.layers = layers
        self.running: list[str] = []
        self.readers: dict[Key, list[str | None]] = {}
        self.origins: dict[Key, tuple[str, list[Key]]] = {}
        self.givers: dict[Key, list[str]] = {}
        self.n_runs: Counter[str] = Counter()
        self.begun: list[set[Key]] = []
        self.alive: list[Tensor] = []  # an identity is a tensor's own only while that lives

    @contextmanager
    def listening(self, model: nn.Module) -> Iterator[None]:
        """Hears of each module and layer that begins or ends."""
        handles: list[RemovableHandle] = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._take, with_kwargs=True))
            handles.append(module.register_forward_hook(self._giver(name)))
        for layer, name in self.layers.items():
            handles.append(layer.register_forward_pre_hook(self._begin(name), with_kwargs=True))
            handles.append(layer.register_forward_hook(self._end))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """No: it is never compiled, and to be skipped torch.compile would be imported, which takes seconds."""
        return False

    def __torch_dispatch__(self, operation: Any, _types: Any, arguments: Any = (), named: Any = None) -> Any:
        named = named or {}
        if self.running:  # what a layer does inside is the layer's own doing
            return operation(*arguments, **named)
        sources = list(dict.fromkeys(self._key(tensor) for tensor in tensors([arguments, named])))
        for key in sources:
            self.readers.setdefault(key, []).append(None)
        given = operation(*arguments, **named)
        name = operation.overloadpacket.__name__
        for tensor in tensors(given):
            identity, version = self._key(tensor)
            # Torch counts an operation in place when this returns.
            self.origins[identity, version + name.endswith("_")] = (name.rstrip("_"), sources)
        return given

    def shared(self, outputs: Any) -> SharedTensors:
        """What was found, once the model has run."""
        returned = {self._key(tensor) for tensor in tensors(outputs)}
        inputs: dict[str, str] = {}
        known: dict[Key, str] = {}
        for key, readers in self.readers.items():
            layers = [name for name in readers if name is not None]
            once = all(self.n_runs[name] == 1 for name in layers)
            place = self._before_pooling(key)
            module = self._module(place)
            if layers and len(readers) > 1 and once and module is not None and not {key, place} & returned:
                inputs.update(dict.fromkeys(layers, module))
                known |= {key: module, place: module}
        sums = {module: self._sum(key, known) for key, module in known.items() if self._module(key) == module}
        return SharedTensors(inputs=inputs, sums={module: found for module, found in sums.items() if found})

    def _module(self, key: Key) -> str | None:
        """The outermost module that gives this tensor and runs once."""
        once = [name for name in self.givers.get(key, []) if self.n_runs[name] == 1]
        return once[-1] if once else None

    def _before_pooling(self, key: Key) -> Key:
        """The tensor that max pooling alone reads to make this one: rounding before is the same, and pools integers."""
        operation, sources = self.origins.get(key, ("", []))
        if operation.startswith("max_pool") and len(self.readers[sources[0]]) == 1 and self._module(sources[0]):
            return sources[0]
        return key

    def _sum(self, key: Key, shared: Mapping[Key, str]) -> Sum | None:
        """The addends of this tensor, itself or before its ReLU; None unless each is a layer's result or shared."""
        operation, sources = self.origins.get(key, ("", []))
        if operation == "relu":
            operation, sources = self.origins.get(sources[0], ("", []))
        if operation != "add" or len(sources) != 2:
            return None
        others = [source for source in sources if source not in shared]
        results = {self._layer_behind(source): self._module(source) for source in others}
        if None in results or None in results.values() or any(len(self.readers[source]) > 1 for source in others):
            return None
        known = {layer: module for layer, module in results.items() if layer is not None and module is not None}
        return Sum(results=known, tensors=tuple(shared[source] for source in sources if source in shared))

    def _layer_behind(self, key: Key) -> str | None:
        """The layer whose output this is, itself or behind a BatchNorm."""
        operation, sources = self.origins.get(key, ("", []))
        if "batch_norm" in operation:
            key = sources[0]
        return next((name for name in self.givers.get(key, []) if name in self.layers.values()), None)

    def _begin(self, name: str) -> Any:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
            self.readers.setdefault(self._key(first_argument(inputs, named)), []).append(name)
            self.running.append(name)

        return hook

    def _end(self, _module: nn.Module, _inputs: Any, _output: Any) -> None:
        self.running.pop()

    def _take(self, _module: nn.Module, inputs: Any, named: Any) -> None:
        self.begun.append({self._key(tensor) for tensor in tensors([inputs, named])})

    def _giver(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            self.n_runs[name] += 1
            given = self.begun.pop()
            # What lets its input pass, a shortcut or dropout, does not produce it.
            if isinstance(output, Tensor) and (key := self._key(output)) not in given:
                self.givers.setdefault(key, []).append(name)

        return hook

    def _key(self, tensor: Tensor) -> Key:
        self.alive.append(tensor)
        return id(tensor), tensor._version
