"""Looking after a store: whether every file is whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from vkd.errors import LabelsMissing, StorageError
from vkd.rounds import Chunk
from vkd.schema import LABELLED, REJECTED, STATUS
from vkd.store.labelset import LabelSet


@dataclass(frozen=True)
class VerifyReport:
    """What a check of every planned chunk found; `corrupt` holds one message per unusable file."""

    num_planned: int
    num_labelled: int
    num_rejected: int
    lacking: list[Chunk]
    corrupt: list[str]

    @property
    def ok(self) -> bool:
        return not self.lacking and not self.corrupt and self.num_planned == self.num_labelled + self.num_rejected


def verify_files(label_set: LabelSet, view: int, planned: Mapping[Chunk, int]) -> VerifyReport:
    """Read every planned chunk (chunk -> rows) and check digest and row count: planned = labelled + rejected."""
    lacking: list[Chunk] = []
    corrupt: list[str] = []
    statuses: Counter[str] = Counter()
    for chunk, num_rows in planned.items():
        try:
            table = label_set.read(view, chunk, verify=True)
        except LabelsMissing:
            lacking.append(chunk)
        except StorageError as error:
            corrupt.append(str(error))
        else:
            statuses.update(table[STATUS].to_pylist())
            if table.num_rows != num_rows:
                corrupt.append(f"chunk {chunk.index} of shard {chunk.shard} has {table.num_rows} rows, the plan has {num_rows}")
    return VerifyReport(sum(planned.values()), statuses[LABELLED], statuses[REJECTED], lacking, list(dict.fromkeys(corrupt)))
