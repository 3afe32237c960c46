"""A whole pass of a model as one native call (ext/cpu/step.h). Knows matrices and operators, not specs or batches.

While Python delivers the tokens of a pass, the one behind it may be under way already (ext/cpu/ahead.h): `Program.draw`
is told how that one is drawn, and takes its tokens when it is asked for the same pass. `Program.halt` before anything
else reads or writes the pages.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import native
from .linear.base import LinearKernel
from .linear.dense_cpu import DenseCpu
from .linear.packed_cpu import PackedCpu

NONE = torch.empty(0)  # stands for a bias or a norm that is not there


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix as the native pass reads it: packed bytes or a dense (outputs, inputs) weight, and its bias."""

    weight: Tensor
    bias: Tensor
    residual: int

    @classmethod
    def of(cls, kernel: LinearKernel, bias: Tensor | None) -> "Matrix | None":
        """None if the native pass has no such kernel."""
        if bias is not None and (bias.dtype != torch.float32 or not bias.is_contiguous()):
            return None
        if isinstance(kernel, PackedCpu):
            return cls(kernel.packed, NONE if bias is None else bias, kernel.residual)
        if isinstance(kernel, DenseCpu):
            return cls(kernel.weight, NONE if bias is None else bias, 0)
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer.

    matrices   query, key, value, out, gate, up, down; of a mixture of experts query, key, value, out, router, then
               gate, up, down of every expert
    norms      input, pre_mlp, post_attention, post_mlp, query, key, float32; None where the model has none
    rope       which of the angles of a pass are this layer's
    visits     experts for a token, 0: no mixture; normalize: see `ops.moe.route`
    """

    matrices: tuple[Matrix, ...]
    norms: tuple[Tensor | None, ...]
    activation: str
    window: int | None
    rope: int
    visits: int = 0
    normalize: bool = False


@dataclass(frozen=True, slots=True)
class AdapterChange:
    """What an adapter adds to one matrix: ((x @ down^T) * (weight * scale)) @ up^T. See ext/cpu/step_lora.h.

    place     7 * layer + number of the matrix in `Layer.matrices`, of attention or an MLP; 7 * layers: the head
    down, up  (rank, in_features), (out_features, rank), any float dtype
    """

    place: int
    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True, slots=True)
class Onward:
    """What is known of the pass behind a pass of one token of every sequence: one more of each, as soon as it is drawn.

    draws, banned  as of `Program.draw`, for that pass
    ends           tokens behind which there is no such pass
    """

    draws: Sequence[float]
    banned: Sequence[int]
    ends: Sequence[int]


NO_MORE = Onward((), (), ())


class Program:
    """A model, built once; it keeps every tensor that it reads.

    A packed matrix keeps the residual that its kernel had when the program was built.
    """

    def __init__(
        self,
        *,
        table: Tensor,
        embedding_scale: float,
        layers: Sequence[Layer],
        final_norm: Tensor,
        head: Matrix,
        heads: int,
        kv_heads: int,
        head_dim: int,
        eps: float,
        norm_offset: float,
        attention_scale: float,
        attention_softcap: float | None,
        logit_scale: float,
    ) -> None:
        """table (vocabulary, hidden) in its stored dtype. Shapes that do not fit are RuntimeErrors."""
        ops = native.ops()
        number: int = ops.step_new(
            table.contiguous(),
            embedding_scale,
            final_norm,
            head.weight,
            head.bias,
            head.residual,
            heads,
            kv_heads,
            head_dim,
            eps,
            norm_offset,
            attention_scale,
            attention_softcap or 0.0,
            logit_scale,
        )
        self._number = number
        weakref.finalize(self, ops.step_free, number).atexit = False
        for layer in layers:
            ops.step_layer(
                number,
                [matrix.weight for matrix in layer.matrices],
                [matrix.bias for matrix in layer.matrices],
                [matrix.residual for matrix in layer.matrices],
                [NONE if norm is None else norm for norm in layer.norms],
                layer.activation,
                layer.window or 0,
                layer.rope,
                layer.visits,
                layer.normalize,
            )
        self.layers = len(layers)
        self._run, self._draw, self._halt = ops.step_run, ops.step_draw, ops.step_halt
        self._ahead = False  # perhaps something is under way
        self._bound: tuple[object, object] = (None, None)
        self._pages: Tensor | None = None

    def bound_to(self, parts: Sequence[tuple[Tensor, Tensor]], angles: Sequence[Tensor]) -> bool:
        """Whether these very objects were bound last."""
        return parts is self._bound[0] and angles is self._bound[1]

    def bind(self, parts: Sequence[tuple[Tensor, Tensor]], homes: Sequence[int], angles: Sequence[Tensor]) -> None:
        """What the next passes read and write.

        parts   keys and values of every group of layers, (layers, pages, page_size, kv_heads, row): see `ops.kv_append`
        homes   the group of every layer; the layers of a group are in it in their order
        angles  cos, sin, cos, sin, ... of each rope, float32 (n, rotary_dim / 2)
        """
        self._bound = (None, None)
        keys, values = [keys for keys, _ in parts], [values for _, values in parts]
        native.ops().step_bind(self._number, keys, values, homes, list(angles))
        self._bound = (parts, angles)

    def run(self, plan: Sequence[int], pages: Tensor, first: int, last: int) -> tuple[Tensor, bool]:
        """Layers [first, last) of a pass, from layer 0 on; the last one ends in logits.

        plan   T, S, L, then T tokens, T rows of the angles, T slots of each of the G groups, S + 1 starts of sequences
               in the rows, S lengths of sequences, L rows whose logits are wanted: see `ForwardBatch`. Empty for the
               layers behind the first
        pages  int32 (G * S, P)
        Returns float32 logits (L, vocab), empty if `last` is not the end, and whether all of them are finite.
        """
        return self._run(self._number, plan, pages, first, last)  # type: ignore[no-any-return]

    def draw(
        self,
        plan: Sequence[int],
        pages: Tensor,
        draws: Sequence[float],
        banned: Sequence[int],
        onward: Onward = NO_MORE,
    ) -> list[int]:
        """A whole pass, and a token behind each of its L rows of logits, as `ops.sample` draws it.

        plan, pages  see `run`; `pages` is passed on while it is the same object as in the call before
        draws        temperature (0: the best token), min_p and u of every row
        banned       for every row how many ids are not allowed, then these, ascending
        onward       what may be begun behind it, in pages that `pages` holds already; at most one pass is in vain
        A token is -1 where the logits are no distribution; all are if any logit is not finite.
        """
        if pages is not self._pages:
            native.ops().step_pages(self._number, pages)
            self._pages = pages
        self._ahead = onward is not NO_MORE
        return self._draw(  # type: ignore[no-any-return]
            self._number, plan, draws, banned, onward.draws, onward.banned, onward.ends
        )

    def halt(self) -> None:
        """Nothing is under way any more; what was is forgotten."""
        if self._ahead:
            self._ahead = False
            self._halt(self._number)

    @property
    def ahead(self) -> tuple[int, int]:
        """How many passes were begun ahead and asked for afterwards, and how many were halted."""
        taken, halted = native.ops().step_counts(self._number)
        return taken, halted

    def adapter(self, changes: Sequence[AdapterChange], owner: object) -> int:
        """A number for `share`, of an adapter that adds `changes`; forgotten with `owner`. Shapes are checked."""
        ops = native.ops()
        number: int = ops.step_adapter(
            self._number,
            [change.place for change in changes],
            [change.down for change in changes],
            [change.up for change in changes],
            [change.scale for change in changes],
        )
        weakref.finalize(owner, ops.step_drop, self._number, number).atexit = False
        return number

    def share(self, adapters: Sequence[int], weights: Sequence[float]) -> None:
        """The next pass, and no other, has these adapters, added in this order; weights: (adapters, sequences)."""
        native.ops().step_share(self._number, adapters, weights)

    def times(self, timed: bool = True) -> dict[str, float]:
        """Seconds spent in each phase since the last call of this, by passes that were asked for; from now on passes
        are timed, or not."""
        seconds, names = native.ops().step_times(self._number, timed)
        return dict(zip(names.split(), seconds.tolist(), strict=True))


def all_finite(x: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity; natively where the kernels are loaded."""
    if native.loaded() and x.device.type == "cpu" and x.dtype == torch.float32 and x.is_contiguous():
        return bool(native.ops().all_finite(x))
    return bool(torch.isfinite(x).all())
