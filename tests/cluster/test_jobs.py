"""`vkd submit` and `vkd jobs` on a real head with a job server; videos, labels and results lie on a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import Mock

import fault_proxy
import harness
import head
import pytest

from vkd import cli
from vkd.checkpoint import load_student

CLIP = "carphone_pristine.mp4"
NUM_CLIPS, NUM_MANY = 4, 31
MANY = ("data.clips.stride_s=0.1", "data.chunk_size=2")  # half a minute of work
DRIVER = ("-m", "vkd", "")  # not vkd.supervisor
pytestmark = [pytest.mark.timeout(400), pytest.mark.filterwarnings("ignore:ssl=None is deprecated:DeprecationWarning")]  # of Ray


@dataclass
class Site:
    """A cluster, the bucket that its nodes reach, and the run file in the current directory."""

    head: head.Head
    bucket: Path

    def places(self, name: str) -> tuple[str, ...]:
        """Overrides for a run of its own."""
        return f"output=s3://bucket/{name}/out", f"labels.store=s3://bucket/{name}/labels", f"data.manifest=s3://bucket/{name}/manifest"

    def chunks(self, name: str) -> set[Path]:
        """The chunk files that a run's teacher has committed."""
        return set(self.bucket.glob(f"{name}/labels/teacher-*/view=0/*/chunk-*.parquet"))

    def drivers(self) -> list[int]:
        """Process ids of the jobs' drivers."""
        return self.head.pids(*DRIVER)


@pytest.fixture(scope="module")
def storage(clips_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A real S3 server's bucket, with one video of 4 s; who is started now reaches it."""
    bucket = tmp_path_factory.mktemp("s3") / "bucket"
    (bucket / "videos").mkdir(parents=True)
    shutil.copy(clips_dir / CLIP, bucket / "videos")
    server = fault_proxy.S3Server(bucket.parent)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in head.environment(server.port).items():
            patch.setenv(name, value)
        yield bucket
    server.kill()


@pytest.fixture(scope="module")
def started(storage: Path) -> Iterator[head.Head]:
    with head.started() as it:
        yield it


@pytest.fixture
def site(started: head.Head, storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", started.url)
    write_run(tmp_path)
    return Site(started, storage)


def write_run(folder: Path) -> None:
    tree = harness.small_run(folder, Path("unused"))
    tree["output"], tree["labels"]["store"] = "s3://bucket/out", "s3://bucket/labels"
    tree["data"] |= {"source": "s3://bucket/videos", "manifest": "s3://bucket/manifest"}
    harness.write(tree, folder / "run.yaml")


Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """`vkd` with these arguments, in this process: exit code, stdout, stderr."""

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["vkd", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return call


def job_of(text: str) -> str:
    """The id in the first line that tells of a job."""
    return next(line.split()[1].rstrip(":") for line in text.splitlines() if line.startswith("job vkd-"))


def test_labelling_is_followed_and_submitting_it_twice_is_safe(site: Site, main: Main) -> None:
    places = site.places("twice")
    with harness.vkd("submit", "label", "run.yaml", *places) as command:
        command.until(site.drivers)
        code, out, _ = main("submit", "label", "run.yaml", *places, "--detach")
        assert (code, job_of(out)) == (0, "vkd-small-" + job_of(out).split("-")[2] + "-1")
        assert "does this already" in out
        code, _, err = main("submit", "distill", "run.yaml", *places)
        assert code == 2
        assert f"job {job_of(out)} works on it: vkd label -> " in err
        code, stdout, stderr = command.finish()
    assert (code, stderr) == (0, ""), stdout
    assert f"label: {NUM_CLIPS} of {NUM_CLIPS} clips" in stdout
    assert stdout.splitlines()[-1].startswith(f"job {job_of(out)} succeeded after")
    assert len(site.chunks("twice")) == 1
    assert_no_credentials(site, job_of(out))


def assert_no_credentials(site: Site, job_id: str) -> None:
    """Neither what the job server tells of a job nor its log holds the keys that its driver had."""
    for path in (f"/api/jobs/{job_id}", f"/api/jobs/{job_id}/logs"):
        with urllib.request.urlopen(site.head.url + path, timeout=30) as answer:
            told = answer.read().decode()
        assert job_id in told
        assert not [key for key in fault_proxy.KEYS if key in told]


def test_a_mistake_that_only_the_cluster_sees_ends_with_2(site: Site, main: Main) -> None:
    code, out, err = main("submit", "label", "run.yaml", *site.places("mistake"), "data.source=s3://bucket/nothing")
    assert code == 2, (out, err)
    assert "vkd: s3://bucket/nothing: no such folder, bucket or file" in out
    assert "supervisor:" not in out  # it was not tried again
    assert err.startswith(f"vkd: job {job_of(out)} failed with exit code 2 after ")
    assert err.count("\n") == 1


@pytest.mark.slow
def test_distilling_beside_labelling(site: Site) -> None:
    words = ("run.yaml", *site.places("distill"), "labels.mode=tee")
    with harness.vkd("submit", "distill", *words, "--max-restarts", "0") as command:
        code, stdout, stderr = command.finish(300)
    assert (code, stderr) == (0, ""), stdout
    assert "distill: epoch 2" in stdout
    assert (site.bucket / "distill" / "out" / "student" / "model.safetensors").exists()
    with harness.vkd("submit", "verify", *words, "--", "--sample", "2") as command:
        code, stdout, stderr = command.finish(300)
    assert (code, stderr) == (0, ""), stdout
    assert "labelled again, teacher" in stdout


@pytest.mark.slow
def test_a_killed_driver_is_started_again_and_finishes(site: Site) -> None:
    with harness.vkd("submit", "label", "run.yaml", *site.places("killed"), *MANY) as command:
        command.until(lambda: len(site.chunks("killed")) >= 2)
        (driver,) = site.drivers()
        os.kill(driver, signal.SIGKILL)
        code, stdout, stderr = command.finish(300)
    assert (code, stderr) == (0, ""), stdout
    assert stdout.count("vkd supervisor: the driver was killed by SIGKILL; starting it again in 5 s (restart 1 of 10)") == 1
    assert f"of {NUM_MANY} clips" in stdout
    assert " there before" in stdout
    assert len(site.chunks("killed")) == -(-NUM_MANY // 2)


@pytest.mark.slow
def test_a_stopped_job_goes_on_when_it_is_submitted_again(site: Site, main: Main) -> None:
    words = ("submit", "label", "run.yaml", *site.places("stopped"), *MANY)
    with harness.vkd(*words) as command:
        command.until(lambda: len(site.chunks("stopped")) >= 2)
        job_id = last_job(main)
        assert main("jobs", "stop", job_id)[:2] == (
            0,
            f"job {job_id} stopped; what is committed is kept\nnext: the same vkd submit goes on where it stopped\n",
        )
        code, stdout, stderr = command.finish()
    assert code == 130
    assert stderr == f"vkd: job {job_id} was stopped; what is committed is kept -> the same vkd submit goes on where it stopped\n"
    assert "vkd: interrupted; what is committed is kept" in stdout
    assert "supervisor:" not in stdout
    assert site.drivers() == []
    before = {path: path.read_bytes() for path in site.chunks("stopped")}
    assert 0 < len(before) < NUM_MANY // 2
    code, stdout, stderr = main(*words)
    assert (code, stderr) == (0, ""), stdout
    assert job_of(stdout) == job_id.removesuffix("1") + "2"
    assert len(site.chunks("stopped")) == -(-NUM_MANY // 2)
    assert {path: path.read_bytes() for path in before} == before
    assert [job["status"] for job in jobs(main) if job["id"].startswith(job_id[:-1])] == ["STOPPED", "SUCCEEDED"]


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_and_it_can_be_followed_again(site: Site, main: Main) -> None:
    with harness.vkd("submit", "label", "run.yaml", *site.places("detached"), *MANY) as command:
        command.until(site.drivers)
        command.process.send_signal(signal.SIGINT)
        code, _, stderr = command.finish()
    job_id = last_job(main)
    assert code == 130
    assert stderr.startswith(f"vkd: no longer following; job {job_id} goes on -> vkd jobs logs {job_id} --follow to follow again")
    assert len(site.drivers()) == 1
    code, stdout, stderr = main("jobs", "logs", job_id, "--follow")
    assert (code, stderr) == (0, ""), stdout
    assert f"label: {NUM_MANY} of {NUM_MANY} clips" in stdout
    assert main("jobs", "logs", job_id)[1].splitlines() == stdout.splitlines()[:-1]


@pytest.mark.slow
def test_a_cluster_with_a_token(storage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of their own: the mode is read when Ray is imported."""
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path)
    token = "5f3a" * 16
    for name in ("right", "wrong"):
        (tmp_path / f"{name}.token").write_text(token if name == "right" else token[::-1])
    (tmp_path / ".rayignore").write_text("*.token\n")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "right.token"))
    places = Site(Mock(), storage).places("token")
    with head.started(token) as it:
        words = ("submit", "label", "run.yaml", *places, "--address", it.url)
        with harness.vkd(*words) as command:
            code, stdout, stderr = command.finish(300)
        assert (code, stderr) == (0, ""), stdout
        assert token not in stdout
        for name, value in (("RAY_AUTH_TOKEN_PATH", str(tmp_path / "wrong.token")), ("RAY_AUTH_MODE", "disabled")):
            monkeypatch.setenv(name, value)
            with harness.vkd("jobs", "ls", "--address", it.url) as command:
                code, stdout, stderr = command.finish()
            assert (code, stdout) == (2, "")
            assert stderr.startswith(f"vkd: {it.url}: the cluster takes no request without its token -> export RAY_AUTH_MODE=token")
            assert stderr.count("\n") == 1


def jobs(main: Main) -> list[dict[str, str]]:
    code, out, err = main("jobs", "ls", "--json")
    assert code == 0, err
    told: list[dict[str, str]] = json.loads(out)["jobs"]
    return told


def last_job(main: Main) -> str:
    return jobs(main)[-1]["id"]


@pytest.mark.slow
def test_a_group_trains_with_everything_on_the_server(site: Site, main: Main) -> None:
    """A worker group of Ray Train writes what it keeps beside checkpoints through our file system too."""
    group = ("labels.mode=tee", "compute.student.workers=1", "compute.student.cpus=0.5")
    code, out, err = main("submit", "distill", "run.yaml", *site.places("group"), *group)
    assert (code, err) == (0, ""), out
    assert (site.bucket / "group/out/student/model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_workflow_of_a_probe_and_a_staged_student(site: Site, clips_dir: Path, tmp_path: Path) -> None:
    """jobs/substage.yaml in small: its probe, its refined labels and the best weights of its phases lie on the server too."""
    write_staged(site, clips_dir, tmp_path)
    seen = []
    for _ in range(2):
        with harness.vkd("submit", "run", "substage.yaml", "--max-restarts", "0") as command:
            code, stdout, stderr = command.finish(900)
        assert (code, stderr) == (0, ""), stdout
        seen.append(
            {path: path.read_bytes() for path in (site.bucket / "staged").rglob("*") if path.suffix in (".parquet", ".safetensors")}
        )
    assert "student: finished before" in stdout and stdout.count("there before") == 2, stdout
    assert seen[0] == seen[1]
    names = {path.relative_to(site.bucket / "staged").as_posix() for path in seen[0]}
    assert {"probe.safetensors", "out/student/model.safetensors"} < names
    refined = {name.split("/")[3] for name in names if name.startswith("out/refined/refined-")}
    assert refined == {f"view={version}" for version in range(3)}
    assert [name for name in names if name.endswith("best.safetensors")]
    student = load_student(str(site.bucket / "staged/out/student"))
    assert student.state_dict()["heads.logits.bias"].shape == (2,)


def write_staged(site: Site, clips_dir: Path, folder: Path) -> None:
    """Two classes, of each a clip of two people; the student learns for four epochs."""
    (site.bucket / "staged").mkdir()
    rows = []
    for person in ("ann", "bob"):
        for label in ("pristine", "distorted"):
            shutil.copy(clips_dir / f"carphone_{label}.mp4", site.bucket / "staged" / f"{person}_{label}.mp4")
            rows.append({"uri": f"s3://bucket/staged/{person}_{label}.mp4", "label": label, "group": person})
    (site.bucket / "staged" / "sources.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root, backbone = "s3://bucket/staged", {"name": "efficientnet_lite", "variant": 0}
    tree = harness.small_run(folder, Path("unused"))
    del tree["data"]["label_from"], tree["train"]["epochs"]
    tree["data"] |= {"source": f"{root}/sources.jsonl", "manifest": f"{root}/manifest", "allow": [root]}
    tree["labels"]["store"] = f"{root}/labels"
    probe = tree | {"name": "probe", "output": f"{root}/probe", "probe": {"out": f"{root}/probe.safetensors", "by": "group"}}
    harness.write(probe, folder / "probe.yaml")
    teacher = {"name": "probe", "path": f"{root}/probe.safetensors", "of": backbone | {"substages": True}}
    student = {"name": "tiny_r3d", "num_frames": 2, "size_px": 32, "widths": [4, 4, 6, 6]}
    recipe = {"name": "substage", "teacher": teacher, "student": student, "substages": ["layer2", "layer4"]}
    recipe["cascade"] = {"warmup": 1, "per_stage": 1, "joint": 1}
    harness.write(tree | {"name": "student", "output": f"{root}/out", "recipe": recipe}, folder / "student.yaml")
    harness.write({"runs": [{"run": "probe.yaml"}, {"run": "student.yaml"}]}, folder / "substage.yaml")
