"""Fixtures of all tests."""

import os
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton reads the variable when a kernel is defined, so it is
# set before any test imports one. No backend named "auto" ever chooses the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Folder of the real data sets (ml-100k/, amazon-beauty/): GENREC_TEST_DATA, else `shared/data` beside the repo."""
    named = os.environ.get("GENREC_TEST_DATA")
    root = Path(named) if named else Path(__file__).parents[2] / "shared" / "data"
    if not root.is_dir():
        pytest.skip(f"no real data: {root} does not exist; set GENREC_TEST_DATA to the folder of ml-100k/ and others")
    return root


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """Tests prepare data into a folder of their own, never into the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GENREC_CACHE", str(tmp_path_factory.mktemp("genrec-cache")))
        yield
