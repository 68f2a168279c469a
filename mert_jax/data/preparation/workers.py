"""A pool of processes that survives the death of any of them.

`concurrent.futures` gives up the whole pool when a process dies and cannot name the job; here a
decoder that crashes costs one file.
"""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from mert_jax.errors import UserError

_CONTEXT = multiprocessing.get_context("spawn")
_ATTEMPTS = 2  # the system may have killed a worker for memory that its neighbours took


class Event(NamedTuple):
    """An event of a job: progress or result with the value sent, or died with the cause."""

    job: Any
    kind: str
    value: Any


class _Worker:
    def __init__(self, function: Callable[..., Any]):
        self.pipe, child_end = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(function, child_end), daemon=True)
        # Ctrl-C reaches every process of the terminal and is for the parent only: the child
        # inherits this mask, the parent gets the signal when it is restored
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child_end.close()
        self.ready = False
        self.job: tuple[Any, int] | None = None  # and which attempt at it this is

    def close(self) -> str:
        """Wait for the process to end and return how it did."""
        self.process.join()
        self.pipe.close()
        exitcode = self.process.exitcode
        if exitcode is not None and exitcode < 0:
            name = signal.Signals(-exitcode).name
            return f"killed by {name}" + (", out of memory?" if name == "SIGKILL" else "")
        return f"exit code {exitcode}"


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Any, Callable[[Any], None]], Any], jobs: Iterable[Any], workers: int
) -> Iterator[Event]:
    """Call `function(job, report)` in processes and yield events as they happen.

    `report(value)` gives a progress event; a job whose process dies twice gives a died event.
    Raises an OSError of the function as it is, any other exception as RuntimeError with its
    traceback, and UserError if a worker cannot start.
    """
    waiting = [(job, 1) for job in reversed(list(jobs))]
    pool = [_Worker(function) for _ in range(max(1, min(workers, len(waiting))))]
    try:
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                if worker.ready and not worker.job and waiting:
                    worker.job = waiting.pop()
                    # reading from a dead worker, below, shows that it died
                    with contextlib.suppress(BrokenPipeError):
                        worker.pipe.send(worker.job[0])
            for pipe in wait([worker.pipe for worker in pool]):
                index = next(i for i, worker in enumerate(pool) if worker.pipe is pipe)
                worker = pool[index]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    cause = worker.close()
                    if not worker.ready:
                        raise UserError(
                            f"a worker process cannot start ({cause}); free some memory or give "
                            "fewer --workers"
                        ) from None
                    pool[index] = _Worker(function)
                    if worker.job:
                        job, attempt = worker.job
                        if attempt < _ATTEMPTS:
                            waiting.append((job, attempt + 1))
                        else:
                            yield Event(job, "died", cause)
                    continue
                if kind == "ready":
                    worker.ready = True
                    continue
                if kind == "error":
                    raise value
                job = worker.job[0]
                if kind == "result":
                    worker.job = None
                yield Event(job, kind, value)
    finally:
        for worker in pool:
            worker.process.kill()
        for worker in pool:
            worker.close()


def _serve(function: Callable[..., Any], pipe: Connection) -> None:
    # decoders print about damaged files to file descriptor 2; every reason goes through the pipe
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)

    def report(value: Any) -> None:
        pipe.send(("progress", value))

    # reading or writing fails when the parent has stopped: stop too
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        pipe.send(("ready", None))
        while True:
            job = pipe.recv()
            try:
                answer = ("result", function(job, report))
            except (BrokenPipeError, ConnectionResetError):
                return
            except OSError as e:
                answer = ("error", e)
            except Exception:
                answer = ("error", RuntimeError(f"on {job}\n{traceback.format_exc()}"))
            pipe.send(answer)
