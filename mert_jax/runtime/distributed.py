"""Connects the processes of a run, one on each host, and ends all of them when one ends.

Each keeps a connection to process 0 while it runs. jax's own service reports neither the missing
process nor why a process ended, and aborts the others with a C++ stack after minutes.
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

GRACE = 3.0  # seconds for the report of a dead host to arrive after a collective failed


class Cluster(NamedTuple):
    """The processes of a run, as this one sees them.

    address: "host:port" of process 0
    number, index: the number of processes, and which one this is
    devices: local devices of this process, None for all
    """

    address: str
    number: int
    index: int
    devices: Sequence[int] | None = None


def find_cluster(
    address: str | None, number: int | None, index: int | None, timeout: float
) -> Cluster:
    """Return the cluster of the arguments or, without any, of the environment.

    The environment is TPU metadata, Slurm, Open MPI, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES
    and JAX_PROCESS_ID; if it names none, the cluster has one process. Raises UserError if only some
    are given, and if `index` is not below `number`.
    """
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    number, index = (
        int(os.environ[name]) if value is None and name in os.environ else value
        for name, value in (("JAX_NUM_PROCESSES", number), ("JAX_PROCESS_ID", index))
    )
    devices = None
    if (address, number, index) == (None, None, None):
        # jax.distributed.initialize() detects the same values, but does not return them
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
            f"--process_id={index} is not one of --num_processes={number}: 0 to one less"
        )
    if ":" not in address:
        raise UserError(f"--coordinator={address} has no port; it is HOST:PORT of process 0")
    return Cluster(address, number, index, devices)


@contextlib.contextmanager
def connect(cluster: Cluster, timeout: float) -> Iterator[None]:
    """Join the cluster: inside, jax knows the devices of all processes, and only process 0 prints.

    When one process ends early, all end with a line that names it and the reason: with its exit
    code if it failed, with `RESTART` if it disappeared. Raises UserError with the address and the
    missing processes if they do not connect within `timeout` seconds.
    """
    if cluster.number == 1:
        yield
        return
    channel = _accept(cluster, timeout) if cluster.index == 0 else _connect(cluster, timeout)
    jax.distributed.initialize(
        cluster.address, cluster.number, cluster.index, local_device_ids=cluster.devices
    )
    channel.start()
    try:
        with _only_first_prints(cluster.index):
            yield
    except UserError as e:
        channel.leave(e.code, str(e))
    except KeyboardInterrupt:
        channel.leave(128 + signal.SIGINT, "interrupted twice, nothing was saved")
    except Exception as e:
        time.sleep(GRACE)  # more likely caused by the end of another host
        traceback.print_exc()
        channel.leave(1, f"{type(e).__name__}: {e}")
    # returns once all processes are done
    jax.distributed.shutdown()
    channel.close()


@contextlib.contextmanager
def _only_first_prints(index: int) -> Iterator[None]:
    if index == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class ControlChannel:
    """Connections of process 0 to all others, or of another process to process 0.

    A thread listens, and ends this process when another one ends early.
    """

    def __init__(self, index: int, peers: dict[int, socket.socket]):
        self._index, self._peers, self._closed = index, peers, False
        self._thread = threading.Thread(target=self._listen, name="hosts", daemon=True)

    def start(self) -> None:
        """Start listening."""
        self._thread.start()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as waiting:
            for peer, connection in self._peers.items():
                waiting.register(connection, selectors.EVENT_READ, peer)
            while True:
                for key, _ in waiting.select():
                    message = _receive(key.fileobj)
                    if self._closed or message == {"done": True}:
                        return
                    self._end(message or dict(host=key.data, code=RESTART, why="is gone"))

    def _end(self, message: dict[str, Any]) -> None:
        """Forward the message that another process ended, and end this one."""
        self.send(message)
        restart = "; run the same command again" if message["code"] == RESTART else ""
        _exit(message["code"], f"host {message['host']} of the run {message['why']}{restart}")

    def send(self, message: dict[str, Any]) -> None:
        """Send a message to all peers that are still connected."""
        for connection in self._peers.values():
            with contextlib.suppress(OSError):
                connection.sendall(json.dumps(message).encode() + b"\n")

    def leave(self, code: int, why: str) -> None:
        """End this process at once with an error, and the others with it."""
        self._closed = True
        self.send(dict(host=self._index, code=code, why=f"stopped: {why}"))
        _exit(code, why)

    def close(self) -> None:
        """Tell the others that the work is done, and disconnect."""
        self._closed = True
        self.send({"done": True})
        for connection in self._peers.values():
            connection.close()


def _exit(code: int, message: str) -> None:
    sys.stdout.flush()
    print_error(message)
    os._exit(code)  # without exit handlers of jax, which wait for the others


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next message, None if the connection is closed or the data is not ours."""
    received = b""
    try:
        while not received.endswith(b"\n"):
            if not (more := connection.recv(1)):
                return None
            received += more
        return json.loads(received)
    except (OSError, ValueError):
        return None


def _control_address(cluster: Cluster) -> tuple[str, int]:
    """Return the address at which process 0 listens: the port below jax's own."""
    host, port = cluster.address.rsplit(":", 1)
    return host, int(port) - 1


def _accept(cluster: Cluster, timeout: float) -> ControlChannel:
    """Wait in process 0 until all others have connected, then tell them so."""
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
                    connection.close()  # another program, or a second process of this number
                    continue
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                peers[peer] = connection
    channel = ControlChannel(0, peers)
    missing = sorted(set(range(1, cluster.number)) - set(peers))
    channel.send({"missing": missing})
    if missing:
        raise _incomplete(cluster, missing, timeout)
    return channel


def _connect(cluster: Cluster, timeout: float) -> ControlChannel:
    """Connect to process 0, and wait until all others have."""
    deadline = time.monotonic() + timeout
    answer = None
    while answer is None:
        try:
            connection = socket.create_connection(_control_address(cluster), timeout=5)
            hello = {"host": cluster.index, "of": cluster.number}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            connection.settimeout(timeout + 10)  # process 0 may have started later
            answer = _receive(connection)
        except OSError:
            pass
        if answer is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {cluster.index} of {cluster.number} could not connect to the "
                    f"coordinator {cluster.address} within {timeout:.0f} s; check that process 0 "
                    f"runs there with --num_processes={cluster.number}, that no other process is "
                    f"{cluster.index}, and that port {_control_address(cluster)[1]} can be reached"
                )
            time.sleep(0.5)
    if answer["missing"]:
        raise _incomplete(cluster, answer["missing"], timeout)
    connection.settimeout(None)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return ControlChannel(cluster.index, {0: connection})


def _incomplete(cluster: Cluster, missing: Sequence[int], timeout: float) -> UserError:
    named = ", ".join(map(str, missing))
    return UserError(
        f"{len(missing)} of {cluster.number} processes did not connect to {cluster.address} within "
        f"{timeout:.0f} s (connect_seconds): {named}; start them too, or set --num_processes"
    )
