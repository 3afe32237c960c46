"""Fixtures that know what this machine has: the only place where a test learns that something is missing."""

import os
from collections.abc import Iterator
from pathlib import Path

import ahead
import pytest

# Before torch is imported anywhere: tests of small models lose more time to waking threads than they gain.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Larger test material that lies beside the checkout on the project's own machines."""
    folder = ROOT.parent / "shared"
    if not (folder / "vectors").is_dir():
        pytest.skip("the project's shared test material is not beside this checkout")
    return folder


@pytest.fixture(scope="session")
def demo() -> Path:
    """The bundled EXL2 demo model."""
    return ROOT / "exl_runtime" / "demo"


@pytest.fixture(scope="session")
def ember() -> Path:
    """The demo model in half precision, as it was before quantization."""
    return ROOT / "tests" / "data" / "ember-6m"


def no_card() -> str | None:
    """None if torch sees an NVIDIA card, else why not."""
    import torch

    return None if torch.cuda.is_available() else "no NVIDIA GPU here"


BUILDS = pytest.StashKey["subprocess.Popen[bytes]"]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What is built ahead is tested last. Tests marked `gpu` run where there is a card, and are skipped elsewhere."""
    items.sort(key=lambda item: ahead.place(ROOT, item.path))
    marked = [item for item in items if item.get_closest_marker("gpu") is not None]
    if marked and (why := no_card()) is not None:
        for item in marked:
            item.add_marker(pytest.mark.skip(reason=why))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Builds for the tests that come last begin beside the first ones."""
    modules = ahead.wanted(ROOT, [item.path for item in session.items])
    if modules and not session.config.option.collectonly and hasattr(os, "setpgid"):
        session.config.stash[BUILDS] = ahead.start(ROOT, modules)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Also after Ctrl-C."""
    if (builds := config.stash.get(BUILDS, None)) is not None:
        ahead.stop(builds)


def unavailable(backend: str) -> str | None:
    """None if `backend` runs here, else why not."""
    if backend == "reference":
        return None
    from exl_runtime.errors import BackendUnavailable, BuildError
    from exl_runtime.ops import native

    try:
        if backend == "cuda":
            if (why := no_card()) is not None:
                return why
            native.ensure_cuda()
        else:
            native.ensure_loaded()
    except BuildError:
        raise  # a compiler is here and the kernels do not build: that is a failure, nothing to skip over
    except BackendUnavailable as err:
        return str(err)
    return None


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of the CPU, one after another. CUDA is tested in tests/cuda, on any machine, by emulation."""
    if why := unavailable(request.param):
        pytest.skip(why)
    return request.param


@pytest.fixture
def room_ahead() -> Iterator[None]:
    """One thread for the CPU kernels, so that a CPU is left for whoever reads what they compute."""
    if why := unavailable("cpu"):
        pytest.skip(why)
    from exl_runtime.checkpoint.threads import usable_processors
    from exl_runtime.ops import native

    if usable_processors() < 2:
        pytest.skip("nothing runs beside Python on one CPU")
    before = native.ops().set_threads(0)
    native.ops().set_threads(1)
    yield
    native.ops().set_threads(before)
