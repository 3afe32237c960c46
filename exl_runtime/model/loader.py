"""From a checkpoint to a `Transformer`: find every tensor, check it, hand it to the best kernel.

Asks the names table which spelling the checkpoint uses; never looks at a family name itself.
"""

import logging
from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from ..checkpoint.reader import Checkpoint
from ..config.names import Source
from ..config.spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec
from ..errors import CheckpointError, FormatError
from ..formats.base import LinearShape, QuantFormat
from ..formats.checks import require_finite
from ..formats.dense import Dense
from ..formats.detect import MARKERS, FormatHints, load_linear
from ..formats.exl2 import Exl2
from ..formats.hints import FOREIGN_METHODS
from ..ops.linear.select import select
from ..ops.table import OpSet, opset
from .attention import Attention, HeadNorms
from .block import Block, BlockNorms
from .embedding import Embedding
from .linear import Linear
from .mlp import Mlp
from .moe import Moe
from .transformer import Transformer

Progress = Callable[[int, int], None]  # (layers loaded, layers in all)
log = logging.getLogger(__name__)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def load_transformer(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    *,
    quantization: Mapping[str, object] | None = None,
    device: torch.device,
    backend: str,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> Transformer:
    """Build the model that `spec` describes from the tensors of `checkpoint`.

    device/backend  where and by which kernels it runs ("cpu", "cuda", "reference"); already resolved
    dtype           what goes into the matrices; None: float32 on the CPU, float16 elsewhere
    quantization    the raw `quantization_config` of the folder, or None
    Raises CheckpointError for missing tensors, FormatError for tensors that do not fit, NonFiniteError for NaN or
    infinity in weights, BackendUnavailable when no kernel takes a matrix.
    """
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.float16
    loader = _Loader(checkpoint, spec, _hints(checkpoint, quantization), device, backend, dtype)
    if backend != "cpu":
        return loader.build(progress)
    # The long work is done by native threads; what is left for torch are thousands of short passes over one matrix,
    # where waking its own threads costs more than they do, most of all on a machine that is busy otherwise.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return loader.build(progress)
    finally:
        torch.set_num_threads(threads)


def _hints(checkpoint: Checkpoint, quantization: Mapping[str, object] | None) -> FormatHints:
    """What the folder declares. EXL2 needs no declaration, and may carry a stale one of the model it was made from."""
    method = (quantization or {}).get("quant_method")
    if (
        isinstance(method, str)
        and method in FOREIGN_METHODS
        and any(name.endswith(f".{Exl2.marker}") for name in checkpoint.names)
    ):
        log.warning("%s declares %s, but its weights are EXL2; the declaration is ignored", checkpoint.folder, method)
        return FormatHints()
    return FormatHints.from_json(quantization)


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        hints: FormatHints,
        device: torch.device,
        backend: str,
        dtype: torch.dtype,
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.hints = hints
        self.device = device
        self.backend = backend
        self.dtype = dtype
        self.ops: OpSet = opset(backend)

    def build(self, progress: Progress | None) -> Transformer:
        spec = self.spec
        embedding = self.embedding()
        blocks = []
        for layer in spec.layers:
            blocks.append(self.block(layer))
            if progress is not None:
                progress(len(blocks), len(spec.layers))
        return Transformer(
            spec=spec,
            embedding=embedding,
            blocks=blocks,
            final_norm=self.norm(spec.names.final_norm, spec.hidden_size),
            head=self.head(embedding),
            ops=self.ops,
            device=self.device,
            dtype=self.dtype,
            backend=self.backend,
        )

    # --- single tensors ---------------------------------------------------------------------------------------

    def embedding(self) -> Embedding:
        path = self.first_existing(self.spec.names.embedding, "weight")
        table = self.checkpoint.tensor(f"{path}.weight")
        where = self.checkpoint.where(f"{path}.weight")
        rows, width = self.spec.vocab_size, self.spec.hidden_size
        if table.dtype not in FLOATS or table.dim() != 2 or table.shape[0] < rows or table.shape[1] != width:
            raise FormatError(
                f"{where}: the embedding table is {table.dtype} {tuple(table.shape)}, "
                f"config.json wants a float table ({rows}, {width})",
                hint="config.json and the weights are from different models",
            )
        if table.dtype == torch.float64:
            table = table.float()
        require_finite(table, "value", where)
        return Embedding(table.to(self.device), scale=self.spec.embedding_scale)

    def norm(self, candidates: tuple[str, ...], size: int) -> Tensor:
        path = self.first_existing(candidates, "weight")
        weight = self.checkpoint.tensor(f"{path}.weight")
        where = self.checkpoint.where(f"{path}.weight")
        if weight.dtype not in FLOATS or tuple(weight.shape) != (size,):
            raise FormatError(f"{where}: norm weight is {weight.dtype} {tuple(weight.shape)}, wanted float ({size},)")
        require_finite(weight, "value", where)
        return weight.to(device=self.device, dtype=torch.float32)

    def bias(self, source: Source, size: int) -> Tensor | None:
        name = f"{source.path}.bias"
        if not self.checkpoint.has(name):
            return None
        bias = self.checkpoint.tensor(name)
        where = self.checkpoint.where(name)
        start = source.start or 0
        if bias.dtype not in FLOATS or bias.dim() != 1 or bias.shape[0] < start + size:
            raise FormatError(
                f"{where}: bias is {bias.dtype} {tuple(bias.shape)}, wanted at least {start + size} floats"
            )
        bias = bias[start : start + size]
        require_finite(bias, "value", where)
        # Many GPTQ exports carry an all-zero bias for layers that have none.
        return bias.to(device=self.device, dtype=self.dtype, copy=True) if bias.any() else None

    def first_existing(self, candidates: tuple[str, ...], suffix: str) -> str:
        """The first path that exists; when none does the very first, so that reading it says what is missing."""
        return next((path for path in candidates if self.checkpoint.has(f"{path}.{suffix}")), candidates[0])

    # --- linears ----------------------------------------------------------------------------------------------

    def linear(self, sources: tuple[Source, ...], inputs: int, outputs: int, *, biased: bool | None = None) -> Linear:
        """`biased`: True: a bias must be there; False: one that is not all zero is an error; None: take what is."""
        source = self.pick(sources)
        shape = LinearShape(inputs, outputs)
        if source.expert is not None:
            kernel = select(self.stacked(source, shape), self.device, self.backend)
            return Linear(kernel)
        bias = self.bias(source, outputs)
        if biased is False and bias is not None:
            raise FormatError(
                f"{self.checkpoint.where(source.path + '.bias')}: a bias that config.json says does not exist",
                hint="config.json and the weights are from different models, or attention_bias/mlp_bias is missing",
            )
        if biased and bias is None and not self.checkpoint.has(f"{source.path}.bias"):
            raise CheckpointError(f"tensor {source.path}.bias is missing, config.json says the layer has a bias")
        return Linear(select(self.quantized(source, shape), self.device, self.backend), bias)

    def pick(self, sources: tuple[Source, ...]) -> Source:
        for source in sources:
            present = self.checkpoint.has(source.path) if source.expert is not None else self.markers(source.path)
            if present:
                return source
        wanted = " or ".join(dict.fromkeys(source.path for source in sources))
        raise CheckpointError(
            f"{self.checkpoint.folder}: no tensors for the matrix {wanted}",
            hint="the download is incomplete, or config.json belongs to another model",
        )

    def markers(self, path: str) -> bool:
        return bool(MARKERS.keys() & self.checkpoint.suffixes(path))

    def quantized(self, source: Source, shape: LinearShape) -> QuantFormat:
        group = self.checkpoint.group(source.path)
        tensors = {suffix: tensor for suffix, tensor in group.items() if suffix != "bias"}
        hints = self.hints.for_module(source.path)
        if source.start is None or source.stop is None:
            return load_linear(tensors, shape, where=group.where, hints=hints)
        whole = LinearShape(shape.in_features, source.total)
        return load_linear(tensors, whole, where=group.where, hints=hints).columns(source.start, source.stop)

    def stacked(self, source: Source, shape: LinearShape) -> Dense:
        """One expert out of a dense 3-D tensor (experts, out, in); only its slice is read."""
        where = self.checkpoint.where(source.path)
        found = self.checkpoint.info(source.path).shape
        total = source.total or shape.out_features
        if len(found) != 3 or tuple(found[1:]) != (total, shape.in_features) or found[0] <= source.expert:
            raise FormatError(f"{where}: shape {tuple(found)}, wanted (experts, {total}, {shape.in_features})")
        weight = self.checkpoint.tensor(source.path, row=source.expert)
        if source.start is not None:
            weight = weight[source.start : source.stop]
        return Dense.load({"weight": weight.contiguous()}, shape, where=where)

    def head(self, embedding: Embedding) -> Linear:
        """The output head; the embedding table when the checkpoint has no head of its own and may share it."""
        spec = self.spec
        for path in spec.names.head:
            if self.markers(path):
                return self.linear((self.head_source(path, embedding),), spec.hidden_size, spec.vocab_size)
        if not spec.tied_embeddings:
            self.pick(tuple(Source(path=path) for path in spec.names.head))
        where = "the embedding table, used as output head"
        table = embedding.table[: spec.vocab_size].to("cpu")
        dense = Dense.load({"weight": table}, LinearShape(spec.hidden_size, spec.vocab_size), where=where)
        return Linear(select(dense, self.device, self.backend))

    def head_source(self, path: str, embedding: Embedding) -> Source:
        """The whole head; only its first vocab_size outputs where it is padded to the rows of the embedding table."""
        rows, vocab = embedding.table.shape[0], self.spec.vocab_size
        if rows == vocab:
            return Source(path=path)
        markers = (("weight", 0), ("qweight", 1), ("q_weight", 1))
        found = {suffix: dim for suffix, dim in markers if self.checkpoint.has(f"{path}.{suffix}")}
        widths = [self.checkpoint.info(f"{path}.{suffix}").shape[dim] for suffix, dim in found.items()]
        # EXL2 pads columns to 32, which its own reader takes off.
        padded = any(width >= rows for width in widths)
        return Source(path=path, start=0, stop=vocab, total=rows) if padded else Source(path=path)

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
        return Moe(router=router, experts=list(experts()), spec=moe)

    def gated(self, part: Callable[[str], tuple[Source, ...]], inner: int, activation: str, *, biased: bool) -> Mlp:
        hidden = self.spec.hidden_size
        return Mlp(
            gate=self.linear(part("gate_proj"), hidden, inner, biased=biased),
            up=self.linear(part("up_proj"), hidden, inner, biased=biased),
            down=self.linear(part("down_proj"), inner, hidden, biased=biased),
            activation=activation,
            ops=self.ops,
        )
