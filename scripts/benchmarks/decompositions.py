"""Are the decompositions fast, do their plans keep accuracy without training, and is their loss predicted well?

Targets. Speed: factors of every candidate rank of all closed-form methods for all layers of ResNet-18 in 60 s and 4 GiB
on two cores, CP in 5 minutes more, and in a fiftieth of the time that one tensorly call (torch.linalg.svd for matrices)
per layer, method and rank takes. Quality: at most 1.5 points lost at 36 % and 4 at 50 % of the parameters of ResNet-20
and of ResNet-56 cut. Prediction: rank correlation of predicted and measured loss of random plans at least 0.95 overall
and 0.7 among plans of like multiply-adds. Quality and prediction need the folder that RANKSEARCH_DATA names. `--quick`
asks the same of three layers of ResNet-18 and of a narrow network on the digits.
"""

import argparse
from collections.abc import Mapping

import decompositions_prediction
import decompositions_quality
import decompositions_speed
from common import Answer, Question, ask, options
from decompositions_networks import cifar_resnet, digits_network, resnet18_layers

# Of the second stage: on the first, of 64 channels, fixed costs rule, and a call per rank takes as long (1.2x).
QUICK_LAYERS = ("layer2_conv2", "layer2_downsample", "fc")


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=list(QUESTIONS), help="one question instead of all three")
    parser.add_argument(
        "--depths", type=int, nargs="+", choices=(20, 56), default=[20, 56], help="ResNets to ask about"
    )
    parser.add_argument("--plans", type=int, default=400, help="random plans per network")
    arguments = parser.parse_args()
    # Speed comes first: the peak memory that it reads is the process's.
    ask(arguments, QUESTIONS)


def speed(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    layers = resnet18_layers()
    if arguments.quick:
        layers = {name: layers[name] for name in QUICK_LAYERS}
        return decompositions_speed.answer(
            layers, QUICK_SPEED, "three layers of ResNet-18: 128 channels at 3x3, 64 to 128 at 1x1, and the classifier"
        )
    return decompositions_speed.answer(layers, SPEED, "ResNet-18, 20 convolutions and the classifier")


def quality(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    if arguments.quick:
        return decompositions_quality.answer([digits_network()], QUICK_QUALITY, multiple=8, alone=False)
    subjects = [cifar_resnet(depth) for depth in arguments.depths]
    return decompositions_quality.answer(subjects, QUALITY, multiple=2, alone=True)


def prediction(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    if arguments.quick:
        return decompositions_prediction.answer([digits_network()], QUICK_PREDICTION, n_plans=20, multiple=4)
    subjects = [cifar_resnet(depth) for depth in arguments.depths]
    return decompositions_prediction.answer(subjects, PREDICTION, n_plans=arguments.plans, multiple=2)


SPEED = decompositions_speed.Targets(seconds=60.0, iterative_seconds=300.0, peak_gib=4.0, times_faster=50.0)
QUICK_SPEED = decompositions_speed.Targets(seconds=10.0, iterative_seconds=20.0, peak_gib=1.0, times_faster=5.0)
# The largest drops in points by network and cut; other rows are told, not judged.
QUALITY = {(network, cut): most for network in ("ResNet-20", "ResNet-56") for cut, most in ((0.36, 1.5), (0.50, 4.0))}
QUICK_QUALITY = {("digits", 0.50): 1.0}
PREDICTION = decompositions_prediction.Targets(overall=0.95, in_band=0.7)
QUICK_PREDICTION = decompositions_prediction.Targets(overall=0.85, in_band=None)
QUESTIONS: Mapping[str, Question] = {
    "speed": speed,
    "quality": quality,
    "prediction": prediction,
}


if __name__ == "__main__":
    main()
