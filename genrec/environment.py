"""Checks that the installed packages fit together, before any of them is imported: `python -m genrec.environment`.

FBGEMM and TorchRec load into one version of torch only, and TorchRec's own metadata asks for a package that clashes
with FBGEMM's CPU build. What then fails is a shared library deep inside an import; here it is an error with the cure.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from datetime import date
from functools import lru_cache
from importlib import metadata, util
from typing import Any

PACKAGES = ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu", "lightning", "torchmetrics", "megatron-core", "triton")

FBGEMM_FOR_TORCH = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8"}
"""Release of FBGEMM that loads into each release of torch. TorchRec has the same number, or a later one."""

_WITHDRAWN_LIGHTNING = ("2.6.2", "2.6.3")


class IncompatiblePackagesError(ImportError):
    """Installed packages don't fit together; the message says which, and the commands that cure it."""


def installed_versions() -> dict[str, str | None]:
    """Version of each package that genrec rests on, from its metadata alone; None where it is not installed."""
    return {name: _version(name) for name in PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def find_problems(versions: Mapping[str, str | None]) -> list[str]:
    """What is wrong with a set of installed versions, each with its cure. Empty where all fits.

    Args:
        versions: As from `installed_versions`.
    """
    problems = [_lightning_problem(versions.get("lightning")), _torchrec_problem(versions)]
    fbgemm = _clash(versions) or _fbgemm_problem(versions)
    return [problem for problem in [fbgemm, *problems] if problem]


def _release(version: str) -> str:
    """Major and minor number: "2.13.0+cpu" -> "2.13"."""
    return ".".join(version.split("+")[0].split(".")[:2])


def _wanted_fbgemm(versions: Mapping[str, str | None]) -> str:
    """The requirement to install: the build for this torch, of the kind (CUDA or CPU) that is or should be there."""
    torch = versions.get("torch") or ""
    release = FBGEMM_FOR_TORCH.get(_release(torch), max(FBGEMM_FOR_TORCH.values()))
    cpu = versions.get("fbgemm-gpu-cpu") is not None or versions.get("fbgemm-gpu") is None or torch.endswith("+cpu")
    return f"{'fbgemm-gpu-cpu' if cpu else 'fbgemm-gpu'}=={release}.0"


def _clash(versions: Mapping[str, str | None]) -> str | None:
    cuda, cpu = versions.get("fbgemm-gpu"), versions.get("fbgemm-gpu-cpu")
    if cuda is None or cpu is None:
        return None
    release = _wanted_fbgemm(versions).split("==")[1]
    return (
        f"fbgemm-gpu {cuda} and fbgemm-gpu-cpu {cpu} are both installed. They write into the same folder, so neither "
        "works any more (TorchRec's metadata pulls the first in).\n"
        "Cure: python -m pip uninstall -y fbgemm-gpu fbgemm-gpu-cpu\n"
        f"      python -m pip install --no-deps fbgemm-gpu-cpu=={release}   (with an NVIDIA GPU: fbgemm-gpu=={release})"
    )


def _fbgemm_problem(versions: Mapping[str, str | None]) -> str | None:
    torch = versions.get("torch")
    if torch is None:
        return "torch is not installed.\nCure: python -m pip install torch, or `make setup` in the repository."
    wanted = _wanted_fbgemm(versions)
    name = "fbgemm-gpu" if versions.get("fbgemm-gpu") is not None else "fbgemm-gpu-cpu"
    found = versions.get(name)
    if found is None and _importable("fbgemm_gpu"):
        return None  # A nightly or home-made build, under a name and number of its own.
    if found is None:
        return (
            "FBGEMM is not installed: the embedding tables need it.\n"
            f"Cure: python -m pip install --no-deps {wanted}   (with an NVIDIA GPU: fbgemm-gpu)"
        )
    if name == "fbgemm-gpu" and torch.endswith("+cpu"):
        return (
            f"torch {torch} is a CPU build, fbgemm-gpu {found} needs CUDA libraries and won't load into it.\n"
            f"Cure: python -m pip uninstall -y fbgemm-gpu\n      python -m pip install --no-deps {wanted}"
        )
    expected = FBGEMM_FOR_TORCH.get(_release(torch))
    if expected is not None and _release(found) != expected:
        return (
            f"{name} {found} doesn't load into torch {torch}, which needs {name} {expected}.\n"
            f"Cure: python -m pip install --no-deps {wanted}"
        )
    return None


def _torchrec_problem(versions: Mapping[str, str | None]) -> str | None:
    found, torch = versions.get("torchrec"), versions.get("torch") or ""
    expected = FBGEMM_FOR_TORCH.get(_release(torch), max(FBGEMM_FOR_TORCH.values()))
    cure = f"Cure: python -m pip install --no-deps torchrec=={expected}.0 iopath pyre-extensions tensordict"
    if found is None and _importable("torchrec"):
        return None
    if found is None:
        return f"torchrec is not installed: batches and embedding tables need it.\n{cure}"
    if _number(_release(found)) < _number(expected):
        return f"torchrec {found} is older than torch {torch} needs ({expected}).\n{cure}"
    return None


def _importable(module: str) -> bool:
    return util.find_spec(module) is not None


def _number(release: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else 0 for part in release.split("."))


def _lightning_problem(found: str | None) -> str | None:
    cure = 'Cure: python -m pip install --upgrade "lightning>=2.6.4"'
    if found is None:
        return f"lightning is not installed.\n{cure}"
    if found in _WITHDRAWN_LIGHTNING:
        return f"lightning {found} was withdrawn by its authors: its release was tampered with. Don't use it.\n{cure}"
    if _number(".".join(found.split(".")[:3])) < (2, 6, 4):
        return f"lightning {found} is older than 2.6.4, the oldest that genrec works with.\n{cure}"
    return None


def check_environment() -> None:
    """Raise unless all that a recipe needs is installed and fits together.

    Raises:
        IncompatiblePackagesError: With every problem and its cure.
    """
    _raise(find_problems(installed_versions()))


@lru_cache(maxsize=1)
def require_torchrec() -> None:
    """Called before torchrec is first imported: raise unless it, FBGEMM and torch fit together.

    Raises:
        IncompatiblePackagesError: With every problem and its cure.
    """
    versions = installed_versions()
    problems = [_clash(versions) or _fbgemm_problem(versions), _torchrec_problem(versions)]
    _raise([problem for problem in problems if problem])


def _raise(problems: list[str]) -> None:
    if problems:
        raise IncompatiblePackagesError(
            "\n\n".join(problems) + "\n\n`python -m genrec.environment` shows what is installed."
        )


def describe() -> dict[str, Any]:
    """Versions, platform and hardware, as a run keeps them in `environment.json`."""
    import torch

    from genrec._version import __version__

    packages = {name: version for name, version in installed_versions().items() if version is not None}
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "genrec": __version__,
        "python": platform.python_version(),
        "packages": packages,
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "gpus": gpus,
    }


def headline() -> str:
    """Date, hardware and versions in one line, for the head of a benchmark's output."""
    found = describe()
    where = ", ".join(found["gpus"]) or f"{found['cpu']}, {found['cpu_threads']} threads"
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return f"{date.today()}; {where}; genrec {found['genrec']}, python {found['python']}, {versions}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def main() -> int:
    """Print what is installed and what is wrong with it; 1 where something is."""
    versions = installed_versions()
    for name, version in versions.items():
        print(f"{name:16}{version or '-'}")
    problems = find_problems(versions)
    for problem in problems:
        print(f"\nPROBLEM: {problem}")
    release = _release(versions["torch"] or "")
    if versions["torch"] and release not in FBGEMM_FOR_TORCH:
        known = ", ".join(f"{torch} with FBGEMM {fbgemm}" for torch, fbgemm in FBGEMM_FOR_TORCH.items())
        print(f"\nNote: torch {release} is in no tested set. Tested: {known}.")
    if not problems:
        print("\nThe packages fit together.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
