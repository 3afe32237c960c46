"""16-bit floats: every pattern widened, and the edges of rounding narrowed, as torch does it."""

from collections.abc import Iterator

import pytest
import torch

from exl_runtime.errors import BackendUnavailable
from exl_runtime.ops import native

HALVES = [torch.float16, torch.bfloat16]


@pytest.fixture(params=["portable", "avx2"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    try:
        native.ensure_loaded()
        native.ops().set_isa(request.param)
    except (BackendUnavailable, RuntimeError) as err:
        pytest.skip(str(err))
    yield
    native.ops().set_isa("best")


def convert(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Through the pages of a cache, one value a head."""
    pages = torch.zeros(1, values.numel(), 1, 1, dtype=dtype)
    x = values.reshape(1, 1, -1)  # one wide token: whole vectors and a rest
    pages = pages.reshape(1, 1, 1, -1)
    native.ops().append_kv(x, x, pages, pages.clone(), torch.zeros(1, dtype=torch.int64))
    return pages.flatten()


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    kind = torch.int32 if a.element_size() == 4 else torch.int16
    nan = a.isnan()
    return bool(torch.equal(nan, b.isnan()) and torch.equal(a[~nan].view(kind), b[~nan].view(kind)))


@pytest.mark.parametrize("dtype", HALVES)
def test_widening_is_exact_for_every_pattern(dtype: torch.dtype) -> None:
    every = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    assert same(convert(every, torch.float32), every.float())
    assert same(convert(every, dtype), every)


@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_rounds_as_torch(dtype: torch.dtype) -> None:
    """Every representable value, the midpoints between neighbours, and a float to either side of each."""
    values = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype).float()
    values = values[values.isfinite()].sort().values
    middles = (values[1:].double() + values[:-1].double()).div(2).float()
    points = torch.cat([values, middles, torch.tensor([torch.inf, -torch.inf, torch.nan, 3e38, 65519.9, 65520.0])])
    points = torch.cat([points, *(points.nextafter(torch.tensor(end)) for end in (torch.inf, -torch.inf))])
    noise = torch.randint(-(2**31), 2**31 - 1, (50_001,), generator=torch.Generator().manual_seed(0)).int()
    points = torch.cat([points, noise.view(torch.float32)])
    assert same(convert(points, dtype), points.to(dtype))


def test_between_the_two_halves() -> None:
    x = torch.randn(1001, generator=torch.Generator().manual_seed(0)) * 100
    assert same(convert(x.half(), torch.bfloat16), x.half().bfloat16())
    assert same(convert(x.bfloat16(), torch.float16), x.bfloat16().half())
