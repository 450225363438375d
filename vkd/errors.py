"""Errors, grouped by who must act; each message says what, where and the next action."""

from __future__ import annotations


class VkdError(Exception):
    """Base of every error that vkd raises on purpose; `exit_code` is what the command returns."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", action: str = "") -> None:
        super().__init__(what)
        self.what, self.where, self.action = what, where, action

    def __str__(self) -> str:
        parts = [self.what if not self.where else f"{self.where}: {self.what}"]
        if self.action:
            parts.append(f"-> {self.action}")
        return " ".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.what, self.where, self.action)


def _rebuild(kind: type[VkdError], what: str, where: str, action: str) -> VkdError:
    return kind(what, where=where, action=action)


class ConfigError(VkdError):
    """The run file, or a value given on the command line, must be edited."""

    exit_code = 2


class ManifestError(VkdError):
    """The manifest must be rebuilt, or another one named."""

    exit_code = 2


class LabelsMissing(VkdError):
    """The store lacks labels that the run needs; the action is the command that makes them."""

    exit_code = 2


class LabelsMismatch(VkdError):
    """The labels on disk belong to something else; the message names the field that differs."""

    exit_code = 2


class TeacherError(VkdError):
    """A teacher cannot be loaded, or its output breaks its contract."""

    exit_code = 2


class StorageError(VkdError):
    """Storage is broken or full: nothing about a video; committed work is kept. `passing`: it may answer when asked again."""

    exit_code = 3

    def __init__(self, what: str, *, where: str = "", action: str = "", passing: bool = False) -> None:
        super().__init__(what, where=where, action=action)
        self.passing = passing

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_storage, (self.what, self.where, self.action, self.passing)


def _rebuild_storage(what: str, where: str, action: str, passing: bool) -> StorageError:
    return StorageError(what, where=where, action=action, passing=passing)


class VideoError(VkdError):
    """One video cannot be used: recorded as a reject, never a stop.

    `kind` is the short reason that rejects are counted by (`missing`, `empty`, `no_video_stream`, ...);
    `permanent` says that trying again cannot help.
    """

    def __init__(self, kind: str, what: str, *, where: str = "", permanent: bool = True) -> None:
        super().__init__(what, where=where)
        self.kind, self.permanent = kind, permanent

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild_video, (self.kind, self.what, self.where, self.permanent)


def _rebuild_video(kind: str, what: str, where: str, permanent: bool) -> VideoError:
    return VideoError(kind, what, where=where, permanent=permanent)
