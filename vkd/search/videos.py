"""What is searched: the videos of a run whose first teacher gives region features, and a query's features by the same teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float

from vkd import models, planning, schema
from vkd.clips import ClipPlan, Sampling, ViewPolicy, plan_examples
from vkd.errors import ConfigError, LabelsMissing, VideoError
from vkd.models import ModelSpec
from vkd.planning import Plan
from vkd.run import Run
from vkd.search.index import Features, Video
from vkd.stages import clip_of, decode_or_reject
from vkd.store.labelset import LabelSet, Reject
from vkd.teachers import TEACHERS
from vkd.teachers.base import Teacher
from vkd.video import guard
from vkd.video.access import Access
from vkd.video.settings import Settings

REGIONS = "regions"

SHOWN = ("source", "family", "host")  # columns of copies: what a video shows


def of_run(run: Run) -> tuple[list[Video], LabelSet, Features]:
    """All labelled videos of a run, each once, and the label set of their regions. Raises LabelsMissing when a chunk lacks."""
    alias, spec = next(iter(run.recipe.teachers.items()))
    teacher: Teacher = models.build(spec, TEACHERS, "teacher")
    if REGIONS not in teacher.emits:
        what = f"it emits no {REGIONS!r}, but {', '.join(teacher.emits)}"
        raise ConfigError(what, where=f"recipe.{alias}", action="name a run whose first teacher is `regions`")
    plan, label_set = Plan.of(run), LabelSet.open(run.store, planning.teacher_spec(run, alias, teacher))
    if lacking := label_set.missing(0, plan.chunks):
        what = f"regions of {len(lacking)} of {len(plan.chunks)} chunks are missing"
        raise LabelsMissing(what, where=label_set.uri, action="vkd label RUN")
    videos: dict[str, Video] = {}
    for chunk in plan.chunks:
        status = label_set.read(0, chunk, ())[schema.STATUS].to_pylist()
        for row, example in enumerate(plan.examples(chunk).to_pylist()):
            if status[row] == schema.LABELLED:
                name = f"{chunk.shard}/{chunk.index * plan.chunk_size + row}"
                video_id, uri, duration_s = (example[key] for key in (schema.VIDEO_ID, schema.URI, schema.DURATION_S))
                shown = sorted({example[key] for key in SHOWN if example.get(key)})
                videos.setdefault(video_id, Video(name, video_id, uri, duration_s, shown))
    fps = _sampling(teacher, alias).fps
    assert fps is not None
    return list(videos.values()), label_set, Features(label_set.spec.name, fps, spec.model_dump(mode="json"))


def regions_of(uri: str, spec: Mapping[str, Any], access: Access) -> Float[np.ndarray, "t r d"]:
    """Region features of one video, by the teacher that a specification names. Raises VideoError when it cannot be decoded."""
    teacher: Teacher = models.build(ModelSpec.model_validate(spec), TEACHERS, "teacher")
    teacher.load("cpu")
    settings = Settings((_sampling(teacher, REGIONS),), access=access)
    duration_s = guard.here(settings).probe(uri).duration_s
    video = {schema.VIDEO_ID: ["query"], schema.URI: [uri], schema.DURATION_S: pa.array([duration_s], pa.float64())}
    examples = plan_examples(pa.table(video), ClipPlan())
    (decoded,) = decode_or_reject([clip_of(examples.to_pylist()[0], ViewPolicy(), 0)], settings)
    if isinstance(decoded, Reject):
        raise VideoError(decoded.kind, decoded.message, where=uri, permanent=decoded.permanent)
    columns = planning.text_columns(examples, planning.columns_for([teacher]))
    regions = teacher(columns | {schema.FRAMES: decoded[0][None]})[REGIONS][0]
    return np.asarray(regions, np.float32)


def _sampling(teacher: Teacher, alias: str) -> Sampling:
    """How it looks at a video, at so many frames a second."""
    if teacher.sampling is None or teacher.sampling.fps is None:
        what = "it does not look at a fixed number of frames a second"
        raise ConfigError(what, where=f"recipe.{alias}", action="set its sampling to fps")
    return teacher.sampling
