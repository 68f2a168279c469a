"""Several processes connect, or name those that are missing, and end together."""

import json
import os
import signal
import sys
import threading
import time

import pytest

from mert_jax.errors import RESTART, UserError
from mert_jax.runtime import distributed
from tests import processes


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_")):
            monkeypatch.delenv(name)


def test_one_process_without_a_cluster():
    assert distributed.find_cluster(None, None, None, 1) == distributed.Cluster("", 1, 0)
    with distributed.connect(distributed.find_cluster(None, None, None, 1), 1):
        pass


def test_flags_and_the_environment_name_a_cluster(monkeypatch):
    assert distributed.find_cluster("here:8476", 4, 3, 1) == distributed.Cluster("here:8476", 4, 3)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "there:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    assert distributed.find_cluster(None, None, None, 1) == distributed.Cluster("there:1234", 2, 1)
    assert distributed.find_cluster(None, None, 0, 1) == distributed.Cluster("there:1234", 2, 0)


def test_slurm_names_a_cluster(monkeypatch):
    for name, value in dict(
        SLURM_JOB_ID="4242",
        SLURM_STEP_NODELIST="node[7-8]",
        SLURM_NTASKS="2",
        SLURM_PROCID="1",
        SLURM_LOCALID="0",
        SLURM_STEP_NUM_NODES="2",
    ).items():
        monkeypatch.setenv(name, value)
    cluster = distributed.find_cluster(None, None, None, 1)
    assert cluster.address.startswith("node7:")
    assert cluster[1:3] == (2, 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("here:1", None, 0), "--num_processes=None and --process_id=0 do not go together"),
        ((None, 2, 0), "--coordinator=None"),
        (("here:1", 2, 2), "--num_processes=2 and --process_id=2 do not"),
        (("here", 2, 1), "--coordinator=here, .*give HOST:PORT"),
    ],
)
def test_half_a_cluster_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        distributed.find_cluster(*given, 1)


def connect(number, present, timeout):
    """Connect the processes `present`, here threads; return each one's channel or error."""
    address, outcome = f"127.0.0.1:{processes.free_port()}", {}

    def run(index):
        cluster = distributed.Cluster(address, number, index)
        try:
            outcome[index] = distributed.open_channel(cluster, timeout)
        except UserError as e:
            outcome[index] = str(e)

    threads = [threading.Thread(target=run, args=(index,)) for index in present]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    for channel in outcome.values():
        if isinstance(channel, distributed.ControlChannel):
            channel.close()
    return address, outcome


def test_processes_connect_in_any_order():
    _, outcome = connect(4, (2, 0, 3, 1), 20)
    assert all(isinstance(channel, distributed.ControlChannel) for channel in outcome.values())
    assert len(outcome) == 4


def test_every_process_names_the_missing_ones():
    address, outcome = connect(4, (0, 2), 1.5)
    for error in outcome.values():
        assert f"2 of 4 processes did not connect to {address} within 2 s" in error
        assert ": 1, 3; start them" in error


def test_a_missing_coordinator():
    address, outcome = connect(2, (1,), 1)
    message = f"could not connect to the coordinator {address} within 1 s; start process 0 there"
    assert message in outcome[1]


def test_a_duplicate_index_does_not_count():
    _, outcome = connect(3, (0, 1, 1), 1.5)
    assert "1 of 3 processes did not connect" in outcome[0]


def test_a_port_in_use_is_named():
    port = processes.free_port()
    refused = pytest.raises(UserError, match=f"port {port - 1}, the one below, cannot be used")
    with distributed.socket.create_server(("", port - 1)), refused:
        distributed.open_channel(distributed.Cluster(f"127.0.0.1:{port}", 2, 0), 1)


def several(number, devices, *flags):
    command = [sys.executable, "-m", "tests.one_of_several", *flags]
    return processes.started(command, number, devices)


def report_of(errors):
    (line,) = (line for line in errors.splitlines() if line.startswith("SAID "))
    return json.loads(line.removeprefix("SAID "))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Saved by the first run below and restored by those with other numbers of processes."""
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize(
    ("number", "mesh", "shares"), [(2, "-1,1,1", 2), (4, "2,1,4", 2), (1, "1,8,1", 1)]
)
def test_each_host_reads_its_share_of_the_same_batch(number, mesh, shares, workdir):
    """On 8 devices; two hosts that share the tensor axis read the same rows."""
    with several(number, 8 // number, f"--mesh={mesh}", f"--workdir={workdir}") as running:
        ended = processes.finished(running)
    assert [code for code, *_ in ended] == [0] * number, ended
    reports = [report_of(errors) for *_, errors in ended]
    assert all(each["same"] and each["restored"] for each in reports)
    assert {each["request"] for each in reports} == {10 + number - 1}
    for each in reports:
        assert each["read"] == each["expected"]
        assert len(each["rows"]) == 24 // shares
    assert sorted({row for each in reports for row in each["rows"]}) == list(range(24))
    first, *others = [out for _, out, _ in ended]
    assert "only the first process prints this" in first
    assert not any("only the first" in out for out in others)


@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("kill", RESTART, "host 1 of the run is gone; run the same command again"),
        ("mistake", 2, "host 1 of the run stopped: there is no such folder on this host"),
        ("bug", 1, "host 1 of the run stopped: ZeroDivisionError: a bug"),
    ],
)
def test_when_one_process_ends_the_others_end_and_name_the_reason(how, code, words):
    begin = time.monotonic()
    with several(3, 1, f"--what={how}") as running:
        ended = processes.finished(running)
    assert time.monotonic() - begin < 60
    for index in (0, 2):
        assert ended[index][0] == code, ended[index]
        assert f"error: {words}" in ended[index][2]
    assert ended[1][0] == (-signal.SIGKILL if how == "kill" else code)
    assert ("there is no such folder" in ended[1][2]) == (how == "mistake")
