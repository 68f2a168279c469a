"""Beats: tunes played at a tempo that drifts, and when their beats are."""

import numpy as np

from mert_jax.synthetic.fonts import Fonts
from mert_jax.synthetic.playing import BACKINGS, LEADS, STYLES, play
from mert_jax.synthetic.recipe import Clip, Recipe, rng, vary
from mert_jax.synthetic.tunes import LICENCE, Tune, headers, parse

SECONDS = 8.0
TEMPI = (65, 165)  # beats a minute
CLIPS = {"train": 275, "val": 75, "test": 150}
SMALL = {"train": 4, "val": 2, "test": 3}


def beat(fonts: Fonts, small: bool = False) -> Recipe:
    """When the beats are [seconds]: crotchets, dotted ones in 6/8 and 9/8. One clip a tune."""
    counts = SMALL if small else CLIPS
    tunes = iter(_tunes(sum(counts.values())))
    clips = [_clip(fonts, split, next(tunes), i) for split, n in counts.items() for i in range(n)]
    about = {
        "source": f"tunes of music21's corpus, chords put to them, rendered; {LICENCE}",
        "split": "by tune; train and val: one font; test: another font",
        "fonts": {"train": fonts.train.about, "test": fonts.test.about},
    }
    return Recipe(clips, about)


def _tunes(count: int) -> list[Tune]:
    """Tunes in a drawn order; none in C|, whose beat may be felt as minims or as crotchets."""
    found, those = [], [header for header in headers() if header.metre != "C|"]
    order = iter(rng("made_beat").permutation(len(those)))
    while len(found) < count:
        if tune := parse(those[next(order)]):
            found.append(tune)
    return found


def beat_times(count: int, draw: np.random.Generator) -> np.ndarray:
    """Times [seconds] of `count` beats: a drawn tempo that wanders by some percent a beat, and
    stays within a sixth of where it began."""
    drift = np.zeros(count)
    for i in range(1, count):
        drift[i] = np.clip(0.95 * drift[i - 1] + draw.normal(0, 0.02), -1 / 6, 1 / 6)
    period = 60 / np.exp(draw.uniform(*np.log(TEMPI))) * np.exp(drift)
    return draw.uniform(0.05, 0.4) + np.append(0.0, period[:-1].cumsum())


def _clip(fonts: Fonts, split: str, tune: Tune, i: int) -> Clip:
    font, draw = fonts.of(split), rng("made_beat", split, i)
    times = beat_times(int(SECONDS * TEMPI[1] / 60 * 1.3) + 2, draw)
    inside = [round(float(t), 4) for t in times if t < SECONDS]

    def wave() -> np.ndarray:
        clock = lambda at: float(np.interp(at / tune.beat, np.arange(len(times)), times))
        style = STYLES[int(draw.integers(len(STYLES)))]
        lead, backing = (int(draw.choice(x)) for x in (LEADS, BACKINGS))
        drums = bool(draw.uniform() < 0.5)
        until = len(inside) * tune.beat
        notes = play(tune, style, lead, backing, until, clock, draw, drums)
        return vary(font.play(notes, SECONDS), draw)

    made_of = {"font": font.name, "tune": tune.header.title, "of": tune.header.collection}
    return Clip(split, {"beat": inside}, made_of, wave)
