"""MERT-v1-330M: 24 pre-norm layers of 1024, 5.12 s clips, 5.45 h of audio an update, 400k updates.

    python -m mert_jax.train --config=configs/large.py --workdir=DIR --config.data.dir=PREPARED

What differs from base.py, with the official values (yizhilll/MERT,
`mert_fairseq/config/pretrain`, RVQ-VAE and CQT, 330M). 317,875,664 parameters.
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """The 330M recipe."""
    config = base.get_config()
    # 64 GPUs of 920,000 samples, 8 times an update (5.45 h), held 7 whole clips each: 3584 clips
    config.batch_size = 3584
    config.accumulation = 8
    config.group = 7
    config.data.num_samples = 122_880  # 5.12 s
    config.objective.mixture_length = (12_000, 36_000)  # 0.5 to 1.5 s
    config.model.update(
        hidden_size=1024,
        num_layers=24,
        num_heads=16,
        intermediate_size=4096,
        pre_norm=True,
        final_dim=128,
        feature_grad_mult=1.0,
        input_dropout=0.0,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        remat="dots",
        unroll=24,  # a quarter faster on TPUs than one at a time, and compiles for minutes longer
    )
    config.optimizer.peak_learning_rate = 1.5e-3
    config.optimizer.clip_norm = 1.0
    return config
