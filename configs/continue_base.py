"""Continued pretraining of MERT-v1-95M on music of your own, with some of other music replayed.

    python -m mert_jax.train --config=configs/continue_base.py --workdir=DIR \
        --config.init_from=MERT-v1-95M --config.data.dir=MINE,GENERAL

MERT-v1-95M is the Hugging Face directory, a fairseq .pt, or a workdir of ours. MINE and GENERAL are
prepared datasets that store the codes of the same EnCodec (`python -m mert_jax.prepare
--output=MINE --codes=ENCODEC`); for MINE alone, add --config.data.weights="()".

Differs from mert_v1.py in the length and the learning rate: it warms up again, to a tenth of the
peak of pretraining, and falls to 0. Hugging Face checkpoints keep no heads; theirs are made anew.

The values are a beginning: this recipe has been run at small size only.
"""

from ml_collections import ConfigDict

from configs import mert_v1


def get_config(size: str = "base") -> ConfigDict:
    """The recipe; `size` is base, large or tiny."""
    config = mert_v1.get_config(size)
    config.init_from = "MERT-v1-95M"
    config.total_steps = 20_000
    config.batch_size = 8 * config.group  # for one host; 11 minutes of audio an update at 95M
    config.accumulation = 1
    config.eval_every = 500
    config.checkpoint.every_steps = 1_000
    config.data.weights = (0.8, 0.2)  # the second dataset is replayed
    config.optimizer.peak_learning_rate *= 0.1
    config.optimizer.warmup_steps = 1_000
    return config
