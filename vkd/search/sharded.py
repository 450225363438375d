"""Search of an index whose shards lie with several actors of a cluster: none holds or reads more than its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import ray
import torch
from jaxtyping import Float, Int, Shaped

from vkd import resources, schema
from vkd.placement import Need
from vkd.search import query as searching
from vkd.search.index import Features, Index, told_of
from vkd.search.networks import Codes, Networks
from vkd.search.query import Hit, Order, best_first

MAX_RESTARTS = 3


class Needs(NamedTuple):
    """Of the videos of a part that most need the fine score: how much, their ids, their numbers in the part."""

    need: Float[np.ndarray, " k"]
    video_ids: Shaped[np.ndarray, " k"]
    numbers: Int[np.ndarray, " k"]


class Part:
    """What runs in an actor: an index of some of the shards, opened by the first call, whose errors come back as they are."""

    def __init__(self, uri: str, told: Mapping[str, Any]) -> None:
        self.uri, self.told = uri, told

    @cached_property
    def index(self) -> Index:
        torch.set_num_threads(1)
        return Index(self.uri, self.told, Networks.beside(self.uri))

    @cached_property
    def video_ids(self) -> Shaped[np.ndarray, " n"]:
        return np.array(self.index.videos[schema.VIDEO_ID].to_pylist(), np.str_)

    def size(self) -> int:
        return len(self.index)

    def needs(self, query: Codes, count: int, order: Order) -> Needs:
        """The `count` videos here that most need the fine score."""
        need = searching.need(self.index, query, order)
        numbers = best_first(need, self.index.id_rank)[:count]
        return Needs(need[numbers], self.video_ids[numbers], numbers)

    def hits(self, query: Codes, query_frames: int, chosen: Int[np.ndarray, " k"], top: int) -> list[Hit]:
        """The best `top` here, when these are compared finely."""
        return searching.hits(self.index, query, query_frames, searching.ranking(self.index, query, chosen), top)


class ShardedIndex:
    """An index that actors hold together; it gives the hits that `query.search` gives, and asks the cluster for a CPU an actor.

    Ray starts an actor again that dies with its node, which then reads its shards again.
    """

    def __init__(self, uri: str, num_actors: int, match_from: float | None = None) -> None:
        """Raises ConfigError when there is no index, or no room for the actors."""
        told = told_of(uri, match_from)
        shards = told["shards"]
        self.networks, self.features = Networks.beside(uri), Features(**told["features"]).kept_in(uri)
        num_parts = min(num_actors, len(shards))
        resources.require(Need("search actor", "--actors", num_parts, {"CPU": 1.0}, {}))
        part = ray.remote(Part).options(num_cpus=1, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS, scheduling_strategy="SPREAD")
        self.parts = [part.remote(uri, told | {"shards": shards[i::num_parts]}) for i in range(num_parts)]
        self.num_videos = 0

    def __len__(self) -> int:
        """Waits for the actors when it is asked for the first time."""
        self.num_videos = self.num_videos or sum(ray.get([part.size.remote() for part in self.parts]))
        return self.num_videos

    def search(
        self, query_regions: Float[np.ndarray, "t r d"], budget: float = 0.05, top: int = 20, order: Order = "selector"
    ) -> list[Hit]:
        """The best `top` videos. The share `budget` of the whole index is compared finely, wherever that lies."""
        query, count = self.networks.index(query_regions), int(budget * len(self))
        needs: list[Needs] = ray.get([part.needs.remote(query, count, order) for part in self.parts])
        chosen = _most_needed(needs, count)
        asked = [part.hits.remote(query, len(query_regions), mine, top) for part, mine in zip(self.parts, chosen, strict=True)]
        hits: list[Hit] = [hit for of_part in ray.get(asked) for hit in of_part]
        best = best_first(np.array([hit.score for hit in hits], np.float32), np.array([hit.video_id for hit in hits]))[:top]
        return [hits[i] for i in best.tolist()]


def _most_needed(needs: Sequence[Needs], count: int) -> list[Int[np.ndarray, " _"]]:
    """Of each part the numbers of those videos that are among the first `count` of all."""
    part = np.repeat(np.arange(len(needs)), [len(each.numbers) for each in needs])
    need, ids, numbers = (np.concatenate(column) for column in zip(*needs, strict=True))
    first = best_first(need, ids)[:count]
    return [numbers[first[part[first] == i]] for i in range(len(needs))]
