"""Watchdog that ends a stalled run (a hanging read, peer or disk), so that it can be restarted."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from mert_jax.errors import RESTART, print_error


def end_stalled_run(workdir: str, host: int, seconds: float) -> None:
    """Write the stacks of all threads to stderr and WORKDIR/stalled.HOST.txt; exit with RESTART."""
    message = f"no progress for {seconds:.0f} s (watchdog_minutes); run the same command again"
    print_error(message)
    faulthandler.dump_traceback(sys.stderr, all_threads=True)
    try:
        with open(os.path.join(workdir, f"stalled.{host}.txt"), "w") as f:
            print(time.strftime("%Y-%m-%d %H:%M:%S"), message, file=f, flush=True)
            faulthandler.dump_traceback(f, all_threads=True)
    finally:  # the disk itself may hang or be full
        os._exit(RESTART)


@contextlib.contextmanager
def watch(seconds: float, on_timeout: Callable[[], None]) -> Iterator[Callable[[], None]]:
    """Yield `beat`; call `on_timeout` in a thread after `seconds` (0: never) without a beat."""
    beat, closed = threading.Event(), threading.Event()

    def wait() -> None:
        while beat.wait(seconds or None):
            beat.clear()
            if closed.is_set():
                return
        on_timeout()

    thread = threading.Thread(target=wait, name="watchdog", daemon=True)
    thread.start()
    try:
        yield beat.set
    finally:
        closed.set()
        beat.set()
        thread.join()
