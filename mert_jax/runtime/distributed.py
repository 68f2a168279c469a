"""Connects the processes of a run, one per host, and ends all of them when one ends.

Each process keeps a connection to process 0. jax's own service names neither the missing process
nor the reason, and ends with a C++ stack after minutes.
"""

import contextlib
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
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
    """Return the cluster of these flags or of the environment, else a cluster of one process.

    The environment: JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or TPU metadata,
    Slurm or Open MPI. Raises UserError for an incomplete cluster or an `index` that is too large.
    """
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    number, index = (
        int(os.environ[name]) if value is None and name in os.environ else value
        for name, value in (("JAX_NUM_PROCESSES", number), ("JAX_PROCESS_ID", index))
    )
    devices = None
    if (address, number, index) == (None, None, None):
        # jax.distributed.initialize() detects the same, but has no public way to return it
        from jax._src.clusters import ClusterEnv

        detect = ClusterEnv.auto_detect_unset_distributed_params
        address, number, index, devices = detect(None, None, None, None, None, int(timeout))
        if address is None:
            return Cluster("", 1, 0)
    if None in (address, number, index):
        raise UserError(
            f"--coordinator={address}, --num_processes={number} and --process_id={index} go "
            "together: give all three, or none where the environment has them (TPU, Slurm)"
        )
    if not 0 <= index < number:
        raise UserError(
            f"--process_id={index} is not one of --num_processes={number}: 0 to {number - 1}"
        )
    if ":" not in address:
        raise UserError(f"--coordinator={address} has no port; it is HOST:PORT of process 0")
    return Cluster(address, number, index, devices)


@contextlib.contextmanager
def connect(cluster: Cluster, timeout: float) -> Iterator[None]:
    """Initialize jax.distributed for the time of the context; only process 0 prints.

    When a process ends early, the others end too and print its number and the reason: with its exit
    code if it failed, with `RESTART` if it vanished. Raises UserError with the missing processes
    after `timeout` seconds.
    """
    if cluster.number == 1:
        yield
        return
    channel = (_connect if cluster.index else _accept)(cluster, timeout)
    jax.distributed.initialize(
        cluster.address, cluster.number, cluster.index, local_device_ids=cluster.devices
    )
    channel.start()
    try:
        with contextlib.ExitStack() as stack:
            if cluster.index:
                null = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(null))
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
    """Connections from process 0 to all others, or from another process to process 0.

    A thread receives messages, and ends this process when another one has ended.
    """

    def __init__(self, index: int, peers: dict[int, socket.socket]):
        self._index, self._peers, self._closed = index, peers, False
        self._thread = threading.Thread(target=self._listen, name="control channel", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            for peer, connection in self._peers.items():
                selector.register(connection, selectors.EVENT_READ, peer)
            while True:
                for key, _ in selector.select():
                    message = _receive(key.fileobj)
                    if self._closed or message == {"done": True}:
                        return
                    message = message or dict(host=key.data, code=RESTART, why="is gone")
                    self.send(message)  # process 0 informs the others
                    code, reason = message["code"], f"host {message['host']} of the run"
                    restart = "; run the same command again" if code == RESTART else ""
                    _exit(code, f"{reason} {message['why']}{restart}")

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to every connected process."""
        for connection in self._peers.values():
            with contextlib.suppress(OSError):  # its process may have ended
                _send(connection, message)

    def fail(self, code: int, why: str) -> None:
        """End this process with an error, and thereby the others."""
        self._closed = True
        self.send(dict(host=self._index, code=code, why=f"stopped: {why}"))
        _exit(code, why)

    def close(self) -> None:
        """Tell the others that this process is done, and close the connections."""
        self._closed = True
        self.send({"done": True})
        for connection in self._peers.values():
            connection.close()


def _exit(code: int, message: str) -> None:
    sys.stdout.flush()
    print_error(message)
    os._exit(code)  # skip exit handlers: those of jax wait for the other processes


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next message, None if the connection is closed or sends something else."""
    line = b""
    try:
        while not line.endswith(b"\n"):
            if not (byte := connection.recv(1)):
                return None
            line += byte
        return json.loads(line)
    except (OSError, ValueError):
        return None


def _control_address(cluster: Cluster) -> tuple[str, int]:
    """Return the host and port of the control channel: the port below jax's own."""
    host, port = cluster.address.rsplit(":", 1)
    return host, int(port) - 1


def _accept(cluster: Cluster, timeout: float) -> ControlChannel:
    """Wait in process 0 until all others have connected, and tell them which are missing."""
    _, port = _control_address(cluster)
    deadline = time.monotonic() + timeout
    peers: dict[int, socket.socket] = {}
    try:
        listener = socket.create_server(("", port))
    except OSError as e:
        raise UserError(
            f"--coordinator={cluster.address}: port {port}, the one below, cannot be used: {e}; "
            "choose another port, the same on every host"
        ) from e
    with listener:
        while len(peers) < cluster.number - 1 and (left := deadline - time.monotonic()) > 0:
            listener.settimeout(left)
            with contextlib.suppress(TimeoutError):
                connection, _ = listener.accept()
                connection.settimeout(10)
                hello = _receive(connection) or {}
                connection.settimeout(None)
                peer = hello.get("host")
                if hello.get("of") != cluster.number or peer in peers or not peer:
                    connection.close()  # another run, or a duplicate index
                    continue
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                peers[peer] = connection
    channel = ControlChannel(0, peers)
    missing = sorted(set(range(1, cluster.number)) - set(peers))
    channel.send({"missing": missing})
    _check_complete(cluster, missing, timeout)
    return channel


def _connect(cluster: Cluster, timeout: float) -> ControlChannel:
    """Connect to process 0, and wait until all others have."""
    deadline = time.monotonic() + timeout
    answer = None
    while answer is None:
        with contextlib.suppress(OSError):
            connection = socket.create_connection(_control_address(cluster), timeout=5)
            _send(connection, {"host": cluster.index, "of": cluster.number})
            connection.settimeout(timeout + 10)  # process 0 may have started later
            answer = _receive(connection)
        if answer is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {cluster.index} of {cluster.number} could not connect to the "
                    f"coordinator {cluster.address} within {timeout:.0f} s; start process 0 there "
                    f"with --num_processes={cluster.number}, give each process an index of its own "
                    f"and open port {_control_address(cluster)[1]}"
                )
            time.sleep(0.5)
    _check_complete(cluster, answer["missing"], timeout)
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return ControlChannel(cluster.index, {0: connection})


def _check_complete(cluster: Cluster, missing: Sequence[int], timeout: float) -> None:
    if missing:
        raise UserError(
            f"{len(missing)} of {cluster.number} processes did not connect to {cluster.address} "
            f"within {timeout:.0f} s (connect_seconds): {', '.join(map(str, missing))}; start them "
            "there too, or set --num_processes"
        )
