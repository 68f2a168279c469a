"""The table and the picture of plans, and the copy of the table in the docs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mert_jax.errors import UserError
from mert_jax.planning import table

FOLDER = Path(__file__).parents[1] / "plans"
PAGE = Path(__file__).parents[2] / "docs" / "tpu.md"


@pytest.fixture
def plan():
    return json.loads((FOLDER / "95m_v5e-8.json").read_text())


def test_the_docs_have_the_table_of_the_plans():
    lines = set(PAGE.read_text().splitlines())
    rows = table.table(table.read_plans([str(FOLDER / "*.json")]))
    assert [line for line in rows if line not in lines] == []


def test_the_cells_of_a_plan(plan):
    cells = table.table_row("mine", plan)
    assert cells["chips"] == "8 (v5e:2x4)"
    assert float(cells["step, ms"]) == pytest.approx(1e3 * plan["estimated_step_time_s"], rel=1e-2)
    per_host = plan["batch_size"] / plan["estimated_step_time_s"]
    assert int(cells["clips/s a host"]) == pytest.approx(per_host, rel=1e-2)
    plan |= {"accumulation": 4, "micro_batch_per_device": 14.0}
    assert table.table_row("mine", plan)["a chip"] == "4 x 14"


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({}, "vector units"),
        ({"hbm_peak_gib": 15.0}, "memory"),
        ({"memory_bound_s": 0.05}, "memory traffic"),
        ({"collective_bound_s": 0.09}, "links"),
        ({"compute_bound_s": 0.06}, "matrix units"),
    ],
)
def test_limit(plan, changes, limit):
    assert table.limit(plan | changes) == limit


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "mert_jax.plan", *arguments], capture_output=True, text=True
    )


def test_the_command_prints_a_table_and_draws(tmp_path, plan):
    for chips in (8, 64):
        path = tmp_path / f"{chips}.json"
        path.write_text(json.dumps(plan | {"num_devices": chips}))
    done = command(f"--plans={tmp_path}/*.json", f"--picture={tmp_path}/scaling.png")
    assert done.returncode == 0, done.stderr
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[2:]] == ["| 64", "| 8"]
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_joins_plans_of_one_kind(plan):
    alone = plan | {"num_devices": 16, "topology": "v4:2x2x4"}
    memory = table.draw([plan, alone, plan | {"num_devices": 64}]).axes[0]
    assert [line.get_xdata().tolist() for line in memory.lines] == [[8, 64]]
    memory = table.draw([plan, alone]).axes[0]  # without any line, points
    assert [line.get_xdata().tolist() for line in memory.lines] == [[8], [16]]


@pytest.mark.parametrize("text", ["", "[]", '{"estimated_step_time_s": null}'])
def test_a_file_that_is_not_a_plan(tmp_path, text):
    path = tmp_path / "some.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"some\.json is not a plan of a TPU"):
        table.read_plans([str(path)])
    with pytest.raises(UserError, match="matches no file"):
        table.read_plans([f"{FOLDER}/95m_v5e-8.json", "nowhere*.json"])
