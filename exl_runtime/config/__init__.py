"""From a Hugging Face `config.json` to a frozen `ModelSpec`. The only room that names model families. Torch-free."""

from .archs import SUPPORTED
from .read import ConfigFiles, load_config
from .resolve import resolve
from .spec import LayerSpec, MlpSpec, ModelSpec, MoeSpec, RopeSpec

__all__ = [
    "SUPPORTED",
    "ConfigFiles",
    "LayerSpec",
    "MlpSpec",
    "ModelSpec",
    "MoeSpec",
    "RopeSpec",
    "load_config",
    "resolve",
]
