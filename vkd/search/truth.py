"""Ground truth of video retrieval: which videos answer which queries, as benchmarks publish it and as users write it down."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from vkd.errors import ConfigError
from vkd.metrics.retrieval import CCWeb, Scores, cc_web_video, evve, fivr, svd
from vkd.store import files


class Truth(NamedTuple):
    """Queries, every video that is named, those that are searched (None: all there are), and what scores are worth."""

    queries: list[str]
    named: frozenset[str]
    database: frozenset[str] | None
    metrics: Callable[[Scores], dict[str, float]]


def read(uri: str, protocol: str) -> Truth:
    """The ground truth in a JSON file. Raises ConfigError when it is not of this protocol, or the protocol is unknown."""
    if protocol not in PROTOCOLS:
        raise ConfigError(f"{protocol!r} is no protocol", where="--protocol", action=f"choose {', '.join(PROTOCOLS)}")
    try:
        return PROTOCOLS[protocol](files.read_json(uri))
    except FileNotFoundError as error:
        raise ConfigError("no such file", where=uri, action="name the ground truth, a JSON file") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"it is no ground truth of {protocol}: {type(error).__name__}: {error}"
        raise ConfigError(what, where=uri, action="name another --protocol, or mend the file") from error


def _relevant(told: Mapping[str, Any]) -> Truth:
    """{query: [what answers it, ...]}."""
    annotation = {query: {"ND": _texts(videos)} for query, videos in told.items()}
    named = {*told, *(video for labels in annotation.values() for video in labels["ND"])}
    return Truth(list(told), frozenset(named), None, lambda scores: {"mAP": fivr(scores, annotation)["DSVR"]})


def _fivr(told: Mapping[str, Any]) -> Truth:
    """{query: {label: [video, ...]}}, or that as `annotation` beside `queries` and `database`."""
    annotation = told.get("annotation", told)
    labelled = {video for labels in annotation.values() for videos in labels.values() for video in _texts(videos)}
    database = frozenset(_texts(told["database"])) if "database" in told else None
    named = labelled.union(annotation, database or ())
    return Truth(_texts(told.get("queries", list(annotation))), frozenset(named), database, lambda scores: fivr(scores, annotation))


def _cc_web_video(told: Mapping[str, Any]) -> Truth:
    truth = CCWeb(**told)
    return Truth(_texts(truth.queries), frozenset(truth.index), frozenset(truth.index), lambda scores: cc_web_video(scores, truth))


def _svd(told: Mapping[str, Any]) -> Truth:
    """{query: {video: 0 or 1}}."""
    labelled = {video for videos in told.values() for video in dict(videos)}
    return Truth(list(told), frozenset(labelled.union(told)), None, lambda scores: svd(scores, told))


def _evve(told: Mapping[str, Any]) -> Truth:
    """`events`: {name: [queries, positives, ...]}, beside `queries` and `database`."""
    events, queries, database = told["events"], _texts(told["queries"]), frozenset(_texts(told["database"]))
    return Truth(queries, database.union(queries), database, lambda scores: evve(scores, events))


PROTOCOLS: Mapping[str, Callable[[Mapping[str, Any]], Truth]] = {
    "relevant": _relevant,
    "fivr": _fivr,
    "cc_web_video": _cc_web_video,
    "svd": _svd,
    "evve": _evve,
}


def _texts(found: Iterable[Any]) -> list[str]:
    """Raises TypeError for anything but a list of names."""
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise TypeError(f"{str(found)[:60]} is no list of names")
    return found
