"""The emulation as a library in this process, and the operators that belong to no kernel."""

import subprocess
import sys

import pytest
import torch

from exl_runtime.errors import BackendUnavailable
from exl_runtime.ops import native


def test_the_backend_cuda_takes_the_device_cpu_once_it_is_emulated(emulated) -> None:
    cpu = torch.device("cpu")
    assert native.cuda_refusal(cpu) is None and native.resolve_backend("cuda", cpu) == "cuda"
    script = """
import torch
from exl_runtime.errors import BackendUnavailable
from exl_runtime.ops import native
assert "need a CUDA device" in native.cuda_refusal(torch.device("cpu"))
try:
    native.resolve_backend("cuda", torch.device("cpu"))
except BackendUnavailable:
    print("refused")
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "refused\n", done.stderr


def test_the_backend_of_the_cpu_stays_what_it_was(emulated) -> None:
    assert native.resolve_backend("reference", torch.device("cpu")) == "reference"
    with pytest.raises(BackendUnavailable, match="cannot run on the device 'meta'"):
        native.resolve_backend("cuda", torch.device("meta"))


def test_multiprocessors(card) -> None:
    count = card.ops.multiprocessors(torch.zeros(1, device=card.device))
    assert count == 4 if card.emulated else count >= 1


def test_orders_are_checked(emulated) -> None:
    with pytest.raises(RuntimeError, match="0 forward, 1 reverse, 2 random, got 3"):
        emulated.ops.emulation_order(3, 0)
    before = emulated.ops.emulation_launches()
    assert isinstance(before, int) and before >= 0


def test_a_result_that_depends_on_the_order_is_noticed(emulated) -> None:
    calls = iter(range(10))
    with pytest.raises(AssertionError, match="depends on the order of threads"):
        emulated.every_order(lambda: torch.tensor([float(next(calls) > 2)]))
    assert emulated.every_order(lambda: torch.ones(2)).tolist() == [1.0, 1.0]
    first, second = emulated.every_order(lambda: (torch.ones(1), torch.zeros(1)))
    assert (first.item(), second.item()) == (1.0, 0.0)
