"""The public face: `load` a model, talk to the `Runtime`. Knows no terminal."""

from .info import RuntimeInfo, RuntimeStats
from .load import load
from .prepare import Rendered
from .runtime import Runtime
from .stream import Stream

__all__ = ["Rendered", "Runtime", "RuntimeInfo", "RuntimeStats", "Stream", "load"]
