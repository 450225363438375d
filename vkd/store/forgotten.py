"""Videos that were taken down: noted in the store, one small file a video, so that no later labelling sees them."""

from __future__ import annotations

import json
import re

from vkd.errors import ConfigError
from vkd.store import files
from vkd.store.chunkfile import Reject

FOLDER, STAGE = "forgotten", "forget"
REJECT = Reject(STAGE, "forgotten", "taken down with vkd labels forget", True)


def note(store: str, video_id: str) -> None:
    """Keep a video out of every label set of the store from now on. Raises ConfigError for what is no video id."""
    if not re.fullmatch(r"[A-Za-z0-9._-]+", video_id) or video_id.startswith("."):
        raise ConfigError(f"{video_id!r} is no video id", where="VIDEO_ID", action="take one from the manifest's column video_id")
    files.put(files.join(store, FOLDER, f"{video_id}.json"), json.dumps({"video_id": video_id}).encode())


def noted(store: str) -> frozenset[str]:
    """The ids of all videos that were taken down: one listing."""
    return frozenset(name.removesuffix(".json") for name in files.list_names(files.join(store, FOLDER)))
