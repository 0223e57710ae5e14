"""Give a model's hidden weight matrices layers of their own, which can then be compressed."""

import math
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ranksearch.finding import can_be_split, weight_users
from ranksearch.layers import evaluating
from ranksearch.surgery import copy_model, replace_modules

# What computes a weight before each call: the attribute that names the weight, and what folds it.
_BEFORE_CALLS: dict[type, tuple[str, Callable[[nn.Module, str], Any]]] = {
    WeightNorm: ("name", remove_weight_norm),
    SpectralNorm: ("name", remove_spectral_norm),
    prune.BasePruningMethod: ("_tensor_name", prune.remove),
}


def expose_layers(model: nn.Module) -> nn.Module:
    """A copy of the model, equal in its outputs, whose hidden weight matrices are layers that can be compressed.

    An nn.MultiheadAttention becomes a SplitAttention of four Linears, `q_proj`, `k_proj`, `v_proj` and `out_proj`;
    nn.TransformerEncoderLayer then calls its layers in eval mode too, where torch's fast path reads their weights.
    Weights that weight_norm, spectral_norm, pruning or other parametrizations compute become plain ones, as they are
    in eval mode. Padded places of an nn.TransformerEncoder, which the fast path fills with zeros, hold what the layers
    give there. What cannot be exposed stays as it is, and compressible_layers tells why. Call it where the model is
    loaded, once its weights are: names in its state_dict change.
    """
    exposed = copy_model(model)
    with evaluating(exposed):
        _fold_weights(exposed)
    users = weight_users(exposed)
    for name, module in list(exposed.named_modules()):
        if can_be_split(module) and not any(users[id(parameter)] > 1 for parameter in module.parameters()):
            exposed = replace_modules(exposed, {name: SplitAttention(module)})
        elif isinstance(module, nn.TransformerEncoder):
            # Nested tensors are what the fast path alone can read.
            module.use_nested_tensor = False
    return exposed


@final
class SplitAttention(nn.Module):
    """Multi-head attention out of plain Linears; called as nn.MultiheadAttention is, and gives what that gives."""

    # By this nn.TransformerEncoderLayer knows that its fast path has no weights to read.
    in_proj_bias = None

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim = attention.embed_dim, attention.num_heads, attention.head_dim
        self.batch_first, self.dropout = attention.batch_first, attention.dropout
        joined = attention.in_proj_weight
        parts = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        weights = parts if joined is None else joined.chunk(3)
        biases = (None,) * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)
        needs_grad = (parts[0] if joined is None else joined).requires_grad
        self.q_proj, self.k_proj, self.v_proj = (
            _linear(weight, bias, requires_grad=needs_grad) for weight, bias in zip(weights, biases, strict=True)
        )
        out = attention.out_proj
        self.out_proj = _linear(out.weight, out.bias, requires_grad=out.weight.requires_grad)
        self.train(attention.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward; `is_causal` is a hint there too, which needs the mask beside it."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint alone: give attn_mask, the causal mask, as well")
        if query.dim() == 2:
            padding = None if key_padding_mask is None else key_padding_mask[None]
            axis = 0 if self.batch_first else 1
            batches = (query.unsqueeze(axis), key.unsqueeze(axis), value.unsqueeze(axis))
            outputs, weights = self(*batches, padding, need_weights, attn_mask, average_attn_weights, is_causal)
            return outputs.squeeze(axis), None if weights is None else weights.squeeze(0)
        q, k, v = self._heads(self.q_proj(query)), self._heads(self.k_proj(key)), self._heads(self.v_proj(value))
        mask = self._mask(attn_mask, key_padding_mask, q.dtype)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q * math.sqrt(1.0 / self.head_dim) @ k.mT
            weights = functional.softmax(scores if mask is None else scores + mask, dim=-1)
            weights = functional.dropout(weights, dropout) if dropout else weights
            mixed = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            mixed = functional.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.transpose(1, 2).flatten(2)
        return self.out_proj(mixed if self.batch_first else mixed.transpose(0, 1)), weights

    def _heads(self, projected: Tensor) -> Tensor:
        """(N, heads, places, head_dim)."""
        by_batch = projected if self.batch_first else projected.transpose(0, 1)
        return torch.unflatten(by_batch, -1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores, of a shape that broadcasts to (N, heads, L, S)."""
        parts = []
        if mask is not None:
            by_head = mask[None, None] if mask.dim() == 2 else torch.unflatten(mask, 0, (-1, self.num_heads))
            parts.append(_added(by_head, dtype))
        if padding is not None:
            parts.append(_added(padding[:, None, None, :], dtype))
        return sum(parts[1:], parts[0]) if parts else None


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as numbers; where it is of booleans, what is True is masked out."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)


def _linear(weight: Tensor, bias: Tensor | None, *, requires_grad: bool) -> nn.Linear:
    n_outputs, n_inputs = weight.shape
    with torch.device("meta"):  # draws nothing
        linear = nn.Linear(n_inputs, n_outputs, bias=bias is not None)
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=requires_grad)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
    return linear


def _fold_weights(model: nn.Module) -> None:
    """Turns weights that are computed before each call into plain ones, in place; those that share parameters stay."""
    users = weight_users(model)
    for module in list(model.modules()):
        for hook in list(module._forward_pre_hooks.values()):
            for kind, (attribute, fold) in _BEFORE_CALLS.items():
                if isinstance(hook, kind):
                    fold(module, getattr(hook, attribute))
        computed = module._modules.get("parametrizations")
        if isinstance(computed, nn.ModuleDict) and not any(users[id(p)] > 1 for p in computed.parameters()):
            _fold_parametrizations(module, computed)


def _fold_parametrizations(module: nn.Module, computed: nn.ModuleDict) -> None:
    # Not by torch's remove_parametrizations: it changes the module's class, which is that of the user's model too.
    values = {name: getattr(module, name).detach().clone() for name in computed}
    module.__class__ = parametrize.type_before_parametrizations(module)
    del module._modules["parametrizations"]
    for name, value in values.items():
        parameters = list(computed[name].parameters())
        if parameters:
            requires_grad = any(parameter.requires_grad for parameter in parameters)
            module.register_parameter(name, nn.Parameter(value, requires_grad=requires_grad))
        else:
            module.register_buffer(name, value)
