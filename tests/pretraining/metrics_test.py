"""Sums become the right numbers, and metrics.jsonl has each step once."""

import json
import math
import sys
import types

import jax
import numpy as np
import pytest

from mert_jax.data.code_checks import perplexity
from mert_jax.errors import UserError
from mert_jax.files import read_jsonl
from mert_jax.pretraining import losses, metrics, step


def sums(**codes) -> step.Sums:
    """Sums over 10 masked frames, with one feature teacher and codebooks of 4 classes."""
    return step.Sums(
        frames=np.float32(10),
        loss=np.float32(50),
        codes=codes
        or {
            "rvq": losses.CodeLoss(
                cross_entropy=np.array([20.0, 10.0], np.float32),
                correct=np.array([5, 1]),
                targets=np.array([[0, 10, 0, 0], [1, 2, 3, 4]]),
                predictions=np.array([[5, 5, 0, 0], [0, 0, 0, 10]]),
            )
        },
        features={"cqt": np.float32(4)},
        penalty=np.float32(2),
    )


def test_validation_is_of_all_records_and_of_each_dataset():
    small = sums()._replace(frames=np.float32(30))
    row = metrics.validation_row([sums(), small])
    assert row["validation_loss"] == 100 / 40
    assert row["validation_losses"] == [50 / 10, 50 / 30]
    alone = metrics.validation_row([small])
    assert alone == {f"validation_{name}": x for name, x in metrics.to_row(small).items()}


def one_book(correct: int) -> losses.CodeLoss:
    return losses.CodeLoss(
        np.array([10.0 * correct]), np.array([correct]), np.eye(4)[:1] * 10, np.eye(4)[:1] * 10
    )


def test_perplexity_is_the_number_of_codes_in_use():
    counts = np.array([[3, 3, 3, 3], [7, 0, 0, 0], [5, 5, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(perplexity(counts), [4, 1, 2, 1], rtol=1e-12)
    uneven = perplexity(np.array([[1, 3]]))
    np.testing.assert_allclose(uneven, 4 / 3**0.75)


def test_row_of_sums():
    row = metrics.to_row(sums())
    entropy = -sum(p * math.log(p) for p in (0.1, 0.2, 0.3, 0.4))
    assert row == {
        "loss": 5.0,
        "loss_codes": 3.0,
        "loss_cqt": pytest.approx(0.4),
        "features_penalty": pytest.approx(0.2),
        "masked_accuracy": [0.5, 0.1],
        "majority_accuracy": [1.0, 0.4],
        "code_perplexity": pytest.approx([1, math.exp(entropy)], abs=1e-6),
        "prediction_perplexity": pytest.approx([2, 1], abs=1e-6),
    }
    assert json.loads(json.dumps(row)) == row


def test_several_code_teachers_are_also_told_apart_in_the_order_of_names():
    # what a compiled step returns has its dicts sorted
    row = metrics.to_row(jax.jit(lambda: sums(b=one_book(2), a=one_book(1)))())
    assert (row["loss_codes"], row["loss_codes_a"], row["loss_codes_b"]) == (3.0, 1.0, 2.0)
    assert row["masked_accuracy"] == [0.1, 0.2]


def test_sums_add_up_to_the_mean_over_all_frames():
    small = sums(a=one_book(1))._replace(frames=np.float32(30))
    total = metrics.add(sums(a=one_book(1)), small)
    assert metrics.to_row(total)["loss"] == 100 / 40
    assert metrics.to_row(total)["masked_accuracy"] == [2 / 40]


def test_many_batches_add_up_beyond_float32():
    total = sums()._replace(loss=np.float32(2**24))
    total = metrics.add(total, sums()._replace(loss=np.float32(1)))
    assert int(total.loss) == 2**24 + 1


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        *[("TPU v4", 275e12), ("TPU v5 lite", 197e12), ("TPU v5e", 197e12), ("TPU v5", 459e12)],
        *[("TPU v5p", 459e12), ("TPU v6e", 918e12), ("NVIDIA A100-SXM4-80GB", 312e12)],
        *[("cpu", None), ("NVIDIA GeForce", None)],
    ],
)
def test_mfu(monkeypatch, kind, peak):
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=kind)] * 4)
    monkeypatch.setattr(jax, "device_count", lambda: 4)
    assert metrics.mfu(1e14) == (peak and pytest.approx(1e14 / 4 / peak))


def test_speed_leaves_out_compilation_and_pauses(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(metrics, "mfu", lambda flops: flops)
    speed = metrics.Speed(100, 200, audio_seconds=40.0, flops=7.0)
    now[0] = 60.0  # compilation
    assert speed.measure(101) == {"audio_seconds_per_second": 0.0, "mfu": None}
    assert speed.eta(101) == "?"
    now[0] = 65.0
    assert speed.measure(111) == {"audio_seconds_per_second": 80.0, "mfu": 14.0}
    assert speed.eta(111) == "0:00:44"
    now[0] = 1000.0  # validation
    speed.pause()
    now[0] = 1010.0
    assert speed.measure(121)["audio_seconds_per_second"] == 40.0


def row(number: int) -> dict:
    extra = {"grad_norm": 1.0, "learning_rate": 1e-3, "audio_seconds_per_second": 9.0, "mfu": None}
    return {"step": number, **metrics.to_row(sums()), **extra}


def test_console_line():
    line = metrics.console_line(row(3), 10, "0:01:00")
    assert line.startswith("step 3/10  loss 5.000 = codes 3.000 cqt 0.4000 penalty 0.2000")
    assert "accuracy [0.50 0.10]" in line
    assert "\n" not in line
    validation = {f"validation_{name}": value for name, value in metrics.to_row(sums()).items()}
    second = metrics.console_line(row(3) | validation, 10, "?").split("\n")[1]
    assert "validation loss 5.000, masked accuracy 0.3000" in second
    assert "0.7000" in second
    validation["validation_losses"] = [5.25, 4.0]
    assert "validation loss 5.000 (5.250 4.000), masked" in metrics.console_line(
        row(3) | validation, 10, "?"
    )


def test_a_resumed_run_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = metrics.Writer(str(tmp_path), 0, tensorboard=False)
    for number in (10, 20, 30):
        first.write(row(number))
    first.close()
    with open(path, "a") as f:
        f.write('{"step": 40, "lo')  # the machine went down here
    resumed = metrics.Writer(str(tmp_path), 20, tensorboard=False)
    assert [r["step"] for r in read_jsonl(path)] == [10, 20]
    resumed.write(row(30))  # on disk before close
    assert [r["step"] for r in read_jsonl(path)] == [10, 20, 30]
    resumed.close()
    assert read_jsonl(path)[-1] == row(30)
    metrics.Writer(str(tmp_path), 0, tensorboard=False).close()
    assert read_jsonl(path) == []


def test_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_jsonl(path) == []
    path.write_text('{"step": 1}\n{"step": 2}')  # whole, but for its newline
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_jsonl(path)


def test_tensorboard_without_its_extra_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "clu", None)  # importing it fails
    with pytest.raises(UserError, match=r"pip install -e \.\[tensorboard\]"):
        metrics.Writer(str(tmp_path), 0, tensorboard=True)
