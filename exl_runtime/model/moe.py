"""A sparse mixture of experts: every token visits the few experts its router picks."""

import torch
from torch import Tensor

from ..config.spec import MoeSpec
from ..ops.table import OpSet
from .linear import Linear
from .mlp import Mlp


class Moe:
    """Router, experts, weighted sum; x (T, hidden) -> (T, hidden)."""

    def __init__(self, *, router: Linear, experts: list[Mlp], spec: MoeSpec, ops: OpSet) -> None:
        self.router = router
        self.experts = experts
        self.spec = spec
        self._route = ops.route

    def __call__(self, x: Tensor) -> Tensor:
        weights, chosen = self._route(self.router(x), self.spec.experts_per_token, self.spec.normalize_top)
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
