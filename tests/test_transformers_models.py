"""Small random models of transformers: their layers found, compressed, saved and loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import ranksearch as rs
from ranksearch.finding import LayerInfo, compressible_layers
from ranksearch.layers import ConvSpec, call_model, evaluating

N, N_WORDS = 6, 50
Make = Callable[[], nn.Module]


def words() -> dict[str, torch.Tensor]:
    mask = (torch.arange(8) < torch.randint(3, 9, (N, 1))).long()
    return {"input_ids": torch.randint(0, N_WORDS, (N, 8)), "attention_mask": mask}


def pixels() -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(N, 3, 16, 16)}


def sound() -> dict[str, torch.Tensor]:
    return {"input_values": torch.randn(N, 200)}


def bert() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=N_WORDS, **sizes))


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=N_WORDS, n_embd=16, n_layer=1, n_head=2, n_positions=8)
    )


def llama() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=N_WORDS, intermediate_size=32, **sizes))


def vit() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=16, patch_size=4, **sizes))


def swin() -> nn.Module:
    return transformers.SwinForImageClassification(
        transformers.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4
        )
    )


def convnext() -> nn.Module:
    return transformers.ConvNextForImageClassification(
        transformers.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2)
    )


def wav2vec2() -> nn.Module:
    convolutions = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    position = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return transformers.Wav2Vec2ForSequenceClassification(
        transformers.Wav2Vec2Config(**convolutions, **sizes, **position)
    )


# What makes each, its data, how many layers it has, and what is skipped.
MODELS: dict[str, tuple[Make, Callable[[], Any], int, str]] = {
    "bert": (bert, words, 8, ""),
    "gpt2": (gpt2, words, 4, "its weight is tied to another module's"),
    "llama": (llama, words, 8, ""),
    "vit": (vit, pixels, 8, ""),
    "swin": (swin, pixels, 15, "SwinRelativePositionBias is not supported"),
    "convnext": (convnext, pixels, 9, ""),
    "wav2vec2": (wav2vec2, sound, 12, ""),
}


def choice(info: LayerInfo, place: int) -> rs.LayerChoice:
    """A low rank, 8 bits or 4, by turns."""
    rank = max(1, min(info.spec.weight_shape[:2]) // 2)
    if isinstance(info.spec, ConvSpec) or place % 3 == 0:
        return rs.LayerChoice(weight_bits=8, activation_bits=8)
    if place % 3 == 1:
        return rs.LayerChoice(decomposition="svd", ranks=(rank,))
    return rs.LayerChoice(weight_bits=4, activation_bits=32)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_of_transformers_is_compressed_saved_and_loaded(name: str, tmp_path: Path) -> None:
    make, data, n_layers, skipped = MODELS[name]
    torch.manual_seed(0)
    model = rs.expose_layers(make().eval())
    batches = [(data(), torch.zeros(N)) for _ in range(3)]
    found = compressible_layers(model, batches[0][0])
    assert len(found.layers) == n_layers and (not skipped or skipped in found.skipped.values())
    plan = rs.Plan(layers={layer: choice(info, i) for i, (layer, info) in enumerate(found.layers.items())})
    compressed = rs.compress(model, plan, calibration=batches)
    rs.save(compressed, plan, tmp_path)
    loaded = rs.load(tmp_path, model)
    with evaluating(compressed), evaluating(loaded):
        own, read = (call_model(each, batches[0][0]).logits for each in (compressed, loaded))
    assert torch.equal(own, read) and bool(own.isfinite().all())
