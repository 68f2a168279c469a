"""Several processes: they meet or say who is missing, and end together."""

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

NONE = {name: "" for name in os.environ if name.startswith(("SLURM_", "OMPI_", "JAX_"))}


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch):
    for name in NONE:
        monkeypatch.delenv(name)


def test_a_process_by_itself():
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
        (("here:1", None, 0), "--num_processes=None and --process_id=0 go together"),
        ((None, 2, 0), "--coordinator=None"),
        (("here:1", 2, 2), "--process_id=2 is not one of --num_processes=2"),
        (("here", 2, 1), "--coordinator=here has no port"),
    ],
)
def test_half_a_cluster_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        distributed.find_cluster(*given, 1)


def meet(number, present, timeout):
    """What becomes of each of the processes `present`, which are threads here: a Line or an
    error."""
    address, outcome = f"127.0.0.1:{processes.free_port()}", {}

    def come(index):
        cluster = distributed.Cluster(address, number, index)
        arrive = distributed._connect if index else distributed._accept
        try:
            outcome[index] = arrive(cluster, timeout)
        except UserError as e:
            outcome[index] = str(e)

    threads = [threading.Thread(target=come, args=(index,)) for index in present]
    for thread in threads:
        thread.start()
        time.sleep(0.05)
    for thread in threads:
        thread.join()
    for line in outcome.values():
        if isinstance(line, distributed.ControlChannel):
            line.close()
    return address, outcome


def test_all_who_come_are_let_in_in_any_order():
    _, outcome = meet(4, (2, 0, 3, 1), 20)
    assert all(isinstance(line, distributed.ControlChannel) for line in outcome.values())
    assert len(outcome) == 4


def test_the_missing_are_named_to_everyone_who_came():
    address, outcome = meet(4, (0, 2), 1.5)
    for said in outcome.values():
        assert f"2 of 4 processes did not connect to {address} within 2 s" in said
        assert ": 1, 3; start them" in said


def test_no_coordinator_at_the_address():
    address, outcome = meet(2, (1,), 1)
    assert (
        f"could not connect to the coordinator {address} within 1 s; check that process 0 runs there"
        in outcome[1]
    )


def test_two_of_the_same_number_do_not_pass_for_two():
    _, outcome = meet(3, (0, 1, 1), 1.5)
    assert "1 of 3 processes did not connect" in outcome[0]


def test_a_port_in_use_is_said():
    port = processes.free_port()
    refused = pytest.raises(UserError, match=f"port {port - 1}, the one below, cannot be used")
    with distributed.socket.create_server(("", port - 1)), refused:
        distributed._accept(distributed.Cluster(f"127.0.0.1:{port}", 2, 0), 1)


def several(number, devices, *flags):
    command = [sys.executable, "-m", "tests.one_of_several", *flags]
    return processes.started(command, number, devices)


def said(errors):
    (line,) = (line for line in errors.splitlines() if line.startswith("SAID "))
    return json.loads(line.removeprefix("SAID "))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Where the first of the runs below saves what the others, of other processes, restore."""
    return tmp_path_factory.mktemp("saved")


@pytest.mark.parametrize(
    ("number", "mesh", "shares"), [(2, "-1,1,1", 2), (4, "2,1,4", 2), (1, "1,8,1", 1)]
)
def test_each_reads_its_share_of_the_same_batch(number, mesh, shares, workdir):
    """Of 8 devices; where `tensor` spans two hosts, both read the same."""
    with several(number, 8 // number, f"--mesh={mesh}", f"--workdir={workdir}") as running:
        ended = processes.finished(running)
    assert [code for code, *_ in ended] == [0] * number, ended
    found = [said(errors) for *_, errors in ended]
    assert all(each["same"] and each["restored"] for each in found)
    assert {each["request"] for each in found} == {10 + number - 1}
    for each in found:
        assert each["read"] == each["expected"]
        assert len(each["rows"]) == 24 // shares
    assert sorted({row for each in found for row in each["rows"]}) == list(range(24))
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
def test_when_one_ends_all_do_and_say_why(how, code, words):
    began = time.monotonic()
    with several(3, 1, f"--what={how}") as running:
        ended = processes.finished(running)
    assert time.monotonic() - began < 60
    for index in (0, 2):
        assert ended[index][0] == code, ended[index]
        assert f"error: {words}" in ended[index][2]
    assert ended[1][0] == (-signal.SIGKILL if how == "kill" else code)
    assert ("there is no such folder" in ended[1][2]) == (how == "mistake")
