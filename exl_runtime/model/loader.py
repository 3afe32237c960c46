"""From a checkpoint to a `Transformer`: every tensor that `weights` finds goes to the best kernel."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from ..checkpoint.packed import NOT_KEPT, PackedModel
from ..checkpoint.reader import Checkpoint
from ..config.names import Source
from ..config.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec
from ..errors import BackendUnavailable
from ..formats.base import LinearShape, QuantFormat
from ..formats.dense import Dense
from ..ops.linear.base import LinearKernel
from ..ops.linear.packed_cpu import PackedCpu
from ..ops.linear.packing import Packing, Workshop
from ..ops.linear.select import select
from ..ops.linear.stored_cpu import StoredCpu, repacked
from ..ops.table import OpSet, opset
from .attention import Attention, HeadNorms
from .block import Block, BlockNorms
from .embedding import Embedding
from .fused import FusedTransformer
from .linear import Linear
from .mlp import Mlp
from .moe import Moe
from .placement import memory_of
from .transformer import Transformer
from .weights import Weights

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]  # (layers loaded, layers in all)


def load_transformer(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    quantization: Mapping[str, object] | None = None,
    device: torch.device,
    backend: str,
    dtype: torch.dtype | None = None,
    hurry: bool = False,
    packed: PackedModel = NOT_KEPT,
    progress: Progress | None = None,
) -> Transformer:
    """Build the model that `spec` describes from the tensors of `checkpoint`.

    device/backend  where and by which kernels it runs ("cpu", "cuda", "reference"); already resolved
    dtype           what goes into the matrices; None: float32 on the CPU, float16 elsewhere
    hurry           take what accuracy the kernels can trade for speed, see `LinearKernel.hurry`
    quantization    the raw `quantization_config` of the folder, or None
    packed          repacked matrices from an earlier load are taken from here, and new ones handed in, on the CPU
    Raises CheckpointError for missing tensors, FormatError for tensors that do not fit, NonFiniteError for NaN or
    infinity in weights, BackendUnavailable when no kernel takes a matrix, OutOfMemory when a GPU is too small.
    """
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    if backend != "cpu":
        with memory_of(device, "the weights"):
            return _Loader(Weights(checkpoint, spec, quantization), device, backend, dtype, hurry).build(progress)
    workshop = Workshop(checkpoint.total_bytes)
    weights = Weights(checkpoint, spec, quantization, keep=workshop.keep, lend=workshop.lend)
    loader = _Loader(weights, device, backend, dtype, hurry, Packing(take=workshop.keep), packed)
    # The long work is done by native threads; what is left for torch are thousands of short passes over one matrix,
    # where waking its own threads costs more than they do, most of all on a machine that is busy otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return loader.build(progress)
    finally:
        torch.set_num_threads(threads)


class _Loader:
    def __init__(
        self,
        weights: Weights,
        device: torch.device,
        backend: str,
        dtype: torch.dtype,
        hurry: bool,
        packing: Packing | None = None,
        packed: PackedModel = NOT_KEPT,
    ) -> None:
        self.weights = weights
        self.spec = weights.spec
        self.device = device
        self.backend = backend
        self.dtype = dtype
        self.hurry = hurry
        self.packing = packing  # None: nothing is repacked
        self.packed = packed
        self.ops: OpSet = opset(backend)
        self.fallen_back = False  # a matrix runs in plain torch, and that was said

    def build(self, progress: Progress | None) -> Transformer:
        spec = self.spec
        embedding = self.embedding()
        head = self.head(embedding)  # the largest matrix: what packing it takes is free again for the others
        blocks = []
        for layer in spec.layers:
            blocks.append(self.block(layer))
            if progress is not None:
                progress(len(blocks), len(spec.layers))
        kind = FusedTransformer if self.backend == "cuda" else Transformer
        return kind(
            spec=spec,
            embedding=embedding,
            blocks=blocks,
            final_norm=self.norm(spec.names.final_norm, spec.hidden_size),
            head=head,
            ops=self.ops,
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
        )

    # --- single tensors ---------------------------------------------------------------------------------------

    def embedding(self) -> Embedding:
        return Embedding(self.weights.embedding().to(self.device), scale=self.spec.embedding_scale)

    def norm(self, candidates: tuple[str, ...], size: int) -> Tensor:
        return self.weights.norm(candidates, size).to(self.device)

    def linear(
        self,
        sources: tuple[Source, ...],
        inputs: int,
        outputs: int,
        *,
        biased: bool | None = None,
        packing: Packing | None = None,
    ) -> Linear:
        """A matrix and its bias; `packing` instead of the usual one."""
        source = self.weights.pick(sources)
        kernel = self.kernel(source, LinearShape(inputs, outputs), packing or self.packing)
        bias = self.weights.bias(source, outputs, biased=biased)
        if bias is not None:
            bias = bias.to(device=self.device, dtype=self.dtype, copy=True)  # a part of a fused bias is a view
            if kernel.output_order is not None:
                bias = bias[kernel.output_order.long()]
        return Linear(kernel, bias)

    def kernel(self, source: Source, shape: LinearShape, packing: Packing | None) -> LinearKernel:
        """The kernel for a stored matrix: as an earlier load packed it, or the best one for it."""
        name = f"{source.path}[{source.start}:{source.stop}]"
        kernel: LinearKernel
        if packing is not None and (found := self.packed.get(name)) is not None:
            kernel = StoredCpu(found, shape, packing, input_order=self.packed.get(f"{name} inputs"))
        else:
            kernel = self.select(self.weights.matrix(source, shape.in_features, shape.out_features), packing)
            if isinstance(kernel, PackedCpu):
                self.packed.add(name, kernel.packed)
                if kernel.input_order is not None:
                    self.packed.add(f"{name} inputs", kernel.input_order.view(torch.uint8))
        if self.hurry:
            kernel.hurry()
        return kernel

    def select(self, matrix: QuantFormat, packing: Packing | None = None) -> LinearKernel:
        """The best kernel for a matrix. One that no CUDA kernel takes runs in plain torch."""
        try:
            kernel = select(matrix, self.device, self.backend, packing)
        except BackendUnavailable as err:
            if self.backend != "cuda":
                raise
            if not self.fallen_back:
                log.warning("some matrices run in plain torch, which is slow: %s", " ".join(str(err).split()))
            self.fallen_back = True
            return select(matrix, self.device, "reference")
        # The codes of a quantized matrix are lent: a kernel that kept them would read those of the next one.
        assert packing is None or kernel.repacks or isinstance(matrix, Dense), f"{type(kernel).__name__} keeps codes"
        return kernel

    def head(self, embedding: Embedding) -> Linear:
        """The output head; the embedding table when the checkpoint has no head of its own and may share it."""
        spec = self.spec
        source = self.weights.head_source()
        if source is not None:
            return self.linear((source,), spec.hidden_size, spec.vocab_size)
        where = "the embedding table, used as output head"
        table = embedding.table[: spec.vocab_size].to("cpu")
        dense = Dense.load({"weight": table}, LinearShape(spec.hidden_size, spec.vocab_size), where=where)
        kernel = self.select(dense)
        if self.hurry:
            kernel.hurry()
        return Linear(kernel)

    # --- blocks -----------------------------------------------------------------------------------------------

    def block(self, layer: LayerSpec) -> Block:
        spec, names, i = self.spec, self.spec.names, layer.index
        norms = BlockNorms(
            input=self.norm(names.norm(i, "input"), spec.hidden_size),
            pre_mlp=self.norm(names.norm(i, "pre_mlp"), spec.hidden_size),
            post_attention=self.norm(names.norm(i, "post_attention"), spec.hidden_size) if spec.post_norms else None,
            post_mlp=self.norm(names.norm(i, "post_mlp"), spec.hidden_size) if spec.post_norms else None,
        )
        mlp = self.mlp(layer, layer.mlp) if isinstance(layer.mlp, MlpSpec) else self.moe(layer, layer.mlp)
        return Block(
            spec=spec,
            layer=layer,
            norms=norms,
            attention=self.attention(layer),
            mlp=mlp,
            ops=self.ops,
            dtype=self.dtype,
        )

    def attention(self, layer: LayerSpec) -> Attention:
        spec, names, i = self.spec, self.spec.names, layer.index
        wide, narrow = spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim

        def project(part: str, outputs: int) -> Linear:
            return self.linear(names.linear(i, part), spec.hidden_size, outputs, biased=spec.qkv_bias)

        return Attention(
            spec=spec,
            window=layer.window,
            query=project("q_proj", wide),
            key=project("k_proj", narrow),
            value=project("v_proj", narrow),
            out=self.linear(names.linear(i, "o_proj"), wide, spec.hidden_size, biased=spec.out_bias),
            norms=HeadNorms(self.norm(names.norm(i, "q"), spec.head_dim), self.norm(names.norm(i, "k"), spec.head_dim))
            if spec.qk_norm
            else None,
            ops=self.ops,
        )

    def mlp(self, layer: LayerSpec, mlp: MlpSpec) -> Mlp:
        def part(name: str) -> tuple[Source, ...]:
            return self.spec.names.linear(layer.index, name)

        return self.gated(part, mlp.intermediate_size, mlp.activation, biased=mlp.bias)

    def moe(self, layer: LayerSpec, moe: MoeSpec) -> Moe:
        names, i = self.spec.names, layer.index

        def experts() -> Iterator[Mlp]:
            for expert in range(moe.experts):

                def part(name: str, e: int = expert) -> tuple[Source, ...]:
                    return names.expert_linear(i, e, name)

                yield self.gated(part, moe.intermediate_size, moe.activation, biased=False)

        router = self.linear(names.router(i), self.spec.hidden_size, moe.experts, biased=False)
        return Moe(router=router, experts=list(experts()), spec=moe, route=self.ops.route)

    def gated(self, part: Callable[[str], tuple[Source, ...]], inner: int, activation: str, *, biased: bool) -> Mlp:
        """An MLP. Where `down` stores its rows in another order than the model's, and all three are repacked anyway,
        gate and up get their columns in that order: then nothing has to be sorted between them, at no cost in bits.
        """
        hidden = self.spec.hidden_size
        sources = [part(name) for name in ("gate_proj", "up_proj", "down_proj")]
        how = self.packing
        if how is not None and all(repacked(self.weights.format_name(each)) for each in sources):
            how = replace(how, sort_inputs=True)
        down = self.linear(sources[2], inner, hidden, biased=biased, packing=how)
        order = down.kernel.input_order
        if self.packing is not None:
            how = replace(self.packing, outputs=order)
        return Mlp(
            gate=self.linear(sources[0], hidden, inner, biased=biased, packing=how),
            up=self.linear(sources[1], hidden, inner, biased=biased, packing=how),
            down=down,
            activation=activation,
            ops=self.ops,
            inner_order=order,
        )
