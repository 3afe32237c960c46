"""The model to be quantized, one layer at a time: dense float32 weights out of any folder that the runtime loads.

Matrices are (K, N), y = x @ W, as everywhere in the formats; whatever they were stored in is dequantized exactly.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor
from typing_extensions import Self

from exl_runtime.checkpoint.header import TensorInfo
from exl_runtime.checkpoint.reader import DTYPES, Checkpoint
from exl_runtime.config import ConfigFiles, MlpSpec, ModelSpec, load_config, resolve
from exl_runtime.config.names import EXPERT_PARTS, Names
from exl_runtime.config.names import Source as Place
from exl_runtime.errors import CheckpointError
from exl_runtime.model.weights import Weights

HEAD = "lm_head"
FLOAT_BYTES = 4
SAMPLE = 4096  # bytes of every tensor that tell one model from another


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One matrix that will be quantized.

    key     inside its layer: "q_proj" ... "down_proj", "experts.3.gate_proj"; of the head: "lm_head"
    path    module path in the EXL2 folder: fused tensors split, the family's own prefix (formats/exl2.md 1.2)
    layer   index of its layer; None: the head
    inputs  K, rows of the matrix;  outputs  N, its columns
    biased  the architecture has a bias here
    """

    key: str
    path: str
    layer: int | None
    inputs: int
    outputs: int
    biased: bool


class Source:
    """An open model folder. Use as a context manager, or call `close`; tensors outlive it.

    folder  where it lies;  files  its JSON files;  spec  the model they describe;  device  where tensors come to lie
    Reading raises CheckpointError (a tensor is missing), FormatError (it does not fit) and NonFiniteError (NaN or
    infinity in a weight), each naming the tensor and its file.
    """

    def __init__(self, files: ConfigFiles, spec: ModelSpec, checkpoint: Checkpoint, device: torch.device) -> None:
        self.folder = files.folder
        self.files = files
        self.spec = spec
        self.device = device
        self._checkpoint = checkpoint
        self._identity: str | None = None  # read once: it looks into every tensor
        self._weights = Weights(checkpoint, spec, files.quantization)

    @classmethod
    def open(cls, folder: Path | str, device: torch.device | None = None) -> Self:
        """Read the configuration and the headers of the weight files; no tensor yet. `device` None: the CPU.

        Raises ConfigError, UnsupportedModel, CheckpointError.
        """
        files = load_config(folder)
        spec = resolve(files.config, files.generation)
        return cls(files, spec, Checkpoint.open(folder), device or torch.device("cpu"))

    def close(self) -> None:
        """Close the weight files."""
        self._checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    # --- what there is ----------------------------------------------------------------------------------------

    def slots(self, layer: int) -> tuple[Slot, ...]:
        """The matrices of one layer: q, k, v, o, then gate, up, down, of every expert in order where there are some."""
        spec, names = self.spec, self.spec.names
        hidden, wide, narrow = spec.hidden_size, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
        mlp = spec.layers[layer].mlp
        inner = mlp.intermediate_size
        shapes = {
            "q_proj": (hidden, wide, spec.qkv_bias),
            "k_proj": (hidden, narrow, spec.qkv_bias),
            "v_proj": (hidden, narrow, spec.qkv_bias),
            "o_proj": (wide, hidden, spec.out_bias),
        }
        bias = isinstance(mlp, MlpSpec) and mlp.bias
        gated = {
            "gate_proj": (hidden, inner, bias),
            "up_proj": (hidden, inner, bias),
            "down_proj": (inner, hidden, bias),
        }
        if isinstance(mlp, MlpSpec):
            shapes |= gated
        else:
            for expert in range(mlp.experts):
                shapes |= {f"experts.{expert}.{part}": gated[part] for part in EXPERT_PARTS}
        return tuple(
            Slot(
                key=key,
                path=_places(names, layer, key)[0].path,
                layer=layer,
                inputs=inputs,
                outputs=outputs,
                biased=biased,
            )
            for key, (inputs, outputs, biased) in shapes.items()
        )

    def layer_slots(self, layer: int | None) -> tuple[Slot, ...]:
        """`slots` of a layer; None: what is quantized outside of them, the head."""
        return (self.head_slot,) if layer is None else self.slots(layer)

    @property
    def head_slot(self) -> Slot:
        """The output head: a matrix of its own in an EXL2 folder even where the source ties it to the embedding."""
        spec = self.spec
        return Slot(
            key=HEAD,
            path=spec.names.head[0],
            layer=None,
            inputs=spec.hidden_size,
            outputs=spec.vocab_size,
            biased=False,
        )

    @property
    def head_is_embedding(self) -> bool:
        """True when the folder has no head of its own and the embedding table serves as one."""
        return self._weights.head_source() is None

    @property
    def formats(self) -> frozenset[str]:
        """The formats among the matrices: "dense", "exl2", "gptq". Reads headers only."""
        names, find = self.spec.names, self._weights.format_name
        slots = (slot for layer in self.spec.layers for slot in self.slots(layer.index))
        found = {find(_places(names, slot.layer, slot.key)) for slot in slots}
        head = self._weights.head_source()
        return frozenset(found | {"dense" if head is None else find((head,))})

    @property
    def parameters(self) -> int:
        """Weights in the matrices of the decoder layers: what bits per weight are counted over."""
        return sum(slot.inputs * slot.outputs for layer in self.spec.layers for slot in self.slots(layer.index))

    @property
    def head_parameters(self) -> int:
        """Weights in the output head."""
        return self.spec.hidden_size * self.spec.vocab_size

    @property
    def embedding_rows(self) -> int:
        """Rows of the stored token table, at least vocab_size."""
        return self._weights.embedding_rows

    def layer_bytes(self, i: int) -> int:
        """Bytes of all tensors of `layer(i)`."""
        spec = self.spec
        weights = sum(slot.outputs * (slot.inputs + slot.biased) for slot in self.slots(i))
        weights += sum(size for _, size in self._norms(i).values())
        mlp = spec.layers[i].mlp
        if not isinstance(mlp, MlpSpec):
            weights += spec.hidden_size * mlp.experts
        return FLOAT_BYTES * weights

    def identity(self) -> str:
        """32 hex digits that tell this model from others: every tensor's name, dtype and shape, and some of its bytes.

        A fine-tuned model may share whole tensors with its base, norms for example, so every tensor is looked at;
        reading all of their bytes would take minutes. Raises CheckpointError.
        """
        if self._identity is None:
            self._identity = self._digest()
        return self._identity

    def _digest(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._checkpoint.names):
            info = self._checkpoint.info(name)
            digest.update(f"{name} {info.dtype} {info.shape}\n".encode())
            digest.update(_middle(info))
        return digest.hexdigest()[:32]

    # --- tensors ----------------------------------------------------------------------------------------------

    def layer(self, i: int) -> dict[str, Tensor]:
        """Everything that layer `i` computes with, float32 on the device.

        <slot key>         (K, N), the matrices in the order of `slots`
        <slot key>.bias    (N,), where the slot is biased
        router             (hidden, experts), where there are experts
        input_norm, pre_mlp_norm (hidden,); post_attention_norm, post_mlp_norm (hidden,) and q_norm, k_norm
        (head_dim,) where the spec has them; as stored, that is without the spec's norm_weight_offset
        """
        spec, names = self.spec, self.spec.names
        held: dict[str, Tensor] = {}
        for slot in self.slots(i):
            held[slot.key], bias = self._linear(_places(names, i, slot.key), slot)
            if slot.biased:
                held[f"{slot.key}.bias"] = bias
        mlp = spec.layers[i].mlp
        if not isinstance(mlp, MlpSpec):
            router, _ = self._weights.linear(names.router(i), spec.hidden_size, mlp.experts, biased=False)
            held["router"] = router.dequantize().to(self.device)
        for key, (kind, size) in self._norms(i).items():
            held[key] = self._weights.norm(names.norm(i, kind), size).to(self.device)
        return held

    def matrix(self, slot: Slot) -> Tensor:
        """One matrix, float32 (K, N) on the device."""
        if slot.layer is None:
            return self.head()
        return self._linear(_places(self.spec.names, slot.layer, slot.key), slot)[0]

    def embedding(self) -> Tensor:
        """The token table, float32 (rows, hidden): as many rows as stored, not multiplied by embedding_scale."""
        return self._weights.embedding().to(device=self.device, dtype=torch.float32)

    def head(self) -> Tensor:
        """The output head, float32 (hidden, vocab): its own or the embedding table; padding outputs left out."""
        source = self._weights.head_source()
        if source is not None:
            return self._linear((source,), self.head_slot)[0]
        return self.embedding()[: self.spec.vocab_size].t().contiguous()

    def final_norm(self) -> Tensor:
        """The norm before the head, float32 (hidden,)."""
        return self._weights.norm(self.spec.names.final_norm, self.spec.hidden_size).to(self.device)

    # --- what stays dense -------------------------------------------------------------------------------------

    def dense_tensors(self, i: int | None) -> dict[str, str]:
        """Name in the EXL2 folder -> key in `layer(i)` of every tensor that is not quantized: norms, router.

        `i` None: the tensors outside the layers, under the keys "embedding" and "final_norm".
        """
        names = self.spec.names
        if i is None:
            return {f"{names.embedding[0]}.weight": "embedding", f"{names.final_norm[0]}.weight": "final_norm"}
        found = {f"{names.norm(i, kind)[0]}.weight": key for key, (kind, _) in self._norms(i).items()}
        if not isinstance(self.spec.layers[i].mlp, MlpSpec):
            found[f"{names.router(i)[0].path}.weight"] = "router"
        return found

    def extra_tensors(self) -> tuple[str, ...]:
        """Names of the stored tensors that are no part of the language model (a vision tower, its projector), sorted.

        Leftovers inside the language model (rotary buffers, zero biases, helper tensors of a format) are none.
        """
        names = self.spec.names
        inside = tuple(f"{prefix}layers." for prefix in names.prefixes)
        inside += tuple(f"{path}." for path in (*names.embedding, *names.final_norm, *names.head))
        return tuple(
            name
            for name in sorted(self._checkpoint.names)
            if not name.startswith(inside) and not name.endswith("rotary_emb.inv_freq")
        )

    def extra_info(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """dtype and shape of one of `extra_tensors` as stored; reads the header only."""
        info = self._checkpoint.info(name)
        return DTYPES[info.dtype], info.shape

    @property
    def extra_bytes(self) -> int:
        """Bytes of all `extra_tensors` as stored."""
        return sum(self._checkpoint.info(name).nbytes for name in self.extra_tensors())

    def extra(self, name: str) -> Tensor:
        """One of `extra_tensors`, as stored, on the CPU."""
        return self._checkpoint.tensor(name)

    # --- helpers ----------------------------------------------------------------------------------------------

    def _linear(self, places: tuple[Place, ...], slot: Slot) -> tuple[Tensor, Tensor | None]:
        """Matrix (K, N) and bias (N,); the bias is None unless the slot is biased."""
        matrix, bias = self._weights.linear(places, slot.inputs, slot.outputs, biased=slot.biased)
        if slot.biased:
            bias = torch.zeros(slot.outputs) if bias is None else bias.to(torch.float32, copy=True)
            bias = bias.to(self.device)
        return matrix.dequantize().to(self.device), bias

    def _norms(self, i: int) -> dict[str, tuple[str, int]]:
        """Key in `layer(i)` -> (kind in the names table, size) of the norms of a layer."""
        spec = self.spec
        kinds = {"input": spec.hidden_size, "pre_mlp": spec.hidden_size}
        if spec.post_norms:
            kinds |= {"post_attention": spec.hidden_size, "post_mlp": spec.hidden_size}
        if spec.qk_norm:
            kinds |= {"q": spec.head_dim, "k": spec.head_dim}
        return {f"{kind}_norm": (kind, size) for kind, size in kinds.items()}


def _middle(info: TensorInfo) -> bytes:
    """Up to `SAMPLE` bytes from the middle of a tensor."""
    size = min(SAMPLE, info.nbytes)
    try:
        with open(info.file, "rb") as file:
            file.seek(info.start + (info.nbytes - size) // 2)
            return file.read(size)
    except OSError as err:
        raise CheckpointError(f"{info.file}: cannot be read: {err.strerror or err}", hint="check the disk") from err


def _places(names: Names, layer: int, key: str) -> tuple[Place, ...]:
    """Where the matrix `key` of a layer may be stored, best first; the first is the spelling of EXL2 folders."""
    if not key.startswith("experts."):
        return names.linear(layer, key)
    _, expert, part = key.split(".")
    return names.expert_linear(layer, int(expert), part)
