"""Study scripts to begin with: an empty one, or one for a model of a library."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template

from ranksearch.errors import StudyError

FOLDER = Path(__file__).parent / "_templates"


@dataclass(frozen=True, kw_only=True, slots=True)
class Scaffold:
    """A template by its file, the example of a model's name where it takes one, and whether it runs in our tests."""

    file: str
    example: str | None = None
    tested: bool = False


SCAFFOLDS: Mapping[str, Scaffold] = {
    "blank": Scaffold(file="blank.txt", tested=True),
    "torchvision": Scaffold(file="torchvision.txt", example="resnet18"),
    "timm": Scaffold(file="timm.txt", example="vit_small_patch16_224"),
    "hf": Scaffold(file="hf.txt", example="distilbert-base-uncased-finetuned-sst-2-english", tested=True),
    "hf-sentence": Scaffold(file="hf_sentence.txt", example="sentence-transformers/all-MiniLM-L6-v2", tested=True),
    "hf-causal": Scaffold(file="hf_causal.txt", example="HuggingFaceTB/SmolLM2-135M", tested=True),
}


def write_script(what: str, output: Path | None = None) -> Path:
    """Writes the study script that `what` asks for: `blank`, or a library and a model as in `torchvision:resnet18`.

    It goes to `output`, else to a file in the working directory that is named like the model. Raises StudyError for
    what there is no template of, and where the file is there already.
    """
    library, _, model = what.partition(":")
    scaffold = SCAFFOLDS.get(library)
    if scaffold is None or bool(model) != bool(scaffold.example):
        known = ", ".join(f"{key}:{found.example}" if found.example else key for key, found in SCAFFOLDS.items())
        raise StudyError(f"there is no template for {what!r}; write one of {known}")
    if re.search(r"[\"\\\n]", model):
        raise StudyError(f"{model!r} is no model's name")
    name = re.sub(r"[^\w.\-]+", "-", model).strip("-.") or "my-model"
    path = output or Path(f"{re.sub(r'[^a-zA-Z0-9]+', '_', name).strip('_')}.py" if model else "study.py")
    if path.exists():
        raise StudyError(f"{path} is there already; give another with --output")
    text = Template((FOLDER / scaffold.file).read_text(encoding="utf-8"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.substitute(model=model, name=name, file=path.name), encoding="utf-8")
    return path
