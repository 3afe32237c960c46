"""A tiny source tree for the build driver, so that each test of it takes a second and not twenty."""

import sys
from pathlib import Path

import pytest

from exl_runtime.errors import BackendUnavailable
from ext.build import Settings
from ext.toolchain import find_compiler, find_ninja

BINDING = """
#include <torch/csrc/stable/library.h>
#include "../common/number.h"
int number();
namespace { int64_t op_number() { return number(); } }
STABLE_TORCH_LIBRARY(NAMESPACE, m) { m.def("number() -> int"); }
STABLE_TORCH_LIBRARY_IMPL(NAMESPACE, CompositeExplicitAutograd, m) { m.impl("number", TORCH_BOX(&op_number)); }
"""


@pytest.fixture(autouse=True)
def toolchain() -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("native kernels are built on Linux only")
    try:
        find_compiler(None)
        find_ninja()
    except BackendUnavailable as err:
        pytest.skip(str(err))


@pytest.fixture
def tiny(tmp_path: Path) -> Settings:
    """Settings that build two small files into a cache of the test's own. Its operator is NAMESPACE::number()."""
    root = tmp_path / "source"
    for folder in ("binding", "common", "cpu"):
        (root / folder).mkdir(parents=True)
    (root / "common" / "number.h").write_text("#pragma once\nconstexpr int kNumber = 41;\n")
    (root / "cpu" / "number.cpp").write_text('#include "../common/number.h"\nint number() { return kNumber + 1; }\n')
    return Settings(root=root, cache=tmp_path / "cache", timeout=60.0)


@pytest.fixture
def loadable(tiny: Settings) -> tuple[Settings, str]:
    """The same with an operator that torch can call; each test gets a namespace of its own."""
    namespace = f"exl_test_{abs(hash(str(tiny.root))):x}"
    (tiny.root / "binding" / "number.cpp").write_text(BINDING.replace("NAMESPACE", namespace))
    return tiny, namespace
