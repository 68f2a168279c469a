"""Connects the processes of a run, one per host, and ends all of them when one ends.

jax's own service names neither the missing process nor the reason, and ends after minutes.
"""

import contextlib
import json
import multiprocessing.connection
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax

from mert_jax.errors import RESTART, UserError, print_error

GRACE = 3.0  # seconds in which the message of a failed host arrives after a collective fails


class Cluster(NamedTuple):
    """The "HOST:PORT" of process 0, number of processes, own index and devices (None: all)."""

    address: str
    number: int
    index: int
    devices: Sequence[int] | None = None


def find_cluster(
    address: str | None, number: int | None, index: int | None, timeout: float
) -> Cluster:
    """Return the cluster of these flags or the environment (JAX_*, TPU, Slurm), else one process.

    Raises UserError for half a cluster.
    """
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    number = os.environ.get("JAX_NUM_PROCESSES") if number is None else number
    index = os.environ.get("JAX_PROCESS_ID") if index is None else index
    devices = None
    if (address, number, index) == (None, None, None):
        # jax.distributed.initialize() detects the same, but has no public way to return it
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        address, number, index, devices = detect(None, None, None, None, None, int(timeout))
        if address is None:
            return Cluster("", 1, 0)
    complete = None not in (address, number, index) and ":" in address
    if not complete or not 0 <= int(index) < int(number):
        flags = f"--coordinator={address}, --num_processes={number} and --process_id={index}"
        todo = "give HOST:PORT of process 0, a number and an index below it, or none of them"
        raise UserError(f"{flags} do not go together: {todo}")
    return Cluster(address, int(number), int(index), devices)


@contextlib.contextmanager
def connect(cluster: Cluster, timeout: float) -> Iterator[None]:
    """Initialize jax.distributed for the time of the context; only process 0 prints.

    When a process ends early, the others end too and name it and the reason: with its exit code if
    it failed, with `RESTART` if it vanished. Raises UserError with the missing processes.
    """
    if cluster.number == 1:
        yield
        return
    channel = open_channel(cluster, timeout)
    jax.distributed.initialize(
        cluster.address, cluster.number, cluster.index, local_device_ids=cluster.devices
    )
    threading.Thread(target=channel.listen, name="control channel", daemon=True).start()
    try:
        output = open(os.devnull, "w") if cluster.index else sys.stdout  # noqa: SIM115
        with contextlib.redirect_stdout(output):
            yield
    except UserError as e:
        channel.fail(e.code, str(e))
    except KeyboardInterrupt:
        channel.fail(128 + signal.SIGINT, "interrupted twice, nothing was saved")
    except Exception as e:
        time.sleep(GRACE)  # the end of another host is a likelier cause than a bug here
        traceback.print_exc()
        channel.fail(1, f"{type(e).__name__}: {e}")
    jax.distributed.shutdown()  # waits for all processes
    channel.close()


class ControlChannel:
    """Connections, by process, from process 0 to all others or from another to process 0."""

    def __init__(self, index: int, peers: dict[int, socket.socket]):
        self._index, self._peers, self._closed = index, peers, False

    def listen(self) -> None:
        """Receive messages until `close`, and end this process when another one has ended."""
        hosts = {connection: peer for peer, connection in self._peers.items()}
        while True:
            for connection in multiprocessing.connection.wait(hosts):
                message = _receive(connection)
                if self._closed or message == {"done": True}:
                    return
                message = message or dict(host=hosts[connection], code=RESTART, why="is gone")
                _send(hosts, message)  # process 0 informs the others
                restart = "; run the same command again" if message["code"] == RESTART else ""
                reason = f"host {message['host']} of the run {message['why']}{restart}"
                _exit(message["code"], reason)

    def fail(self, code: int, why: str) -> None:
        """End this process with an error, and thereby the others."""
        self._closed = True
        _send(self._peers.values(), dict(host=self._index, code=code, why=f"stopped: {why}"))
        _exit(code, why)

    def close(self) -> None:
        """Tell the others that this process is done, and close the connections."""
        self._closed = True
        _send(self._peers.values(), {"done": True})
        for connection in self._peers.values():
            connection.close()


def _exit(code: int, message: str) -> None:
    sys.stdout.flush()
    print_error(message)
    os._exit(code)  # skip exit handlers: those of jax wait for the other processes


def _send(connections: Iterable[socket.socket], message: dict[str, Any]) -> None:
    for connection in connections:
        with contextlib.suppress(OSError):  # its process may have ended
            connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next message, None if the connection is closed or sends something else."""
    with contextlib.suppress(OSError, ValueError):
        return json.loads(connection.makefile("rb", buffering=0).readline())
    return None


def open_channel(cluster: Cluster, timeout: float) -> ControlChannel:
    """Connect the processes, on the port below jax's own. Raises UserError if some are missing."""
    host, port = cluster.address.rsplit(":", 1)
    function = _connect if cluster.index else _accept
    peers, missing = function(cluster, (host, int(port) - 1), timeout)
    if missing:
        count, names = f"{len(missing)} of {cluster.number}", ", ".join(map(str, missing))
        failed = f"did not connect to {cluster.address} within {timeout:.0f} s (connect_seconds)"
        raise UserError(f"{count} processes {failed}: {names}; start them, or set --num_processes")
    for connection in peers.values():
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return ControlChannel(cluster.index, peers)


def _accept(cluster: Cluster, address: tuple[str, int], timeout: float) -> tuple[dict, list[int]]:
    """Wait in process 0 until all others have connected; return them, and those missing."""
    deadline, number, port = time.monotonic() + timeout, cluster.number, address[1]
    peers: dict[int, socket.socket] = {}
    try:
        listener = socket.create_server(("", port))
    except OSError as e:
        unusable = f"--coordinator={cluster.address}: port {port}, the one below, cannot be used"
        raise UserError(f"{unusable}: {e}; choose another port, the same on every host") from e
    with listener:
        while len(peers) < number - 1 and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(10)
                hello = _receive(connection) or {}
                peer = hello.get("host")
                if hello.get("of") != number or peer in peers or not peer:
                    connection.close()  # another run, or a duplicate index
                else:
                    peers[peer] = connection
    missing = [index for index in range(1, number) if index not in peers]
    _send(peers.values(), {"missing": missing})
    return peers, missing


def _connect(cluster: Cluster, address: tuple[str, int], timeout: float) -> tuple[dict, list[int]]:
    """Connect to process 0; return the connection, and the processes that process 0 misses."""
    deadline = time.monotonic() + timeout
    while True:
        with contextlib.suppress(OSError):
            connection = socket.create_connection(address, timeout=5)
            _send([connection], {"host": cluster.index, "of": cluster.number})
            connection.settimeout(timeout + 10)  # process 0 may have started later
            if answer := _receive(connection):
                return {0: connection}, answer["missing"]
        if time.monotonic() > deadline:
            failed = f"could not connect to the coordinator {cluster.address}"
            todo = f"start process 0 there, open port {address[1]}, give each another --process_id"
            raise UserError(f"{failed} within {timeout:.0f} s; {todo}")
        time.sleep(0.5)
