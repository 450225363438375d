"""What is searched: the videos of a run whose first teacher gives region features, and a query's features by the same teacher."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from vkd import models, planning, schema
from vkd.clips import ClipPlan, Sampling, ViewPolicy, plan_examples
from vkd.copies import FAMILY, HOST, SOURCE
from vkd.errors import ConfigError, LabelsMismatch, LabelsMissing, VideoError
from vkd.models import ModelSpec
from vkd.planning import Plan
from vkd.run import Run
from vkd.search.index import Features, Video
from vkd.stages import clip_of, decode_or_reject
from vkd.store import files
from vkd.store.labelset import LabelSet, Reject
from vkd.teachers import TEACHERS
from vkd.teachers.base import Teacher
from vkd.video import guard
from vkd.video.access import Access
from vkd.video.settings import Settings

REGIONS = "regions"

SHOWN, AKIN = (SOURCE, HOST), (SOURCE, HOST, FAMILY)  # columns of copies: what a video shows, and what it may look like
MIN_LEFT_OUT_S = 1.0  # a frame's time more is rounding


class Query(NamedTuple):
    """What is searched for: features of a video's frames, from its beginning on."""

    regions: Float[np.ndarray, "t r d"]
    duration_s: float | None

    def only_first_s(self, fps: float) -> float | None:
        """How many seconds were looked at, when the video goes on after that."""
        seen_s = len(self.regions) / fps
        return seen_s if self.duration_s is not None and self.duration_s >= seen_s + MIN_LEFT_OUT_S else None


def of_run(run: Run) -> tuple[list[Video], LabelSet, Features]:
    """All labelled videos of a run, each once, and the label set of their regions.

    Raises LabelsMissing when a chunk lacks, ConfigError when clips are parts of videos: segments are told in seconds of whole ones.
    """
    alias, teacher = planning.first_teacher(run)
    if REGIONS not in teacher.emits:
        what = f"it emits no {REGIONS!r}, but {', '.join(teacher.emits)}"
        raise ConfigError(what, where=f"recipe.{alias}", action="name a run whose first teacher is `regions`")
    plan, label_set = Plan.of(run), LabelSet.open(run.store, planning.teacher_spec(run, alias, teacher))
    if lacking := label_set.missing(0, plan.chunks):
        what = f"regions of {len(lacking)} of {len(plan.chunks)} chunks are missing"
        raise LabelsMissing(what, where=label_set.uri, action="vkd label RUN")
    committed, videos = label_set.committed(0), dict[str, Video]()
    for chunk in plan.chunks:
        status = label_set.read(0, chunk, (), attempt=committed[chunk])[schema.STATUS].to_pylist()
        for row, example in enumerate(plan.examples(chunk).to_pylist()):
            _require_whole(example)
            if status[row] == schema.LABELLED:
                name = f"{chunk.shard}/{chunk.index * plan.chunk_size + row}"
                video_id, uri, duration_s = (example[key] for key in (schema.VIDEO_ID, schema.URI, schema.DURATION_S))
                shown, akin = (sorted({example[key] for key in keys if example.get(key)}) for keys in (SHOWN, AKIN))
                videos.setdefault(video_id, Video(name, video_id, uri, duration_s, shown, akin))
    sampling = _sampling(teacher, alias)
    fps = sampling.fps or 0.0
    listed = [v._replace(num_frames=min(math.ceil((v.duration_s or 0.0) * fps), sampling.num_frames)) for v in videos.values()]
    spec = run.recipe.teachers[alias].model_dump(mode="json")
    named = [option for option in teacher.places if spec.get(option) and not os.path.isdir(spec[option])]
    return listed, label_set, Features(label_set.spec.name, fps, spec, _identity(teacher), named)


def query_of(uri: str, features: Features, access: Access) -> Query:
    """One video as the teacher of an index sees it.

    Raises VideoError when it cannot be decoded, LabelsMismatch when the teacher is no longer the one that the index was made with.
    """
    with TemporaryDirectory(prefix="vkd-teacher-") as folder:
        spec = ModelSpec.model_validate({**features.teacher, **_local(features, folder)})
        teacher: Teacher = models.build(spec, TEACHERS, "teacher")
        _require_the_same(teacher, features)
        teacher.load("cpu")
        return _query(uri, teacher, access)


def _query(uri: str, teacher: Teacher, access: Access) -> Query:
    settings = Settings((_sampling(teacher, REGIONS),), access=access)
    duration_s = guard.here(settings).probe(uri).duration_s
    video = {schema.VIDEO_ID: ["query"], schema.URI: [uri], schema.DURATION_S: pa.array([duration_s], pa.float64())}
    examples = plan_examples(pa.table(video), ClipPlan())
    (decoded,) = decode_or_reject([clip_of(examples.to_pylist()[0], ViewPolicy(), 0)], settings)
    if isinstance(decoded, Reject):
        raise VideoError(decoded.kind, decoded.message, where=uri, permanent=decoded.permanent)
    columns = planning.text_columns(examples, planning.columns_for([teacher]))
    regions = teacher(columns | {schema.FRAMES: decoded[0][None]})[REGIONS][0]
    return Query(np.asarray(regions, np.float32), duration_s)


def _require_whole(example: Mapping[str, Any]) -> None:
    start_s, end_s, duration_s = (example[name] for name in (schema.START_S, schema.END_S, schema.DURATION_S))
    if start_s > 0 or (end_s is not None and duration_s is not None and end_s < duration_s):
        what = f"{example[schema.URI]} is cut into clips, and an index is of whole videos"
        raise ConfigError(what, where="data.clips", action="set data.clips.plan=whole, label again, and index that")


def _local(features: Features, folder: str) -> dict[str, str]:
    """The options of a teacher that name files, which lie in `folder` where they are in storage: weights are read from disk."""
    found = {option: str(features.teacher[option]) for option in features.files}
    for option, uri in found.items():
        if "://" in uri:
            found[option] = os.path.join(folder, uri.rsplit("/", 1)[-1])
            Path(found[option]).write_bytes(files.read(uri))
    return found


def _require_the_same(teacher: Teacher, features: Features) -> None:
    now = _identity(teacher)
    if differing := sorted(name for name in {*features.identity, *now} if features.identity.get(name) != now.get(name)):
        what = f"{features.teacher['name']} has another {differing[0]} now than when the index was made: queries would not fit its videos"
        raise LabelsMismatch(what, where=features.name, action="restore the teacher's files, or vkd index RUN into another folder")


def _identity(teacher: Teacher) -> dict[str, Any]:
    """What it says of itself, as it comes back from a file."""
    told: dict[str, Any] = json.loads(json.dumps(teacher.identity()))
    return told


def _sampling(teacher: Teacher, alias: str) -> Sampling:
    """How it looks at a video, at so many frames a second."""
    if teacher.sampling is None or teacher.sampling.fps is None:
        what = "it does not look at a fixed number of frames a second"
        raise ConfigError(what, where=f"recipe.{alias}", action="set its sampling to fps")
    return teacher.sampling
