"""The native pass of a model: one call for all layers where its parts are ones that ext/cpu/step.h knows.

It gives the bits of the blocks called one after another, without an interpreter and without torch between them.
Half precision on the CPU and kernels from elsewhere are not for it.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cache.storage import KVStorage
from ..config.spec import ModelSpec, RopeSpec
from ..ops import step as native
from ..ops.step import NO_MORE, Onward
from .batch import Plan
from .block import Block
from .embedding import Embedding
from .linear import Linear
from .mlp import Mlp
from .moe import Moe

WHOLE = 64  # tokens of a pass that runs in one call; a longer one comes back to the interpreter after every layer


class NativeStep:
    """Built by `native_step`. Not thread-safe, as the Transformer around it."""

    def __init__(self, program: native.Program) -> None:
        self.program = program

    def run(self, plan: Plan, kv: KVStorage, angles: Sequence[Tensor], places: Sequence[int]) -> tuple[Tensor, bool]:
        """Float32 logits (L, vocab), before any softcap, and whether they are finite; keys and values go into `kv`.

        angles, places: see `Angles.rows`.
        """
        program = self.program
        self._bind(kv, angles)
        numbers = _numbers(plan, places)
        if len(plan.tokens) <= WHOLE:
            return program.run(numbers, plan.pages, 0, program.layers)
        for layer in range(program.layers):
            found = program.run(numbers, plan.pages, layer, layer + 1)
            numbers = []
        return found

    def draw(
        self,
        plan: Plan,
        kv: KVStorage,
        angles: Sequence[Tensor],
        places: Sequence[int],
        draws: Sequence[float],
        banned: Sequence[int],
        onward: Onward,
    ) -> list[int]:
        """A token behind each of the L rows, see `ops.step.Program.draw`; for passes of at most WHOLE tokens."""
        if not self._bind(kv, angles):
            onward = NO_MORE  # angles of this pass alone are of no use for the next
        return self.program.draw(_numbers(plan, places), plan.pages, draws, banned, onward)

    def _bind(self, kv: KVStorage, angles: Sequence[Tensor]) -> bool:
        """Whether these pages and angles are those of the pass before."""
        if self.program.bound_to(kv.parts, angles):
            return True
        self.program.bind(kv.parts, kv.group_of, angles)
        return False

    def halt(self) -> None:
        """End what runs ahead of the calls, see `ops.step.Program.halt`."""
        self.program.halt()


def _numbers(plan: Plan, places: Sequence[int]) -> list[int]:
    sizes = (len(plan.tokens), len(plan.kv_lengths), len(plan.logit_rows))
    return [*sizes, *plan.tokens, *places, *plan.slots, *plan.q_starts, *plan.kv_lengths, *plan.logit_rows]


def native_step(
    spec: ModelSpec,
    embedding: Embedding,
    blocks: Sequence[Block],
    final_norm: Tensor,
    head: Linear,
    *,
    ropes: Sequence[RopeSpec],
    dtype: torch.dtype,
    backend: str,
) -> NativeStep | None:
    """The native pass of these parts, or None where one of them is not for it."""
    if backend != "cpu" or dtype != torch.float32 or not blocks:
        return None
    layers = [_layer(block, ropes) for block in blocks]
    end = _matrix(head)
    if end is None or not all(layers):
        return None
    program = native.Program(
        table=embedding.table,
        embedding_scale=embedding.scale,
        layers=[layer for layer in layers if layer is not None],
        final_norm=final_norm,
        head=end,
        heads=spec.heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        eps=spec.norm_eps,
        norm_offset=spec.norm_weight_offset,
        attention_scale=spec.attention_scale,
        attention_softcap=spec.attention_softcap,
        logit_scale=spec.logit_scale,
    )
    return NativeStep(program)


def _layer(block: Block, ropes: Sequence[RopeSpec]) -> native.Layer | None:
    attention, mlp, norms = block.attention, block.mlp, block.norms
    linears = (attention.query, attention.key, attention.value, attention.out, *mlp.linears)
    matrices = tuple(matrix for linear in linears if (matrix := _matrix(linear)) is not None)
    if type(mlp) not in (Mlp, Moe) or len(matrices) < len(linears):
        return None
    mixture = mlp.spec if isinstance(mlp, Moe) else None
    heads = attention.norms
    return native.Layer(
        matrices=matrices,
        norms=(
            norms.input,
            norms.pre_mlp,
            norms.post_attention,
            norms.post_mlp,
            None if heads is None else heads.query,
            None if heads is None else heads.key,
        ),
        activation=mlp.activation if mixture is None else mixture.activation,
        window=attention.window,
        rope=ropes.index(block.layer.rope),
        visits=0 if mixture is None else mixture.experts_per_token,
        normalize=mixture is not None and mixture.normalize_top,
    )


def _matrix(linear: Linear) -> native.Matrix | None:
    # A subclass computes something else around the kernel.
    return native.Matrix.of(linear.kernel, linear.bias) if type(linear) is Linear else None
