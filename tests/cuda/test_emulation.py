"""The emulation itself: what it computes, and that it notices what it is there to notice."""

import torch

from exl_runtime.ops import native


def test_the_library_loads_and_answers(emulated) -> None:
    assert emulated.ops.multiprocessors(torch.zeros(1)) == 4
    assert native.cuda_refusal(emulated.device) is None
    assert native.resolve_backend("cuda", torch.device("cpu")) == "cuda"
    assert native.resolve_backend(None, torch.device("cpu")) in ("cpu", "reference")
