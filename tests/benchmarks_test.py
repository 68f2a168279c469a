"""The benchmarks' table and picture, and with `-m slow` their bars."""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import growth, measure, table

FOLDER = Path(__file__).parent / "benchmarks"
ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
WITH_BARS = "cqt_nnaudio,rvq_vae,student_95m,step,stream"
ROW = {
    "name": "rvq_vae",
    "peer": "theirs",
    "ours_s": 0.05,
    "peer_s": 0.2,
    "ours_range_s": [0.04, 0.06],
    "peer_range_s": [0.2, 0.2],
    "ratio": 4.0,
    "ours_mib": 10.4,
    "peer_mib": 20.0,
}


def test_the_page_has_what_was_measured():
    rows = json.loads((FOLDER / "measured.json").read_text())
    lines = set(PAGE.read_text().splitlines())
    assert [line for line in table.markdown(rows).splitlines() if line not in lines] == []
    assert {*table.BARS, "stream"} <= {row["name"] for row in rows}


def test_a_row_of_the_table():
    with_mfu = measure.with_flops(ROW | {"name": "other", "mfu": [0.41, 0.2]}, 1e10)
    *_, first, second = table.markdown([ROW, with_mfu]).splitlines()
    cells = "50 ms (40 to 60) | 0.2 s | 4.00x"
    assert first == f"| rvq_vae | theirs | {cells} | 2x | 10, 20 |"
    assert (
        second
        == f"| other, 200 and 50 GFLOP/s, MFU 0.410 and 0.200 | theirs | {cells} |  | 10, 20 |"
    )


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"ratio": 1.61}, False),
        ({"ratio": 1.59}, True),
        ({"name": "other", "ratio": 0.1}, False),
        ({"name": "stream", "clips_per_s": 81}, False),
        ({"name": "stream", "clips_per_s": 79}, True),
    ],
)
def test_what_misses_its_bar(changes, missed):
    assert table.missed(ROW | changes, 0.8) == missed


def test_the_slope_of_growth():
    line = [
        {"clips": clips, "seconds": 5, "step_s": 3 * clips**1.5, "temporaries_mib": 7 * clips}
        for clips in (1, 2, 4)
    ]
    assert growth.slope(line, "step_s") == pytest.approx(1.5)
    axes = growth.picture({"a line": line}).axes
    assert [ax.get_legend().texts[0].get_text() for ax in axes] == [
        "a line: slope 1.50",
        "a line: slope 1.00",
    ]


def noting(path, mib):
    """A side whose calls record their process and which holds memory."""
    held = np.ones(mib * 2**17)

    def run():
        with open(path, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return held

    return run


def failing():
    raise ValueError("no such thing")


@pytest.mark.slow
def test_sides_take_turns_in_processes_of_their_own(tmp_path):
    path = tmp_path / "calls"
    sides = {"ours": (noting, str(path), 10), "peer": (noting, str(path), 210)}
    times = measure.apart(sides, rounds=2, calls=5)
    turns = [[*turn] for _, turn in itertools.groupby(path.read_text().split())]
    assert [len(turn) for turn in turns] == [6] * 4  # one of six is not timed
    (ours, *_), (peer, *_) = turns[:2]
    assert turns[2:] == [[ours] * 6, [peer] * 6]
    assert len({os.getpid(), int(ours), int(peer)}) == 3
    for timing in times.values():
        assert len(timing.seconds) == 10
        assert min(timing.seconds) >= 0.3
    assert times["peer"].mib - times["ours"].mib == pytest.approx(200, abs=20)


def test_a_turn_lasts_a_second(tmp_path):
    times = measure.apart({"ours": (noting, str(tmp_path / "calls"), 1)}, rounds=1, calls=2)
    assert len(times["ours"].seconds) > 2  # of 0.3 s


def test_a_side_that_fails_ends_it(capfd):
    with pytest.raises(RuntimeError, match="ended with code 1"):
        measure.apart({"ours": (failing,)})
    assert "ValueError: no such thing" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.peers
def test_no_ratio_is_far_below_its_bar(tmp_path):
    found = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tests.benchmarks", f"--only={WITH_BARS}", f"--json={found}"]
    environment = os.environ | {"XLA_FLAGS": ""}  # one device, as users have it
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    rows = {row["name"]: row for row in json.loads(found.read_text())}
    assert {*table.BARS, "stream"} <= set(rows)
    low = [f"{name}: {row['ratio']:.2f}x" for name, row in rows.items() if table.missed(row, 0.8)]
    assert low == []
