"""Region features of single videos, read from their label set by the videos' places in the manifest."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from vkd import schema
from vkd.errors import ConfigError, LabelsMissing
from vkd.rounds import Chunk
from vkd.store.encodings import decode
from vkd.store.labelset import LabelSet

REGIONS = "regions"


class RegionStore:
    """The label `regions` in view 0 of a set. A video is named `<shard>/<row>`, row counting all examples of the manifest's shard.

    Chunks that were read stay, as they are stored, up to `cache_bytes` of them, and always the last one. A copy sent to another
    process starts with none. Raises ConfigError when the set holds no regions.
    """

    def __init__(self, uri: str, cache_bytes: int = 1 << 30) -> None:
        self._set, self.cache_bytes = LabelSet.at(uri), cache_bytes
        tensor = self._set.spec.tensors.get(REGIONS)
        if tensor is None or not tensor.ragged or len(tensor.shape) != 3:
            what = f"the labels are {', '.join(self._set.spec.tensors)}, and no {REGIONS!r} of frames"
            raise ConfigError(what, where=uri, action="name the folder of a set that the teacher regions labelled")
        self.num_regions, self.num_dims = tensor.row_shape
        try:
            self._chunk_size = int(self._set.spec.fields["data"]["chunk_size"])
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError("the set does not say how large its chunks are", where=uri, action="label the videos again") from error
        self._chunks: OrderedDict[Chunk, pa.Table] = OrderedDict()
        self._num_bytes = 0

    @property
    def name(self) -> str:
        """The set's name: `<alias>-<fingerprint>`."""
        return self._set.spec.name

    def read(self, video: str) -> Float[np.ndarray, "t r d"]:
        """The features of a video's frames, float32. Raises LabelsMissing when it is not labelled, ConfigError for another name."""
        shard, slash, number = video.rpartition("/")
        if not slash or not number.isdecimal():
            raise ConfigError(f"{video!r} names no video", where=self.name, action="name it <shard>/<row>, as pair manifests do")
        index, row = divmod(int(number), self._chunk_size)
        table = self._chunk(Chunk(shard, index))
        if row >= table.num_rows or table[schema.STATUS][row].as_py() != schema.LABELLED:
            what = f"video {video} {'is not there' if row >= table.num_rows else 'is rejected'}"
            action = "vkd label RUN --retry-rejects, or, when it was taken down since, vkd pairs RUN into another folder"
            raise LabelsMissing(what, where=self._set.uri, action=action)
        found: np.ndarray = decode(table, REGIONS, np.array([row]))[0]
        return found

    def _chunk(self, chunk: Chunk) -> pa.Table:
        if chunk in self._chunks:
            self._chunks.move_to_end(chunk)
            return self._chunks[chunk]
        table = self._set.read(0, chunk, [REGIONS]).combine_chunks()  # once, not at every video
        self._chunks[chunk] = table
        self._num_bytes += table.nbytes
        while self._num_bytes > self.cache_bytes and len(self._chunks) > 1:
            self._num_bytes -= self._chunks.popitem(last=False)[1].nbytes
        return table

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_chunks": OrderedDict(), "_num_bytes": 0}
