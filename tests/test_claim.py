"""An output is its run's, also when that was written before a key of today was there."""

from __future__ import annotations

from pathlib import Path

import pytest
import small
import yaml

from vkd import claim
from vkd.errors import ConfigError
from vkd.run import parse


def test_keys_that_came_later_have_their_defaults(tmp_path: Path) -> None:
    run = parse(small.tree_of(tmp_path))
    claim.claim_output(run)
    stored = tmp_path / "out" / "run.yaml"
    tree = yaml.safe_load(stored.read_text())
    tree["recipe"]["weights"] = {"kl": 1.0, "cosine": 1.0, "mse": 0.0, "similarity": 0.0, "cross_entropy": 0.0}
    del tree["recipe"]["live"], tree["recipe"]["substages"]
    stored.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"another recipe\.weights\.at"):
        claim.claim_output(small.changed(run, "recipe.weights.at=1"))
    claim.claim_output(run)


def test_what_is_no_run_any_more_is_compared_as_it_is(tmp_path: Path) -> None:
    run = parse(small.tree_of(tmp_path))
    claim.claim_output(run)
    stored = tmp_path / "out" / "run.yaml"
    tree = yaml.safe_load(stored.read_text())
    tree["recipe"]["gone"] = 1
    stored.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"another recipe\.gone"):
        claim.claim_output(run)
