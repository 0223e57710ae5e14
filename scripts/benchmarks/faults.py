"""Does it hold where something is wrong: files that a stranger wrote or a disk damaged?

Each question is a module of its own, `faults_NAME.py`, which says what it asks and what its target is, and is imported
when it is asked: `fuzz`, files that were changed in every way; `kills`, studies that are killed at any moment.
`--quick` asks each a smaller question.
"""

import argparse
import importlib
from functools import partial

from common import Answer, ask, options

QUESTIONS = ("fuzz", "kills")


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=QUESTIONS, help="one question instead of all")
    parser.add_argument("--kills", type=int, help="so many; fewer than 200 fall short of the question")
    parser.add_argument("--seed", type=int, default=0, help="of the kills' moments")
    ask(parser.parse_args(), {name: partial(answer, name) for name in QUESTIONS})


def answer(name: str, arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """The answer of `faults_NAME.answer(arguments)`."""
    found: tuple[Answer, list[str]] = importlib.import_module(f"faults_{name}").answer(arguments)
    return found


if __name__ == "__main__":
    main()
