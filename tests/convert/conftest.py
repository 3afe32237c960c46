"""What several tests of whole conversions start from."""

import shutil
from pathlib import Path

import pytest
from converting import small_model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for models that the tests of one file share."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture
def source(models: Path, tmp_path: Path) -> Path:
    """A model in a folder of its own, which the test may spoil."""
    return Path(shutil.copytree(small_model("llama", models), tmp_path / "source"))
