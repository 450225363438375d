"""Where the bytes of a video uri lie."""

from __future__ import annotations

import importlib.util
import os

from vkd.errors import VideoError

PACKAGE = "package://"  # package://NAME/sub/file: a file inside an installed Python package, the same on every machine


def resolve_uri(uri: str) -> str:
    """A local path for `package://`, `file://` and plain paths; any other uri unchanged.

    Nothing is imported or opened. Raises VideoError `missing` when the package is not installed.
    """
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    if not uri.startswith(PACKAGE):
        return uri
    name, _, inside = uri.removeprefix(PACKAGE).partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() and name != "__main__" else None
    if spec is None or not spec.submodule_search_locations:
        raise VideoError("missing", f"the Python package {name!r} is not installed here", where=uri)
    folder = next(iter(spec.submodule_search_locations))
    return os.path.join(folder, *inside.split("/")) if inside else folder
