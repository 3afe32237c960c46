"""The one Transformer: what it computes is said by a `ModelSpec`, how fast by the kernels it was built with.

Knows nothing of text, requests or sampling; keys and values live in pages that somebody else hands out.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from typing import NoReturn

import torch
from torch import Tensor
from typing_extensions import Self

from ..cache.storage import KVStorage
from ..config.spec import ModelSpec
from ..errors import NonFiniteError
from ..ops.native import torch_alone
from ..ops.step import NO_MORE, Onward, all_finite
from ..ops.table import OpSet
from .angles import Angles
from .batch import ForwardBatch, Plan, by_layer
from .block import Block
from .embedding import Embedding
from .linear import Linear
from .step import NativeStep, native_step


class Transformer:
    """Built by `loader.load_transformer`. Not thread-safe: one forward pass at a time."""

    def __init__(
        self,
        *,
        spec: ModelSpec,
        embedding: Embedding,
        blocks: list[Block],
        final_norm: Tensor,
        head: Linear,
        ops: OpSet,
        device: torch.device,
        dtype: torch.dtype,
        backend: str,
    ) -> None:
        self.spec = spec
        self.embedding = embedding
        self.blocks = blocks
        self.final_norm = final_norm
        self.head = head
        self.ops = ops
        self.device = device
        self.dtype = dtype
        self.backend = backend
        self._angles = Angles(tuple(dict.fromkeys(layer.rope for layer in spec.layers)), device)
        self._step: NativeStep | None = None
        self._step_is_known = False
        self.runs_ahead = True  # whether `draw_plan` begins what is known of the next pass

    @property
    def nbytes(self) -> int:
        """Bytes of all weights as held in memory."""
        linears = [self.head, *(linear for block in self.blocks for linear in block.linears)]
        return self.embedding.nbytes + sum(linear.nbytes for linear in linears)

    def forward(self, batch: ForwardBatch, kv: KVStorage) -> Tensor:
        """Run the new tokens of `batch`, write their keys and values into `kv`, return float32 logits (L, vocab).

        Row l belongs to token row batch.logit_rows[l]. Raises NonFiniteError naming the first layer whose output
        is not finite.
        """
        if self.step is not None:
            return self.forward_plan(Plan.of(batch), kv)
        logits = self._run(batch, kv, check=False)
        if not all_finite(logits):
            self._refuse(batch, kv)
        return logits

    def forward_plan(self, plan: Plan, kv: KVStorage) -> Tensor:
        """`forward` without a detour over tensors, for what runs natively."""
        step = self.step
        if step is None:
            return self.forward(plan.on(self.device), kv)
        logits, finite = step.run(plan, kv, *self._angles.rows(plan))
        if not finite:
            self._refuse(plan.on(self.device), kv)
        if self.spec.logit_softcap is None:
            return logits
        with self._alone():
            return self._capped(logits)

    @property
    def draws(self) -> bool:
        """Whether `draw_plan` can be called."""
        return self.spec.logit_softcap is None and self.step is not None

    def draw_plan(
        self,
        plan: Plan,
        kv: KVStorage,
        draws: Sequence[float],
        banned: Sequence[int],
        onward: Onward = NO_MORE,
    ) -> list[int] | None:
        """`forward_plan` and a token drawn behind each of its rows, natively, without logits that anybody sees.

        draws, banned, onward: see `ops.step.Program.draw`. None where a row has no token that may be drawn, or its
        logits are not finite; `forward_plan` then says what is wrong. At most `step.WHOLE` tokens.
        """
        step = self.step
        assert step is not None
        tokens = step.draw(plan, kv, *self._angles.rows(plan), draws, banned, onward if self.runs_ahead else NO_MORE)
        return None if -1 in tokens else tokens

    def halt(self) -> None:
        """End the pass that runs ahead of the calls, if there is one: before others than this model touch the pages."""
        if self._step is not None:
            self._step.halt()

    def _refuse(self, batch: ForwardBatch, kv: KVStorage) -> NoReturn:
        """The logits are not finite: find the layer."""
        self._run(batch, kv, check=True)
        raise NonFiniteError("the logits contain NaN or infinity", hint="the output head or its scales are damaged")

    @property
    def step(self) -> NativeStep | None:
        """The native pass of this model, built when first asked for; None where a part is not for it."""
        if not self._step_is_known:
            parts = (self.spec, self.embedding, self.blocks, self.final_norm, self.head)
            self._step = native_step(*parts, ropes=self._angles.ropes, dtype=self.dtype, backend=self.backend)
            self._step_is_known = True
        return self._step

    def forget_step(self) -> None:
        """Call when a part of the model has been replaced: the native pass is built anew from what is there then."""
        self.halt()
        self._step, self._step_is_known = None, False

    def with_parts(self, blocks: list[Block], head: Linear, embedding: Embedding) -> Self:
        """The same model with other blocks, another head and embedding; all else is shared."""
        other = copy(self)
        other.blocks, other.head, other.embedding = blocks, head, embedding
        other.forget_step()  # which halts the pass of this one: until then it is the other's, too
        return other

    def _capped(self, logits: Tensor) -> Tensor:
        if (cap := self.spec.logit_softcap) is not None:
            logits.div_(cap).tanh_().mul_(cap)
        return logits

    def _run(self, batch: ForwardBatch, kv: KVStorage, *, check: bool) -> Tensor:
        """Operator by operator."""
        self.halt()
        with torch.inference_mode(), self._alone():
            return self._run_layers(batch, kv, check)

    def _alone(self) -> AbstractContextManager[None]:
        return torch_alone() if self.backend == "cpu" else nullcontext()

    def _run_layers(self, batch: ForwardBatch, kv: KVStorage, check: bool) -> Tensor:
        spec = self.spec
        x = self.embedding(batch.tokens)
        if check:
            require_finite(x, "the token embedding")
        ropes = self._angles.of_all(batch)
        seen = by_layer(batch, kv.geometry)
        for block in self.blocks:
            x = block(x, seen[block.layer.index], ropes[block.layer.rope], *kv.layer(block.layer.index))
            if check:
                require_finite(x, f"layer {block.layer.index}")
        if batch.logit_rows.numel() != x.shape[0]:
            x = x.index_select(0, batch.logit_rows)
        x = self.ops.rms_norm(x, self.final_norm, spec.norm_eps, spec.norm_weight_offset)
        logits = self.head(x.to(self.dtype)).float()
        if spec.logit_scale != 1.0:
            logits.mul_(spec.logit_scale)
        return self._capped(logits)


def require_finite(x: Tensor, where: str) -> None:
    """Raise NonFiniteError naming the place and the token row when x (T, hidden) holds NaN or infinity."""
    bad = ~torch.isfinite(x).all(dim=-1)
    if bad.any():
        row = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"{where} gives NaN or infinity (token row {row} of this pass)",
            hint="the weights of that layer are damaged, or the model needs a wider number range than it is given",
        )
