"""All golden tests by one path: `MERT_JAX_GOLDEN=FOLDER python -m pytest tests/golden_test.py`.

FOLDER (default: tests/golden) holds numbers of the official code; tests/golden/README.md explains
each array and tolerance. The tests take every size from its files, run whatever files, cases and
keys are there, and fail if there are none. A run of the whole suite collects the files of
tests/golden instead of this one.
"""

from tests.golden.cqt_test import *
from tests.golden.encodec_test import *
from tests.golden.huggingface_test import *
from tests.golden.initialisation_test import *
from tests.golden.masking_test import *
from tests.golden.mixture_test import *
from tests.golden.optimizer_test import *
from tests.golden.student_test import *
from tests.golden_files import FOLDER, names, read_json


def test_the_folder_holds_golden_numbers():
    cases = [
        *STUDENT_FILES,
        *HF_WEIGHTS,
        *names("cqt*.npz"),
        *ENCODEC,
        *MASK_CASES,
        *MIXTURE,
        *read_json("lr_schedule.json"),
        *names("optimizer.npz"),
        *read_json("init_stats.json"),
    ]
    assert cases, f"MERT_JAX_GOLDEN={FOLDER} holds no golden numbers that these tests know"
