"""Which format a matrix is in: decided by its own tensors, module by module, as one checkpoint may mix formats.

Knows no models and no devices.
"""

from collections.abc import Mapping

from torch import Tensor

from ..errors import FormatError
from .base import LinearShape, QuantFormat
from .dense import Dense
from .exl2 import Exl2
from .gptq import Gptq
from .hints import SUPPORTED, FormatHints, GptqHints

__all__ = ["FORMATS", "FormatHints", "GptqHints", "detect", "load_linear"]

FORMATS: tuple[type[Exl2] | type[Gptq] | type[Dense], ...] = (Exl2, Gptq, Dense)
MARKERS: dict[str, type[Exl2] | type[Gptq] | type[Dense]] = {cls.marker: cls for cls in FORMATS}


def detect(suffixes: Mapping[str, object] | frozenset[str], *, where: str) -> type[Exl2] | type[Gptq] | type[Dense]:
    """The format whose marker tensor is among `suffixes`; FormatError for none or several."""
    found = [cls for marker, cls in MARKERS.items() if marker in suffixes]
    if len(found) == 1:
        return found[0]
    names = ", ".join(sorted(suffixes)) or "nothing"
    if found:
        both = " and ".join(f"{cls.marker} ({cls.name})" for cls in found)
        raise FormatError(
            f"{where}: holds {both} at once, wanted one of them",
            hint="the folder mixes files of two versions of the model; keep one of them",
        )
    raise FormatError(
        f"{where}: tensors of no known format, found {names}; wanted q_weight, qweight or weight",
        hint=f"this runtime reads {SUPPORTED}",
    )


def load_linear(
    tensors: Mapping[str, Tensor],
    shape: LinearShape,
    *,
    where: str = "matrix",
    hints: FormatHints | GptqHints | None = None,
) -> QuantFormat:
    """Check and wrap the tensors of one matrix (suffix -> tensor, for example "q_weight").

    where  the module's path first, for messages ("model.layers.0.mlp.up_proj in model.safetensors")
    hints  the declaration for this module, or for the whole checkpoint (then `where` says which module this is)
    Raises FormatError or NonFiniteError naming the tensor.
    """
    cls = detect(tensors, where=where)
    if cls is not Gptq:
        return cls.load(tensors, shape, where=where)
    if isinstance(hints, FormatHints):
        hints = hints.for_module(where.partition(" in ")[0])
    return Gptq.load(tensors, shape, where=where, hints=hints)
