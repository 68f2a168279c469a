"""A watchdog that ends a stalled run (a hanging disk or read, a dead peer) so that it restarts."""

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable

from mert_jax.errors import RESTART, print_error


def end_stalled_run(workdir: str, host: int, seconds: float) -> None:
    """Dump the stacks of all threads and exit with `RESTART`, without waiting for anything.

    They go to standard error and to WORKDIR/stalled.HOST.txt.
    """
    message = (
        f"no progress for {seconds:.0f} s (watchdog_minutes): the stacks of all threads follow; "
        f"ending with code {RESTART}, run the same command again"
    )
    print_error(message)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    try:
        with open(os.path.join(workdir, f"stalled.{host}.txt"), "w") as f:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=f, flush=True)
            faulthandler.dump_traceback(f, all_threads=True)
    finally:  # the disk may be full, or what hangs
        os._exit(RESTART)


class Watchdog:
    """Calls `on_timeout` from its own thread once `beat` was not called for `seconds` (0: never).

    A context manager: the thread ends with it.
    """

    def __init__(self, seconds: float, on_timeout: Callable[[], None]):
        self._seconds, self._on_timeout = seconds, on_timeout
        self._beat, self._stopped = threading.Event(), False
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds > 0:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self.beat()
        if self._thread.is_alive():
            self._thread.join()

    def beat(self) -> None:
        """Record progress and restart the timer."""
        self._beat.set()

    def _watch(self) -> None:
        while not self._stopped:
            if not self._beat.wait(self._seconds):
                return self._on_timeout()
            self._beat.clear()
        return None
