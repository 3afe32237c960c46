"""A sparse mixture of experts: every token visits the few experts its router picks."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..config.spec import MoeSpec
from .linear import Linear
from .mlp import Mlp

Route = Callable[[Tensor, int, bool], tuple[Tensor, Tensor]]


class Moe:
    """Router, experts, weighted sum; x (T, hidden) -> (T, hidden). route: see `ops.moe.route`."""

    def __init__(self, *, router: Linear, experts: list[Mlp], spec: MoeSpec, route: Route) -> None:
        self.router = router
        self.experts = experts
        self.spec = spec
        self.route = route

    def __call__(self, x: Tensor) -> Tensor:
        weights, chosen = self.route(self.router(x), self.spec.experts_per_token, self.spec.normalize_top)
        out = torch.zeros_like(x)
        # Experts in ascending order, so that the order of the sum for one token never depends on its neighbours.
        for expert in chosen.unique(sorted=True).tolist():
            rows, place = (chosen == expert).nonzero(as_tuple=True)
            out.index_add_(0, rows, self.experts[expert](x[rows]) * weights[rows, place, None].to(x.dtype))
        return out

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Every linear layer inside."""
        return (self.router, *(linear for expert in self.experts for linear in expert.linears))
