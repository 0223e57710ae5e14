"""The README's own blocks run, in their order."""

import re
import shlex
from pathlib import Path

import pytest
from command_line import Commands

README = Path(__file__).parents[1] / "README.md"


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "study.py").write_text(blocks("python")[0], encoding="utf-8")
    return folder


def test_commands(folder: Path, commands: Commands) -> None:
    lines = [line for block in blocks("ranksearch") for line in block.splitlines() if line]
    assert lines
    for line in lines:
        program, *words = shlex.split(line, comments=True)
        assert program == "ranksearch"
        ended = commands.run(folder, *words)
        assert ended.code == 0, f"{line}\n{ended.out}\n{ended.err}"


@pytest.mark.parametrize("block", blocks("python")[1:])
def test_python(folder: Path, monkeypatch: pytest.MonkeyPatch, block: str) -> None:
    monkeypatch.chdir(folder)
    exec(compile(block, str(README), "exec"), {})
