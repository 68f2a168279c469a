"""Numbers that the whole package shares."""

SAMPLE_RATE = 24_000  # Hz, of MERT and of everything that a dataset holds
HOP_LENGTH = 320  # samples from one frame to the next: 75 frames a second
FULL_SCALE = 32_768  # int16 = wave * FULL_SCALE, libsndfile's scale: 16-bit files stay bit-exact

# of a workdir: the settings of its run, the student's architecture, the lock, the checkpoints
CONFIG_FILE = "config.json"
MODEL_FILE = "model.json"
LOCK_FILE = "lock"
CHECKPOINTS = "checkpoints"
