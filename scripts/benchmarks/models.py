"""Do the architectures that people bring go the whole way, and do large ones within time and memory?

Each question is a module of its own, which says what it asks and what its target is: `architectures`
(models_architectures.py), nineteen kinds of network from their layers to a verified export; `causal`, `wide` and
`deep` (models_memory.py), the statistics, table and compression of a causal model of 135 million parameters, of a block
4,096 wide, and of four of them; `encoder` (models_encoder.py), what a search makes of a real sentence encoder.
`--quick` asks one architecture and a block 512 wide.
"""

import argparse
from functools import partial

from common import Answer, ask, options
from models_networks import NETWORKS

QUICK = ("architectures", "wide")
QUESTIONS = ("architectures", "causal", "wide", "deep", "encoder")


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=QUESTIONS, help="one question instead of all")
    parser.add_argument("--architectures", nargs="+", choices=list(NETWORKS), metavar="NAME", help="these rows alone")
    parser.add_argument("--trials", type=int, help="of the encoder's search")
    arguments = parser.parse_args()
    asked = QUICK if arguments.quick and not arguments.only else QUESTIONS
    ask(arguments, {name: partial(answer, name) for name in asked})


def answer(name: str, arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """The answer of the question's module, which is imported when it is asked."""
    if name == "architectures":
        import models_architectures

        return models_architectures.answer(arguments)
    if name == "encoder":
        import models_encoder

        return models_encoder.answer(arguments)
    import models_memory

    return models_memory.answer(name, arguments)


if __name__ == "__main__":
    main()
