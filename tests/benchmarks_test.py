"""The benchmarks' table and picture; `-m slow`: their bars."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks import growth, table

FOLDER = Path(__file__).parent / "benchmarks"
README = Path(__file__).parent.parent / "README.md"
WITH_BARS = "cqt_nnaudio,rvq_vae,stream"
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


def test_the_readme_has_what_was_measured():
    rows = json.loads((FOLDER / "measured.json").read_text())
    lines = set(README.read_text().splitlines())
    assert [line for line in table.markdown(rows).splitlines() if line not in lines] == []
    assert {*table.BARS, "stream"} <= {row["name"] for row in rows}


def test_a_row_of_the_table():
    with_mfu = ROW | {"name": "other", "mfu": [0.41, 0.2]}
    *_, first, second = table.markdown([ROW, with_mfu]).splitlines()
    cells = "50 ms (40 to 60) | 0.2 s | 4.00x"
    assert first == f"| rvq_vae | theirs | {cells} | 2x | 10, 20 |"
    assert second == f"| other, MFU 0.410 and 0.200 | theirs | {cells} |  | 10, 20 |"


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


@pytest.mark.slow
@pytest.mark.peers
def test_no_ratio_is_far_below_its_bar(tmp_path):
    found = tmp_path / "rows.json"
    command = [sys.executable, "-m", "tests.benchmarks", f"--only={WITH_BARS}", f"--json={found}"]
    environment = os.environ | {"XLA_FLAGS": ""}  # one device, as users have it
    subprocess.run(command, check=True, env=environment, cwd=README.parent)
    rows = {row["name"]: row for row in json.loads(found.read_text())}
    assert {*table.BARS, "stream"} <= set(rows)
    low = [f"{name}: {row['ratio']:.2f}x" for name, row in rows.items() if table.missed(row, 0.8)]
    assert low == []
