"""What a config names by its import path."""

from __future__ import annotations

import os
import pkgutil
import sys
from typing import Any

from genrec.config import ConfigError


def imported(setting: str, path: str) -> Any:
    """The object at a dotted path such as `my_models.MyRanking`; the working folder is searched too.

    Args:
        setting: Where the config names it, for the error.
        path: Of the module, and the name in it.

    Raises:
        ConfigError: There is none.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{setting}={path}: {error}.") from error
