"""A pool of processes where a crash costs one job; in `concurrent.futures` it ends the pool."""

import contextlib
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from mert_jax.errors import UserError

_CONTEXT = multiprocessing.get_context("spawn")
_ATTEMPTS = 2  # the system may have killed a worker for memory that its neighbours took


class _Worker:
    """A process that answers the jobs sent to `pipe`, and says None when it has started."""

    def __init__(self, function: Callable[[Any], Any]):
        self.pipe, child_end = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(function, child_end), daemon=True)
        self.job, self.attempt = None, 0
        # Ctrl-C reaches every process of the terminal and is for the parent only: the child
        # inherits this mask, the parent gets the signal when it is restored
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        child_end.close()

    def close(self) -> str:
        """Close the pipe, which ends an idle process, and return how the process ended."""
        self.pipe.close()
        self.process.join()
        if (code := self.process.exitcode) >= 0:
            return f"exit code {code}"
        cause = f"killed by {signal.Signals(-code).name}"
        return cause + (", out of memory?" if code == -signal.SIGKILL else "")


def cpus() -> int:
    """Return the number of CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Any], Any], jobs: Iterable[Any], workers: int
) -> Iterator[tuple[Any, Any, str]]:
    """Call `function` on jobs in processes; yield (job, result, "") of each as it is done.

    A job whose process dies twice gives (job, None, the cause). Raises an OSError of the function,
    RuntimeError with a traceback for its other errors, and UserError if a worker cannot start.
    """
    waiting = [(job, 1) for job in reversed(list(jobs))]
    first = [_Worker(function) for _ in range(min(workers, len(waiting)))]
    pool = {worker.pipe: worker for worker in first}
    try:
        while pool:
            for pipe in wait(list(pool)):
                worker, result, cause = pool[pipe], None, ""
                job, attempt = worker.job, worker.attempt
                try:
                    result = pipe.recv()
                except (EOFError, ConnectionResetError):
                    cause = pool.pop(pipe).close()
                    if job is None:
                        problem = f"a process cannot start ({cause}); give fewer --workers"
                        raise UserError(problem) from None
                    if attempt < _ATTEMPTS:
                        waiting.append((job, attempt + 1))
                        job = None
                    if waiting:
                        worker = _Worker(function)
                        pool[worker.pipe] = worker
                else:
                    if isinstance(result, Exception):
                        raise result
                    if waiting:
                        worker.job, worker.attempt = waiting.pop()
                        with contextlib.suppress(BrokenPipeError):  # reading shows that it died
                            pipe.send(worker.job)
                    else:
                        pool.pop(pipe).close()
                if job is not None:
                    yield job, result, cause
    finally:
        for worker in pool.values():
            worker.process.kill()
        for worker in pool.values():
            worker.close()


def _serve(function: Callable[[Any], Any], pipe: Connection) -> None:
    # decoders print about damaged files to file descriptor 2; every reason goes through the pipe
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)
    answer = None
    # reading or writing fails when the parent has stopped: stop too
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            pipe.send(answer)
            job = pipe.recv()
            try:
                answer = function(job)
            except OSError as e:
                answer = e
            except Exception:
                answer = RuntimeError(f"on {job}\n{traceback.format_exc()}")
