"""Can a measured latency be believed, is it predicted well, and what do bits and layers cost on the target?

Each question is a module of its own, which says what it asks and what its target is, and is imported when it is asked:
`itself` (latency_itself.py), one model against itself on a busy machine; `prediction` (latency_prediction.py), layers'
latencies added up against those of whole plans; `int8` (latency_int8.py), int8 against the runtime's own; `profile`
(latency_profile.py), the time that the table of candidates takes. `--quick` asks each a smaller question.
"""

import argparse
import importlib
from functools import partial

from common import Answer, ask, options

QUESTIONS = ("itself", "prediction", "int8", "profile")


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=QUESTIONS, help="one question instead of all")
    parser.add_argument("--compiled", action="store_true", help="predict for torch's compile mode as well")
    arguments = parser.parse_args()
    ask(arguments, {name: partial(answer, name) for name in QUESTIONS})


def answer(name: str, arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """The answer of `latency_NAME.answer(arguments)`; one that does not hold where there is no such module."""
    module = f"latency_{name}"
    try:
        question = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return {"holds": False, "scope": f"not asked: there is no {module}.py"}, []
    found: tuple[Answer, list[str]] = question.answer(arguments)
    return found


if __name__ == "__main__":
    main()
