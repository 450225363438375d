"""Tests on Ray clusters of several processes on this machine."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "e2e"))  # harness
