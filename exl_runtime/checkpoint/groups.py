"""The tensors of one matrix, as one mapping. Does not know which suffixes a format has."""

from collections.abc import Callable, Iterator, Mapping

from torch import Tensor

from .header import TensorInfo, short


class TensorGroup(Mapping[str, Tensor]):
    """Suffix ("weight", "q_weight", "bias", ...) -> tensor, for all tensors named `path`.<suffix>.

    A tensor is read when it is first asked for, and kept as long as the group lives. `infos` needs no reading.
    """

    __slots__ = ("_read", "_tensors", "infos", "path")

    def __init__(self, path: str, infos: Mapping[str, TensorInfo], read: Callable[[str], Tensor]) -> None:
        self.path = path
        self.infos = dict(infos)
        self._read = read
        self._tensors: dict[str, Tensor] = {}

    @property
    def where(self) -> str:
        """The matrix and its file or files, for messages."""
        files = dict.fromkeys(info.file.name for info in self.infos.values())
        return f"{short(self.path)} in {' and '.join(files)}"

    def __getitem__(self, suffix: str) -> Tensor:
        info = self.infos[suffix]
        if suffix not in self._tensors:
            self._tensors[suffix] = self._read(info.name)
        return self._tensors[suffix]

    def __iter__(self) -> Iterator[str]:
        return iter(self.infos)

    def __len__(self) -> int:
        return len(self.infos)

    def __contains__(self, suffix: object) -> bool:
        return suffix in self.infos

    def __repr__(self) -> str:
        return f"TensorGroup({self.path!r}, {sorted(self.infos)})"
