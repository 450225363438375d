"""Labels that Ray Data refines, bit for bit those that one process refines."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from vkd import cluster, phased
from vkd.feeding import open_sets
from vkd.label_table import MapChunks
from vkd.planning import Plan
from vkd.rounds import rounds_of_epoch
from vkd.run import Run
from vkd.schema import TRAIN


def refined(run: Run, folder: Path, map_chunks: MapChunks) -> tuple[dict[str, bytes], float]:
    """The chunk files of all versions, and how many of the newest labels are not used; the student says what its clip's number says."""
    plan, sets = open_sets(run, Plan.of(run))
    table = phased.table_of(run.model_copy(update={"output": str(folder)}), plan, sets["teacher"], map_chunks)
    assert table is not None
    for epoch in range(2):
        table.prepare(epoch)
        for round_ in rounds_of_epoch([len(rows) for rows in plan.rows(TRAIN)], epoch, every_examples=10, seed=0):
            numbers = torch.tensor([chunk * plan.chunk_size + row for chunk in round_.chunks for row in plan.rows(TRAIN)[chunk]])
            table.note(round_, numbers, torch.stack([numbers + 1.0, 30.0 - numbers], dim=1) / 31)
    version = table.prepare(2)
    files = {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("refined-*/view=*/*/*.parquet"))}
    assert len(files) == (version + 1) * len(plan.chunks) > len(plan.chunks)
    return files, table.share_unused(version)


def refined_by_who_holds_all_cpus(run: Run, folder: Path) -> tuple[dict[str, bytes], float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "MANY_CHUNKS", 1)
        return refined(run, folder, cluster.map_chunks)


def test_it_comes_out_the_same_and_needs_no_free_cpu(staged: Run, local_ray: None, tmp_path: Path) -> None:
    task = ray.remote(refined_by_who_holds_all_cpus).options(num_cpus=2)
    assert ray.get(task.remote(staged, tmp_path / "ray")) == refined(staged, tmp_path / "here", map)
