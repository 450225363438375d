"""Errors: one line that says what, where and the next action, the same after a trip between processes."""

from __future__ import annotations

import copy
import pickle

import pytest

from vkd import errors
from vkd.errors import BudgetSpent, ConfigError, StorageError, VideoError, VkdError

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, VkdError) and kind is not VideoError]


@pytest.mark.parametrize(
    ("where", "action", "text"),
    [
        ("", "", "what"),
        ("place", "", "place: what"),
        ("", "do this", "what -> do this"),
        ("place", "do this", "place: what -> do this"),
    ],
)
def test_the_message_is_what_where_and_action(where: str, action: str, text: str) -> None:
    assert str(ConfigError("what", where=where, action=action)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickled_error_keeps_kind_fields_and_exit_code(kind: type[VkdError]) -> None:
    error = kind("what", where="place", action="do this")
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert (again.what, again.where, again.action) == ("what", "place", "do this")
        assert str(again) == str(error)
        assert again.exit_code == error.exit_code


@pytest.mark.parametrize("permanent", [True, False])
def test_a_pickled_video_error_keeps_its_kind(permanent: bool) -> None:
    error = VideoError("truncated", "too short", where="a.mp4", permanent=permanent)
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.kind, again.permanent, str(again)) == (VideoError, "truncated", permanent, "a.mp4: too short")


def test_exit_codes_say_who_must_act() -> None:
    user = {"ConfigError", "ManifestError", "LabelsMissing", "LabellingEnded", "LabelsMismatch", "TeacherError"}
    every: list[type[VkdError]] = [*KINDS, VideoError]
    codes = {kind.__name__: kind.exit_code for kind in every}
    assert codes == dict.fromkeys(user, 2) | {StorageError.__name__: 3, BudgetSpent.__name__: 4, "VkdError": 1, "VideoError": 1}
