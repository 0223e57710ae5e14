"""One pass of calibration data over the model, with a collector at every layer."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ranksearch.batches import merged
from ranksearch.errors import StudyError
from ranksearch.finding import LayerInfo
from ranksearch.layers import call_model, evaluating
from ranksearch.spec import Batches
from ranksearch.statistics.collector import Collector, count_moment_bytes
from ranksearch.statistics.storing import mapped
from ranksearch.statistics.values import LayerStatistics
from ranksearch.trees import count_rows, first_examples, is_classification, pick_rows, tensors

# Fewer gradients than this say little about a layer: rather leave out the largest layer.
MIN_GRADIENT_EXAMPLES = 32


def collect(
    model: nn.Module,
    layers: Mapping[str, LayerInfo],
    batches: Batches,
    loss: Any,
    *,
    max_examples: int = 1024,
    max_gradient_examples: int = 256,
    memory_bytes: int = 1 << 30,
    moment_bytes: int = 4 << 30,
    seed: int = 0,
) -> dict[str, LayerStatistics]:
    """The statistics of each layer over the first `max_examples` examples, in eval mode; the model stays as it was.

    Gradients come from the first `max_gradient_examples`. Where `loss` is the cross-entropy they are those at labels
    sampled from the model's own softmax, whose gradients' second moment is the Hessian of KL(dense || changed).
    Other outputs are taken as the means of a normal distribution and sampled likewise, so that the second moment is
    the Hessian of the change relative to the dense outputs' variance. Without a loss only inputs are looked at.
    Those of single examples take `memory_bytes` at most, the largest layers left out. One pass over the data, or
    several, each of as many layers as have `moment_bytes` of moments at most; those are then kept on disk.
    Raises StudyError where there is no data, a layer never runs, or a number is not finite.
    """
    if not layers:  # a study of embeddings alone
        return {}
    n_exact = _gradient_budget(layers, max_gradient_examples, memory_bytes)
    n_gradient = max_gradient_examples if loss is not None else 0
    groups = _groups(layers, moment_bytes)
    found: dict[str, LayerStatistics] = {}
    for names in groups:
        collectors = {name: Collector(layers[name], max_examples, n_exact.get(name, 0), seed) for name in names}
        n_seen = _pass(model, layers, collectors, batches, loss, max_examples, n_gradient, seed)
        for name in names:  # each collector goes as its result comes: together they would take the memory twice
            statistics = collectors.pop(name).result(name, n_seen)
            found[name] = statistics if len(groups) == 1 else mapped(statistics)
    return found


def _groups(layers: Mapping[str, LayerInfo], moment_bytes: int) -> list[list[str]]:
    """Neighbours of at most so many bytes of moments together; a larger layer is a group of its own."""
    groups: list[list[str]] = []
    left = 0
    for name, info in layers.items():
        n_bytes = count_moment_bytes(info.spec)
        if n_bytes > left:
            groups.append([])
            left = moment_bytes
        groups[-1].append(name)
        left -= n_bytes
    return groups


def _pass(
    model: nn.Module,
    layers: Mapping[str, LayerInfo],
    collectors: Mapping[str, Collector],
    batches: Batches,
    loss: Any,
    max_examples: int,
    n_gradient: int,
    seed: int,
) -> int:
    """Over how many examples the collectors have listened; each pass draws the same random numbers."""
    generator = torch.Generator().manual_seed(seed)
    n_seen = 0
    for inputs in merged(model, first_examples(batches, max_examples)):
        n_rows = count_rows(inputs)
        n_backward = max(0, min(n_rows, n_gradient - n_seen))
        # Hooked anew each time: what is tried out in between is not listened to.
        with evaluating(model), _hooked(model, layers, collectors):
            if n_backward:
                _backward(model, pick_rows(inputs, slice(n_backward)), collectors, n_seen, loss, generator)
            if n_backward < n_rows:
                for collector in collectors.values():
                    collector.start(n_rows - n_backward, n_seen + n_backward, with_gradients=False)
                call_model(model, pick_rows(inputs, slice(n_backward, None)))
        n_seen += n_rows
    if n_seen == 0:
        raise StudyError("the calibration data yields no example")
    return n_seen


def _gradient_budget(layers: Mapping[str, LayerInfo], max_examples: int, memory_bytes: int) -> dict[str, int]:
    """For how many examples each layer's gradients are kept: the same for all, the largest layers left out."""
    sizes = {name: 4 * math.prod(info.spec.weight_shape) for name, info in layers.items()}
    while sizes:
        n_examples = min(max_examples, memory_bytes // sum(sizes.values()))
        if n_examples >= min(max_examples, MIN_GRADIENT_EXAMPLES):
            return dict.fromkeys(sizes, n_examples)
        del sizes[max(sizes, key=lambda name: sizes[name])]
    return {}


@contextmanager
def _hooked(model: nn.Module, layers: Mapping[str, LayerInfo], collectors: Mapping[str, Collector]) -> Iterator[None]:
    """The model with collectors listening and all parameters frozen: autograd then computes output gradients only.

    All layers are differentiable, whichever are listened to: every pass takes the same loss.
    """
    handles: list[RemovableHandle] = []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        for name in layers:
            handles.append(model.get_submodule(name).register_forward_hook(_differentiable))
        for name, collector in collectors.items():
            handles.append(model.get_submodule(name).register_forward_hook(collector, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trainable:
            parameter.requires_grad_(True)


def _differentiable(_module: nn.Module, _arguments: Any, output: Tensor) -> Tensor | None:
    """With frozen parameters the first layers have nothing to differentiate: an added zero starts the graph."""
    if output.requires_grad or not torch.is_grad_enabled():
        return None
    return output + torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)


def _backward(
    model: nn.Module,
    inputs: Any,
    collectors: Mapping[str, Collector],
    n_seen: int,
    loss: Any,
    generator: torch.Generator,
) -> None:
    for collector in collectors.values():
        collector.start(count_rows(inputs), n_seen, with_gradients=True)
    with torch.enable_grad():
        outputs = call_model(model, inputs)
        sampled = _class_loss(outputs, generator) if is_classification(loss) else _value_loss(outputs, generator)
        for collector in collectors.values():
            collector.runs_again = True
        sampled.backward()  # type: ignore[no-untyped-call]


def _class_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The weighted sum of cross-entropies at sampled labels; `logits` is (N, C, ...).

    A sure model seldom draws the label that has a gradient, and few examples would decide all. So labels are drawn
    by q ~ p |p - e_label|, p times the size of the gradient, and weighted by (p / q)^1/2: the same second moment.
    """
    n_positions = logits[0].numel() // logits.shape[1]
    flat = logits.float().movedim(1, -1).reshape(-1, logits.shape[1])
    p = flat.detach().cpu().double().softmax(-1)
    sizes = (p.square().sum(-1, keepdim=True) - 2 * p + 1).clamp_min(1e-12).sqrt()
    q = p * sizes / (p * sizes).sum(-1, keepdim=True)
    labels = torch.multinomial(q, 1, generator=generator)
    weights = (p / q).gather(1, labels)[:, 0].sqrt().to(flat)
    total = (weights * F.cross_entropy(flat, labels[:, 0].to(flat.device), reduction="none")).sum()
    # Labels of one example's positions are independent, so variances add up: this gives the mean over positions.
    return total / math.sqrt(n_positions)


def _value_loss(outputs: Any, generator: torch.Generator) -> Tensor:
    """A random direction of the outputs, such that 1/2 E[change^2] is the mean squared change over the variance."""
    leaves = [leaf for leaf in tensors(outputs) if leaf.requires_grad]
    if not leaves:
        raise StudyError("the model's outputs do not depend on any compressible layer in a way that has a gradient")
    total = torch.zeros(())
    for leaf in leaves:
        values = leaf.detach().double()
        spread = values - values.mean(0) if len(values) > 1 else values
        scale = math.sqrt(2 / (max(float(spread.square().mean()), 1e-30) * values[0].numel() * len(leaves)))
        signs = torch.randint(0, 2, leaf.shape, generator=generator).to(leaf) * 2 - 1
        total = total + scale * (signs * leaf).sum().cpu()
    return total
