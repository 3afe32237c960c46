"""What the build driver needs to know of one library, whatever it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass

NINJA = "build.ninja"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One build: equal keys mean equal results."""

    key: str
    output: str  # the file that ninja leaves in the build folder
    title: str  # "native kernels", in messages
    files: Mapping[str, str]  # name -> text, written into the build folder first; NINJA is one of them
    compiler: str  # path and version, for the log and for messages
    torch: str  # its version

    @property
    def steps(self) -> int:
        """Commands that ninja will run."""
        return self.files[NINJA].count("\nbuild ")
