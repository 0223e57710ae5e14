"""Hidden weight matrices as layers: equal outputs, and compressed, exported and loaded like any other."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

import ranksearch as rs
from ranksearch.exposing import SplitAttention
from ranksearch.finding import compressible_layers
from ranksearch.layers import evaluating
from ranksearch.portable import FORMATS, write_portable

EIGHT, N, L, S = 8, 2, 5, 7  # width, examples, queries, keys
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def randomized(module: nn.Module) -> nn.Module:
    """The module with other biases than torch's zeros."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


@settings(max_examples=60, deadline=None)
@given(
    batch_first=st.booleans(),
    bias=st.booleans(),
    widths=st.sampled_from([{}, {"kdim": 6, "vdim": 4}]),
    batched=st.booleans(),
    mask=st.sampled_from([None, "bool", "float", "by head"]),
    padding=st.sampled_from([None, "bool", "float"]),
    call=st.fixed_dictionaries({"need_weights": st.booleans(), "average_attn_weights": st.booleans()}),
    training=st.booleans(),
    gradients=st.booleans(),
)
def test_a_split_attention_is_called_and_gives_as_before(
    batch_first: bool, bias: bool, widths: Any, batched: bool, mask: Any, padding: Any, call: Any, training: bool,
    gradients: bool,
) -> None:  # fmt: skip
    attention = randomized(nn.MultiheadAttention(EIGHT, 2, bias=bias, batch_first=batch_first, **widths))
    attention.train(training)
    split = rs.expose_layers(attention)
    assert isinstance(split, SplitAttention) and split.training == training
    sizes = (L, EIGHT), (S, widths.get("kdim", EIGHT)), (S, widths.get("vdim", EIGHT))
    n = N if batched else 1
    inputs = [torch.randn(n, *size) for size in sizes]
    inputs = [x if batch_first else x.transpose(0, 1) for x in inputs] if batched else [x[0] for x in inputs]
    causal = torch.ones(L, S, dtype=torch.bool).triu(2)
    masks = {"bool": causal, "float": torch.randn(L, S), "by head": causal.expand(2 * n, L, S)}
    padded = (torch.arange(S) > 4).expand(n, S)
    paddings = {"bool": padded, "float": torch.randn(n, S)}
    kept = None if padding is None else paddings[padding] if batched else paddings[padding][0]
    if kept is not None and mask is not None and kept.dtype != masks[mask].dtype:
        kept = None  # torch warns of masks of two kinds
    given = {"attn_mask": masks.get(mask), "key_padding_mask": kept, **call}
    with torch.set_grad_enabled(gradients):
        wanted, given_back = attention(*inputs, **given), split(*inputs, **given)
    torch.testing.assert_close(given_back[0], wanted[0], **CLOSE)
    assert (given_back[1] is None) == (wanted[1] is None)
    if wanted[1] is not None:
        torch.testing.assert_close(given_back[1], wanted[1], **CLOSE)


def test_a_causal_hint_needs_its_mask_and_dropout_is_kept() -> None:
    attention = nn.MultiheadAttention(EIGHT, 2, dropout=0.5, batch_first=True).train()
    split, x = rs.expose_layers(attention), torch.randn(N, L, EIGHT)
    with pytest.raises(RuntimeError, match="give attn_mask"):
        split(x, x, x, is_causal=True)
    causal = nn.Transformer.generate_square_subsequent_mask(L)
    for model in (attention, split):
        torch.manual_seed(3)
        _, weights = model(x, x, x, attn_mask=causal, is_causal=True)
        assert float((weights == 0).float().mean()) > 0.2 and not model(x, x, x, need_weights=False)[0].isnan().any()
    split.eval(), attention.eval()
    torch.testing.assert_close(
        split(x, x, x, attn_mask=causal, is_causal=True)[0], attention(x, x, x, attn_mask=causal)[0], **CLOSE
    )


class Translator(nn.Module):
    """Encoder and decoder of torch's own blocks."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        self.body = nn.Transformer(EIGHT, 2, 1, 1, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first)
        self.head = nn.Linear(EIGHT, 3)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.body(source, target))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True:UserWarning")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_torchs_blocks_call_their_layers(batch_first: bool, training: bool) -> None:
    model = Translator(batch_first).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exposed = rs.expose_layers(model)
    example = torch.randn(4, 4, EIGHT), torch.randn(4, 4, EIGHT)
    with torch.no_grad():
        torch.testing.assert_close(exposed(*example), model(*example), **CLOSE)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    found = compressible_layers(exposed, example)
    assert not found.skipped and exposed.training == training
    assert len([name for name in found.layers if "attn" in name]) == 12
    hidden = compressible_layers(model, example).skipped
    assert "rs.expose_layers" in hidden["body.encoder.layers.0.self_attn"]
    assert "rs.expose_layers" in hidden["body.encoder.layers.0.self_attn.out_proj"]
    assert "rs.expose_layers" in hidden["body.encoder.layers.0.linear1"]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_padded_batches_give_the_same_where_there_is_something() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(EIGHT, 2, 16, batch_first=True), 2).eval()
    x, padded = torch.randn(2, L, EIGHT), torch.arange(L) >= torch.tensor([[L], [3]])
    with torch.no_grad():
        wanted, given = (
            encoder(x, src_key_padding_mask=padded),
            rs.expose_layers(encoder)(x, src_key_padding_mask=padded),
        )
    torch.testing.assert_close(given[~padded], wanted[~padded], **CLOSE)


def pruned(layer: nn.Module) -> nn.Module:
    return prune.l1_unstructured(layer, "weight", amount=0.5)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch's older weight_norm
@pytest.mark.parametrize(
    "normed",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal, weight_norm,
     spectral_norm, pruned],
)  # fmt: skip
def test_computed_weights_become_plain(normed: Any) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), normed(nn.Linear(32, 4))).train()
    x = torch.randn(2, 3, 4, 4)
    for _ in range(3):
        model(x).sum().backward()
    assert "rs.expose_layers" in compressible_layers(model, x).skipped["2"]
    exposed = rs.expose_layers(model)
    assert exposed.training and type(exposed[2]) is nn.Linear and not compressible_layers(exposed, x).skipped
    with evaluating(model), evaluating(exposed):
        assert torch.equal(exposed(x), model(x))
    assert exposed[2].weight.requires_grad


def test_what_cannot_be_exposed_stays_and_is_told() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.MultiheadAttention(EIGHT, 2, add_bias_kv=True, batch_first=True)
            self.zero = nn.MultiheadAttention(EIGHT, 2, add_zero_attn=True, batch_first=True)
            self.tied = nn.MultiheadAttention(EIGHT, 2, batch_first=True)
            self.tied_too = nn.MultiheadAttention(EIGHT, 2, batch_first=True)
            self.tied_too.in_proj_weight = self.tied.in_proj_weight
            self.left, self.right = nn.Linear(EIGHT, EIGHT), nn.Linear(EIGHT, EIGHT)
            self.right.weight = self.left.weight
            for layer in (self.left, self.right):
                parametrizations.spectral_norm(layer)
            self.right.parametrizations.weight.original = self.left.parametrizations.weight.original
            self.volume = parametrizations.weight_norm(nn.Conv3d(1, 1, 1))
            self.head = nn.Linear(EIGHT, 2)

        def forward(self, x: Tensor) -> Tensor:
            for attention in (self.more, self.zero, self.tied, self.tied_too):
                x = attention(x, x, x)[0]
            x = self.volume(self.right(self.left(x))[:, None, None])[:, 0, 0]
            return self.head(x)

    model, x = Odd().eval(), torch.randn(N, L, EIGHT)
    exposed = rs.expose_layers(model)
    with torch.no_grad():
        torch.testing.assert_close(exposed(x), model(x), **CLOSE)
    found = compressible_layers(exposed, x)
    assert list(found.layers) == ["head"]
    assert found.skipped["more"] == "MultiheadAttention multiplies by weights of its own; it cannot be split"
    assert "it cannot be split" in found.skipped["zero.out_proj"]
    assert "tied" in found.skipped["tied"] and "tied" in found.skipped["left"]
    assert found.skipped["volume"] == "Conv3d is not supported"


@pytest.mark.parametrize(("layer", "told"), [("body.layers.0.self_attn", "splits it"), ("stem", "makes it plain")])
def test_a_plan_for_a_hidden_matrix_is_told_what_to_do(layer: str, told: str) -> None:
    plan = rs.Plan(layers={layer: rs.LayerChoice(decomposition="svd", ranks=(2,))})
    with pytest.raises(rs.PlanError, match=f"layer '{layer}'.*rs.expose_layers {told}"):
        rs.rebuild(Classifier(), plan)


def test_exposing_twice_changes_nothing_and_a_copy_is_a_copy() -> None:
    model = Translator()
    model.body.encoder.layers[0].self_attn.in_proj_weight.requires_grad_(False)
    once = rs.expose_layers(model)
    twice = rs.expose_layers(once)
    assert once.state_dict().keys() == twice.state_dict().keys()
    assert not {id(p) for p in model.parameters()} & {id(p) for p in once.parameters()}
    attention = once.body.encoder.layers[0].self_attn
    assert not attention.q_proj.weight.requires_grad and attention.out_proj.weight.requires_grad
    assert copy.deepcopy(once)(torch.randn(1, 2, EIGHT), torch.randn(1, 2, EIGHT)).shape == (1, 2, 3)


class Classifier(nn.Module):
    """A small vision transformer of torch's own blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = weight_norm_of(nn.Linear(6, 32))
        self.body = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), 2, enable_nested_tensor=False
        )
        self.head = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean(1))


def weight_norm_of(layer: nn.Module) -> nn.Module:
    return parametrizations.weight_norm(layer)


def test_what_was_hidden_is_compressed_exported_and_loaded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = rs.expose_layers(Classifier().eval())
    batches = [(torch.randn(16, 4, 6), torch.zeros(16)) for _ in range(4)]
    eight = rs.LayerChoice(weight_bits=8, activation_bits=8)
    plan = rs.Plan(
        layers={
            "stem": eight,
            "body.layers.0.self_attn.q_proj": rs.LayerChoice(decomposition="svd", ranks=(16,)),
            "body.layers.0.self_attn.out_proj": eight,
            "body.layers.1.self_attn.v_proj": rs.LayerChoice(weight_bits=4, activation_bits=32),
            "body.layers.1.linear1": rs.LayerChoice(decomposition="svd", ranks=(12,), weight_bits=8, activation_bits=8),
        }
    )
    compressed = rs.compress(dense, plan, calibration=batches, weight_limit=64)
    written = rs.save(compressed, plan, tmp_path)
    loaded = rs.load(tmp_path, rs.expose_layers(Classifier()))
    x = batches[0][0]
    with torch.no_grad():
        wanted = compressed.eval()(x)
        assert torch.equal(loaded(x), wanted) and not torch.equal(wanted, dense(x))
        # Rounded as the plan says, near what it was.
        assert float((wanted - dense(x)).norm() / dense(x).norm()) < 0.2
    assert set(written.layers) == set(plan.layers)
    assert len(write_portable(loaded, x, tmp_path, list(FORMATS))) == 3
