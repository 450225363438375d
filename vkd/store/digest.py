"""A digest of what a table says, whatever its layout in memory or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa


def content_digest(table: pa.Table) -> str:
    """Digest of names, types, metadata, nulls and values; the same however Arrow lays them out."""
    hasher = hashlib.sha256()
    for part in table.schema:
        metadata = sorted(pair for pair in (part.metadata or {}).items() if pair[0].startswith(b"vkd."))
        kind = "list" if pa.types.is_list(part.type) else str(part.type)  # Parquet may rename a list's items
        hasher.update(repr((part.name, kind, metadata)).encode())
        column = table[part.name]
        _hash_array(hasher.update, column.chunk(0) if column.num_chunks == 1 else column.combine_chunks())
    return hasher.hexdigest()[:32]


def _hash_array(update: Callable[[Any], object], array: pa.Array) -> None:
    update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)))
    array = array.drop_null()
    if pa.types.is_list(array.type):
        update(array.value_lengths().to_numpy(zero_copy_only=False))
        _hash_array(update, array.flatten())
    elif pa.types.is_fixed_size_binary(array.type):
        width = array.type.byte_width
        update(memoryview(array.buffers()[1] or b"")[array.offset * width :][: len(array) * width])
    elif pa.types.is_string(array.type) or pa.types.is_large_binary(array.type):
        array = array.cast(pa.large_binary())
        offsets = np.frombuffer(array.buffers()[1], np.int64, len(array) + 1, array.offset * 8) if len(array) else np.zeros(1, np.int64)
        update(np.diff(offsets))
        update(memoryview(array.buffers()[2] or b"")[offsets[0] : offsets[-1]])
    else:
        update(np.ascontiguousarray(array.to_numpy(zero_copy_only=False)))
