"""Other programs that run the same shapes, each behind `contestant.Contestant`; none is needed to run the rest.

llamacpp.py  llama.cpp through llama-cpp-python     stepwise.py  what peers on torch have in common
exllama.py   exllamav2 on a GPU                     hf.py        transformers
"""

from pathlib import Path

import torch

from exl_runtime.errors import UsageError

from ..contestant import Contestant

PEERS = ("llama.cpp", "exllamav2", "transformers")
USAGE = "llama.cpp=FILE.gguf, exllamav2=DIR or transformers=DIR"


def split_peer(text: str) -> tuple[str, Path]:
    """ "llama.cpp=FILE" -> (name, path). Raises UsageError: another name, or nothing there."""
    name, sign, path = text.partition("=")
    if name not in PEERS or not sign or not path:
        raise UsageError(f"--peer {text!r}", hint=f"give {USAGE}")
    place = Path(path).expanduser()
    if name == "llama.cpp" and not place.is_file():
        raise UsageError(f"--peer: there is no file {path}", hint="give a GGUF file; `make --gguf` writes one")
    if name != "llama.cpp" and not place.is_dir():
        raise UsageError(f"--peer: there is no folder {path}", hint="give the folder of a model")
    return name, place


def open_peer(name: str, path: Path, device: torch.device) -> Contestant:
    """One of PEERS with the model at `path`. Raises EvalError, in one line with the way out, where it cannot run."""
    if name == "llama.cpp":
        from .llamacpp import LlamaCpp

        return LlamaCpp(path, device)
    if name == "exllamav2":
        from .exllama import ExLlama

        return ExLlama(path, device)
    from .hf import Transformers

    return Transformers(path, device)
