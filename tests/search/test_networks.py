"""Networks are loaded from export folders, or it is told which folder holds none."""

from __future__ import annotations

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


def test_a_folder_that_holds_no_such_network_is_told(folders: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"{tmp_path}/none: holds no exported student"):
        Networks.load(folders | {"fine": f"{tmp_path}/none"})
    with pytest.raises(ConfigError, match="trained on no region features"):
        Networks.load(folders | {"fine": small.exported_student(tmp_path / "clips")})
    with pytest.raises(ConfigError, match="not a FineStudent"):
        Networks.load(folders | {"fine": folders["selector"]})
