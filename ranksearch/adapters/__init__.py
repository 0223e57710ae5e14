"""Models of well-known libraries as studies take them: the model, what it is fed, its loss, its score, its ties."""

from ranksearch.adapters.base import Adapter
from ranksearch.adapters.causal import CausalLanguageModel, causal_language_model, next_tokens
from ranksearch.adapters.encoders import (
    Classifier,
    SentenceEncoder,
    pair_cosine_loss,
    sentence_encoder,
    text_classifier,
)
from ranksearch.adapters.ties import TIES
from ranksearch.adapters.timm import timm_classifier
from ranksearch.adapters.torchvision import torchvision_classifier

__all__ = [
    "TIES",
    "Adapter",
    "CausalLanguageModel",
    "Classifier",
    "SentenceEncoder",
    "causal_language_model",
    "next_tokens",
    "pair_cosine_loss",
    "sentence_encoder",
    "text_classifier",
    "timm_classifier",
    "torchvision_classifier",
]
