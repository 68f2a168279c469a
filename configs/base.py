"""MERT-v1-95M: 12 post-norm layers of 768, 5 s clips, 1.48 h of audio an update, 400k updates.

    python -m mert_jax.train --config=configs/base.py --workdir=DIR --config.data.dir=PREPARED

Values are the official ones (yizhilll/MERT, `mert_fairseq/config/pretrain`, RVQ-VAE and CQT, 95M)
unless a comment says otherwise. Needs `python -m mert_jax.prepare` first. 95,550,160 parameters.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """The 95M recipe."""
    config = ConfigDict()
    config.seed = 1337
    config.total_steps = 400_000
    # 64 GPUs of 2,000,000 samples (1.48 h) held 16 whole clips each: 1024 clips
    config.batch_size = 1024
    config.accumulation = 1  # micro-batches an update; the official run had none at 95M
    # neighbouring clips that share a noise pool and a count of masked frames: one GPU's batch
    config.group = 16
    config.log_every = 200
    config.eval_every = 5_000
    # weights to begin with: a workdir, a Hugging Face MERT or a fairseq .pt; "": none
    config.init_from = ""
    config.tensorboard = False  # needs the extra [tensorboard]

    config.data = ConfigDict(
        dict(
            dir="",  # of one prepared dataset, or of several: "mine,general"
            weights=(),  # the ratio of their clips, such as (0.8, 0.2); (): of their records
            num_samples=120_000,  # 5 s
            threads=16,  # that read ahead
            workers=0,  # > 0 reads in as many processes
            # clips whose record cannot be read and whose place another takes, as a share of all:
            # beyond it a run stops
            max_faulty=0.01,
            accept_changes=False,  # go on though the datasets are not those the run began with
        )
    )
    config.checkpoint = ConfigDict(
        dict(
            every_steps=5_000,
            every_minutes=30.0,
            keep=3,  # the newest, besides
            keep_every=0,  # those of steps that this divides; 0: none
        )
    )
    # an update that is not finite, or whose gradient norm is beyond `factor` times the median of
    # the last `window`, is skipped; `streak` in a row go back to an earlier checkpoint and pass
    # over the batches since, at most `rollbacks` times
    config.guard = ConfigDict(dict(window=128, factor=10.0, streak=8, rollbacks=3))
    config.watchdog_minutes = 30.0  # without a step, ends the run to be started again; 0: never
    config.mesh = ConfigDict(dict(data=-1, fsdp=1, tensor=1))  # -1: the rest of the devices

    # Codes by random projection need no download; the official acoustic teacher is an RVQ-VAE of
    # the same 8 x 1024 codes: mert_v1.py. Any mix of the teachers below goes.
    config.teachers = ("random_projection", "cqt")
    config.teacher = ConfigDict(
        dict(
            random_projection=ConfigDict(
                dict(weight=1.0, seed=0, books=8, size=1024, n_fft=2048, checkpoint="")
            ),
            # an EnCodec, or empty where the dataset stores the codes (prepare --codes); computed
            # codes hear half a second more than the clip. books: 0 is the first 8
            rvq_vae=ConfigDict(dict(weight=1.0, checkpoint="", books=0, context=12_160)),
            # what fit_teacher wrote
            kmeans=ConfigDict(dict(weight=1.0, checkpoint="")),
            mel_rvq=ConfigDict(dict(weight=1.0, checkpoint="", books=8)),
            # 7 octaves from C1 (32.7 Hz) on, a quarter of a semitone a bin
            cqt=ConfigDict(dict(weight=1.0, fmin=32.7, n_bins=336, bins_per_octave=48)),
        )
    )
    config.objective = ConfigDict(
        dict(
            mask_prob=0.8,
            mask_length=5,  # 67 ms
            mixture_prob=0.5,
            mixture_count=(1, 3),
            mixture_length=(12_000, 24_000),  # 0.5 to 1 s
            mixture_volume=1.0,
            logit_temperature=0.1,
            # fairseq's dictionary puts <s>, <pad>, </s> and <unk> before the first code; they are
            # never targets but stand in every softmax
            special_codes=4,
            features_penalty=10.0,
            unmasked_weight=0.0,  # of the cross-entropy at frames that are not masked
            codebooks_per_step=0,  # a random subset of each teacher's; 0: all of them
        )
    )
    config.model = ConfigDict(
        dict(
            conv_dim=512,
            conv_kernels=(10, 3, 3, 3, 3, 2, 2),
            conv_strides=(5, 2, 2, 2, 2, 2, 2),  # 320 samples a frame: 75 Hz at 24 kHz
            hidden_size=768,
            num_layers=12,
            num_heads=12,
            intermediate_size=3072,
            pre_norm=False,
            final_dim=64,
            pos_conv_kernel=128,
            pos_conv_groups=16,
            feature_grad_mult=0.1,
            input_dropout=0.1,
            hidden_dropout=0.1,
            attention_dropout=0.1,
            activation_dropout=0.0,
            layerdrop=0.05,
            remat="none",  # none, dots or full: what the backward pass recomputes
            # layers an iteration of the scan; all of them: a TPU need not stack their activations,
            # and compiles for minutes longer
            unroll=12,
            dtype="bfloat16",  # of computation; parameters, norms, softmax and losses are float32
        )
    )
    config.optimizer = ConfigDict(
        dict(
            peak_learning_rate=5e-4,
            warmup_steps=32_000,
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            weight_decay=0.01,
            clip_norm=10.0,
        )
    )
    return config
