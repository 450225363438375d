"""Networks are loaded from export folders, or it is told which folder holds none."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import paired
import pytest
import small

from vkd.errors import ConfigError, LabelsMismatch
from vkd.search.networks import Networks

STUDENTS = {
    "coarse": "vkd.students.coarse:CoarseStudent",
    "fine": "vkd.students.visil:FineStudent",
    "selector": "vkd.students.selector:Selector",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder, features = tmp_path_factory.mktemp("students"), "regions-1"
    return {part: paired.exported(folder / part, name, features) for part, name in STUDENTS.items()}


def test_networks_of_one_set_of_features(folders: dict[str, str], tmp_path: Path) -> None:
    assert Networks.load(folders).features == "regions-1"
    other = paired.exported(tmp_path / "other", STUDENTS["fine"], "regions-2")
    with pytest.raises(LabelsMismatch, match="trained on regions-2"):
        Networks.load(folders | {"fine": other})


def test_a_selector_of_other_students_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    def told(**digests: str) -> dict[str, str]:
        shutil.copytree(folders["selector"], tmp_path / "selector", dirs_exist_ok=True)
        config = json.loads((tmp_path / "selector" / "config.json").read_text())
        (tmp_path / "selector" / "config.json").write_text(json.dumps(config | digests))
        return folders | {"selector": str(tmp_path / "selector")}

    fine = hashlib.sha256((Path(folders["fine"]) / "model.safetensors").read_bytes()).hexdigest()
    Networks.load(told(**{"teacher_model.safetensors": fine}))
    with pytest.raises(LabelsMismatch, match=r"selector: learned where another coarse student is wrong than that of .*coarse -> name"):
        Networks.load(told(**{"coarse_model.safetensors": fine}))


def test_a_folder_that_holds_no_such_network_is_told(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}/none: holds no exported student"):
        Networks.load(folders | {"fine": f"{tmp_path}/none"})
    with pytest.raises(ConfigError, match="trained on no region features"):
        Networks.load(folders | {"fine": small.exported_student(tmp_path / "clips")})
    with pytest.raises(ConfigError, match="not a FineStudent"):
        Networks.load(folders | {"fine": folders["selector"]})
