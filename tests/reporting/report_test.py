"""The report shows the figures of metrics.jsonl in files that need no network."""

import html.parser
import json
import re
import subprocess
import sys

import numpy as np
import pytest
from matplotlib import figure, image

from mert_jax.errors import UserError
from mert_jax.reporting import plots, report, summary
from mert_jax.runtime import goodput

CONFIG = {"batch_size": 36, "total_steps": 500, "data": {"num_samples": 240_000}}


def parts(loss: float, books: int) -> dict:
    """Return the metrics of one kind, training or validation."""
    return {
        "loss": loss,
        "loss_codes": loss - 1,
        "loss_cqt": 0.5,
        "features_penalty": 0.05,
        "masked_accuracy": [0.25 + 0.01 * k for k in range(books)],
        "majority_accuracy": [0.125] * books,
        "code_perplexity": [200.0] * books,
        "prediction_perplexity": [100.0] * books,
    }


def make_rows(count: int, validation: dict[int, float] | None = None, books: int = 2) -> list[dict]:
    """Return `count` rows, 10 steps apart; `validation` maps a step to its loss."""
    rows = []
    for step in range(10, 10 * count + 1, 10):
        row = {"step": step, **parts(50 - step / 100, books), "grad_norm": 1.0 + step % 3}
        row |= {"learning_rate": 1e-3, "looped_clips": 0, "mfu": None}
        row["audio_seconds_per_second"] = 0.0 if step == 10 else 100.0 + step
        if step in (validation or {}):
            row |= {f"validation_{k}": v for k, v in parts(validation[step], books).items()}
        rows.append(row)
    return rows


def save(workdir, rows: list[dict], config: dict | None = None) -> str:
    workdir.mkdir(exist_ok=True)
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config is not None:
        (workdir / "config.json").write_text(json.dumps(config))
    return str(workdir)


class Elements(html.parser.HTMLParser):
    """Collects every element with its attributes, and every text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def test_files_and_headline_figures(tmp_path, capsys):
    rows = make_rows(50, {100: 49.0, 200: 45.5, 500: 46.25})
    rows[-1]["validation_masked_accuracy"] = [0.5, 0.25]
    report.write_report(save(tmp_path, rows, CONFIG))
    assert {f.name for f in tmp_path.iterdir()} == {
        *("metrics.jsonl", "config.json", "report.png", "report.html")
    }
    height, width, _ = image.imread(tmp_path / "report.png").shape
    assert min(height, width) > 1000
    printed = re.sub(" +", " ", capsys.readouterr().out)
    page = Elements((tmp_path / "report.html").read_text())
    for label, value in {
        "steps": "500 of 500",
        "audio seen": "50.0 h",  # 500 updates of 36 clips of 10 s
        "median speed": "360 s of audio a second",  # of 120, 130, ... 600
        "last training loss": "45",
        "first validation loss": "49 at step 100",
        "best validation loss": "45.5 at step 200",
        "last validation loss": "46.25 at step 500",
        "validation masked accuracy": "0.3750",
        "always the most frequent code": "0.1250",
    }.items():
        assert f"\n{label} {value}\n" in printed
        assert page.texts[page.texts.index(label) + 1] == value
    assert str(tmp_path / "report.png") in printed
    assert str(tmp_path / "report.html") in printed
    assert "warning" not in printed
    texts = " ".join(page.texts)
    assert "1 0.25 0.125 200 100 mean 0.375 0.125 200 100" in texts
    assert "data.num_samples 240000" in texts


def test_the_page_needs_no_network_and_escapes_its_text(tmp_path):
    workdir = save(tmp_path / "<b>run & co", make_rows(3), {"data": {"dir": "<script>alert()"}})
    rows, config = summary.read_run(workdir)
    warnings = ["<b>collapsed</b>"]
    figures = summary.summarize(rows, config)
    page = Elements(report.page(plots.panels(rows)[:2], figures, warnings, config, workdir))
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"b", "script", "link", "iframe", "object"}
    assert "img" in tags
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action"):
            if name in attributes:
                assert attributes[name].startswith("data:image/png;base64,"), tag
    style = page.texts[[text.startswith("\nbody") for text in page.texts].index(True)]
    assert "url(" not in style
    assert "@" not in style
    assert any(text.endswith("<b>run & co") for text in page.texts)
    assert "<b>collapsed</b>" in page.texts


def test_panels_follow_the_metrics():
    rows = make_rows(5, {50: 1.0})
    assert [panel.title for panel in plots.panels(rows)] == [
        *("Loss", "Loss of the codes", "Loss of cqt", "Masked accuracy"),
        *("Perplexity of the targets", "Perplexity of the predictions", "Features penalty"),
        *("Gradient norm", "Learning rate", "Speed"),
    ]
    for row in rows:
        row |= {"loss_chroma": 0.1, "mfu": 0.4, "loss_codes_rvq": 2.0, "loss_codes_kmeans": 1.0}
    panels = {panel.title: panel for panel in plots.panels(rows)}
    assert {"Loss of cqt", "Loss of chroma", "Model FLOPs utilisation"} < panels.keys()
    assert [line.label for line in panels["Loss of the codes"].lines] == [
        *("training", "validation", "rvq", "kmeans")
    ]
    accuracy = panels["Masked accuracy"]
    *_, mean, guess = accuracy.lines
    assert (mean.label, guess.label) == ("mean, validation", "most frequent code")
    assert accuracy.codebooks == len(accuracy.lines) - 2 == 2
    np.testing.assert_allclose([*mean.values, *guess.values], [0.255, 0.125])
    assert list(mean.steps) == [50]


def test_each_dataset_of_several_has_its_validation_loss():
    rows = make_rows(5, {20: 3.0, 30: 2.0, 50: 1.0})
    for step, losses in ((20, [3.0, 2.5]), (30, [2.0, 2.5]), (50, [1.0, 1.5, 9.0])):
        rows[step // 10 - 1]["validation_losses"] = losses  # a third dataset came late
    panel = {panel.title: panel for panel in plots.panels(rows)}["Validation loss of each dataset"]
    assert [line.label for line in panel.lines] == ["dataset 1", "dataset 2", "dataset 3"]
    assert [list(line.steps) for line in panel.lines] == [[20, 30, 50]] * 3
    np.testing.assert_array_equal(panel.lines[1].values, [2.5, 2.5, 1.5])
    np.testing.assert_array_equal(panel.lines[2].values, [np.nan, np.nan, 9.0])


def test_a_teacher_of_features_has_no_codebooks():
    rows = make_rows(3, {30: 1.0}, books=0)
    panels, figures = plots.panels(rows), summary.summarize(rows, {})
    assert "Masked accuracy" not in [panel.title for panel in panels]
    assert summary.list_warnings(rows, figures) == []
    assert "<td>mean</td><td>0</td>" in report.page(panels[:1], figures, [], {}, "")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("count", "books"), [(1, 8), (2, 1), (1200, 16)])
def test_draws_any_number_of_rows_and_codebooks_without_a_warning(count, books):
    rows = make_rows(count, {10: 50.0}, books)
    rows[-1] |= {"loss": float("nan"), "grad_norm": float("inf")}
    rows[-1]["prediction_perplexity"] = [1] * books
    panels = plots.panels(rows)
    assert plots.png(panels, rows[-1]["step"], title=r"$\frac$").startswith(b"\x89PNG")


def test_long_runs_are_thinned_to_means_within_their_range():
    rows = make_rows(5000)
    rows[1234]["grad_norm"] = 400.0
    rows[2000]["grad_norm"] = float("nan")
    for row in rows[100:110]:
        row["grad_norm"] = float("nan")
    norm = next(p for p in plots.panels(rows) if p.title == "Gradient norm").lines[0]
    assert len(norm.steps) == len(norm.values) == plots.POINTS
    real = [row["grad_norm"] for row in rows[1230:1240]]
    assert norm.values[123] == pytest.approx(np.mean(real))
    assert (norm.low[123], norm.high[123]) == (min(real), 400)
    assert norm.values[200] == pytest.approx(np.mean([row["grad_norm"] for row in rows[2001:2010]]))
    assert np.flatnonzero(np.isnan(norm.values)).tolist() == [10]


def test_axes_of_a_panel():
    rows = make_rows(30, {100: 3.0})
    rows[3] |= {"loss_cqt": 50.0, "features_penalty": 0.0}
    axes = {}
    for panel in plots.panels(rows):
        axes[panel.title] = figure.Figure().add_subplot()
        plots.draw(axes[panel.title], panel, 300)
        assert axes[panel.title].get_xlabel() == "step"
        assert axes[panel.title].get_xlim() == (0, 306)
    # a collapsed student is a line at the bottom
    assert axes["Perplexity of the predictions"].get_yscale() == "log"
    assert axes["Perplexity of the predictions"].get_ylim()[0] == 0.9
    assert axes["Masked accuracy"].get_ylim()[0] == 0
    # logarithmic if the range is wide and positive
    assert axes["Loss of cqt"].get_yscale() == "log"
    assert axes["Features penalty"].get_yscale() == "linear"
    assert [text.get_text() for text in axes["Loss"].get_legend().get_texts()] == [
        *("training", "validation")
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"validation_prediction_perplexity": [100.0, 1.2]}, "Collapsed student.* codebook 1"),
        ({"validation_code_perplexity": [1.5, 200.0]}, "Collapsed teacher.* codebook 0"),
        ({"validation_masked_accuracy": [0.1, 0.125]}, "does not exceed .* codebook 0, 1"),
        ({"validation_loss": float("nan")}, "validation_loss is not finite in 1 of 2 rows"),
        ({"grad_norm": None}, "grad_norm is not finite in 1 of 6 rows"),
        # only the last measurement counts
        ({"masked_accuracy": [0.0, 0.0], "prediction_perplexity": [1.0, 1.0]}, None),
    ],
)
def test_warnings(changes, message):
    rows = make_rows(6, {30: 4.0, 60: 3.0})
    assert summary.list_warnings(rows, summary.summarize(rows, {})) == []
    rows[-1] |= changes
    warnings = summary.list_warnings(rows, summary.summarize(rows, {}))
    assert len(warnings) == bool(message)
    if message:
        assert re.search(message, warnings[0])


def test_without_validation_the_last_step_is_reported():
    rows = make_rows(4)
    rows[-1]["masked_accuracy"] = [0.1, 0.9]
    figures = summary.summarize(rows, {})
    assert (figures["kind"], figures["kind_step"]) == ("training", 40)
    assert (figures["first"], figures["best"], figures["hours"]) == (None, None, None)
    assert "training accuracy does not exceed" in summary.list_warnings(rows, figures)[0]


def test_a_validation_loss_may_never_be_finite():
    rows = make_rows(4, {20: float("nan"), 40: float("inf")})
    figures = summary.summarize(rows, CONFIG)
    assert (figures["first"], figures["best"]) == (None, None)
    assert dict(summary.headline(figures))["last validation loss"] == "nan at step 40"


def test_mistakes_end_in_one_line_and_code_2(tmp_path):
    save(tmp_path / "empty", [])
    save(tmp_path / "corrupt", make_rows(3))
    with open(tmp_path / "corrupt" / "metrics.jsonl", "a") as f:
        f.write("{oops\n")
    cases = {
        f"--workdir={tmp_path / 'nowhere'}": "metrics.jsonl is not there",
        f"--workdir={tmp_path}": "metrics.jsonl is not there",
        f"--workdir={tmp_path / 'empty'}": "is empty",
        f"--workdir={tmp_path / 'corrupt'}": "line 4 is not JSON",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "mert_jax.report", arg], stderr=subprocess.PIPE, text=True
        )
        for arg in cases
    ]
    for process, message in zip(started, cases.values(), strict=True):
        error = process.communicate()[1]
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert process.returncode == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"step": None}, "line 2 is not the metrics of a step"),
        ({"step": 20}, "holds nothing to plot"),
        ({"step": 20, "loss": "low"}, "loss is not as many numbers"),
    ],
)
def test_rows_that_are_not_metrics_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        report.write_report(save(tmp_path, [{"step": 10}, changes]))


def test_a_workdir_must_be_named():
    with pytest.raises(UserError, match="--workdir=DIR is needed"):
        report.write_report(None)


def test_a_cut_off_last_line_is_left_out(tmp_path):
    workdir = save(tmp_path, make_rows(3))
    with open(tmp_path / "metrics.jsonl", "a") as f:
        f.write('{"step": 40, "loss": 1')
    assert summary.read_run(workdir) == (make_rows(3), {})


@pytest.mark.parametrize(
    ("name", "message"), [("report.png", "cannot be written"), ("config.json", "cannot be read")]
)
def test_unreadable_and_unwritable_files_are_refused(tmp_path, name, message):
    workdir = save(tmp_path, make_rows(1))
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=message):
        report.write_report(workdir)


def test_warnings_are_printed_and_on_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "png", lambda *args, **options: b"")
    rows = make_rows(2)
    rows[-1]["masked_accuracy"] = [0.0, 0.0]
    report.write_report(save(tmp_path, rows))
    warned = capsys.readouterr().out.split("\nwarning: ")[1].strip()
    assert "codebook 0, 1" in warned
    assert warned in (tmp_path / "report.html").read_text()


def test_goodput_is_printed_and_on_the_page(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plots, "png", lambda *args, **options: b"")
    workdir = save(tmp_path, make_rows(2))
    spent = dict.fromkeys(goodput.KINDS, 0.0) | {"step": 2700.0, "lost": 900.0}
    (tmp_path / "goodput.json").write_text(json.dumps(spent))
    report.write_report(workdir)
    line = "time: 1.00 h, of which step 75.0 %, lost 25.0 %"
    assert line in capsys.readouterr().out
    assert line in (tmp_path / "report.html").read_text()
