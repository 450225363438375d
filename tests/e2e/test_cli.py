"""The command line as a stranger meets it: one clear line and an exit code for each mistake, one JSON object where it is asked for."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import harness
import pytest
import typer
import yaml

from vkd import cli
from vkd.label_report import LabelReport

VERBS = ("manifest", "label", "distill", "evaluate", "run", "status", "verify", "export")
OTHERS = ("plan", "probe", "whiten", "pairs", "index", "search", "adopt", "retrieval", "submit", "jobs", "labels")
USER, STORAGE, INTERRUPT = 2, 3, 130


@dataclass
class Done:
    code: int
    out: str
    err: str

    def failed_with(self, code: int, *parts: str) -> None:
        """The command ended with one line that has all these parts."""
        assert self.code == code, (self.out, self.err)
        assert self.err.startswith("vkd: ") and self.err.count("\n") == 1, self.err
        assert "Traceback" not in self.out + self.err
        for part in parts:
            assert part in self.err


Main = Callable[..., Done]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Main:
    """`vkd` with these arguments, in this process."""

    def call(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["vkd", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return Done(int(stop.value.code or 0), *capsys.readouterr())

    return call


@pytest.fixture(scope="module")
def labelled(tree: harness.Tree, report: LabelReport, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run file of a run whose labels are there."""
    return harness.write(tree, tmp_path_factory.mktemp("cli") / "run.yaml")


def in_command(text: str, places: dict[str, Path]) -> str:
    for name, place in places.items():
        text = text.replace(f"<{name}>", str(place))
    return text


@pytest.mark.parametrize(
    ("command", "parts"),
    [
        ("label <none>/run.yaml", ["<none>/run.yaml", "cannot read the run file"]),
        ("label <text>", ["is not a mapping of keys"]),
        ("label <workflow>", ["is a workflow of 2 runs", "vkd run <workflow>"]),
        ("label <run> train.epoch=1", ["unknown key 'train.epoch'", "did you mean 'epochs'?"]),
        ("label <run> train.epochs=many", ["train.epochs", "integer", "'many'"]),
        ("label <run> train.epochs", ["'train.epochs' is not KEY=VALUE"]),
        ("label <run> recipe.name=magic", ["unknown recipe 'magic'", "use one of dns, kd, label, substage"]),
        ("label <run> recipe.teacher.name=magic", ["unknown teacher 'magic'", "efficientnet_lite, pair_scores, probe, regions, student"]),
        (
            "label <run> recipe.student.name=magic data.keep_frames=none",
            ["unknown student 'magic'", "coarse, fine, selector, shift_cnn, tiny_r3d, tiny_vit, visil"],
        ),
        ("label <run> recipe.teacher.weights=<none>.pth", ["<none>.pth", "the weights are not there"]),
        ("label <run> labels.encodings.logits=fp7", ["unknown encoding 'fp7'", "fp16"]),
        ("label <run> labels.encodings.sound=fp16", ["no teacher emits 'sound'", "embedding, logits"]),
        ("label <run> data.source=<none>", ["<none>", "no such folder"]),
        ("label <run> data.source=null data.manifest=<none>", ["no manifest here", "vkd manifest SOURCE <none>"]),
        ("label <run> data.source=<broken> data.manifest=<new>/broken", ["no usable video; 1 are rejected", "InvalidDataError"]),
        ("label <run> data.split.by=group data.split.group=person", ["needs the column 'person'", "it has example_id"]),
        ("label <run> --limit nonsense", ["--limit 'nonsense'", "1%"]),
        ("label <run> --limit 0%", ["--limit '0%'"]),
        ("label <run> --fast", ["--fast", "see vkd label --help"]),
        ("label", ["RUN", "see vkd label --help"]),
        ("lable <run>", ["'lable'", "see vkd --help"]),
        (
            "label <run> compute.teacher.actors=64 compute.teacher.cpus=1 labels.store=<new>/labels",
            ["compute.teacher: needs 64 teacher actors of 1 CPU each", "62 of them find no place", "with 2 CPUs in all"],
        ),
        (
            "distill <run> compute.student.workers=9 output=<new>/nine",
            ["compute.student: needs 9 student workers of 1 CPU each", "with 2 CPUs in all"],
        ),
        (
            "distill <run> labels.store=<new>/labels output=<new>/lacking",
            ["no labels teacher-", "-> vkd label <run> labels.store=<new>/labels output=<new>/lacking"],
        ),
        ("distill <run> data.split.by=column output=<new>/column", ["needs the column 'split'"]),
        ("evaluate <run> --student <none>", ["<none>: holds no exported student"]),
        ("export <run> <new>/student output=<new>/lacking", ["no checkpoint yet", "vkd distill <run> output=<new>/lacking first"]),
        ("status <none>", ["no label sets here"]),
        ("manifest <none> <new>/manifest", ["<none>", "no such folder"]),
        ("manifest <empty> <new>/manifest", ["no video found", ".mp4"]),
        ("manifest <empty> <new>/manifest --probe deeply", ["--probe", "'header'"]),
        ("manifest <empty> <new>/manifest --chunk-size many", ["--chunk-size", "integer"]),
    ],
)
def test_a_mistake_is_one_line(command: str, parts: list[str], main: Main, labelled: Path, tmp_path: Path) -> None:
    text, workflow = tmp_path / "text.yaml", tmp_path / "workflow.yaml"
    text.write_text("just text\n")
    workflow.write_text(yaml.safe_dump({"runs": [{"run": str(labelled)}, {"run": str(labelled)}]}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.mp4").write_text("not a video\n")
    places = {name: tmp_path / name for name in ("none", "empty", "broken", "new")}
    places |= {"run": labelled, "text": text, "workflow": workflow}
    main(*(in_command(word, places) for word in command.split())).failed_with(USER, *(in_command(part, places) for part in parts))


def test_weights_that_do_not_load_are_told_in_one_line(main: Main, labelled: Path, tmp_path: Path) -> None:
    """They are found out by an actor, whose constructor's errors Ray hands on as text only."""
    weights = tmp_path / "weights.pth"
    weights.write_bytes(b"no state dict")
    main("label", labelled, f"recipe.teacher.weights={weights}").failed_with(USER, "weights.pth", "cannot be read")


def test_an_output_is_not_used_for_another_run(main: Main, labelled: Path, tmp_path: Path) -> None:
    mine = (labelled, f"output={tmp_path / 'out'}", "train.epochs=1")
    assert main("distill", *mine).code == 0
    other = main("distill", *mine, "train.learning_rate=0.5")
    other.failed_with(USER, "another train.learning_rate: 0.002 there, 0.5 here", "name another output")


def test_next_step_is_a_command_that_works(main: Main, labelled: Path, tmp_path: Path) -> None:
    done = main("label", labelled, f"output={tmp_path / 'my out'}", "train.epochs=1")
    assert done.out.splitlines()[-1] == f"next: vkd distill {labelled} 'output={tmp_path / 'my out'}' train.epochs=1"
    done = main("distill", labelled, f"output={tmp_path / 'my out'}", "train.epochs=1")
    assert done.out.splitlines()[-1] == f"next: vkd evaluate {labelled} 'output={tmp_path / 'my out'}' train.epochs=1"
    assert "labels.allow_partial=true" in main("label", labelled, "--limit", "50%").out.splitlines()[-1]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.slow
def test_json_is_one_object_alone_on_stdout(main: Main, tiny_video: Path, tmp_path: Path) -> None:
    run_file = harness.write(harness.small_run(tmp_path, tiny_video), tmp_path / "run.yaml")
    keeps_one = "data.split.holdout=0.4"  # of four clips

    def answer(verb: str, *arguments: object) -> dict[str, object]:
        done = main(verb, *arguments, "--json")
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert isinstance(found, dict) and done.out.count("\n") == 1
        return found

    answers = {verb: answer(verb, run_file, keeps_one) for verb in ("label", "distill", "evaluate", "run", "verify")}
    answers["manifest"] = answer("manifest", tiny_video, tmp_path / "other")
    answers["status"] = answer("status", tmp_path / "labels")
    answers["export"] = answer("export", run_file, tmp_path / "student", keeps_one)
    assert answers.keys() == set(VERBS)
    assert (answers["manifest"]["videos"], answers["label"]["labelled"], answers["distill"]["num_steps"]) == (1, 4, 2)
    assert answers["evaluate"]["num_clips"] == 1
    assert {name: part.keys() for name, part in answers["run"].items()} == {"small": {"label", "distill", "evaluate"}}  # type: ignore[attr-defined]
    assert {row["planned"] for row in answers["status"]["sets"]} == {4}  # type: ignore[attr-defined]
    assert answers["verify"]["ok"] is True
    assert answers["export"]["step"] == 2


def test_help_imports_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from vkd import cli\n"
        "for verb in sys.argv[1:]:\n"
        "    sys.argv = ['vkd', *([verb] if verb != 'all' else []), '--help']\n"
        "    try: cli.main()\n"
        "    except SystemExit as stop: assert not stop.code\n"
        "print(sorted({'torch', 'ray', 'pyarrow'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, "all", *VERBS, *OTHERS], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert all(f"vkd {verb}" in done.stdout for verb in (*VERBS, *OTHERS))
    assert set(typer.main.get_command(cli.app).commands) == {*VERBS, *OTHERS}  # type: ignore[attr-defined]


def test_ctrl_c_keeps_what_is_committed(main: Main, local_ray: None, tiny_video: Path, tmp_path: Path) -> None:
    run_file = harness.write(harness.small_run(tmp_path, tiny_video), tmp_path / "run.yaml")
    command = ("label", run_file, "data.clips.stride_s=0.25", "data.chunk_size=2")
    committed = lambda: sorted((tmp_path / "labels").glob("teacher-*/view=0/*/chunk-*"))  # noqa: E731
    with harness.vkd(*command) as first:
        first.until(committed)
        first.process.send_signal(signal.SIGINT)
        Done(*first.finish()).failed_with(INTERRUPT, "interrupted", "run the same command again")
        assert not [pid for pid in first.left_behind() if b"MapWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    kept = committed()
    assert 1 <= len(kept) < 7
    done = main(*command, "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["present"] >= 2
    assert len(committed()) == 7


def test_unreachable_cluster_is_told_at_once(labelled: Path, tmp_path: Path) -> None:
    with harness.vkd("label", labelled, "compute.address=127.0.0.1:9", f"labels.store={tmp_path}") as command:
        Done(*command.finish(60)).failed_with(USER, "compute.address", "no Ray cluster answers at '127.0.0.1:9'")


@pytest.mark.slow  # half a minute
def test_full_disk_stops_with_what_to_do(labelled: Path, tmp_path: Path) -> None:
    """The store is on a real file system of 50 kB, mounted in a name space of its own."""
    mount = f'mount -t tmpfs -o size=50k tmpfs {tmp_path} && exec "$@"'
    program = ("unshare", "--mount", "--map-root-user", "sh", "-c", mount, "sh")
    if shutil.which("unshare") is None or subprocess.run([*program, "true"], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a file system")
    with harness.vkd("label", labelled, f"labels.store={tmp_path / 'labels'}", program=(*program, harness.VKD)) as command:
        Done(*command.finish()).failed_with(STORAGE, "No space left on device", "free space", "run the same command again")
