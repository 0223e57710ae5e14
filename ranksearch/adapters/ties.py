"""Layers that runtimes fuse, by the families of transformers' models: `Space(ties=rs.adapters.TIES["llama"])`."""

from collections.abc import Mapping

_NAMED = ("*.query", "*.key", "*.value")
_PROJECTIONS = ("*.q_proj", "*.k_proj", "*.v_proj")
_SELF_ATTENTION = ("*.self_attn.q_proj", "*.self_attn.k_proj", "*.self_attn.v_proj")
_GATED = ("*.gate_proj", "*.up_proj")

# Families whose attention is one layer already, such as GPT-2's and timm's, have nothing to tie.
TIES: Mapping[str, tuple[tuple[str, ...], ...]] = {
    **dict.fromkeys(("bert", "camembert", "electra", "roberta", "xlm-roberta"), (_NAMED,)),
    "deberta-v2": (("*.query_proj", "*.key_proj", "*.value_proj"),),
    "distilbert": (("*.q_lin", "*.k_lin", "*.v_lin"),),
    "mpnet": (("*.attn.q", "*.attn.k", "*.attn.v"),),
    **dict.fromkeys(("deit", "dinov2", "swin", "vit"), (_PROJECTIONS,)),
    **dict.fromkeys(("bart", "clip", "opt", "phi", "whisper"), (_SELF_ATTENTION,)),
    **dict.fromkeys(
        ("gemma", "gemma2", "gemma3_text", "llama", "mistral", "olmo2", "qwen2", "qwen3", "smollm3", "stablelm"),
        (_PROJECTIONS, _GATED),
    ),
}
