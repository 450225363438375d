"""The result page, its thumbnails from real clips, and the features of a query video."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from vkd.clips import Sampling
from vkd.errors import LabelsMismatch, VideoError
from vkd.schema import Columns, TensorType
from vkd.search import videos
from vkd.search.index import Features
from vkd.search.page import NUM_THUMBNAILS, THUMBNAIL_PX, page, thumbnails
from vkd.search.query import Hit, Segment
from vkd.teachers.base import Teacher
from vkd.video.access import Access

FEATURES = Features("regions-0123", 1.0, {"name": "search.test_page:MeanColours"}, {})


class MeanColours(Teacher):
    """Regions are the mean colour of each of 3 x 3 tiles, one frame a second."""

    version = 1
    sampling = Sampling(num_frames=8, size_px=24, mode="fps", fps=1.0)

    @property
    def emits(self) -> Mapping[str, TensorType]:
        return {"regions": TensorType("float32", (None, 9, 3))}

    @property
    def needs(self) -> tuple[str, ...]:
        return "frames", "duration_s"

    def identity(self) -> dict[str, Any]:
        return {}

    def load(self, device: str) -> None: ...

    @property
    def module(self) -> nn.Module:
        return nn.Identity()

    def __call__(self, batch: Columns) -> Columns:
        tiles = torch.from_numpy(batch["frames"]).float().view(-1, 8, 3, 8, 3, 8, 3).mean((3, 5)).flatten(2, 3)
        real = [max(1, int(float(duration_s))) for duration_s in batch["duration_s"].tolist()]
        regions = np.empty(len(real), object)
        for i, count in enumerate(real):
            regions[i] = tiles[i, :count].numpy()
        return batch | {"regions": regions}


def hit(uri: str, segment: Segment | None) -> Hit:
    return Hit("a" * 16, uri, 4.0, 0.75, True, segment is not None, segment)


def test_a_match_shows_both_segments_and_others_none(small_videos: Path) -> None:
    query, found = str(small_videos / "a_sharp.mp4"), str(small_videos / "b_dull.mp4")
    hits = [hit(found, Segment(0.0, 2.0, 1.0, 3.0)), hit("<b>.mp4", None), hit("/gone.mp4", Segment(0.0, 1.0, 0.0, 1.0))]
    strips = thumbnails(query, hits, Access())
    text = page(query, hits, strips)
    images = re.findall(r'base64,([^"]+)"', text)
    assert len(images) == 3 * NUM_THUMBNAILS  # of the third the query's alone
    with Image.open(io.BytesIO(base64.b64decode(images[NUM_THUMBNAILS]))) as image:
        assert (image.format, image.size) == ("JPEG", (THUMBNAIL_PX, THUMBNAIL_PX))
        first = np.asarray(strips[0][1][0], np.float32)
        assert np.abs(np.asarray(image, np.float32) - first).mean() < 5
    assert "2 of 3 match" in text and "query, 0.0 to 2.0 s" in text and "found, 1.0 to 3.0 s" in text
    assert "<b>" not in text and "&lt;b&gt;.mp4" in text and "gone" in str(strips[2][1])
    assert not re.search(r"(src|href)=\"(?!data:)", text)


def test_a_match_may_have_no_segment() -> None:
    told = Hit("a" * 16, "a.mp4", 4.0, 0.75, True, True, None)
    text = page("q.mp4", [told], thumbnails("q.mp4", [told], Access()))
    assert "1 of 1 match" in text and "no part stands out" in text and "<img" not in text


def test_no_match_is_said(small_videos: Path) -> None:
    hits = [hit("a.mp4", None)]
    assert "no match" in page("q.mp4", hits, thumbnails("q.mp4", hits, Access()))


def test_a_query_gives_what_the_teacher_says_of_it(small_videos: Path) -> None:
    regions = videos.query_of(str(small_videos / "a_sharp.mp4"), FEATURES, Access()).regions
    backwards = videos.query_of(str(small_videos / "c_sharp.mp4"), FEATURES, Access()).regions
    assert regions.shape == backwards.shape == (4, 9, 3) and regions.dtype == np.float32
    assert not np.array_equal(regions, backwards)


def test_a_query_that_is_no_video_is_told(tmp_path: Path) -> None:
    place = tmp_path / "q.mp4"
    place.write_text("no video\n")
    with pytest.raises(VideoError, match=r"q\.mp4"):
        videos.query_of(str(place), FEATURES, Access())


def test_a_teacher_with_other_files_than_the_index_was_made_with_is_refused(small_videos: Path) -> None:
    """A whitening that was fitted anew lies where the old one lay."""
    features = replace(FEATURES, identity={"whitening": {"sha256": "old"}})
    with pytest.raises(LabelsMismatch, match=r"regions-0123.*another whitening now"):
        videos.query_of(str(small_videos / "a_sharp.mp4"), features, Access())
