"""What `quantization_config` says about GPTQ matrices, parsed and typed. Knows no tensors.

EXL2 and dense matrices need nothing from it. For GPTQ the tensors are the truth about bit width and group count; the
declaration only settles what tensors cannot show: how zero-points are read, and a group size when it is ambiguous.
Sections in brackets are those of formats/gptq.md.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from typing_extensions import Self

from ..errors import FormatError

SUPPORTED = "EXL2, GPTQ (2, 3, 4, 8 bit) and plain fp16/bf16/fp32 safetensors"
# Methods met in the wild whose tensors mean something else, and what to tell the user.
FOREIGN_METHODS = {
    "awq": "AWQ packs along columns; look for a GPTQ or EXL2 version of the model",
    "fp8": "look for the bf16 original, or a GPTQ or EXL2 version of the model",
    "fbgemm_fp8": "look for the bf16 original, or a GPTQ or EXL2 version of the model",
    "bitsandbytes": "look for the fp16 original, or a GPTQ or EXL2 version of the model",
    "compressed-tensors": "look for the original, or a GPTQ or EXL2 version of the model",
    "mxfp4": "look for a bf16, GPTQ or EXL2 version of the model",
    "exl3": "EXL3 is a different format from EXL2; look for an EXL2 version of the model",
    "qqq": "look for a GPTQ or EXL2 version of the model",
    "gguf": "look for a GPTQ or EXL2 version of the model",
    "hqq": "look for a GPTQ or EXL2 version of the model",
    "aqlm": "look for a GPTQ or EXL2 version of the model",
    "quip": "look for a GPTQ or EXL2 version of the model",
    "torchao": "look for the original, or a GPTQ or EXL2 version of the model",
    "marlin": "look for the same model with checkpoint_format gptq or gptq_v2, or in EXL2",
}
# A quantizer with packings of its own. The one named here writes the tensors of GPTQ v1, so it is read as such.
AUTO_ROUND = ("auto-round", "autoround", "auto_round", "intel/auto-round")
AUTO_ROUND_GPTQ = ("auto_round:auto_gptq", "auto_gptq")
LAYOUTS = ("gptq", "gptq_v2", "gptq_p")  # values of checkpoint_format whose bytes we know
NESTED_REPETITION = re.compile(r"[+*}?]\??\)+[+*{]")  # "(a+)+" and its kin: exponential on a path that does not match
FIRST_CARRY_VERSION = (0, 9, 0)  # gptqmodel from here on writes v1 zero-points by a word-wide subtraction (3.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqHints:
    """What the declaration says about one GPTQ matrix.

    group_size  -1: one group; None: not declared
    sym         zero-points all in the middle; None: not declared
    layout      "gptq" (zero-points v1), "gptq_v2" (v2), "gptq_p" (bit planes, v2)
    carry       v1 zero-points were written by gptqmodel's word-wide subtraction, so carries must be undone
    """

    group_size: int | None = None
    sym: bool | None = None
    layout: str = "gptq"
    carry: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """One entry of `dynamic`: a pattern matched at the start of a module's path, and what it changes there."""

    pattern: re.Pattern[str]
    excluded: bool  # "-:" pattern: declared as not quantized
    group_size: int | None = None
    sym: bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatHints:
    """The declaration of a whole checkpoint."""

    method: str | None = None  # "gptq", "exl2" or None; for people, the tensors decide module by module
    gptq: GptqHints = GptqHints()
    overrides: tuple[Override, ...] = ()  # excluding ones first; the first match counts

    @classmethod
    def from_json(cls, quantization: Mapping[str, object] | None) -> Self:
        """Parse the raw JSON object (None or empty: nothing declared).

        Raises FormatError for a method, layout or packing this runtime does not read, and for values of wrong type.
        """
        if not quantization:
            return cls()
        if not isinstance(quantization, Mapping):
            raise FormatError(f"quantization_config is {quantization!r}, wanted a JSON object")
        method = _get(quantization, str, "quant_method", "method")
        if method is not None:
            method = method.lower()
        if method == "exl2":
            return cls(method=method)
        if method in AUTO_ROUND:
            _require_gptq_packing(quantization)
        elif method not in (None, "gptq"):
            raise FormatError(
                f"quantization_config.quant_method is {method!r}, this runtime reads {SUPPORTED}",
                hint=FOREIGN_METHODS.get(method),
            )
        layout = _layout(quantization)
        pack_dtype = _get(quantization, str, "pack_dtype")
        if pack_dtype is not None and pack_dtype.removeprefix("torch.") != "int32":
            raise FormatError(
                f"quantization_config.pack_dtype is {pack_dtype!r}: codes are packed into words of another size, "
                "this runtime reads int32 only"
            )
        _get(quantization, int, "bits")
        sym = _get(quantization, bool, "sym")
        base = GptqHints(
            group_size=_group_size(quantization, "quantization_config"),
            sym=sym,
            layout=layout,
            carry=_written_with_carry(quantization),
        )
        return cls(method="gptq", gptq=base, overrides=_overrides(quantization))

    def for_module(self, path: str) -> GptqHints:
        """The declaration for the module at `path` (for example "model.layers.0.mlp.up_proj")."""
        for override in self.overrides:
            if override.pattern.match(path):
                if override.excluded:
                    break
                return replace(
                    self.gptq,
                    group_size=self.gptq.group_size if override.group_size is None else override.group_size,
                    sym=self.gptq.sym if override.sym is None else override.sym,
                )
        return self.gptq


def _get(table: Mapping[str, object], kind: type, *keys: str, where: str = "quantization_config"):
    """The value of the first key that is present and not null, checked for its type; None if there is none."""
    for key in keys:
        value = table.get(key)
        if value is None:
            continue
        # bool is a subclass of int: `"bits": true` is a mistake, not 1.
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise FormatError(f"{where}.{key} is {value!r}, wanted {kind.__name__}")
        return value
    return None


def _layout(quantization: Mapping[str, object]) -> str:
    layout = _get(quantization, str, "checkpoint_format", "format")
    if layout is None:
        layout = "marlin" if _get(quantization, bool, "is_marlin_format") else "gptq"
    if layout not in LAYOUTS:
        raise FormatError(
            f"quantization_config.checkpoint_format is {layout!r}: the weights lie in the order of one particular "
            f"kernel, this runtime reads {', '.join(LAYOUTS)}",
            hint="look for the same model with checkpoint_format gptq or gptq_v2, or in EXL2",
        )
    return layout


def _require_gptq_packing(quantization: Mapping[str, object]) -> None:
    packing = _get(quantization, str, "packing_format", "backend")
    if packing not in AUTO_ROUND_GPTQ:
        raise FormatError(
            f"quantization_config.packing_format is {packing!r}, this runtime reads {AUTO_ROUND_GPTQ[0]} only",
            hint="look for a GPTQ or EXL2 version of the model",
        )


def _group_size(table: Mapping[str, object], where: str) -> int | None:
    size = _get(table, int, "group_size", where=where)
    if size is not None and size != -1 and size <= 0:
        raise FormatError(f"{where}.group_size is {size}, wanted -1 (one group) or a positive number")
    return size


def _overrides(quantization: Mapping[str, object]) -> tuple[Override, ...]:
    """`dynamic` (regular expressions) and `extra_config` (whole paths), the two spellings of exceptions."""
    dynamic = _get(quantization, Mapping, "dynamic") or {}
    exact = _get(quantization, Mapping, "extra_config") or {}
    entries = [("dynamic", str(text), str(text), changes) for text, changes in dynamic.items()]
    entries += [("extra_config", str(path), re.escape(str(path)) + "$", changes) for path, changes in exact.items()]
    overrides = []
    for key, shown, text, changes in entries:
        where = f"quantization_config.{key}[{shown!r}]"
        if not isinstance(changes, Mapping):
            raise FormatError(f"{where} is {changes!r}, wanted a JSON object")
        excluded = text.startswith("-:")
        if NESTED_REPETITION.search(text):
            raise FormatError(f"{where}: a repetition inside a repetition, which could take forever to match")
        try:
            pattern = re.compile(text.removeprefix("-:") if excluded else text.removeprefix("+:"))
        except re.error as err:
            raise FormatError(f"{where}: not a regular expression ({err})") from err
        sym = _get(changes, bool, "sym", where=where)
        size = _group_size(changes, where)
        overrides.append(Override(pattern=pattern, excluded=excluded, group_size=size, sym=sym))
    return tuple(sorted(overrides, key=lambda override: not override.excluded))


def _written_with_carry(quantization: Mapping[str, object]) -> bool:
    """True if the writer is gptqmodel 0.9.0 or later."""
    meta = _get(quantization, Mapping, "meta") or {}
    writers = meta.get("quantizer") or ()
    if isinstance(writers, str):
        writers = (writers,)
    if not isinstance(writers, list | tuple) or not all(isinstance(writer, str) for writer in writers):
        raise FormatError(f"quantization_config.meta.quantizer is {writers!r}, wanted a list of name:version")
    for writer in writers:
        name, _, version = writer.partition(":")
        if name.strip().lower() == "gptqmodel":
            numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:3])
            if numbers >= FIRST_CARRY_VERSION:
                return True
    return False
