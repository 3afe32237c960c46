"""Fixtures of tests that call the native kernels directly."""

from collections.abc import Iterator

import pytest
from conftest import unavailable


@pytest.fixture(scope="session")
def kernels() -> None:
    """The native library is loaded; where it cannot be had, the tests that need it say why they do not run."""
    if why := unavailable("cpu"):
        pytest.skip(why)


@pytest.fixture(params=["portable", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest, kernels: None) -> Iterator[str]:
    """Every instruction set this CPU has, one after another."""
    from exl_runtime.ops import native

    try:
        assert native.ops().set_isa(request.param) == request.param
    except RuntimeError as err:
        pytest.skip(str(err))
    yield request.param
    native.ops().set_isa("best")


@pytest.fixture
def restore(kernels: None) -> Iterator[None]:
    """Puts thread count and instruction set back."""
    from exl_runtime.ops import native

    before = native.ops().set_threads(0)
    yield
    native.ops().set_threads(before)
    native.ops().set_isa("best")
