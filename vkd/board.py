"""TensorBoard's events of one start of training, wherever the output lies."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from vkd.store import files


class Board:
    """Figures by step. For an output on an object store the events are written here and put there by `put`.

    TensorBoard's own writer gives up at the first fault of a store, and training with it.
    """

    def __init__(self, output: str, purge_step: int) -> None:
        self.place = files.join(output, "tensorboard")
        self._temporary = tempfile.mkdtemp(prefix="vkd-board-") if "://" in output else None
        self._writer = SummaryWriter(self._temporary or self.place, purge_step=purge_step)

    def add(self, figures: Mapping[str, float], step: int) -> None:
        """Show figures at a step."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def put(self) -> None:
        """Bring what was added so far to where the output lies."""
        self._writer.flush()
        for path in Path(self._temporary).iterdir() if self._temporary else ():
            files.put(files.join(self.place, path.name), path.read_bytes())

    def close(self) -> None:
        """Bring the rest there; nothing is left here."""
        try:
            self.put()
        finally:
            self._writer.close()
            if self._temporary:
                shutil.rmtree(self._temporary)
