"""The pages of docs/: their blocks run, their links lead somewhere, and their commands are ones that there are."""

import re
import shlex
from itertools import takewhile
from pathlib import Path

import pytest
import typer.main

from ranksearch.cli import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
# The others have tests of their own, beside what is checked of all.
SELF_CONTAINED = ("cookbook", "goals", "reading_the_front", "your_model")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def named(page: Path) -> str:
    return page.stem


def blocks(page: Path, *languages: str) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return re.findall(rf"```(?:{'|'.join(languages)})\n(.*?)```", text, re.DOTALL)


def commands_of(page: Path) -> list[list[str]]:
    lines = (line for block in blocks(page, "sh", "ranksearch") for line in block.splitlines())
    words = (shlex.split(line, comments=True) for line in lines)
    return [list(takewhile(lambda w: w != ">", rest)) for first, *rest in filter(None, words) if first == "ranksearch"]


@pytest.mark.parametrize("page", [ROOT / "docs" / f"{name}.md" for name in SELF_CONTAINED], ids=named)
def test_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKSEARCH_MAX_TIMING_SECONDS", "0.1")
    names: dict[str, object] = {"__name__": "page"}
    assert blocks(page, "python")
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=named)
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


@pytest.mark.parametrize("page", [page for page in PAGES if commands_of(page)], ids=named)
def test_commands_are_those_that_there_are(page: Path) -> None:
    group = typer.main.get_command(app)
    for name, *words in commands_of(page):
        command = group.commands[name]  # type: ignore[attr-defined]
        # Parses every option, and runs nothing.
        command.make_context(name, words)


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {link.partition("#")[0] for link in LINK.findall(PAGES[0].read_text(encoding="utf-8"))}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked
