"""Labels that would teach nothing stop a run before its first step, with the numbers."""

import numpy as np
import pytest

from mert_jax.data import code_checks
from mert_jax.errors import UserError
from mert_jax.pretraining.run import check_first_codes
from tests import small
from tests.small_run import Run, music


def test_good_labels_are_described():
    counts = np.array([[25, 25, 25, 25], [50, 50, 0, 0]])
    line = code_checks.check_codes("labels of x", counts, 100)
    assert line == "labels of x: 2 codebooks of 4, perplexity 4 2"


def test_one_code_for_everything_is_refused():
    counts = np.array([[25, 25, 25, 25], [0, 0, 99, 1]])
    with pytest.raises(UserError, match=r"codebook 1 of 2 is degenerate: 99\.0% of 100 .* code 2"):
        code_checks.check_codes("x", counts, 100)


def test_codes_outside_the_codebook_are_counted():
    counts = np.array([[25, 25, 25, 25], [25, 25, 25, 5]])
    with pytest.raises(UserError, match=r"20 of 100 codes of codebook 1 lie outside its 4"):
        code_checks.check_codes("x", counts, 100)


def test_a_batch_is_checked_as_it_is_trained_on():
    run = Run()
    batch = {"audio": music(8), "looped": np.zeros(8, bool)}
    sums = run.evaluate(run.init().params, run.teacher_params, batch, run.key)
    (line,) = check_first_codes(sums, small.config().objective.special_codes, "music")
    assert "labels of random_projection in music: 2 codebooks of 64, perplexity" in line
    silent = batch | {"audio": np.zeros_like(batch["audio"])}
    sums = run.evaluate(run.init().params, run.teacher_params, silent, run.key)
    with pytest.raises(UserError, match="degenerate"):
        check_first_codes(sums, small.config().objective.special_codes, "music")
    codes = sums.codes["random_projection"]
    special = np.eye(68)[[2, 2]] * int(sums.frames)  # <unk> everywhere
    sums.codes["random_projection"] = codes._replace(targets=special)
    with pytest.raises(UserError, match="lie outside its 64"):
        check_first_codes(sums, small.config().objective.special_codes, "music")
