"""Pieces of tensors in torch.distributed.checkpoint folders: what a rank holds of a global tensor, written and read.

A piece says where a local tensor lies in its global one. That is all that resharding needs: a reader asks for its own
pieces, whatever ranks wrote whichever ones.
"""

from __future__ import annotations

import dataclasses
import pickle
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

METADATA = ".metadata"

LARGEST_CHUNK = 256 * 2**20
"""Bytes of a written chunk at most: a reader holds one in memory beside its own tensor."""


@dataclass(frozen=True)
class Piece:
    """A box of a global tensor.

    Args:
        key: Name of the global tensor.
        tensor: The box's content: a view of the memory that is saved, or filled by a read.
        offset: Of the box's first element.
        size: Of the global tensor.
    """

    key: str
    tensor: Tensor
    offset: tuple[int, ...]
    size: tuple[int, ...]

    @staticmethod
    def whole(key: str, tensor: Tensor) -> Piece:
        """A tensor that is all there."""
        return Piece(key, tensor, (0,) * tensor.dim(), tuple(tensor.shape))

    def cut(self) -> list[Piece]:
        """Itself, in blocks of rows of at most `LARGEST_CHUNK` bytes; nothing where it is empty."""
        if self.tensor.numel() == 0:
            return []
        rows = self.tensor.shape[0] if self.tensor.dim() else 1
        row_bytes = self.tensor.numel() // rows * self.tensor.element_size()
        step = max(1, LARGEST_CHUNK // max(row_bytes, 1))
        if rows <= step:
            return [self]
        return [
            dataclasses.replace(
                self, tensor=self.tensor[start : start + step], offset=(self.offset[0] + start, *self.offset[1:])
            )
            for start in range(0, rows, step)
        ]


# Writing --------------------------------------------------------------------------------------------------------------


class _SavePlanner(DefaultSavePlanner):
    """Plans by pieces. The base class lets one rank write what several hold, and checks that nothing is missing."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._names = {(piece.key, piece.offset): str(number) for number, piece in enumerate(pieces)}
        # Not the pieces themselves: with an asynchronous save their memory goes on changing.
        self._items = [_write_item(piece) for piece in pieces]

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        assert index.offset is not None
        return self.state_dict[self._names[index.fqn, tuple(index.offset)]]


def _write_item(piece: Piece) -> WriteItem:
    offset = torch.Size(piece.offset)
    return WriteItem(
        index=MetadataIndex(piece.key, offset),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offset, piece.tensor.size()),
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.size),
        ),
    )


def write(pieces: Iterable[Piece], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Write the pieces of all ranks of `group`. Every rank calls it; a failure of one is raised by all."""
    tensors, planner, writer = _prepare(pieces, folder)
    with _quiet():
        dcp.save(
            tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=not dist.is_initialized()
        )


def write_later(pieces: Iterable[Piece], folder: Path, group: dist.ProcessGroup | None) -> Future[Any]:
    """The same by DCP's `async_save`: the tensors are copied now and written by a thread."""
    tensors, planner, writer = _prepare(pieces, folder)
    with _quiet():
        future = dcp.async_save(
            tensors, storage_writer=writer, planner=planner, process_group=group, no_dist=not dist.is_initialized()
        )
    assert isinstance(future, Future)
    return future


def _prepare(
    pieces: Iterable[Piece], folder: Path
) -> tuple[dict[str, Any], _SavePlanner, dcp.FileSystemWriter]:  # fmt: skip
    cut = [part for piece in pieces for part in piece.cut()]
    return {str(n): part.tensor.detach() for n, part in enumerate(cut)}, _SavePlanner(cut), dcp.FileSystemWriter(folder)


# Reading --------------------------------------------------------------------------------------------------------------


class _LoadPlanner(DefaultLoadPlanner):
    """Fills pieces from whatever chunks overlap them."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces: dict[str, dict[tuple[int, ...], Tensor]] = {}
        for piece in pieces:
            self._pieces.setdefault(piece.key, {})[piece.offset] = piece.tensor.detach()

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items: list[ReadItem] = []
        for key, boxes in self._pieces.items():
            chunks = [ChunkStorageMetadata(torch.Size(o), t.size()) for o, t in boxes.items() if t.numel()]
            saved = self.metadata.state_dict_metadata[key]
            assert isinstance(saved, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(key, saved, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self._pieces[index.fqn][tuple(index.offset)]


class _Reader(dcp.FileSystemReader):
    """Reads `.metadata`, a pickle, with none but the classes that such a file is made of. Tensors are always safe."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return read_metadata(Path(self.path))


_ALLOWED = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata", "ChunkStorageMetadata",
            "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(("torch", name) for name, value in vars(torch).items() if isinstance(value, torch.dtype)),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath", "Path")),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint's metadata is made of")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """What tensors a folder holds, and in which chunks.

    Raises:
        ValueError: The file is damaged, or holds what such a file never does.
    """
    path = folder / METADATA
    try:
        with open(path, "rb") as file:
            return _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to say
        raise ValueError(f"'{path}' can't be read: {error}.") from error


def read(pieces: Sequence[Piece], folder: Path, group: dist.ProcessGroup | None) -> None:
    """Fill the pieces. Every rank of `group` calls it, each with its own; the keys must be there, of these sizes."""
    with _quiet():
        dcp.load(
            {}, storage_reader=_Reader(folder), planner=_LoadPlanner(pieces), process_group=group,
            no_dist=not dist.is_initialized(),
        )  # fmt: skip


def sizes(metadata: Metadata) -> dict[str, tuple[int, ...]]:
    """Global size of each tensor."""
    return {
        key: tuple(value.size)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }


def dtypes(metadata: Metadata) -> Mapping[str, torch.dtype]:
    """Type of each tensor."""
    return {
        key: value.properties.dtype
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }


class _quiet(warnings.catch_warnings):
    """DCP says that it is used without torch.distributed, where it is told to be."""

    def __enter__(self) -> Any:
        entered = super().__enter__()
        for message in (r"torch.distributed is disabled", r".*ShardedTensor.*", r"TypedStorage is deprecated"):
            warnings.filterwarnings("ignore", message=message)
        return entered
