"""`python -m vkd`: the command line as a supervisor starts it. Only the first Ctrl-C counts: a second does not cut short its clean end."""

from __future__ import annotations

import signal

from vkd.cli import main


def _interrupt(signum: int, frame: object) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGINT, _interrupt)
    main()
