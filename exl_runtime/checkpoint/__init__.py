"""Safetensors folders: every header is checked before any tensor is read. Does not know what the bytes mean."""

from .groups import TensorGroup
from .index import TensorInfo
from .reader import Checkpoint

__all__ = ["Checkpoint", "TensorGroup", "TensorInfo"]
