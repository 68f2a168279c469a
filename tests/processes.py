"""The processes of a distributed run on one machine: jax.distributed with collectives on CPUs."""

import contextlib
import socket
import subprocess
from collections.abc import Iterator, Sequence

from tests.runs import ENVIRONMENT


def free_port() -> int:
    """Return a free port whose next lower port is free too."""
    while True:
        with socket.socket() as upper, socket.socket() as lower:
            upper.bind(("127.0.0.1", 0))
            port = upper.getsockname()[1]
            with contextlib.suppress(OSError):
                lower.bind(("127.0.0.1", port - 1))
                return port


def environment(devices: int, **more: str) -> dict[str, str]:
    """Return the environment of a process with `devices` devices."""
    return (
        ENVIRONMENT
        | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_PLATFORMS": "cpu",
        }
        | more
    )


@contextlib.contextmanager
def started(
    command: Sequence[str], number: int, devices: int, starting: Sequence[int] | None = None
) -> Iterator[dict[int, subprocess.Popen]]:
    """Start `number` processes of `command`, or only those in `starting`; kill them at the end."""
    address = f"127.0.0.1:{free_port()}"
    running = {}
    try:
        for index in range(number) if starting is None else starting:
            flags = [
                f"--coordinator={address}",
                f"--num_processes={number}",
                f"--process_id={index}",
            ]
            running[index] = subprocess.Popen(
                [*command, *flags],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(devices),
            )
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.wait()


def finished(running: dict[int, subprocess.Popen], timeout: float = 240) -> list[tuple]:
    """Wait for all processes; return exit code, standard output and standard error of each."""
    found = []
    for process in running.values():
        printed = process.communicate(timeout=timeout)
        found.append((process.returncode, *printed))
    return found
