"""Clashing, missing and unmatched packages, simulated by their metadata."""

import subprocess
import sys
from datetime import date
from importlib import metadata

import pytest

from genrec import environment
from genrec.environment import (
    check_environment,
    describe,
    find_problems,
    headline,
    installed_versions,
    main,
    require_torchrec,
)

GOOD = {
    "torch": "2.13.0+cpu",
    "torchrec": "1.8.0",
    "fbgemm-gpu": None,
    "fbgemm-gpu-cpu": "1.8.0",
    "lightning": "2.6.6",
    "torchmetrics": "1.9.0",
}


@pytest.fixture
def install(monkeypatch):
    """Pretend that a set of packages is installed."""

    def pretend(**versions):
        known = {**GOOD, **{name.replace("_", "-"): version for name, version in versions.items()}}

        def version(name):
            if known.get(name) is None:
                raise metadata.PackageNotFoundError(name)
            return known[name]

        monkeypatch.setattr(environment.metadata, "version", version)
        require_torchrec.cache_clear()

    yield pretend
    require_torchrec.cache_clear()


@pytest.mark.parametrize(("torch", "fbgemm"), [("2.11.0", "1.6.0"), ("2.12.1", "1.7.0"), ("2.13.0+cpu", "1.8.0")])
def test_matching_sets_pass(torch, fbgemm, install):
    install(torch=torch, fbgemm_gpu_cpu=fbgemm, torchrec=fbgemm)
    check_environment()
    require_torchrec()


def test_a_later_torchrec_passes():
    assert find_problems({**GOOD, "torchrec": "1.9.2"}) == []


def test_a_torch_without_a_known_partner_passes_with_a_note(install, capsys):
    install(torch="2.14.0")
    assert main() == 0
    assert "in no tested set" in capsys.readouterr().out


def test_both_fbgemm_builds(install, capsys):
    install(fbgemm_gpu="1.9.0")
    for check in (check_environment, require_torchrec):
        with pytest.raises(ImportError, match="both installed") as caught:
            check()
        assert "pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu" in str(caught.value)
        assert "pip install --no-deps fbgemm-gpu-cpu==1.8.0" in str(caught.value)
    assert main() == 1
    assert "both installed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("versions", "what", "cure"),
    [
        ({"fbgemm-gpu-cpu": "1.9.0"}, "fbgemm-gpu-cpu 1.9.0 doesn't load into torch 2.13.0", "fbgemm-gpu-cpu==1.8.0"),
        ({"torch": "2.12.1"}, "needs fbgemm-gpu-cpu 1.7", "--no-deps fbgemm-gpu-cpu==1.7.0"),
        (
            {"torch": "2.12.1", "fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None},
            "needs fbgemm-gpu 1.7",
            "--no-deps fbgemm-gpu==1.7.0",
        ),
        ({"fbgemm-gpu": "1.8.0", "fbgemm-gpu-cpu": None}, "CPU build", "--no-deps fbgemm-gpu-cpu==1.8.0"),
        ({"fbgemm-gpu-cpu": None}, "FBGEMM is not installed", "--no-deps fbgemm-gpu-cpu==1.8.0"),
        ({"torchrec": None}, "torchrec is not installed", "--no-deps torchrec==1.8.0"),
        ({"torchrec": "1.7.0"}, "torchrec 1.7.0 is older", "--no-deps torchrec==1.8.0"),
        ({"lightning": "2.6.2"}, "lightning 2.6.2 was withdrawn", "lightning>=2.6.4"),
        ({"lightning": "2.6.3"}, "lightning 2.6.3 was withdrawn", "lightning>=2.6.4"),
        ({"lightning": "2.5.1.post0"}, "older than 2.6.4", "lightning>=2.6.4"),
        ({"lightning": None}, "lightning is not installed", "lightning>=2.6.4"),
        ({"torch": None}, "torch is not installed", "make setup"),
    ],
)
def test_problem_and_cure(versions, what, cure, monkeypatch):
    monkeypatch.setattr(environment, "_importable", lambda module: False)
    problems = find_problems({**GOOD, **versions})
    assert any(what in problem and cure in problem for problem in problems), problems


def test_builds_under_other_names_pass():
    """Here both modules can be imported, as with nightly builds."""
    assert find_problems({**GOOD, "fbgemm-gpu-cpu": None, "torchrec": None}) == []


def test_several_problems_are_all_named(install, monkeypatch):
    monkeypatch.setattr(environment, "_importable", lambda module: False)
    install(lightning="2.6.3", torchrec=None)
    with pytest.raises(ImportError, match="withdrawn") as caught:
        check_environment()
    assert "torchrec is not installed" in str(caught.value)


def test_this_environment_is_sound():
    assert find_problems(installed_versions()) == []


def test_the_command_needs_no_heavy_import():
    code = (
        "import sys; from genrec.environment import main; status = main(); "
        "heavy = {'torch', 'torchrec', 'fbgemm_gpu'} & set(sys.modules); assert not heavy, heavy; sys.exit(status)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "The packages fit together." in result.stdout


def test_headline_names_date_hardware_and_versions():
    line = headline()
    assert line.startswith(f"{date.today()}; ")
    assert f"torch {installed_versions()['torch']}" in line
    assert describe()["gpus"] or describe()["cpu"] in line


def test_models_check_before_torchrec_is_imported():
    """In a clash the user sees the cure, not a shared library that failed to load."""
    code = """
from importlib import metadata
import sys
real = metadata.version
metadata.version = lambda name: "1.9.0" if name == "fbgemm-gpu" else real(name)
for module in ("genrec.data", "genrec.layers.preprocess", "genrec.models"):
    try:
        __import__(module)
    except ImportError as error:
        assert "both installed" in str(error), (module, error)
    else:
        raise AssertionError(f"{module} was imported")
assert "torchrec" not in sys.modules
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
