"""What the pipeline does before any work; the whole of it runs in tests/e2e."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import small

from vkd.console import Screen
from vkd.errors import ManifestError
from vkd.manifest import Manifest
from vkd.pipeline import build_manifest
from vkd.run import parse


def test_videos_known_by_their_content_stay_when_a_corpus_is_copied_anew(small_videos: Path, tmp_path: Path) -> None:
    videos = Path(shutil.copytree(small_videos, tmp_path / "videos"))
    tree = small.tree_of(tmp_path) | {"data": {"manifest": f"{tmp_path}/known", "source": str(videos), "hash": True}}
    build_manifest(parse(tree), Screen())
    first = Manifest.load(f"{tmp_path}/known").digest
    for path in videos.rglob("*.*"):
        os.utime(path, ns=(1, 1))
    build_manifest(parse(tree), Screen())
    assert Manifest.load(f"{tmp_path}/known").digest == first
    with pytest.raises(ManifestError, match="made with hash True, not False"):
        build_manifest(parse(tree, ["data.hash=false"]), Screen())
