"""Our own codec, for `fit_teacher --teacher=rvq_vae`: a teacher without anybody's weights.

    python -m mert_jax.fit_teacher --teacher=rvq_vae --config=configs/codec.py \
        --data=PREPARED --output=DIR

trains EnCodec's 24 kHz encoder and decoder (arXiv 2210.13438, without its adversary);
`--config=configs/codec.py:small` one of a quarter of the width, for half an hour of two CPU cores.
"""

from ml_collections import ConfigDict

from mert_jax.fitting import codec_run


def get_config(size: str = "full") -> ConfigDict:
    """The settings; `size` is full or small."""
    config = codec_run.get_config()
    if size == "small":
        config.update(filters=8, dim=64, total_steps=1500, batch_size=16, learning_rate=1e-3)
        config.update(log_every=25, eval_every=250)
    elif size != "full":
        raise ValueError(f"codec.py is full or small, not {size!r}")
    return config
