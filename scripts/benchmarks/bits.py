"""Are few bits in the file, what do they cost in accuracy, and are they faster where the profile says so?

Each question is a module of its own, which says what its target is: `size` (bits_size.py), the bytes of written files;
`accuracy` (bits_accuracy.py), calibrated rounding beside plain rounding and NNCF's int8, without any training; `joint`
(bits_joint.py), the sign of what 8 bits do to the latency of factored plans. `accuracy` needs the folder that
RANKSEARCH_DATA names. `--quick` asks each of a small network on the digits.
"""

import bits_accuracy
import bits_joint
import bits_size
from common import ask, options


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=list(QUESTIONS), help="one question instead of all")
    parser.add_argument(
        "--depths", type=int, nargs="+", choices=(20, 56), default=[20, 56], help="ResNets to ask about"
    )
    ask(parser.parse_args(), QUESTIONS)


QUESTIONS = {"size": bits_size.answer, "accuracy": bits_accuracy.answer, "joint": bits_joint.answer}


if __name__ == "__main__":
    main()
