"""Networks of the architectures that people bring, small and of random weights, with inputs as they take them.

Those of `transformers` are that library's own classes, made from their configurations; nothing is downloaded. What it
does not have is spelled out here, after the papers that are named.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from networks import resnet18, vgg16
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ranksearch.layers import call_model

N_WORDS, N_CLASSES = 128, 10
# Batches by which BatchNorms get the moments that training would have left them.
N_SETTLING, SETTLING_ROWS = 4, 8


@dataclass(frozen=True, kw_only=True)
class Network:
    """How a network is made, and so many examples of what it takes, by their number and a generator."""

    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], Any]


class SqueezeExcite(nn.Module):
    """Hu et al.'s, as MobileNetV3 has it: channels are weighed by what a bottleneck makes of their means."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(inputs, 1)
        return inputs * F.hardsigmoid(self.expand(F.relu(self.reduce(means))))


class InvertedResidual(nn.Module):
    """The block of MobileNetV3 (Howard et al., 2019): expansion, depthwise filters, squeeze-excite, projection."""

    def __init__(self, n_inputs: int, hidden: int, width: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.is_residual = stride == 1 and n_inputs == width
        self.body = nn.Sequential(
            nn.Conv2d(n_inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.Hardswish(inplace=True),
            nn.Conv2d(hidden, hidden, kernel, stride, kernel // 2, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.Hardswish(inplace=True), SqueezeExcite(hidden),
            nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width),
        )  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        outputs: Tensor = self.body(inputs)
        return inputs + outputs if self.is_residual else outputs


def mobilenet_v3() -> nn.Module:
    """MobileNetV3 with four blocks."""
    stem = [nn.Conv2d(3, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.Hardswish(inplace=True)]
    sizes = [(16, 32, 16, 3, 1), (16, 64, 24, 3, 2), (24, 96, 24, 5, 1), (24, 96, 40, 5, 2)]
    head = [nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96), nn.Hardswish(inplace=True)]
    classifier = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 64), nn.Hardswish(), nn.Dropout(0.2)]
    return nn.Sequential(*stem, *(InvertedResidual(*size) for size in sizes), *head, *classifier, nn.Linear(64, 10))


def _double_convolution(n_inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(n_inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
        nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
    )  # fmt: skip


class UNet(nn.Module):
    """Ronneberger et al.'s, three scales deep: skips are concatenated, transposed convolutions scale up."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64)) -> None:
        super().__init__()
        pairs = list(zip(widths, widths[1:], strict=False))
        self.down = nn.ModuleList(_double_convolution(n, width) for n, width in zip((3, *widths), widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, stride=2) for narrow, wide in reversed(pairs))
        self.merge = nn.ModuleList(_double_convolution(2 * narrow, narrow) for narrow, _ in reversed(pairs))
        self.head = nn.Conv2d(widths[0], 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        values, skips = self.down[0](images), []
        for block in list(self.down)[1:]:
            skips.append(values)
            values = block(F.max_pool2d(values, 2))
        for up, merge in zip(self.up, self.merge, strict=True):
            values = merge(torch.cat([skips.pop(), up(values)], dim=1))
        return self.head(values)


class AudioNetwork(nn.Module):
    """Convolutions over time alone, on raw samples: dilated ones with residuals, as in WaveNet (van den Oord, 2016)."""

    def __init__(self, width: int = 32, n_blocks: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 16, stride=8, padding=4)
        self.filters = nn.ModuleList(
            nn.Conv1d(width, 2 * width, 3, padding=2**i, dilation=2**i) for i in range(n_blocks)
        )
        self.mixes = nn.ModuleList(nn.Conv1d(width, width, 1) for _ in range(n_blocks))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(n_blocks))
        self.head = nn.Linear(width, 10)

    def forward(self, samples: Tensor) -> Tensor:
        values = F.relu(self.stem(samples))
        for spread, mix, norm in zip(self.filters, self.mixes, self.norms, strict=True):
            values = values + norm(mix(F.glu(spread(values), dim=1)))
        return self.head(values.mean(2))


def _of_transformers(model: str, config: str, **sizes: Any) -> nn.Module:
    """A class of transformers, made from its configuration: `sizes` are the fields that differ from the defaults."""
    import transformers

    made: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    return made


def _images(size: int, n_rows: int, random: torch.Generator) -> Tensor:
    return torch.randn(n_rows, 3, size, size, generator=random)


def _samples(length: int, axes: tuple[int, ...], n_rows: int, random: torch.Generator) -> Tensor:
    return torch.randn(n_rows, *axes, length, generator=random)


def _words(length: int, n_rows: int, random: torch.Generator) -> Mapping[str, Tensor]:
    """Token ids of sentences of different lengths, padded at the end, with their masks."""
    lengths = torch.randint(length // 2, length + 1, (n_rows, 1), generator=random)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(1, N_WORDS, (n_rows, length), generator=random) * mask, "attention_mask": mask}


def _ids(length: int, n_rows: int, random: torch.Generator) -> Mapping[str, Tensor]:
    """Token ids of full length, as causal models are given them."""
    return {"input_ids": torch.randint(1, N_WORDS, (n_rows, length), generator=random)}


_text, _image = partial(_words, 24), partial(_images, 32)


def _transformer(model: str, config: str, inputs: Callable[[int, torch.Generator], Any], **sizes: Any) -> Network:
    return Network(build=partial(_of_transformers, model, config, **sizes), inputs=inputs)


ENCODER = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
NETWORKS: Mapping[str, Network] = {
    "resnet": Network(build=partial(resnet18, 8, (1, 1, 1, 1)), inputs=partial(_images, 64)),
    "resnet_bottleneck": _transformer(
        "ResNetForImageClassification", "ResNetConfig", partial(_images, 64), embedding_size=16,
        hidden_sizes=[32, 64, 128], depths=[1, 2, 1], layer_type="bottleneck", num_labels=N_CLASSES,
    ),
    "vgg": Network(build=partial(vgg16, 8), inputs=_image),
    "mobilenet_v2": _transformer(
        "MobileNetV2ForImageClassification", "MobileNetV2Config", partial(_images, 64), image_size=64,
        depth_multiplier=0.35, num_labels=N_CLASSES,
    ),
    "mobilenet_v3": Network(build=mobilenet_v3, inputs=partial(_images, 64)),
    "efficientnet": _transformer(
        "EfficientNetForImageClassification", "EfficientNetConfig", partial(_images, 64), image_size=64,
        width_coefficient=0.5, depth_coefficient=0.3, hidden_dim=640, num_labels=N_CLASSES,
    ),
    "convnext": _transformer(
        "ConvNextForImageClassification", "ConvNextConfig", partial(_images, 64), image_size=64,
        hidden_sizes=[24, 48, 96], depths=[1, 1, 2], num_stages=3, layer_scale_init_value=1.0, num_labels=N_CLASSES,
    ),
    "vit": _transformer(
        "ViTForImageClassification", "ViTConfig", _image, image_size=32, patch_size=8, num_labels=N_CLASSES, **ENCODER
    ),
    "swin": _transformer(
        "SwinForImageClassification", "SwinConfig", _image, image_size=32, patch_size=2, embed_dim=32,
        depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=N_CLASSES,
    ),
    "segformer": _transformer(
        "SegformerForSemanticSegmentation", "SegformerConfig", partial(_images, 64), num_encoder_blocks=2,
        depths=[1, 1], sr_ratios=[4, 1], hidden_sizes=[16, 32], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=32, num_labels=N_CLASSES,
    ),
    "detr": _transformer(
        "DetrForObjectDetection", "DetrConfig", partial(_images, 64), d_model=64, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=128, decoder_ffn_dim=128,
        num_queries=10, num_labels=N_CLASSES, use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
        backbone_config={
            "model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1],
            "layer_type": "basic", "out_features": ["stage3"],
        },
    ),
    "unet": Network(build=UNet, inputs=_image),
    "audio": Network(build=AudioNetwork, inputs=partial(_samples, 1024, (1,))),
    "wav2vec2": _transformer(
        "Wav2Vec2ForCTC", "Wav2Vec2Config", partial(_samples, 3200, ()), conv_dim=[32] * 4, conv_kernel=[10, 3, 3, 2],
        conv_stride=[5, 4, 2, 2], num_feat_extract_layers=4, num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4, vocab_size=32, **ENCODER,
    ),
    "bert": _transformer(
        "BertForSequenceClassification", "BertConfig", _text, vocab_size=N_WORDS, max_position_embeddings=64, **ENCODER
    ),
    "distilbert": _transformer(
        "DistilBertForSequenceClassification", "DistilBertConfig", _text, vocab_size=N_WORDS,
        max_position_embeddings=64, dim=64, hidden_dim=128, n_layers=2, n_heads=4,
    ),
    "gpt2": _transformer(
        "GPT2LMHeadModel", "GPT2Config", _text, vocab_size=N_WORDS, n_positions=64, n_embd=64, n_layer=2, n_head=4,
        use_cache=False,
    ),
    "llama": _transformer(
        "LlamaForCausalLM", "LlamaConfig", partial(_ids, 24), vocab_size=N_WORDS, num_key_value_heads=2,
        max_position_embeddings=64, use_cache=False, tie_word_embeddings=True, **ENCODER,
    ),
    "t5_encoder": _transformer(
        "T5EncoderModel", "T5Config", _text, vocab_size=N_WORDS, d_model=64, d_kv=16, d_ff=128, num_layers=2,
        num_heads=4, feed_forward_proj="gated-gelu", use_cache=False,
    ),
}  # fmt: skip


def network(name: str, seed: int = 0) -> nn.Module:
    """The network of that name in eval mode, its signals as strong as training would make them; always the same."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = NETWORKS[name].build()
        _strengthen(model, NETWORKS[name].inputs)
    return model.eval()


@torch.no_grad()
def _strengthen(model: nn.Module, inputs: Callable[[int, torch.Generator], Any]) -> None:
    """Gives layers a gain of about 1 (in place), and BatchNorms the moments of random inputs.

    As they are made, the signals of some die away with depth, and nothing that is cut or rounded would show.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d) and not parametrize.is_parametrized(module):
            gain = "linear" if isinstance(module, nn.Linear) else "relu"
            nn.init.kaiming_normal_(module.weight, nonlinearity=gain)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = None
        nn.init.ones_(norm.weight)
    random = torch.Generator().manual_seed(1)
    for _ in range(N_SETTLING if norms else 0):
        call_model(model.train(), inputs(SETTLING_ROWS, random))
