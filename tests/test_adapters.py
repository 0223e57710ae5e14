"""Models of transformers as studies take them, on every runtime that is installed, and ties by family."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.errors import StudyError
from ranksearch.finding import compressible_layers
from ranksearch.layers import call_model, layer_spec
from ranksearch.runtimes import get_runtime
from ranksearch.spec import tied_layers
from ranksearch.trees import map_tensors
from ranksearch.workbench import SessionModel

transformers = pytest.importorskip("transformers")
from tiny_transformers import N_TOKENS, tiny_model, write_folder  # noqa: E402

TEXTS = ["the cat sat on the mat", "a very good film", "bad"]
ENCODER, CLASSIFIER = transformers.AutoModel, transformers.AutoModelForSequenceClassification
CAUSAL = transformers.AutoModelForCausalLM


def given_tokens() -> dict[str, Tensor]:
    """Token ids of four texts and their mask, two of them shorter."""
    tokens = torch.randint(4, N_TOKENS, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([9, 4, 9, 6])[:, None]).long()
    return {"input_ids": tokens * mask, "attention_mask": mask}


MODELS = {
    "classifier": (rs.adapters.Classifier, "bert", CLASSIFIER, given_tokens()),
    "images": (
        rs.adapters.Classifier,
        "vit",
        transformers.AutoModelForImageClassification,
        torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)),
    ),
    "sentences": (rs.adapters.SentenceEncoder, "bert", ENCODER, given_tokens()),
    "llama": (rs.adapters.CausalLanguageModel, "llama", CAUSAL, given_tokens()),
    "gpt2": (rs.adapters.CausalLanguageModel, "gpt2", CAUSAL, given_tokens()["input_ids"]),
}


@pytest.mark.parametrize("runtime", ["openvino", "onnxruntime", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_runtimes_compute_what_torch_does(name: str, runtime: str) -> None:
    if runtime == "onnxruntime":
        pytest.importorskip("onnxruntime")
    wrapped, family, kind, inputs = MODELS[name]
    model = wrapped(tiny_model(family, kind)).eval()
    other = map_tensors(inputs, lambda tensor: tensor.flip(0))
    session = get_runtime(runtime).prepare(model, inputs, rs.Target(runtime=runtime, batch_size=4, threads=1))
    with torch.no_grad():
        torch.testing.assert_close(
            call_model(SessionModel(session, 4), other), call_model(model, other), rtol=1e-4, atol=1e-5
        )


def test_a_sentence_is_the_mean_of_its_tokens_at_unit_length(tmp_path: Path) -> None:
    adapter = rs.adapters.sentence_encoder(write_folder(tmp_path, "bert", ENCODER), length=8)
    model, inputs = adapter.model(), adapter.inputs(TEXTS)
    assert set(inputs) == {"input_ids", "attention_mask"} and inputs["input_ids"].shape == (3, 8)
    with torch.no_grad():
        embeddings = model(**inputs)
        for text, embedding in zip(TEXTS, embeddings, strict=True):
            [alone] = rs.adapters.sentence_encoder(tmp_path, length=len(text.split()) + 2).inputs([text])["input_ids"]
            states = model.network(alone[None]).last_hidden_state[0]
            torch.testing.assert_close(embedding, F.normalize(states.mean(0), dim=0))
    targets = torch.tensor([0.25])
    cosine = float(embeddings[0] @ embeddings[1])
    assert float(adapter.loss(embeddings[:2], targets)) == pytest.approx((cosine - 0.25) ** 2, abs=1e-6)
    assert adapter.score is rs.pair_spearman and adapter.higher_is_better


def test_loading_a_folder_draws_no_bar(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    adapter = rs.adapters.sentence_encoder(write_folder(tmp_path, "bert", ENCODER), length=8)
    capfd.readouterr()
    adapter.model()
    assert "Loading" not in "".join(capfd.readouterr())
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_classifier_takes_texts_and_pairs_of_them(tmp_path: Path) -> None:
    adapter = rs.adapters.text_classifier(write_folder(tmp_path, "bert", CLASSIFIER, num_labels=3), length=8)
    model = adapter.model()
    assert not model.training
    inputs = adapter.inputs([("good film", "bad"), ("a", "cat")])
    assert inputs["input_ids"].tolist()[1] == [2, 7, 3, 11, 3, 0, 0, 0]
    with torch.no_grad():
        logits = call_model(model, adapter.inputs(TEXTS))
    assert logits.shape == (3, 3)
    assert torch.isfinite(adapter.loss(logits, torch.tensor([0, 1, 2])))
    assert adapter.score(logits, logits.argmax(1)).tolist() == [1.0, 1.0, 1.0]


def test_a_causal_model_is_asked_for_the_next_token_of_blocks(tmp_path: Path) -> None:
    adapter = rs.adapters.causal_language_model(write_folder(tmp_path, "gpt2", CAUSAL), length=4)
    inputs = adapter.inputs(TEXTS)
    targets = rs.adapters.next_tokens(inputs)
    assert inputs["attention_mask"].sum(1).tolist() == [4, 2, 4, 1]
    ids = inputs["input_ids"]
    assert targets.tolist() == [
        [*ids[0, 1:].tolist(), -100],
        [int(ids[1, 1]), -100, -100, -100],
        [*ids[2, 1:].tolist(), -100],
        [-100] * 4,
    ]
    model = adapter.model()
    with torch.no_grad():
        logits = call_model(model, inputs)
        own = model.network(input_ids=ids[:1], labels=ids[:1]).loss
    assert logits.shape == (4, N_TOKENS, 4) and not adapter.higher_is_better
    assert float(adapter.loss(logits[:1], targets[:1])) == pytest.approx(float(own), rel=1e-5)
    assert isinstance(adapter.score, type(rs.perplexity))


def test_what_was_published_in_bfloat16_is_loaded_in_float32(tmp_path: Path) -> None:
    network = tiny_model("llama", CAUSAL).bfloat16()
    network.save_pretrained(tmp_path)
    model = rs.adapters.causal_language_model(tmp_path).model()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def example_of(family: str) -> Any:
    if family in ("vit", "deit", "dinov2", "swin"):
        return {"pixel_values": torch.zeros(1, 3, 32, 32) if family == "swin" else torch.zeros(1, 3, 16, 16)}
    if family == "whisper":
        return {"input_features": torch.zeros(1, 80, 3000), "decoder_input_ids": torch.ones(1, 4, dtype=torch.long)}
    return {"input_ids": torch.arange(4, 8)[None]}


@pytest.mark.parametrize("family", sorted(rs.adapters.TIES.keys() - {"clip", "phi"}))
def test_ties_are_layers_of_one_input(family: str) -> None:
    model = tiny_model(family, ENCODER)
    found = compressible_layers(model, example_of(family))
    ties = tied_layers(rs.Space(ties=rs.adapters.TIES[family]).ties, list(found.layers))
    n_blocks = len({name.rpartition(".")[0] for tie in ties for name in tie})
    assert n_blocks >= 2 and {len(tie) for tie in ties} <= {2, 3}
    given: dict[str, list[Tensor]] = {name: [] for tie in ties for name in tie}
    for name, inputs in given.items():
        model.get_submodule(name).register_forward_hook(lambda _module, a, _output, kept=inputs: kept.append(a[0]))
    with torch.no_grad():
        model(**example_of(family))
    for first, *others in ties:
        for name in others:
            assert all(a is b or torch.equal(a, b) for a, b in zip(given[first], given[name], strict=True)), name


def test_a_library_that_is_missing_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = {
        "transformers": rs.adapters.text_classifier("distilbert-base-uncased"),
        "timm": rs.adapters.timm_classifier("resnet18"),
        "torchvision": rs.adapters.torchvision_classifier("resnet18"),
    }
    for name, adapter in adapters.items():
        for module in (name, "torchvision.models"):
            monkeypatch.setitem(sys.modules, module, None)
        for use in (adapter.model, lambda adapter=adapter: adapter.inputs(["a"])):
            with pytest.raises(StudyError, match=rf"needs {name}, .*: pip install 'ranksearch\[{name}\]'"):
                use()


def test_the_linear_layers_of_every_adapter_can_be_compressed() -> None:
    for wrapped, family, kind, inputs in MODELS.values():
        model = wrapped(tiny_model(family, kind))
        kinds = {name for name, module in model.named_modules() if layer_spec(module) is not None}
        missing = {name for name in kinds - compressible_layers(model, inputs).layers.keys() if "pooler" not in name}
        assert missing <= {"network.lm_head"}, missing
        assert isinstance(model, nn.Module)
