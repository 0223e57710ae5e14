"""README.md and the pages of docs/: their blocks and commands run, and their links lead somewhere."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path

import pytest
import typer.main
from command_line import Commands

from ranksearch.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKING_PAGES = [*PAGES, ROOT / "SECURITY.md"]
# The others have tests of their own, beside what is checked of all.
SELF_CONTAINED = ("README", "choosing_a_target", "cookbook", "goals", "reading_the_front", "your_model")
N_TRIALS = "3"
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")

# What would not end, asks a question or takes minutes, and where it is run.
RUN_ELSEWHERE = {
    "ui": "test_cli.py, until it is ended",
    "clean": "test_cli.py, which answers it",
    "demo": "scripts/demo; what it does is done here to a smaller study: run, front, export, verify",
}
# The benchmarks' commands made their figures, on real data and for hours.
PAGES_OF_READERS = [page for page in PAGES if page.stem != "benchmarks"]


def named(page: Path) -> str:
    return page.stem


def blocks(page: Path, *languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    """The words after `ranksearch` of all commands of a page, those within its sentences first, each once.

    Other programs are left out: pip, and the scripts, of which continuous integration runs scripts/setup,
    scripts/test and scripts/check.
    """
    text = page.read_text(encoding="utf-8")
    sentences = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [" ".join(span.split()) for span in re.findall(r"`(ranksearch [^`]*)`", sentences)]
    lines += [line for block in blocks(page, "sh", "ranksearch") for line in block.splitlines()]
    words = (shlex.split(line, comments=True) for line in dict.fromkeys(lines))
    found = [list(takewhile(lambda w: w != ">", rest)) for first, *rest in filter(None, words) if first == "ranksearch"]
    return [words for words in found if not is_only_a_name(*words)]


def is_only_a_name(command: str, *words: str) -> bool:
    """Whether a command is spoken of without the arguments that it needs."""
    group = typer.main.get_command(app)
    return not words and any(param.required for param in group.commands[command].params)  # type: ignore[attr-defined]


def commands_by_first_page() -> dict[Path, list[list[str]]]:
    """What is run for each page: the same command on several pages is run for the first of them."""
    found: dict[Path, list[list[str]]] = {}
    seen = []
    for page in PAGES_OF_READERS:
        for words in commands_of(page):
            if words[0] not in RUN_ELSEWHERE and words not in seen:
                seen.append(words)
                found.setdefault(page, []).append(words)
    return found


COMMANDS = commands_by_first_page()


@dataclass(frozen=True, kw_only=True)
class Reader:
    """Somebody who has run and exported the README's study, and goes through a page in a copy of its folder."""

    folder: Path
    trial: str
    run_id: str

    def words(self, words: list[str]) -> list[str]:
        """A page's command about this study: a trial that it has, and as many as it has, or one of another's."""
        n_trials = "1" if "--name" in words else N_TRIALS
        instead = {"--trial": self.trial, "--run-id": self.run_id, "--trials": n_trials}
        own = [instead.get(before, word) for before, word in pairwise(["", *words])]
        own = ["study.py" if word == "STUDY.py" else word for word in own]
        return [*own, "--trials", n_trials] if own[0] == "run" and "--trials" not in own else own


@pytest.fixture(scope="module")
def reader(commands: Commands, tmp_path_factory: pytest.TempPathFactory) -> Reader:
    folder = tmp_path_factory.mktemp("reader")
    (folder / "study.py").write_text(blocks(PAGES[0], "python")[0], encoding="utf-8")
    # The cookbook's, for a network whose second layer has another name.
    (plan,) = blocks(ROOT / "docs" / "cookbook.md", "json")
    (folder / "plan.json").write_text(plan.replace('"3"', '"2"'), encoding="utf-8")
    ended = commands.run(folder, "run", "study.py", "--trials", N_TRIALS, "--json")
    assert ended.code == 0, ended.err
    # What pages without an export of their own verify.
    assert commands.run(folder, "export", "study.py", "-o", "small").code == 0
    best = next(row for row in json.loads(ended.out)["front"] if not row["summary"].startswith("dense:"))
    return Reader(folder=folder, trial=str(best["trial"]), run_id=best["run_id"])


@pytest.mark.parametrize("page", [page for page in PAGES if page.stem in SELF_CONTAINED], ids=named)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKSEARCH_MAX_TIMING_SECONDS", "0.1")
    names: dict[str, object] = {"__name__": "page"}
    assert blocks(page, "python")
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", list(COMMANDS), ids=named)
def test_commands_run(page: Path, reader: Reader, commands: Commands, tmp_path: Path) -> None:
    folder, empty = tmp_path / "copy", tmp_path / "empty"
    shutil.copytree(reader.folder, folder)
    empty.mkdir()
    for words in COMMANDS[page]:
        if "-o" in words:
            # A page's exports to one folder are alternatives.
            shutil.rmtree(folder / words[words.index("-o") + 1], ignore_errors=True)
        ended = commands.run(empty if words[0] == "new" else folder, *reader.words(words))
        assert ended.code == 0 or (ended.code == 1 and is_late_alone(ended.out)), f"{words}\n{ended.out}\n{ended.err}"


def is_late_alone(printed: str) -> bool:
    """Whether all that `verify` found fault with is the time, which is the machine's as well."""
    faults = [line for line in printed.splitlines() if line.startswith("FAILS")]
    return bool(faults) and all("the latency is as claimed" in line for line in faults)


@pytest.mark.parametrize("page", LINKING_PAGES, ids=named)
def test_links_lead_to_files_and_sections(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("https://", "http://")):
            continue
        path, _, section = link.partition("#")
        target = page if not path else (page.parent / path).resolve()
        assert target.exists(), f"{page.name} links to {link}"
        if section:
            titles = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE)
            anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert section in anchors, f"{page.name} links to {link}"


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(PAGES[0].read_text(encoding="utf-8"))}
    assert {page.relative_to(ROOT).as_posix() for page in LINKING_PAGES[1:]} <= linked
