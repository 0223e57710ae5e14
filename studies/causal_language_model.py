"""A small Llama on the reference pages of Python's own documentation, judged by its perplexity, for OpenVINO.

The study trains it, once, for some minutes, and keeps it in the cache; or `$MODEL` names another causal model of
transformers, or its folder, such as HuggingFaceTB/SmolLM2-135M. The text is what Python's `help()` shows of keywords
and topics, or that of the file that `$TEXT` names. What is timed is one pass over `LENGTH` tokens, as a prompt is read:
no token after the other, and no cache of keys and values.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranksearch as rs
from ranksearch.cache import cache_directory, content_hash

try:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils.logging import disable_progress_bar
except ImportError as error:
    raise ImportError("this study needs transformers: pip install 'ranksearch[transformers]'") from error

disable_progress_bar()

LENGTH = 128  # tokens of a block
BATCH_SIZE = 8  # blocks
N_VOCABULARY, N_EPOCHS, MAX_LEARNING_RATE = 1024, 8, 3e-3
SIZES = {
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 384,
}
END = "<|end|>"
Batch = tuple[dict[str, Tensor], Tensor]


def read_texts() -> list[str]:
    """The texts for training, for the search and for the report: two thirds, a sixth and a sixth of the pages."""
    if chosen := os.environ.get("TEXT"):
        pages = [[paragraph] for paragraph in paragraphs(Path(chosen).read_text(encoding="utf-8"))]
    else:
        pages = [paragraphs(topics[name]) for name in sorted(topics)]
        order = torch.randperm(len(pages), generator=torch.Generator().manual_seed(0)).tolist()
        pages = [pages[i] for i in order]
    # Pages repeat one another's paragraphs: each is kept where it comes first, so that no two parts have one in common.
    first = {paragraph: number for number, page in reversed(list(enumerate(pages))) for paragraph in page}
    kept = [[paragraph for paragraph in page if first[paragraph] == number] for number, page in enumerate(pages)]
    ends = [len(kept) * 4 // 6, len(kept) * 5 // 6]
    parts = kept[: ends[0]], kept[ends[0] : ends[1]], kept[ends[1] :]
    return ["\n\n".join(paragraph for page in part for paragraph in page) for part in parts]


def paragraphs(text: str) -> list[str]:
    """What stands between empty lines."""
    return [part for part in (lines.strip("\n") for lines in text.split("\n\n")) if part]


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Pairs of bytes that occur often, merged until the vocabulary is full (Sennrich et al., 2016)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        text.splitlines(keepends=True),
        trainers.BpeTrainer(
            vocab_size=N_VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)


def train_network(tokens: Tensor, n_vocabulary: int, n_epochs: int) -> nn.Module:
    """A Llama trained from scratch on blocks of tokens, (N, `LENGTH`)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = LlamaForCausalLM(LlamaConfig(vocab_size=n_vocabulary, max_position_embeddings=LENGTH, **SIZES))
        model = rs.adapters.CausalLanguageModel(network).train()
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        n_steps = n_epochs * -(-len(tokens) // BATCH_SIZE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MAX_LEARNING_RATE, n_steps)
        for rows in (rows for _ in range(n_epochs) for rows in torch.randperm(len(tokens)).split(BATCH_SIZE)):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[rows])[:, :, :-1], tokens[rows, 1:]).backward()
            optimizer.step()
            schedule.step()
    return network.eval()


def trained_model() -> str:
    """The folder of the network that this study trains, and of its tokenizer; made at the first call."""
    text = read_texts()[0]
    key = content_hash([text, LENGTH, BATCH_SIZE, N_VOCABULARY, N_EPOCHS, MAX_LEARNING_RATE, SIZES])
    folder = cache_directory() / "causal-language-model" / key
    if not folder.is_dir():
        print("training the language model, once (some minutes)", file=sys.stderr, flush=True)
        tokenizer = train_tokenizer(text)
        ids = torch.tensor(tokenizer(text)["input_ids"])
        tokens = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        network = train_network(tokens, len(tokenizer), N_EPOCHS)
        folder.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(dir=folder.parent))
        network.save_pretrained(aside)
        tokenizer.save_pretrained(aside)
        try:
            aside.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(aside)
    return str(folder)


def language_model() -> rs.adapters.Adapter:
    """The model that `$MODEL` names, else the study's own, on blocks of `LENGTH` tokens."""
    return rs.adapters.causal_language_model(os.environ.get("MODEL") or trained_model(), length=LENGTH)


def load_data() -> rs.Data:
    """Batches of blocks and of the tokens after each; no paragraph is in two parts."""
    train, validation, test = (batches(text) for text in read_texts())
    return rs.Data(calibration=train, train=train, validation=validation, test=test)


def batches(text: str) -> list[Batch]:
    """Blocks of a text, all of one length but the last, which is padded."""
    inputs = language_model().inputs([text])
    targets = rs.adapters.next_tokens(inputs).split(BATCH_SIZE)
    parts = zip(*(tensor.split(BATCH_SIZE) for tensor in inputs.values()), strict=True)
    return [(dict(zip(inputs, part, strict=True)), wanted) for part, wanted in zip(parts, targets, strict=True)]


def load_model() -> nn.Module:
    """The trained model."""
    return language_model().model()


study = rs.StudySpec(
    name="llama-prompt-openvino",
    model=load_model,
    data=load_data,
    loss=F.cross_entropy,
    score=rs.perplexity,
    higher_is_better=False,
    target=rs.Target(runtime="openvino", device="cpu", batch_size=1, threads=2, precision="f32"),
    goals=rs.Goals(max_drop="5%rel"),
    space=rs.Space(ties=rs.adapters.TIES["llama"]),
    recovery=rs.Recovery(steps=40, learning_rate=5e-4, optimizer="adamw"),
    objectives=("drop", "latency", "bytes"),
    seed=0,
)
