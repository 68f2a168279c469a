"""A pool of processes that outlives the death of any of them.

`concurrent.futures` gives up the whole pool when a process dies and cannot say on which job; a
decoder that crashes on one file of a hundred thousand must cost that file only.
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
_ATTEMPTS = 2  # the system may have killed a worker for the sake of its neighbour's memory


class Event(NamedTuple):
    """News of a job: `kind` is progress, result or died, `value` what was sent or why it died."""

    job: Any
    kind: str
    value: Any


class _Worker:
    def __init__(self, function: Callable[..., Any]):
        self.pipe, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(function, theirs), daemon=True)
        # Ctrl-C reaches every process of the terminal: the parent alone answers it
        with _blocked_interrupt():
            self.process.start()
        theirs.close()
        self.ready = False
        self.job: Any = None


def cpus() -> int:
    """CPUs that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def run_jobs(
    function: Callable[[Any, Callable[[Any], None]], Any], jobs: Iterable[Any], workers: int
) -> Iterator[Event]:
    """Call `function(job, report)` in processes and yield events as they happen.

    `report(value)` gives a progress event; a job whose process dies twice gives a died event. An
    OSError of the function is raised here; any other exception as RuntimeError with its traceback.
    """
    waiting = [(job, 1) for job in reversed(list(jobs))]
    pool = [_Worker(function) for _ in range(max(1, min(workers, len(waiting))))]
    try:
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                if worker.ready and not worker.job and waiting:
                    worker.job = waiting.pop()
                    # a worker that died since is found out by reading from it, below
                    with contextlib.suppress(BrokenPipeError):
                        worker.pipe.send(worker.job[0])
            for pipe in wait([worker.pipe for worker in pool]):
                index = next(i for i, worker in enumerate(pool) if worker.pipe is pipe)
                worker = pool[index]
                try:
                    kind, value = pipe.recv()
                except (EOFError, ConnectionResetError):
                    pool[index] = _replace(worker, function)
                    if worker.job:
                        job, attempt = worker.job
                        if attempt < _ATTEMPTS:
                            waiting.append((job, attempt + 1))
                        else:
                            yield Event(job, "died", _cause(worker.process.exitcode))
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
            worker.process.join()
            worker.pipe.close()


def _replace(worker: _Worker, function: Callable[..., Any]) -> _Worker:
    worker.process.join()
    worker.pipe.close()
    if not worker.ready:
        raise UserError(
            f"a worker process cannot start ({_cause(worker.process.exitcode)}); free some memory "
            "or give fewer --workers"
        )
    return _Worker(function)


def _cause(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        return f"killed by {name}" + (", out of memory?" if name == "SIGKILL" else "")
    return f"exit code {exitcode}"


@contextlib.contextmanager
def _blocked_interrupt() -> Iterator[None]:
    # a child inherits the mask; here a Ctrl-C in between is delivered when the block ends
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(function: Callable[..., Any], pipe: Connection) -> None:
    # decoders print about damaged files on file descriptor 2; every reason goes through the pipe
    with open(os.devnull, "wb") as null:
        os.dup2(null.fileno(), 2)

    def report(value: Any) -> None:
        pipe.send(("progress", value))

    # the parent is gone when reading or writing fails: it was stopped, and so are we
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
