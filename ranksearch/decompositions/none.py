"""The layer as it is."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor, nn

from ranksearch.decompositions.base import AbstractDecomposition, Factorisation, Options, double_precision
from ranksearch.decompositions.metric import Metric
from ranksearch.decompositions.ranks import Ranks
from ranksearch.layers import LayerSpec, build_layer


@final
@dataclass(frozen=True, kw_only=True, slots=True)
class NoneFactorisation(Factorisation):
    """The weight itself."""

    dense: Tensor

    def factors(self, ranks: Ranks) -> tuple[Tensor, ...]:
        return (self.dense.clone(),)

    def weight(self, ranks: Ranks) -> Tensor:
        return self.dense.clone()


@final
class NoDecomposition(AbstractDecomposition):
    """Leaves the layer as it is: no ranks, one module, a bias only where the layer has one."""

    name: ClassVar[str] = "none"

    def refuse(self, spec: LayerSpec) -> str | None:
        return None

    def max_ranks(self, spec: LayerSpec, options: Options) -> Ranks:
        return ()

    def build(self, spec: LayerSpec, ranks: Ranks, options: Options) -> nn.Module:
        return build_layer(spec)

    def factorise(self, weight: Tensor, spec: LayerSpec, options: Options, metric: Metric | None) -> Factorisation:
        double_precision(weight, spec, metric)
        return NoneFactorisation(dense=weight.detach().float())
