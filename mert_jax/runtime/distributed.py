"""The processes of a run, one a host: how they find each other, and what becomes of the others when
one of them ends.

Each keeps a connection to process 0 for as long as it runs. jax's own service says neither who is
missing nor why somebody left, and ends the process with a C++ stack after minutes.
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

GRACE = 3.0  # seconds in which the news of a dead host arrives after a collective failed


class Cluster(NamedTuple):
    """Where process 0 listens, "host:port", how many processes there are, which one this is, and
    which devices of its host are its own (None: all)."""

    address: str
    number: int
    index: int
    devices: Sequence[int] | None = None


def find_cluster(
    address: str | None, number: int | None, index: int | None, timeout: float
) -> Cluster:
    """The cluster that these name or, where none is given, the one that the environment says: TPU
    metadata, Slurm, Open MPI, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. A
    cluster of 1 where there is none.

    Raises UserError when some are given and others not, and when `index` is not below `number`.
    """
    address = address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    number, index = (
        int(os.environ[name]) if value is None and name in os.environ else value
        for name, value in (("JAX_NUM_PROCESSES", number), ("JAX_PROCESS_ID", index))
    )
    devices = None
    if (address, number, index) == (None, None, None):
        # jax asks the same for jax.distributed.initialize(), but keeps the answer to itself
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
    """Inside, this process is one of the cluster's: jax knows the devices of all.

    Only process 0 prints. When one process ends before the others, all end, with a line that says
    which one and why: with its exit code where it failed, with `RESTART` where it vanished. Raises
    UserError with the address and the missing processes when they are not there in `timeout`
    seconds.
    """
    if cluster.number == 1:
        yield
        return
    line = _at_the_door(cluster, timeout) if cluster.index == 0 else _knock(cluster, timeout)
    jax.distributed.initialize(
        cluster.address, cluster.number, cluster.index, local_device_ids=cluster.devices
    )
    line.start()
    try:
        with _only_first_prints(cluster.index):
            yield
    except UserError as e:
        line.leave(e.code, str(e))
    except KeyboardInterrupt:
        line.leave(128 + signal.SIGINT, "interrupted twice, nothing was saved")
    except Exception as e:
        time.sleep(GRACE)  # more likely another host's end than a fault of this one
        traceback.print_exc()
        line.leave(1, f"{type(e).__name__}: {e}")
    # nobody leaves before all are done
    jax.distributed.shutdown()
    line.close()


@contextlib.contextmanager
def _only_first_prints(index: int) -> Iterator[None]:
    if index == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


class ControlChannel:
    """This process's connections: to all others for process 0, to process 0 for the others.

    A thread listens, and ends the process when one of the others is gone.
    """

    def __init__(self, index: int, peers: dict[int, socket.socket]):
        self._index, self._peers, self._over = index, peers, False
        self._thread = threading.Thread(target=self._listen, name="hosts", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as waiting:
            for peer, connection in self._peers.items():
                waiting.register(connection, selectors.EVENT_READ, peer)
            while True:
                for key, _ in waiting.select():
                    word = _receive(key.fileobj)
                    if self._over or word == {"done": True}:
                        return
                    self._end(word or dict(host=key.data, code=RESTART, why="is gone"))

    def _end(self, word: dict[str, Any]) -> None:
        """End this process, because of what happened on another; process 0 tells the rest."""
        self._tell(word)
        restart = "; run the same command again" if word["code"] == RESTART else ""
        _exit(word["code"], f"host {word['host']} of the run {word['why']}{restart}")

    def _tell(self, word: dict[str, Any]) -> None:
        for connection in self._peers.values():
            with contextlib.suppress(OSError):  # it may be the one that is gone
                connection.sendall(json.dumps(word).encode() + b"\n")

    def leave(self, code: int, why: str) -> None:
        """End this process at once with an error, and with it the others."""
        self._over = True
        self._tell(dict(host=self._index, code=code, why=f"stopped: {why}"))
        _exit(code, why)

    def close(self) -> None:
        """Say goodbye: the work is done."""
        self._over = True
        self._tell({"done": True})
        for connection in self._peers.values():
            connection.close()


def _exit(code: int, message: str) -> None:
    sys.stdout.flush()
    print_error(message)
    os._exit(code)  # nothing that waits for the others, such as jax's own farewell


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """The next message, None where the other end is closed or what comes is none of ours."""
    received = b""
    try:
        while not received.endswith(b"\n"):
            if not (more := connection.recv(1)):
                return None
            received += more
        return json.loads(received)
    except (OSError, ValueError):
        return None


def _door(cluster: Cluster) -> tuple[str, int]:
    """Where process 0 waits for the others: the port below jax's own."""
    host, port = cluster.address.rsplit(":", 1)
    return host, int(port) - 1


def _at_the_door(cluster: Cluster, timeout: float) -> ControlChannel:
    """Process 0: wait for all the others, then let them in together."""
    _, port = _door(cluster)
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
                    connection.close()  # a stranger, or two of the same number
                    continue
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                peers[peer] = connection
    line = ControlChannel(0, peers)
    missing = sorted(set(range(1, cluster.number)) - set(peers))
    line._tell({"missing": missing})
    if missing:
        raise _incomplete(cluster, missing, timeout)
    return line


def _knock(cluster: Cluster, timeout: float) -> ControlChannel:
    """The others: come to process 0, and wait until all are there."""
    deadline = time.monotonic() + timeout
    answer = None
    while answer is None:
        try:
            connection = socket.create_connection(_door(cluster), timeout=5)
            hello = {"host": cluster.index, "of": cluster.number}
            connection.sendall(json.dumps(hello).encode() + b"\n")
            connection.settimeout(timeout + 10)  # process 0 may have begun to wait later
            answer = _receive(connection)
        except OSError:
            pass
        if answer is None:
            if time.monotonic() > deadline:
                raise UserError(
                    f"process {cluster.index} of {cluster.number}: nobody let it in at "
                    f"{cluster.address} in {timeout:.0f} s; is process 0 running there, with "
                    f"--num_processes={cluster.number} and no other process {cluster.index}, and "
                    f"may port {_door(cluster)[1]} be reached?"
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
        f"{len(missing)} of {cluster.number} processes did not come to {cluster.address} in "
        f"{timeout:.0f} s (connect_seconds): {named}; start them there too, or set --num_processes"
    )
