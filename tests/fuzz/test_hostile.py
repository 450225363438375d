"""Hostile inputs that are no videos: uris, manifests, checkpoints, run files. Each is one error that vkd names, or a named reject."""

from __future__ import annotations

import ast
import io
import json
import os
import shutil
import struct
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import small
import torch
import yaml
from torch import nn

from vkd import checkpoint, schema
from vkd.checkpoint import Position
from vkd.clips import Clip, ClipPlan, Sampling, SplitPlan, View
from vkd.errors import ConfigError, ManifestError, StorageError, VideoError, VkdError
from vkd.manifest import BuildOptions, Manifest, build
from vkd.planning import Plan
from vkd.run import Run, load
from vkd.stages import decode_or_reject
from vkd.status import note_planned, store_status
from vkd.store import chunkfile
from vkd.store.labelset import LabelSet, Reject
from vkd.video import fetch
from vkd.video.access import Access
from vkd.video.settings import Settings

REPOSITORY = Path(__file__).parents[2]
ESCAPES = [
    "/etc/passwd", "../../../../../../../../etc/passwd", "file:///etc/passwd", "file:/etc/passwd", "local:///etc/passwd",
    "local:/etc/passwd", "FILE:///etc/passwd", "file://localhost/etc/passwd", "~/secret.mp4", "dir:///etc/passwd",
    "generic://file:///etc/passwd", "simplecache::file:///etc/passwd", "zip://x::/etc/x.zip", "reference:///etc/passwd",
    "data://x,hi", "package://os/../../etc/passwd", "package://numpy/../../../../../../etc/passwd", "link.mp4", "folder/passwd",
    "a\0b.mp4", "x" * 300, "x" * 100_000, "/dev/zero", "/proc/self/environ", "video.mp4/inside.mp4", "loop.mp4", "",
]  # fmt: skip


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that may be read, which is the working directory too, with links out of it and a pipe."""
    place = tmp_path / "videos"
    place.mkdir()
    (tmp_path / "secret.mp4").write_text("secret")
    (place / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (place / "loop.mp4").symlink_to(place / "loop.mp4")
    (place / "folder").symlink_to("/etc")
    (place / "video.mp4").write_bytes(b"no video")
    os.mkfifo(place / "pipe.mp4")
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path))
    return place


@pytest.mark.parametrize("uri", [*ESCAPES, "pipe.mp4"], ids=lambda uri: uri[:40].replace("\0", "0"))
def test_a_uri_cannot_leave_its_root(root: Path, uri: str) -> None:
    with pytest.raises(VideoError), fetch.opened(uri, Access.to(str(root))):
        pytest.fail("opened")


def test_hostile_uris_of_a_manifest_are_rejects(root: Path) -> None:
    clips = [Clip(uri, 0.0, 1.0, View(), "key") for uri in ESCAPES]
    settings = Settings((Sampling(num_frames=1, size_px=16),), access=Access.to(str(root)))
    assert all(isinstance(found, Reject) for found in decode_or_reject(clips, settings))


@pytest.mark.parametrize("span", [(float("nan"), 1.0), (0.0, float("nan")), (-1e308, 1e308), (0.0, float("inf")), (1e300, None)])
def test_absurd_spans_are_rejects(clips_dir: Path, span: tuple[float, float | None]) -> None:
    clip = Clip(str(clips_dir / "carphone_distorted.mp4"), *span, View(), "key")
    (found,) = decode_or_reject([clip], Settings((Sampling(num_frames=1, size_px=16),)))
    assert isinstance(found, Reject)
    assert found.kind == "bad_span"


def test_a_list_with_hostile_uris_gives_a_manifest_of_the_others(root: Path, clips_dir: Path) -> None:
    shutil.copy(clips_dir / "carphone_distorted.mp4", root / "good.mp4")
    uris = [uri for uri in ESCAPES if uri] + ["good.mp4"]
    (root / "list.jsonl").write_text("".join(json.dumps({"uri": uri}) + "\n" for uri in uris))
    build(str(root / "list.jsonl"), str(root / "manifest"), BuildOptions())
    manifest = Manifest.load(str(root / "manifest"))
    assert [Path(uri).name for uri in manifest.read_shard(manifest.shards[0])[schema.URI].to_pylist()] == ["good.mp4"]
    assert manifest.rejects().num_rows > len(uris) / 2  # some are other names of one file


def forged(folder: Path, table: pa.Table) -> str:
    """A manifest of one shard that vkd did not make, whose digest is right."""
    from vkd import manifest

    name = manifest.write_rows(str(folder), "shards", table)
    index = {"chunk_size": 4, "probe": "header", "hash": False, "shards": [{"name": name, "rows": table.num_rows}]}
    (folder / "manifest.json").write_text(json.dumps(index))
    return str(folder)


GOOD = {schema.VIDEO_ID: ["a"], schema.URI: ["/v/a.mp4"], schema.DURATION_S: [5.0]}


@pytest.mark.parametrize(
    "columns",
    [
        {**GOOD, schema.URI: [None]},
        {**GOOD, schema.URI: [7]},
        {**GOOD, schema.DURATION_S: ["long"]},
        {schema.VIDEO_ID: ["a"], schema.URI: ["/v/a.mp4"]},
        {**GOOD, schema.START_S: [None], schema.END_S: [1.0]},
        {**GOOD, schema.START_S: [0.0]},
        {**GOOD, schema.START_S: ["0"], schema.END_S: ["1"]},
    ],
)
def test_forged_manifests_are_refused(tmp_path: Path, columns: dict[str, list[object]]) -> None:
    path = forged(tmp_path, pa.table(columns))
    with pytest.raises(ManifestError):
        Plan(path, ClipPlan(plan="windows", length_s=1.0), SplitPlan())


@pytest.mark.parametrize("duration_s", [1e308, float("nan"), -1.0, float("inf"), 1e9])
def test_forged_durations_do_not_make_millions_of_clips(tmp_path: Path, duration_s: float) -> None:
    path = forged(tmp_path, pa.table({**GOOD, schema.DURATION_S: [duration_s]}))
    assert Plan(path, ClipPlan(plan="windows", length_s=0.1), SplitPlan()).num_examples == 1


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "{}",
        "[]",
        '{"chunk_size": 0, "probe": "none", "hash": false}',
        '{"chunk_size": -4, "probe": "none", "hash": false}',
        '{"chunk_size": 4, "probe": "none", "hash": false, "shards": [{"name": "../../../etc/passwd", "rows": 1}]}',
        '{"chunk_size": 4, "probe": "none", "hash": false, "shards": [{"name": "0123456789abcdef", "rows": -1}]}',
        "\xff\xfe",
    ],
)
def test_damaged_manifest_files_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ManifestError):
        Manifest.load(str(tmp_path))


def with_chunks(table: pa.Table, told: bytes) -> bytes:
    """A Parquet file whose footer says this of its chunks."""
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, table.schema) as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({chunkfile.CHUNKS: told})
    data: bytes = sink.getvalue().to_pybytes()
    return data


@pytest.mark.parametrize("damage", ["text", "cut", "huge_footer", "no_chunks", "nested", "wrong_types"])
def test_damaged_label_files_are_storage_errors(tmp_path: Path, damage: str) -> None:
    path, table = tmp_path / "chunk-00000.a0.parquet", pa.table({schema.EXAMPLE_ID: ["a", "b"], schema.STATUS: ["labelled"] * 2})
    pq.write_table(table, path)
    data = path.read_bytes()
    changed = {
        "text": b"no labels",
        "cut": data[: len(data) // 2],
        "no_chunks": data,
        "nested": with_chunks(table, b"[" * 100_000),
        "wrong_types": with_chunks(table, b'[{"index": "x", "attempt": [], "num_rows": {}, "rejects": 3, "digest": null}]'),
        "huge_footer": data[:-8] + struct.pack("<I", 2**32 - 1) + b"PAR1",
    }
    path.write_bytes(changed[damage])
    with pytest.raises(StorageError):
        chunkfile.read(str(path), 0, None, verify=True)
    with pytest.raises(StorageError):
        chunkfile.infos(str(path))


@pytest.mark.parametrize(
    "change", [{"probe": {"logits": {"shape": [9], "float32_base64": "?"}}}, {"tensors": {"logits": 3}}, {"tensors": 7}]
)
def test_a_damaged_label_set_is_a_storage_error(labelled: Run, tmp_path: Path, change: dict[str, object]) -> None:
    run = small.copied(labelled, tmp_path)
    (path,) = Path(run.labels.store).glob("teacher-*/labelset.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StorageError, match=r"labelset\.json"):
        LabelSet.at(str(path.parent))


class _Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (self.path, "w")


@pytest.fixture
def saved(tmp_path: Path) -> tuple[str, nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    small.save_checkpoint(str(tmp_path), Position(step=1), model, optimizer)
    return f"{tmp_path}/step-000000001", model, optimizer


def _pickled(path: Path) -> bytes:
    buffer = io.BytesIO()
    torch.save({"state": _Evil(str(path)), "param_groups": []}, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (checkpoint.STATE, b"[" * 100_000),
        (checkpoint.STATE, b"{}"),
        (checkpoint.STATE, b'{"position": {"step": 1, "command": "x"}}'),
        (checkpoint.STATE, b'{"position": 3}'),
        (checkpoint.WEIGHTS, struct.pack("<Q", 2**62) + b"{}"),
        (checkpoint.WEIGHTS, struct.pack("<Q", 2) + b"{}"),
        (checkpoint.OPTIMIZER, None),
        (checkpoint.OPTIMIZER, b"cos\nsystem\n(S'true'\ntR."),
        (checkpoint.OPTIMIZER, b""),
    ],
)
def test_hostile_checkpoints_run_nothing_and_are_one_error(
    tmp_path: Path, saved: tuple[str, nn.Module, torch.optim.Optimizer], name: str, content: bytes | None
) -> None:
    folder, model, optimizer = saved
    trap = tmp_path / "trap"
    (Path(folder) / name).write_bytes(_pickled(trap) if content is None else content)
    with pytest.raises(VkdError):
        checkpoint.restore(folder, model, optimizer)
    assert not trap.exists()


@pytest.mark.parametrize(
    "config",
    [
        {"student": {"name": "os:system"}, "heads": {}},
        {"student": {"name": "subprocess:Popen", "args": "true"}, "heads": {}},
        {"student": {"name": "torch.nn:Linear", "in_features": 2, "out_features": 2}, "heads": {}},
        {"student": {"name": "shift_cnn"}, "heads": {"logits": 10**15}},
        {"student": {"name": "shift_cnn"}, "heads": {"logits": "x"}},
        {"student": 3, "heads": {}},
        {"student": "shift_cnn"},
        [],
    ],
)
def test_hostile_students_are_refused(tmp_path: Path, config: object) -> None:
    (tmp_path / checkpoint.CONFIG).write_text(json.dumps(config))
    (tmp_path / checkpoint.WEIGHTS).write_bytes(struct.pack("<Q", 2) + b"{}")
    with pytest.raises(VkdError):
        checkpoint.load_student(str(tmp_path))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize("text", [BOMB, "a: &a [*a]", "[" * 5000, "!!python/object/apply:os.system [true]", "name: 2024-99-99", "a: \xff"])
def test_hostile_run_files_are_config_errors(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError):
        load(tmp_path / "run.yaml")


def test_a_few_aliases_are_no_bomb(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"name": "x", "data": [1] * 1000}))
    with pytest.raises(ConfigError, match="output"):
        load(tmp_path / "run.yaml")


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"num_examples": "many"}', "[" * 100_000])
def test_a_hostile_planned_file_is_one_error_or_no_plan(labelled: object, tmp_path: Path, text: str) -> None:
    store = tmp_path / "labels"
    shutil.copytree(labelled.labels.store, store)  # type: ignore[attr-defined]
    for folder in store.iterdir():
        note_planned(str(folder), 3)
        (folder / "planned.json").write_text(text)
    try:
        assert all(each.planned is None for each in store_status(str(store), 0.0))
    except StorageError as error:
        assert "planned.json" in str(error)


def test_nothing_is_unpickled() -> None:
    """No pickle but the name of its error, no eval, and torch.load only of weights."""
    for path in (REPOSITORY / "vkd").rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"), path
            if isinstance(node, ast.Import):
                assert not {alias.name for alias in node.names} & {"marshal", "shelve", "dill", "cloudpickle", "joblib"}, path
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle":
                assert node.attr == "UnpicklingError", path
            if isinstance(node, ast.Call):
                called, told = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"), path
                assert called != "torch.load" or told.get("weights_only") == "True", path
                assert called != "np.load" or told.get("allow_pickle") != "True", path
