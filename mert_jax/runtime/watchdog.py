"""Ends a run that no longer moves, so that it can be started again: a stalled read, a dead peer, a
hanging disk."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from mert_jax.errors import RESTART, print_error


def end_stalled_run(workdir: str, host: int, seconds: float) -> None:
    """Write what every thread is doing to standard error and WORKDIR/stalled.HOST.txt, and exit
    with `RESTART`, without waiting for anything."""
    message = (
        f"nothing has moved for {seconds:.0f} s (watchdog_minutes): the stacks of all threads "
        f"follow; ending with code {RESTART}, run the same command again"
    )
    print_error(message)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    try:
        with open(os.path.join(workdir, f"stalled.{host}.txt"), "w") as f:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=f, flush=True)
            faulthandler.dump_traceback(f, all_threads=True)
    finally:  # the disk may be what hangs or is full
        os._exit(RESTART)


class Watchdog:
    """Calls `bark` once nobody has called `pat` for `seconds` (0: never), from a thread of its own.

    A context manager: the thread ends with it.
    """

    def __init__(self, seconds: float, bark: Callable[[], None]):
        self._seconds, self._bark = seconds, bark
        self._patted, self._over = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over = True
        self.beat()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """Say that the run is moving."""
        self._patted.set()

    def _watch(self) -> None:
        while not self._over:
            if not self._patted.wait(self._seconds):
                return self._bark()
            self._patted.clear()
        return None
