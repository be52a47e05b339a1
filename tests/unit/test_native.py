"""Where compiled libraries are looked for, and what is said where there is none."""

import pytest

from genrec import _native


def test_a_missing_library_is_explained(monkeypatch, tmp_path):
    monkeypatch.setenv(_native.LIBRARY_PATH_VARIABLE, str(tmp_path))
    with pytest.raises(_native.NativeLibraryError) as caught:
        _native.load_library("genrec_absent")
    message = str(caught.value)
    assert "libgenrec_absent.so was found in none of" in message
    assert str(tmp_path) in message
    assert "make setup" in message


def test_a_missing_library_is_looked_for_once_in_the_same_places(monkeypatch, tmp_path):
    monkeypatch.setenv(_native.LIBRARY_PATH_VARIABLE, str(tmp_path / "empty"))
    looked = []
    monkeypatch.setattr(_native, "library_directories", lambda: looked.append(1) or [tmp_path])
    for _ in range(2):
        with pytest.raises(_native.NativeLibraryError, match="found in none of"):
            _native.load_library("genrec_later")
    assert len(looked) == 1
    monkeypatch.setenv(_native.LIBRARY_PATH_VARIABLE, str(tmp_path))
    with pytest.raises(_native.NativeLibraryError, match="found in none of"):
        _native.load_library("genrec_later")
    assert len(looked) == 2


def test_the_variable_comes_first_and_a_broken_file_is_named(monkeypatch, tmp_path):
    (tmp_path / "libgenrec_broken.so").write_text("no library")
    monkeypatch.setenv(_native.LIBRARY_PATH_VARIABLE, str(tmp_path))
    assert _native.library_directories()[0] == tmp_path
    with pytest.raises(_native.NativeLibraryError, match="doesn't load"):
        _native.load_library("genrec_broken")


def test_the_engine_is_installed_and_of_this_version():
    from genrec.embedding.hkv._binding import ABI_VERSION, library

    assert library().genrec_hkv_abi_version() == ABI_VERSION
    assert library().genrec_hkv_isa().decode() in ("generic", "avx2", "avx512")
