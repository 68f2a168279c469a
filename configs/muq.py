"""Like MuQ: a residual quantiser of log-mel frames (Mel-RVQ), 0.4 s masked at a time, no CQT.

    python -m mert_jax.fit_teacher --teacher=mel_rvq --data=PREPARED --output=FITTED
    python -m mert_jax.train --config=configs/muq.py --workdir=DIR --config.data.dir=PREPARED \
        --config.teacher.mel_rvq.checkpoint=FITTED

`muq.py:large` and `muq.py:tiny` train the other students.

Source: arXiv 2501.01108 and tencent-ailab/MuQ, `muq_model.py`: 8 codebooks of 1024 codes of 16
dimensions; every window of 0.4 s (30 of our frames) is masked with probability 0.6; no mixture, no
fairseq dictionary. tiny.py's clips of 1 s are too short for such masks: there they are tiny.py's.

Only like it: MuQ is a Conformer on log-mel at 25 frames a second, a code of four stacked frames of
10 ms; ours is MERT's student, a code for each of 75 frames, clips of 5 s. It puts noise into the
wave where ours masks the front end's output, scores codes by a linear layer where ours scores by
cosine, and takes the mean of the codebooks' cross-entropies where ours takes their sum. Its second
round, on codes of the first round's features, is not here, nor the settings of its training runs,
which we have not found: schedule and batch are MERT's, masks the defaults of its code.
"""

from ml_collections import ConfigDict

from configs import sizes


def get_config(size: str = "base") -> ConfigDict:
    """The recipe; `size` is base, large or tiny."""
    config = sizes.sized(size)
    config.teachers = ("mel_rvq",)
    config.group = 1  # of clips that are mixed and share a count of masked frames: none do
    config.objective.update(mixture_prob=0.0, special_codes=0)
    if size != "tiny":
        # overlapping spans that cover, measured, 0.60 of the frames
        config.objective.update(mask_prob=0.9, mask_length=30)
    return config
