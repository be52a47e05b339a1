"""`FolderCheckpointIO`: strategy "auto" reads the folders of sharded runs too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import TorchCheckpointIO
from typing_extensions import override

from genrec.parallel import _folders
from genrec.parallel.checkpoint import read_checkpoint


class FolderCheckpointIO(TorchCheckpointIO):
    """Lightning's files, and folders of `HybridParallelStrategy` where a path names one.

    `Trainer(strategy="auto", plugins=[FolderCheckpointIO()])` then resumes a sharded run on one process. What it saves
    are files; one that takes the place of a folder replaces it once it is complete.
    """

    @override
    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """The checkpoint's dict; of a folder whole tensors on the host.

        Raises:
            FileNotFoundError, ValueError: The folder is incomplete or damaged.
        """
        if Path(path).is_dir():
            return read_checkpoint(path, weights_only)
        return super().load_checkpoint(path, map_location, weights_only)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """A file."""
        target = Path(path)
        if not target.is_dir():
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        partial, aside = target.with_name(f".{target.name}.part"), target.with_name(f".{target.name}.folder")
        super().save_checkpoint(checkpoint, partial, storage_options)
        _folders.remove(aside)
        os.replace(target, aside)
        os.replace(partial, target)
        _folders.remove(aside)
