"""Like MusicFM: one codebook of a random projection (BEST-RQ), 0.4 s masked at a time, no CQT.

    python -m mert_jax.train --config=configs/musicfm.py --workdir=DIR --config.data.dir=PREPARED

`musicfm.py:large` and `musicfm.py:tiny` train the other students. Codes of features normalised over
the dataset, as MusicFM's are, rather than over the clip, need `python -m mert_jax.fit_teacher
--teacher=random_projection --data=PREPARED --output=FITTED` and
`--config.teacher.random_projection.checkpoint=FITTED`.

Source: arXiv 2311.03318 and minzwon/musicfm, `model/musicfm_25hz.py`: 4096 codes of 16 dimensions
from 128 log-mel bands of 2048 samples; every window of 0.4 s (30 of our frames) is masked with
probability 0.6; no mixture, no fairseq dictionary. tiny.py's clips of 1 s are too short for such
masks, and its 600 updates for so many codes: there the masks and the 256 codes are tiny.py's.

Only like it: MusicFM is a Conformer on log-mel at 25 frames a second, a code of four stacked frames
of 10 ms, clips of 30 s; ours is MERT's student, a code for each of 75 frames, clips of 5 s. It
puts noise into the wave where ours masks the front end's output, and scores codes by a linear
layer where ours scores by cosine. Its training script is not public: schedule and batch are MERT's.
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config(size: str = "base") -> ConfigDict:
    """The recipe; `size` is base, large or tiny."""
    config = sizes.sized(size)
    config.teachers = ("random_projection",)
    config.teacher.random_projection.update(books=1, n_fft=2048)
    config.group = 1  # of clips that are mixed and share a count of masked frames: none do
    config.objective.update(mixture_prob=0.0, special_codes=0)
    if size != "tiny":
        config.teacher.random_projection.size = 4096
        # overlapping spans that cover, measured, 0.60 of the frames
        config.objective.update(mask_prob=0.9, mask_length=30)
    return config
