"""Watchdog that ends a stalled run (a hanging read, peer or disk), so that it can be restarted."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from mert_jax.errors import RESTART, print_error


def end_stalled_run(workdir: str, host: int, seconds: float) -> None:
    """Write the stacks of all threads to stderr and WORKDIR/stalled.HOST.txt; exit with RESTART."""
    message = (
        f"no progress for {seconds:.0f} s (watchdog_minutes): the stacks of all threads "
        f"follow; ending with code {RESTART}, run the same command again"
    )
    print_error(message)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    try:
        with open(os.path.join(workdir, f"stalled.{host}.txt"), "w") as f:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=f, flush=True)
            faulthandler.dump_traceback(f, all_threads=True)
    finally:  # the disk itself may hang or be full
        os._exit(RESTART)


class Watchdog:
    """Calls `on_timeout` in a thread after `seconds` (0: never) without a `beat`, until closed."""

    def __init__(self, seconds: float, on_timeout: Callable[[], None]):
        self._seconds, self._on_timeout = seconds, on_timeout
        self._beat, self._closed = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed = True
        self.beat()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """Record progress of the run."""
        self._beat.set()

    def _watch(self) -> None:
        while not self._closed:
            if not self._beat.wait(self._seconds):
                self._on_timeout()
                return
            self._beat.clear()
