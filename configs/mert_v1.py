"""MERT v1: the codes of an RVQ-VAE, and a CQT.

    python -m mert_jax.prepare --output=PREPARED --codes=ENCODEC
    python -m mert_jax.train --config=configs/mert_v1.py --workdir=DIR --config.data.dir=PREPARED

`mert_v1.py:large` and `mert_v1.py:tiny` train the other students. ENCODEC is the official
encodec_24khz-d7cc33bc.th, a Hugging Face EnCodec, or what `python -m mert_jax.fit_teacher
--teacher=rvq_vae` wrote; instead of storing its codes first,
`--config.teacher.rvq_vae.checkpoint=ENCODEC` computes them at every step.

Differs from base.py, large.py and tiny.py in the acoustic teacher alone: 8 codebooks of 1024.

Source: arXiv 2306.00107, and yizhilll/MERT, `mert_fairseq/config/pretrain`. Ours is only like it in
this: codes computed at every step hear half a second before the clip where the official ones hear
all of the track (stored ones do too).
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config(size: str = "base") -> ConfigDict:
    """The recipe; `size` is base, large or tiny."""
    config = sizes.sized(size)
    config.teachers = ("rvq_vae", "cqt")
    return config
