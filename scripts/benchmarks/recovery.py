"""Does short training win back what compression cost?

Targets: points that a plan at a cut of multiply-adds loses against dense on test images 5,000 to 9,999, after 30 epochs
of training at most, preparation included: ResNet-20 0.6 at 44 % and 1.1 at 67 %, ResNet-56 0.3 at 50 % and 0.8 at 66 %.
Controls tell what each part of the recipe is worth, for 10 epochs each, and are not judged. Jointly: low rank in 8 bits
loses no more than low rank alone of the same bytes. Digits: the embedded study's best plan at the same drop is smaller
or faster by 1.3x than where BatchNorm is re-estimated alone. All but the last need the folder that RANKSEARCH_DATA
names. `--quick`: a narrow network on the digits, of whose loss at 85 % two thirds must come back.
"""

import argparse
from collections.abc import Mapping
from dataclasses import replace

import recovery_digits
import recovery_joint
import torch
from common import Answer, Question, ask, options
from decompositions_networks import cifar_resnet, digits_network
from recovery_plans import RULES
from recovery_rows import DENSE, Judge, Recipe, judge_of, line, train, train_dense, train_plan

OURS = Recipe(name="ours", epochs=30.0, rule="one-shot loss, spatial")
MOST = {(20, 0.44): 0.6, (20, 0.67): 1.1, (56, 0.50): 0.3, (56, 0.66): 0.8}
CONTROLS = (
    Recipe(name="ours", epochs=10.0),
    Recipe(name="without distillation", epochs=10.0, distillation=0.0),
    Recipe(name="without product decay", epochs=10.0, product_decay=False),
    Recipe(name="without balance", epochs=10.0, balanced=False),
    Recipe(name="with preparation", epochs=10.0, prepare=3.0),
    Recipe(name="ranks by one-shot loss", epochs=10.0, rule="one-shot loss"),
    Recipe(name="spatial ranks by one-shot loss", epochs=10.0, rule="one-shot loss, spatial"),
    Recipe(name="ranks by tempered loss", epochs=10.0, rule="tempered loss"),
)


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--only", choices=list(QUESTIONS), help="one question instead of all")
    parser.add_argument(
        "--depths", type=int, nargs="+", choices=(20, 56), default=[20, 56], help="ResNets to ask about"
    )
    parser.add_argument("--cuts", type=float, nargs="+", help="of the judged cuts, these")
    parser.add_argument("--epochs", type=float, default=OURS.epochs, help="fewer fall short of the question")
    parser.add_argument("--learning-rate", type=float, default=OURS.learning_rate, help="the largest of the cycle")
    parser.add_argument("--rule", choices=list(RULES), default=OURS.rule, help="how the bars' ranks are chosen")
    parser.add_argument(
        "--recipes", nargs="+", choices=[*(r.name for r in CONTROLS), DENSE], help="of the controls, these"
    )
    parser.add_argument("--plans", nargs="+", choices=recovery_joint.NAMES, help="of the joint plans, these")
    arguments = parser.parse_args()
    ask(arguments, {"quick": quick} if arguments.quick else QUESTIONS)


def bars(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """Our recipe at each cut."""
    recipe = replace(OURS, epochs=arguments.epochs, learning_rate=arguments.learning_rate, rule=arguments.rule)
    rows = []
    for (depth, cut), most in MOST.items():
        if depth in arguments.depths and cut in (arguments.cuts or [cut]):
            subject = cifar_resnet(depth)
            rows.append(train(subject, judge_of(subject), cut, recipe) | {"most": most})
    return {
        "rows": rows,
        "target": {f"ResNet-{depth} {cut:.0%}": most for (depth, cut), most in MOST.items()},
        "holds": bool(rows) and all(row["test"]["drop"] <= row["most"] for row in rows),
        "scope": f"{recipe.epochs:g} epochs, one cycle to {recipe.learning_rate:g}, ranks: {recipe.rule}; drop in "
        "points, paired 95 %, on 5,000 test images and on all",
    }, [f"{line(row, ('test', 'all'))} (at most {row['most']})" for row in rows]


def controls(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """ResNet-20 at 67 %, the recipe with a part of it left out or put in."""
    subject = cifar_resnet(20)
    judge, epochs = judge_of(subject), min(arguments.epochs, CONTROLS[0].epochs)
    wanted = arguments.recipes or [*(recipe.name for recipe in CONTROLS), DENSE]
    rows = [
        train(subject, judge, 0.67, replace(recipe, epochs=epochs, learning_rate=arguments.learning_rate))
        for recipe in CONTROLS
        if recipe.name in wanted
    ]
    if DENSE in wanted:
        rows.append(train_dense(subject, judge, epochs, arguments.learning_rate))
    return {
        "rows": rows,
        "holds": True,
        "scope": f"ResNet-20, 67 % of its multiply-adds cut, {epochs:g} epochs each; not judged",
    }, [line(row, ("test", "all")) for row in rows]


def joint(arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """ResNet-20, low rank and bits at equal bytes."""
    subject = cifar_resnet(20)
    judge, epochs = judge_of(subject), min(arguments.epochs, CONTROLS[0].epochs)
    wanted = arguments.plans or recovery_joint.NAMES
    recipe = Recipe(name="", epochs=epochs, learning_rate=arguments.learning_rate)
    rows = [
        train_plan(subject, judge, plan, replace(recipe, name=name))
        for name, plan in recovery_joint.plans(subject, wanted)
    ]
    drops = {row["recipe"]: row["test"]["drop"] for row in rows}
    both, alone = drops.get(recovery_joint.BOTH_AS_FOUR), drops.get(recovery_joint.LOW_AS_FOUR)
    return {
        "rows": rows,
        "holds": both is not None and alone is not None and both <= alone,
        "target": "low rank 8/8 loses no more than low rank alone of the same bytes",
        "scope": f"ResNet-20, {epochs:g} epochs each",
    }, [line(row, ("test", "all")) for row in rows]


def digits(_arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """The embedded study, with training and without."""
    return recovery_digits.answer(N_TRIALS)


def quick(_arguments: argparse.Namespace) -> tuple[Answer, list[str]]:
    """The digits: what comes back in a few epochs."""
    subject = digits_network()
    row = train(subject, Judge(subject=subject, splits={"test": list(subject.test)}), QUICK_CUT, QUICK)
    left = row["test"]["drop"] / row["before"] if row["before"] > 0 else 0.0
    return {
        "rows": [row],
        "target": {"share of the loss left": QUICK_LEFT},
        "holds": row["before"] > QUICK_LEAST and left <= QUICK_LEFT,
        "scope": f"a narrow network on the digits, {QUICK_CUT:.0%} cut, {QUICK.epochs:g} epochs; of the points lost "
        "after BatchNorm re-estimation, the share still lost after training",
    }, [line(row, ("test",))]


# A loss of less than a point is nothing to win back.
QUICK, QUICK_CUT, QUICK_LEFT, QUICK_LEAST = Recipe(name="ours", epochs=8.0), 0.85, 1 / 3, 1.0
N_TRIALS = 24
QUESTIONS: Mapping[str, Question] = {"bars": bars, "controls": controls, "joint": joint, "digits": digits}


if __name__ == "__main__":
    torch.set_flush_denormal(True)
    main()
