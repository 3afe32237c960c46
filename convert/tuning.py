"""The tuning stage: end-to-end correction of a small model, kept only where it helps on held-out rows."""

from collections.abc import Sequence
from pathlib import Path

from .calibration import Calibration
from .progress import Progress
from .source import Source
from .workspace import Workspace


def tuned_files(
    source: Source,
    space: Workspace,
    data: Calibration,
    *,
    encoder: str,
    seed: int,
    memory: int,
    progress: Progress,
) -> tuple[Sequence[Path], str]:
    """The files of all layers and the head to be written, and a note for the protocol."""
    files = [space.layer(layer.index) for layer in source.spec.layers] + [space.layer(None)]
    return files, ""
