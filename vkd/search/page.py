"""What a search found, as one HTML file: each match's segment above the same moments of the query."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vkd.clips import Clip, Sampling, View
from vkd.search.query import Hit
from vkd.stages import decode_or_reject
from vkd.store.labelset import Reject
from vkd.video.access import Access
from vkd.video.settings import Settings

NUM_THUMBNAILS, THUMBNAIL_PX, JPEG_QUALITY = 8, 96, 80
Frames = UInt8[np.ndarray, "t s s 3"]
Strip = Frames | str  # or why there are none
STYLE = (
    "body{font:14px sans-serif;margin:2em;color:#222}h2{font-size:1em;margin:2em 0 .3em;word-break:break-all}"
    "img{display:block}div{display:flex;gap:2px;margin:2px 0}p{margin:.2em 0;color:#666}.match{color:#060}"
)


def thumbnails(query_uri: str, hits: Sequence[Hit], access: Access) -> list[tuple[Strip, Strip]]:
    """Of each match the query's frames and its own, at the same shares of their segments; other hits have none."""
    settings = Settings((Sampling(num_frames=NUM_THUMBNAILS, size_px=THUMBNAIL_PX),), access=access)
    clips = []
    for hit in hits:
        if hit.segment is not None:
            s = hit.segment
            clips += [_clip(query_uri, s.query_start_s, s.query_end_s), _clip(hit.uri, s.start_s, s.end_s)]
    decoded = (found.message if isinstance(found, Reject) else found[0] for found in decode_or_reject(clips, settings))
    return [("", "") if hit.segment is None else (next(decoded), next(decoded)) for hit in hits]


def page(query_uri: str, hits: Sequence[Hit], strips: Sequence[tuple[Strip, Strip]]) -> str:
    """The file's content; it needs no other."""
    matches = sum(hit.matches for hit in hits)
    told = f"{matches} of {len(hits)} match" if matches else "no match: the videos below are only the most similar ones"
    parts = [f"<!doctype html><meta charset=utf-8><title>search</title><style>{STYLE}</style>"]
    parts.append(f"<h1>{html.escape(query_uri)}</h1><p>{told}</p>")
    for place, (hit, (of_query, of_hit)) in enumerate(zip(hits, strips, strict=True), 1):
        kind = "match" if hit.matches else "no match"
        parts.append(f"<h2>{place}. {html.escape(hit.uri)}</h2>")
        parts.append(f'<p class="{"match" if hit.matches else ""}">{kind}, {hit.score:.3f} {"fine" if hit.is_fine else "coarse"}</p>')
        if hit.segment is not None:
            s = hit.segment
            parts.append(_strip("query", s.query_start_s, s.query_end_s, of_query) + _strip("found", s.start_s, s.end_s, of_hit))
        elif hit.matches:
            parts.append("<p>alike as a whole; no part stands out</p>")
    return "\n".join(parts)


def _clip(uri: str, start_s: float, end_s: float) -> Clip:
    return Clip(uri, start_s, end_s, View(), uri)


def _strip(name: str, start_s: float, end_s: float, strip: Strip) -> str:
    told = f"<p>{name}, {start_s:.1f} to {end_s:.1f} s</p>"
    if isinstance(strip, str):
        return told + f"<p>{html.escape(strip)}</p>"
    return told + "<div>" + "".join(f'<img src="data:image/jpeg;base64,{_jpeg(frame)}">' for frame in strip) + "</div>"


def _jpeg(frame: UInt8[np.ndarray, "s s 3"]) -> str:
    sink = io.BytesIO()
    Image.fromarray(frame).save(sink, "JPEG", quality=JPEG_QUALITY)
    return base64.b64encode(sink.getvalue()).decode()
