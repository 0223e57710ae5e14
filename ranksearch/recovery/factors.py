"""The factors of a layer: how large their product is, and how its size is shared among them."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor, nn

from ranksearch.factored import is_chain
from ranksearch.layers import layer_spec
from ranksearch.quantization import QuantizedModule

Chain = tuple[nn.Module, ...]
N_SWEEPS = 3


def factor_chains(model: nn.Module) -> list[Chain]:
    """The layers that stand in a row with nothing between them, as decompositions build them, each row once."""
    chains = [tuple(module) for module in model.modules() if is_chain(module)]
    return [chain for chain in chains if len(chain) > 1 and all(_is_layer(module) for module in chain)]


def squared_norm(factors: Sequence[Tensor], groups: Sequence[int]) -> Tensor:
    """The squared Frobenius norm of the weight that a chain's factors (out, in / groups, ...) amount to.

    Exact where no two factors extend over the same axis of the kernel; the weight itself is never made. Khodak et al.,
    Initialization and Regularization of Factorized Neural Layers (2021), decay this instead of each factor.
    """
    *others, last = [
        weight.reshape(n_groups, weight.shape[0] // n_groups, weight.shape[1], -1)
        for weight, n_groups in zip(factors, groups, strict=True)
    ]
    gram: Tensor | None = None
    for weight in others:
        gram = _gram(weight, gram)
    if gram is None:
        return last.square().sum()
    n_groups, _, n_inputs, _ = last.shape
    index = torch.arange(n_groups)
    within = gram.reshape(n_groups, n_inputs, n_groups, n_inputs)[index, :, index]
    # Of the last products only the diagonal is wanted: outputs may be many.
    return (torch.einsum("goik,gij->gojk", last, within) * last).sum()


def product(chain: Chain) -> tuple[Tensor, Tensor | None]:
    """The weight that these modules amount to, (out, in, ...) of a layer without groups, and the last one's bias.

    Exact where no two factors extend over the same axis of the kernel and only the last has a bias.
    """
    weight = _ungrouped(chain[0])
    for module in chain[1:]:
        after = _ungrouped(module)
        sizes = [max(a, b) for a, b in zip(weight.shape[2:], after.shape[2:], strict=True)]
        taps = [factor[..., None].flatten(2) for factor in (weight, after)]
        # One of the two has a single tap along each axis, so that their pairs are the taps of the product, in order.
        pairs = torch.einsum("oai,asj->osij", taps[1], taps[0])
        weight = _as_kernel(pairs, weight.shape[2:], after.shape[2:]).reshape(*pairs.shape[:2], *sizes)
    bias = getattr(chain[-1], "bias", None)
    return weight, bias


def chain_norm(chain: Chain) -> Tensor:
    """The squared norm of the weight that these modules amount to, before it is rounded."""
    return squared_norm([module.get_parameter("weight") for module in chain], [_groups(module) for module in chain])


@torch.no_grad()
def balance(chain: Chain) -> None:
    """Scales the channels between factors such that either side has the same norm (in place); outputs stay.

    Chains with rounded factors are left alone: their steps were fitted to the weights as they are.
    """
    if any(isinstance(module, QuantizedModule) for module in chain):
        return
    for _ in range(N_SWEEPS if len(chain) > 2 else 1):
        for before, after in zip(chain, chain[1:], strict=False):
            _balance_pair(before, after)


def _balance_pair(before: nn.Module, after: nn.Module) -> None:
    outgoing, incoming = before.get_parameter("weight"), _by_input(after)
    sizes = outgoing.flatten(1).norm(dim=1), incoming.flatten(2).norm(dim=2).flatten()
    scale = torch.sqrt(sizes[1] / sizes[0])
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1.0)
    outgoing.mul_(scale.reshape(-1, *[1] * (outgoing.dim() - 1)))
    bias = getattr(before, "bias", None)
    if isinstance(bias, Tensor):
        bias.mul_(scale)
    incoming.div_(scale.reshape(*incoming.shape[:2], 1, 1))


def _by_input(module: nn.Module) -> Tensor:
    """The weight as (groups, inputs of a group, outputs of a group, taps), a view."""
    weight, groups = module.get_parameter("weight"), _groups(module)
    return weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1).transpose(1, 2)


def _gram(weight: Tensor, before: Tensor | None) -> Tensor:
    """Inner products (out, out) of the rows of all factors up to this one, (groups, out, in, taps)."""
    groups, n_outputs, n_inputs, _ = weight.shape
    if before is None:
        blocks = torch.einsum("goik,gpik->gop", weight, weight)
        return torch.block_diag(*blocks)  # type: ignore[no-untyped-call, no-any-return]
    blocks = before.reshape(groups, n_inputs, groups, n_inputs)
    grams = torch.einsum("goik,gihj,hpjk->gohp", weight, blocks, weight)
    return grams.reshape(groups * n_outputs, groups * n_outputs)


def _as_kernel(pairs: Tensor, before: torch.Size, after: torch.Size) -> Tensor:
    """Pairs (out, in, taps after, taps before) as a kernel: each axis is of the one that extends over it."""
    grid = pairs.reshape(*pairs.shape[:2], *after, *before)
    n = len(before)
    order = [0, 1, *(axis for i in range(n) for axis in (2 + i, 2 + n + i))]
    return grid.permute(order)


def _ungrouped(module: nn.Module) -> Tensor:
    """The weight (out, in, ...) with zeros where groups keep channels apart."""
    weight, groups = module.get_parameter("weight"), _groups(module)
    if groups == 1:
        return weight
    blocks = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    full = weight.new_zeros(groups, blocks.shape[1], groups, *blocks.shape[2:])
    index = torch.arange(groups)
    full[index, :, index] = blocks
    return full.reshape(weight.shape[0], groups * weight.shape[1], *weight.shape[2:])


def _groups(module: nn.Module) -> int:
    spec = module.spec if isinstance(module, QuantizedModule) else layer_spec(module)
    return getattr(spec, "groups", 1)


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, QuantizedModule) or layer_spec(module) is not None


@final
class ProductDecay:
    """Weight decay on what the factors of a layer amount to, not on each; balances them first.

    Khodak et al., Initialization and Regularization of Factorized Neural Layers (2021).
    """

    def __init__(self, model: nn.Module, weight_decay: float) -> None:
        self.weight_decay = weight_decay
        self.chains = factor_chains(model) if weight_decay else []
        self.factors = [module.get_parameter("weight") for chain in self.chains for module in chain]
        self.ids = {id(factor) for factor in self.factors}
        for chain in self.chains:
            balance(chain)

    def __contains__(self, parameter: nn.Parameter) -> bool:
        return id(parameter) in self.ids

    def apply(self, rate: float | None) -> None:
        """One step of decay: at this learning rate, apart from the optimiser (Loshchilov and Hutter, 2019).

        Without one the decay's gradient is added to the factors' own.
        """
        trained = [factor for factor in self.factors if factor.requires_grad]
        if not trained:
            return
        total = torch.stack([chain_norm(chain) for chain in self.chains]).sum() / 2
        gradients = torch.autograd.grad(total, trained, allow_unused=True)
        with torch.no_grad():
            for factor, gradient in zip(trained, gradients, strict=True):
                if gradient is not None and rate is not None:
                    factor.sub_(gradient, alpha=rate * self.weight_decay)
                elif gradient is not None and factor.grad is not None:
                    factor.grad.add_(gradient, alpha=self.weight_decay)
