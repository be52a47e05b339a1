"""Fixtures of all tests."""

import os
from importlib import util
from pathlib import Path

import pytest
import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton reads the variable when a kernel is defined, so it is
# set before any test imports one. No backend named "auto" ever chooses the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips what is marked `gpu` or `hopper` where there is none: its shapes would take the interpreter hours."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("hopper") and not (
        torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
    ):
        pytest.skip("needs a Hopper GPU")


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


@pytest.fixture(scope="session", autouse=True)
def _interpreter_rounds_to_nearest():
    """Triton's interpreter truncates fp32 to bf16 where a GPU rounds to nearest: make it round."""
    if os.environ.get("TRITON_INTERPRET") != "1" or util.find_spec("triton") is None:
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding(values, source, target, mode):
        if (source, target) == (tl.float32, tl.bfloat16):
            return torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view("uint16")
        return convert(values, source, target, mode)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", rounding)
        yield
