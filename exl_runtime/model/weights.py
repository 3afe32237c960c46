"""Finds the tensors of a model in a checkpoint and checks them: any spelling, any format, still on the CPU as stored.

Asks the names table which spelling the checkpoint uses; never looks at a family name itself. Knows no kernels.
"""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..checkpoint.reader import DTYPES, Checkpoint
from ..config.names import Source
from ..config.spec import ModelSpec
from ..errors import CheckpointError, FormatError
from ..formats.base import LinearShape, QuantFormat
from ..formats.checks import require_finite
from ..formats.dense import FLOATS, Dense
from ..formats.detect import MARKERS, FormatHints, detect, load_linear
from ..formats.exl2 import Exl2
from ..formats.hints import FOREIGN_METHODS

log = logging.getLogger(__name__)


def declared_hints(checkpoint: Checkpoint, quantization: Mapping[str, object] | None) -> FormatHints:
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


class Weights:
    """The checked tensors of one open checkpoint.

    quantization  the raw `quantization_config` of the folder, or None
    keep          bytes -> the buffer for what is used as stored (dense matrices); None: every tensor has its own
    lend          bytes -> the buffer for the codes of a quantized matrix, valid until the next matrix is asked for: for
                  callers who repack one after another; None: every tensor has its own
    Every method raises CheckpointError for missing tensors, FormatError for tensors that do not fit the spec,
    NonFiniteError for NaN or infinity; all name the tensor and its file.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        quantization: Mapping[str, object] | None = None,
        *,
        keep: Callable[[int], Tensor] | None = None,
        lend: Callable[[int], Tensor] | None = None,
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self._keep = keep
        self._lend = lend
        self.hints = declared_hints(checkpoint, quantization)

    # --- single tensors ---------------------------------------------------------------------------------------

    def embedding(self) -> Tensor:
        """The table (rows, hidden) in its stored dtype (float64 becomes float32); rows may exceed vocab_size."""
        name = self._embedding_name()
        table = self.checkpoint.tensor(name, room=self._keep)
        if table.dtype == torch.float64:
            table = table.float()
        require_finite(table, "value", self.checkpoint.where(name))
        return table

    @property
    def embedding_rows(self) -> int:
        """Rows of the stored table, at least vocab_size; reads the header only."""
        return self.checkpoint.info(self._embedding_name()).shape[0]

    def norm(self, candidates: tuple[str, ...], size: int) -> Tensor:
        """One norm weight, float32 (size,)."""
        name = f"{self._first_existing(candidates)}.weight"
        weight = self.checkpoint.tensor(name)
        where = self.checkpoint.where(name)
        if weight.dtype not in FLOATS or tuple(weight.shape) != (size,):
            raise FormatError(f"{where}: norm weight is {weight.dtype} {tuple(weight.shape)}, wanted float ({size},)")
        weight = weight.float()
        require_finite(weight, "value", where)
        return weight

    def _embedding_name(self) -> str:
        name = f"{self._first_existing(self.spec.names.embedding)}.weight"
        info = self.checkpoint.info(name)
        dtype, shape = DTYPES.get(info.dtype), tuple(info.shape)
        rows, width = self.spec.vocab_size, self.spec.hidden_size
        if dtype not in FLOATS or len(shape) != 2 or shape[0] < rows or shape[1] != width:
            raise FormatError(
                f"{self.checkpoint.where(name)}: the embedding table is {dtype or info.dtype} {shape}, "
                f"config.json wants a float table ({rows}, {width})",
                hint="config.json and the weights are from different models",
            )
        return name

    def _first_existing(self, candidates: tuple[str, ...]) -> str:
        """The first path that exists; when none does the very first, so that reading it says what is missing."""
        return next((path for path in candidates if self.checkpoint.has(f"{path}.weight")), candidates[0])

    # --- matrices ---------------------------------------------------------------------------------------------

    def linear(
        self, sources: tuple[Source, ...], inputs: int, outputs: int, *, biased: bool | None = None
    ) -> tuple[QuantFormat, Tensor | None]:
        """The matrix at the first of `sources` that exists, and its bias (outputs,) in the stored dtype.

        biased  True: a bias must be there; False: one that is not all zero is an error; None: take what is
        The bias is None where there is none, or where it is all zero.
        """
        source = self.pick(sources)
        return self.matrix(source, inputs, outputs), self.bias(source, outputs, biased=biased)

    def bias(self, source: Source, outputs: int, *, biased: bool | None = None) -> Tensor | None:
        """The second half of `linear`."""
        if source.expert is not None:
            return None
        bias = self._bias(source, outputs)
        if biased is False and bias is not None:
            raise FormatError(
                f"{self.checkpoint.where(source.path + '.bias')}: a bias that config.json says does not exist",
                hint="config.json and the weights are from different models, or attention_bias/mlp_bias is missing",
            )
        if biased and bias is None and not self.checkpoint.has(f"{source.path}.bias"):
            raise CheckpointError(f"tensor {source.path}.bias is missing, config.json says the layer has a bias")
        return bias

    def matrix(self, source: Source, inputs: int, outputs: int) -> QuantFormat:
        """The first half of `linear`."""
        shape = LinearShape(inputs, outputs)
        return self._matrix(source, shape) if source.expert is None else self._stacked(source, shape)

    def pick(self, sources: tuple[Source, ...]) -> Source:
        """The first source that the checkpoint has."""
        for source in sources:
            present = self.checkpoint.has(source.path) if source.expert is not None else self._marked(source.path)
            if present:
                return source
        wanted = " or ".join(dict.fromkeys(source.path for source in sources))
        raise CheckpointError(
            f"{self.checkpoint.folder}: no tensors for the matrix {wanted}",
            hint="the download is incomplete, or config.json belongs to another model",
        )

    def format_name(self, sources: tuple[Source, ...]) -> str:
        """ "dense", "exl2" or "gptq": how the first of `sources` that exists is stored; reads headers only."""
        source = self.pick(sources)
        if source.expert is not None:
            return Dense.name
        return detect(self.checkpoint.suffixes(source.path), where=source.path).name

    def head_source(self) -> Source | None:
        """Where the output head is; None: the embedding table serves as one, as the checkpoint has no other.

        The whole head, or only its first vocab_size outputs where it is padded to the rows of the embedding table.
        """
        spec, checkpoint = self.spec, self.checkpoint
        path = next((path for path in spec.names.head if self._marked(path)), None)
        if path is None:
            return None if spec.tied_embeddings else self.pick(tuple(Source(path=path) for path in spec.names.head))
        rows, vocab = self.embedding_rows, spec.vocab_size
        if rows == vocab:
            return Source(path=path)
        markers = (("weight", 0), ("qweight", 1), ("q_weight", 1))
        found = {suffix: dim for suffix, dim in markers if checkpoint.has(f"{path}.{suffix}")}
        widths = [checkpoint.info(f"{path}.{suffix}").shape[dim] for suffix, dim in found.items()]
        # EXL2 pads columns to 32, which its own reader takes off.
        padded = any(width >= rows for width in widths)
        return Source(path=path, start=0, stop=vocab, total=rows) if padded else Source(path=path)

    def _marked(self, path: str) -> bool:
        return bool(MARKERS.keys() & self.checkpoint.suffixes(path))

    def _bias(self, source: Source, size: int) -> Tensor | None:
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
        return bias if bias.any() else None

    def _matrix(self, source: Source, shape: LinearShape) -> QuantFormat:
        group = self.checkpoint.group(source.path)
        hints = self.hints.for_module(source.path)
        name = f"{source.path}.{Dense.marker}"
        whole = (source.total, shape.in_features)
        dense = group.infos.keys() - {"bias"} == {Dense.marker}
        # A part of a matrix of any other shape is cut out below, where the whole is looked at and refused.
        if dense and source.start is not None and source.stop is not None and self.checkpoint.info(name).shape == whole:
            part = self.checkpoint.tensor(name, part=(source.start, source.stop), room=self._keep)
            return load_linear({Dense.marker: part}, shape, where=group.where, hints=hints)
        tensors = {suffix: self._stored(source, suffix) for suffix in group if suffix != "bias"}
        if source.start is None or source.stop is None:
            return load_linear(tensors, shape, where=group.where, hints=hints)
        fused = LinearShape(shape.in_features, source.total)
        return load_linear(tensors, fused, where=group.where, hints=hints).columns(source.start, source.stop)

    def _stored(self, source: Source, suffix: str) -> Tensor:
        """One tensor of a matrix, in memory by what becomes of it."""
        room = None
        if suffix == Dense.marker:
            room = self._keep if source.start is None else None
        elif suffix in MARKERS:
            room = self._lend
        return self.checkpoint.tensor(f"{source.path}.{suffix}", room=room)

    def _stacked(self, source: Source, shape: LinearShape) -> Dense:
        """One expert out of a dense 3-D tensor (experts, out, in); only its slice is read."""
        where = self.checkpoint.where(source.path)
        found = self.checkpoint.info(source.path).shape
        total = source.total or shape.out_features
        if len(found) != 3 or tuple(found[1:]) != (total, shape.in_features) or found[0] <= source.expert:
            raise FormatError(f"{where}: shape {tuple(found)}, wanted (experts, {total}, {shape.in_features})")
        part = (source.start or 0, total if source.stop is None else source.stop)
        weight = self.checkpoint.tensor(source.path, row=source.expert, part=part, room=self._keep)
        return Dense.load({"weight": weight}, shape, where=where)
