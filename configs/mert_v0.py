"""MERT v0: k-means on log-mel and on chroma, and a CQT.

    python -m mert_jax.fit_teacher --teacher=kmeans --data=PREPARED --output=FITTED
    python -m mert_jax.train --config=configs/mert_v0.py --workdir=DIR --config.data.dir=PREPARED \
        --config.teacher.kmeans.checkpoint=FITTED

`mert_v0.py:large` and `mert_v0.py:tiny` train the other students.

Differs from base.py in the acoustic teacher, 300 centres on log-mel and 200 on chroma, and in that
no clips are mixed: the model card of MERT-v1-95M names the mixture among what is new in v1.

Source: arXiv 2306.00107, its comparison of teachers; no file of yizhilll/MERT has this recipe, so
that everything else is v1's. Only like the released MERT-v0, which heard 16 kHz at 50 frames a
second (here 24 kHz at 75). Both heads have 300 classes; the last 100 of chroma's are never targets.
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config(size: str = "base") -> ConfigDict:
    """The recipe; `size` is base, large or tiny."""
    config = sizes.sized(size)
    config.teachers = ("kmeans", "cqt")
    config.objective.mixture_prob = 0.0
    return config
