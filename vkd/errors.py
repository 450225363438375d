"""Errors, grouped by who must act; each message says what, where and the next action."""

from __future__ import annotations

import os
import re

SECRET_VARIABLES = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
MIN_SECRET_CHARS = 5  # shorter values would be found in ordinary words
_VALUE = r"[^\s\"'`<>&;,|\\#)\]}]+"
_NAMED = r"secret_?access_?key|access_?key_?id|session_?token|password|signature|credential"
_IN_QUERY = r"sig|token|key|secret|pass|auth|credential|amz|goog"
_SECRETS = (  # (pattern, what takes its place)
    # user:password@, where a password may hold a slash, but host:port/ is none
    (re.compile(r"(\w://)(?:[^\s/\"'`<>|?#]*|[^\s/\"'`<>|?#:@]*:(?!\d+/)[^\s\"'`<>|?#@]*)@"), r"\1***@"),
    (re.compile(rf"([?&;][^\s=&?#]*(?:{_IN_QUERY})[^\s=&?#]*=){_VALUE}", re.IGNORECASE), r"\1***"),
    (re.compile(rf"((?:{_NAMED})[\"']?\s*[=:]\s*[\"']?){_VALUE}", re.IGNORECASE), r"\1***"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{12,}"), "***"),
)


def redact(text: str) -> str:
    """The text without passwords, keys and signatures: those of uris, those that are named, those of this process's environment."""
    for secret in sorted((os.environ.get(name, "") for name in SECRET_VARIABLES), key=len, reverse=True):
        if len(secret) >= MIN_SECRET_CHARS:
            text = text.replace(secret, "***")
    for pattern, instead in _SECRETS:
        text = pattern.sub(instead, text)
    return text


class VkdError(Exception):
    """Base of every error that vkd raises on purpose; `exit_code` is what the command returns."""

    exit_code = 1

    def __init__(self, what: str, *, where: str = "", action: str = "") -> None:
        self.what, self.where, self.action = redact(what), redact(where), redact(action)
        super().__init__(self.what)

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


class BudgetSpent(VkdError):
    """A run has taken as long, or cost as much, as its user allowed."""

    exit_code = 4


class ManifestError(VkdError):
    """The manifest must be rebuilt, or another one named."""

    exit_code = 2


class LabelsMissing(VkdError):
    """The store lacks labels that the run needs; the action is the command that makes them."""

    exit_code = 2


class LabellingEnded(LabelsMissing):
    """Labelling that ran beside training ended without a chunk that training waits for; its own error says why."""


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
