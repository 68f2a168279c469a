"""Features that probes read."""

from typing import NamedTuple

import librosa
import numpy as np
import pytest

from mert_jax import teachers
from mert_jax.constants import SAMPLE_RATE
from mert_jax.errors import UserError
from mert_jax.extraction import embedder
from mert_jax.probing import features


class StandIn(NamedTuple):
    """A student that says of a wave its layer's number, its level and its seed."""

    seed: int = 0
    sample_rate: int = SAMPLE_RATE
    frame_rate: float = 75.0
    num_layers: int = 3

    @property
    def fingerprint(self) -> str:
        return f"stand-in {self.seed}"

    def reinitialised(self, seed: int) -> "StandIn":
        return self._replace(seed=seed + 1)

    def embed(self, waves, pool="none", layers=()):
        for wave in waves:
            chosen = layers or range(self.num_layers + 1)
            frames = len(wave) // 320
            found = np.ones((len(chosen), frames, 2), np.float32)
            found[..., 0] *= np.array(list(chosen))[:, None] + 100 * self.seed
            found[..., 1] *= np.abs(wave).mean()
            yield found.mean(1) if pool == "mean" else found


def tone(seconds: float) -> np.ndarray:
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    return (0.3 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)


def test_log_mel_is_librosas():
    wave = tone(1.37)
    made = features.log_mel()
    (found,) = made.pooled(iter([wave]))
    power = librosa.feature.melspectrogram(
        y=np.pad(wave, (0, 4096)), sr=SAMPLE_RATE, n_fft=2048, hop_length=320, n_mels=128,
        pad_mode="constant",
    )  # fmt: skip
    frames = np.log(power[:, : len(wave) // 320 + 1].T + 1e-5)
    assert found.shape == (1, 256)
    np.testing.assert_allclose(found[0], np.concatenate([frames.mean(0), frames.std(0)]), atol=1e-3)
    (stacked,) = made.frames(iter([wave]))
    assert stacked.shape == (1, len(frames), 256)
    np.testing.assert_allclose(stacked[0, 1:, 128:], np.diff(frames, axis=0), atol=2e-3)
    assert made.frame_rate == 75


def test_cqt_does_not_depend_on_the_padding():
    wave = tone(1.2)
    teacher = teachers.make("cqt")
    frames = np.log1p(np.asarray(teacher.apply(teacher.params, wave[None])[0]))
    (found,) = features.cqt().pooled(iter([wave]))
    expected = np.concatenate([frames.mean(0), frames.std(0)])
    np.testing.assert_allclose(found[0], expected, atol=1e-4)


def test_waves_are_asked_for_one_after_the_other():
    asked = []

    def waves():
        for seconds in (1.0, 2.0, 3.0):
            asked.append(seconds)
            yield tone(seconds)

    found = features.log_mel().pooled(waves())
    next(found)
    assert asked == [1.0]


def test_a_student_has_all_layers_or_some():
    whole = features.student(StandIn())
    (found,) = whole.pooled(iter([tone(1.0)]))
    assert whole.layers == len(found) == 4
    some = features.student(StandIn(), layers=(3, 1))
    assert some.layers == 2
    (frames,) = some.frames(iter([tone(1.0)]))
    assert frames.shape == (2, 75, 2)
    assert frames[:, 0, 0].tolist() == [3, 1]


def test_a_table_has_the_checkpoint_then_the_baselines(monkeypatch):
    monkeypatch.setattr(embedder, "load", lambda path: StandIn())
    made = features.make("somewhere", ["cqt", "random", "log_mel"])
    assert [f.name for f in made] == ["student", "random", "cqt", "log_mel"]
    assert made[0].fingerprint != made[1].fingerprint
    assert len({f.fingerprint for f in made}) == 4


@pytest.mark.parametrize(
    ("baselines", "said"),
    [
        (["mfcc"], "unknown baseline 'mfcc'"),
        (["random"], "--checkpoint"),
        ([], "nothing to probe"),
    ],
)
def test_mistakes(baselines, said):
    with pytest.raises(UserError, match=said):
        features.make("", baselines)
