"""What plans lose, measured: the distance of the outputs to dense on calibration batches that did not shape them."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, final

import numpy as np
from torch import Tensor, nn

from ranksearch.batches import merged
from ranksearch.compression import compress
from ranksearch.factorisations import Factorisations
from ranksearch.finding import WeightInfo
from ranksearch.layers import call_model, evaluating, first_argument, weight_spec
from ranksearch.loss_model import SMALLEST_LOSS
from ranksearch.plan import LayerChoice, Plan
from ranksearch.quantization import CODE_LIMIT, SharedTensors, rounded_outputs, shared_tensors
from ranksearch.replaying import Replay
from ranksearch.scoring import output_distance
from ranksearch.trees import count_rows, first_examples

KL_BATCHES = 2
# What is kept of the layers' inputs; those of the others are taken when asked for.
MAX_READ_BYTES = 1 << 28


@final
class LossMeter:
    """Measures losses in nats, always positive; keeps dense's outputs, and what layers read.

    Two calibration batches shape a plan's factors, the next two judge it; with too few batches, the same.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: Sequence[tuple[Any, Any]],
        factorisations: Factorisations,
        loss: Any,
        *,
        weight_limit: int = CODE_LIMIT,
    ) -> None:
        self._model = model
        judging = calibration[KL_BATCHES : 2 * KL_BATCHES] or calibration[:KL_BATCHES]
        self._shaping = [(inputs, None) for inputs in merged(model, (inputs for inputs, _ in calibration[:KL_BATCHES]))]
        self._judging = list(merged(model, (inputs for inputs, _ in judging)))
        self._factorisations = factorisations
        self._loss = loss
        self._weight_limit = weight_limit
        self._shared = shared_tensors(model, next(iter(first_examples(calibration, 1))))
        self._replay = Replay(model, self._judging)
        self._read = self._listen({name for name, module in model.named_modules() if name and weight_spec(module)})
        self._last_read: dict[str, list[Tensor]] = {}

    def of_plan(self, plan: Plan) -> float:
        """The distance of the outputs under the plan to dense."""
        compressed = self._compressed(self._model, plan, self._shaping, self._shared)
        with evaluating(compressed):
            return self._distance([call_model(compressed, inputs) for inputs in self._judging])

    def of_layer(self, info: WeightInfo, choice: LayerChoice) -> float:
        """The same where this layer alone is changed: it is compressed on what it reads, without the model around it.

        A layer that runs several times, reads other rows than the examples, or whose input is rounded for others too
        takes the whole model.
        """
        plan = Plan(layers={info.name: choice})
        read = self._what_it_reads(info) if self._rounds_alone(info.name, choice) else None
        if read is None:
            return self.of_plan(plan)
        alone = Alone(info.name, self._model.get_submodule(info.name))
        built = self._compressed(alone, plan, read, SharedTensors()).get_submodule(info.name)
        return self._distance(self._replay.outputs_with(info.name, built))

    def _compressed(
        self, model: nn.Module, plan: Plan, calibration: Sequence[tuple[Any, Any]], shared: SharedTensors
    ) -> nn.Module:
        return compress(
            model, plan, calibration=calibration, factorisations=self._factorisations,
            weight_limit=self._weight_limit, shared=shared,
        )  # fmt: skip

    def _rounds_alone(self, name: str, choice: LayerChoice) -> bool:
        return choice.activation_bits != 8 or not rounded_outputs(self._shared, [name]).inputs

    def _what_it_reads(self, info: WeightInfo) -> list[tuple[Tensor, None]] | None:
        """The layer's inputs, batch by batch; None where they are not one row for each example."""
        if not info.name or info.n_calls != 1:
            return None
        known = self._read if info.name in self._read else self._last_read
        if info.name not in known:
            known = self._last_read = self._listen({info.name}, max_bytes=sys.maxsize)
        read, n_rows = known[info.name], [count_rows(inputs) for inputs, _ in self._shaping]
        return [(tensor, None) for tensor in read] if [len(tensor) for tensor in read] == n_rows else None

    def _listen(self, names: set[str], max_bytes: int = MAX_READ_BYTES) -> dict[str, list[Tensor]]:
        """What the layers of these names are given, batch by batch; without those for which `max_bytes` do not do."""
        heard: dict[str, list[Tensor]] = {name: [] for name in names}
        left = max_bytes

        def listener(name: str) -> Any:
            def hook(_module: nn.Module, arguments: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
                nonlocal left
                given = first_argument(arguments, named).detach()
                size = given.numel() * given.element_size()
                if size > left:
                    heard.pop(name, None)
                elif name in heard:
                    left -= size
                    # What is done in place later is none of its input.
                    heard[name].append(given.clone())

            return hook

        with ExitStack() as stack, evaluating(self._model):
            for name in names:
                layer = self._model.get_submodule(name)
                stack.callback(layer.register_forward_pre_hook(listener(name), with_kwargs=True).remove)
            for inputs, _ in self._shaping:
                call_model(self._model, inputs)
        return heard

    def _distance(self, outputs: Sequence[Any]) -> float:
        pairs = zip(outputs, self._replay.outputs, strict=True)
        return max(float(np.mean([output_distance(own, dense, self._loss) for own, dense in pairs])), SMALLEST_LOSS)


@final
class Alone(nn.Module):
    """A model of one layer, which bears the name that it has in another."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        *parents, last = name.split(".")
        place: nn.Module = self
        for parent in parents:
            below = nn.Module()
            place.add_module(parent, below)
            place = below
        place.add_module(last, layer)
        self._name = name

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.get_submodule(self._name)(inputs)
        return outputs
