"""The decompositions by name, and the check that a choice fits a layer."""

from ranksearch.decompositions.base import AbstractDecomposition, Factorisation, Options, describe
from ranksearch.decompositions.blueprint_separable import BlueprintSeparable
from ranksearch.decompositions.cp import CP
from ranksearch.decompositions.depthwise_separable import DepthwiseSeparable
from ranksearch.decompositions.grouped_svd import GroupedSVD
from ranksearch.decompositions.harmonic import Harmonic
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.none import NoDecomposition
from ranksearch.decompositions.ranks import Ranks
from ranksearch.decompositions.spatial_svd import SpatialSVD
from ranksearch.decompositions.svd import SVD
from ranksearch.decompositions.tensor_train import TensorTrain
from ranksearch.decompositions.tucker2 import Tucker2
from ranksearch.errors import DecompositionError
from ranksearch.layers import LayerSpec
from ranksearch.plan import LayerChoice

__all__ = [
    "DECOMPOSITIONS",
    "AbstractDecomposition",
    "Factorisation",
    "Metric",
    "Options",
    "Ranks",
    "check_choice",
    "get_decomposition",
    "register_decomposition",
]

DECOMPOSITIONS: dict[str, AbstractDecomposition] = {
    decomposition.name: decomposition
    for decomposition in (
        NoDecomposition(),
        SVD(),
        SpatialSVD(),
        Tucker2(),
        CP(),
        TensorTrain(),
        DepthwiseSeparable(),
        BlueprintSeparable(),
        GroupedSVD(),
        Harmonic(),
    )
}
_BUILT_IN = frozenset(DECOMPOSITIONS)


def register_decomposition(decomposition: AbstractDecomposition) -> None:
    """Adds a decomposition of your own to the table, in place of one that you registered under its name before.

    Raises DecompositionError where the name is one of ours.
    """
    if decomposition.name in _BUILT_IN:
        raise DecompositionError(f"{decomposition.name!r} is a decomposition of ranksearch; give yours another name")
    DECOMPOSITIONS[decomposition.name] = decomposition


def get_decomposition(name: str) -> AbstractDecomposition:
    """The decomposition of this name. Raises DecompositionError, listing the known, where there is none."""
    if name not in DECOMPOSITIONS:
        raise DecompositionError(f"there is no decomposition {name!r}; known are {', '.join(DECOMPOSITIONS)}")
    return DECOMPOSITIONS[name]


def check_choice(spec: LayerSpec, choice: LayerChoice, *, layer: str | None = None) -> None:
    """Raises DecompositionError, with the layer's name if given, where the choice does not fit the layer."""
    place = describe(spec) if layer is None else f"layer {layer!r}, {describe(spec)}"
    try:
        decomposition = get_decomposition(choice.decomposition)
    except DecompositionError as error:
        raise DecompositionError(f"{place}: {error}") from None
    reason = decomposition.refuse(spec)
    if reason is not None:
        raise DecompositionError(f"{place}: {choice.decomposition} refuses it: {reason}")
    settings = [decomposition.spell_out(options) for options in decomposition.options_for(spec)]
    if decomposition.spell_out(choice.factor_options) not in settings:
        allowed = " or ".join(str(setting) for setting in settings)
        raise DecompositionError(
            f"{place}: {choice.decomposition} has no options {choice.factor_options}; allowed are {allowed}"
        )
    _check_ranks(place, choice, decomposition.max_ranks(spec, choice.factor_options))


def _check_ranks(place: str, choice: LayerChoice, most: Ranks) -> None:
    if len(choice.ranks) != len(most):
        raise DecompositionError(
            f"{place}: {choice.decomposition} takes {len(most)} ranks, not {len(choice.ranks)}: {choice.ranks}"
        )
    if any(not 1 <= rank <= largest for rank, largest in zip(choice.ranks, most, strict=True)):
        raise DecompositionError(
            f"{place}: {choice.decomposition} ranks {choice.ranks} are not all between 1 and {most}"
        )
