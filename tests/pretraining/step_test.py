"""The step: what it updates, and what its result may not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax.errors import UserError
from mert_jax.models import mert_v1
from mert_jax.pretraining import build, losses, metrics, step
from tests import small
from tests.small_run import SAMPLES, Run, music


@pytest.fixture(scope="module")
def run():
    return Run(total_steps=60)


def test_the_loss_falls_on_one_batch(run):
    _, rows = run.train(40, music(8))
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"]
    assert rows[-1]["loss_cqt"] < rows[0]["loss_cqt"]


def test_the_first_update_moves_only_the_moments(run):
    before = run.init()
    after, _ = run.train(1, music(8))
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    moved = [np.any(np.asarray(m)) for m in jax.tree.leaves(after.opt_state)]
    assert any(moved)
    assert int(after.step) == 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_skipped_and_the_run_goes_on(run, value):
    state, _ = run.train(2, music(8))
    bad = np.asarray(music(8), np.float32)
    bad[3, 1000:1010] = value
    batch = {"audio": bad, "looped": np.zeros(8, bool)}
    before = jax.tree.map(np.asarray, state)
    state, result = run.step(state, run.teacher_params, batch, run.key)
    assert not np.isfinite(result["grad_norm"])
    for part in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(before, part), getattr(state, part))
    assert (int(state.step), int(state.batch)) == (3, 3)
    assert (int(state.guard.skipped), int(state.guard.streak)) == (1, 1)
    state, result = run.step(state, run.teacher_params, {**batch, "audio": music(8) * 1.0}, run.key)
    assert (int(state.guard.skipped), int(state.guard.streak)) == (1, 0)
    assert int(result["updates"]) == 2  # of the learning rate's schedule, too
    assert np.any(
        np.asarray(before.params["masked_spec_embed"] != state.params["masked_spec_embed"])
    )


def test_loss_is_the_weighted_sum_of_its_parts(run):
    other = Run(teacher__cqt__weight=3.0, teacher__random_projection__weight=0.5)
    given = (run.init().params, run.teacher_params, {"audio": music(8)}, run.key)
    row = metrics.to_row(other.evaluate(*given))
    parts = 0.5 * row["loss_codes"] + 3 * row["loss_cqt"] + 10 * row["features_penalty"]
    assert row["loss"] == pytest.approx(parts, rel=1e-5)


def test_accumulation_changes_nothing_but_rounding():
    # the penalty is a mean over a micro-batch's clips, weighted by its masked frames: left out
    whole, rows = Run(objective__features_penalty=0.0).train(3, music(8))
    parts, other = Run(objective__features_penalty=0.0, accumulation=4).train(3, music(8))
    for a, b in zip(rows, other, strict=True):
        assert a["loss_codes"] == pytest.approx(b["loss_codes"], rel=1e-5)
        assert a["loss_cqt"] == pytest.approx(b["loss_cqt"], rel=1e-4)
        assert a["code_perplexity"] == b["code_perplexity"]  # the same frames are masked
    # Adam turns a gradient's rounding into a step's sign where the gradient is nearly 0
    close = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4)
    jax.tree.map(close, whole.params, parts.params)


def test_micro_batches_are_whole_groups_and_cover_the_batch():
    rows = step.split(jnp.arange(24), 3, 2)
    assert rows.shape == (3, 8)
    assert sorted(np.ravel(rows)) == list(range(24))
    pairs = np.asarray(rows).reshape(3, 4, 2)
    np.testing.assert_array_equal(pairs[..., 1] - pairs[..., 0], np.ones((3, 4)))


def test_masks_differ_between_steps_and_seeds(run):
    keys = [step.row_keys(jax.random.fold_in(run.key, k), jnp.arange(8)) for k in range(2)]
    masks = [np.asarray(run.objective.mask(k, 49)) for k in keys]
    assert (masks[0] != masks[1]).any()
    assert (masks[0] == np.asarray(run.objective.mask(keys[0], 49))).all()


def test_evaluation_neither_mixes_nor_drops_out(run):
    dropping = Run(model__hidden_dropout=0.5)
    dropping.objective = dropping.objective._replace(mixture=lambda keys, wave: wave * jnp.nan)
    given = (run.init().params, run.teacher_params, {"audio": music(8)}, run.key)
    assert float(dropping.evaluate(*given).loss) == float(run.evaluate(*given).loss)


def test_visible_frames_count_where_they_have_a_weight(run):
    given = (run.init().params, run.teacher_params, {"audio": music(8)}, run.key)
    masked, both = run.evaluate(*given), Run(objective__unmasked_weight=0.5).evaluate(*given)
    assert masked.unmasked is None
    assert float(both.unmasked) > 0
    assert float(both.loss) == pytest.approx(float(masked.loss + both.unmasked), rel=1e-6)
    np.testing.assert_array_equal(*(s.codes["random_projection"].correct for s in (masked, both)))


def test_targets_are_of_the_clean_wave(run):
    """A teacher that repeats the wave and a student that repeats it too disagree by the mixture."""
    audio = music(4)
    clean = run.objective._replace(
        teachers={"wave": lambda params, wave: wave[..., None]},
        weights={"wave": 1.0},
        student=lambda params, wave, mask, length, key: mert_v1.Output(
            None, jnp.zeros(()), {"wave": wave[:, :length, None]}
        ),
        num_frames=lambda samples: samples // 4,
        mixture=lambda keys, wave: wave + 3,
    )
    given = ({}, {"wave": {}}, audio, jnp.arange(4), run.key, clean)
    loss, sums = step.loss_fn(*given, True)
    assert float(sums.features["wave"] / sums.frames) == pytest.approx(9, rel=1e-5)
    loss, sums = step.loss_fn(*given, False)
    assert float(loss) == 0 < int(sums.frames)


def test_shorter_targets_shorten_the_student(run):
    other = Run()

    def codes(params, wave):
        return jnp.zeros((wave.shape[0], 30, 2), jnp.int32)

    teachers = other.objective.teachers | {"random_projection": codes}
    other.objective = other.objective._replace(teachers=teachers)
    target = jax.eval_shape(
        lambda wave: step.compute_targets(other.objective, run.teacher_params, wave, 49),
        jnp.zeros((2, SAMPLES)),
    )
    assert {t.shape[1] for t in target.values()} == {30}
    sums = other.evaluate(run.init().params, run.teacher_params, {"audio": music(2)}, run.key)
    assert 0 < int(sums.frames) < 60


def test_flops_agree_with_the_published_count():
    """The analytic count of 0.328 TFLOP a 5 s clip, forward and backward, at 95M."""
    from configs import base

    config = base.get_config()
    student = mert_v1.Student(heads=(), **dict(config.model) | {"dtype": jnp.float32})
    assert 3 * student.flops(120_000) == pytest.approx(0.328e12, rel=0.01)


def test_wrong_shapes_are_named():
    with pytest.raises(ValueError, match=r"\(1, 3, 2, 5\).*\(1, 4, 2\)"):
        losses.code_loss(jnp.zeros((1, 3, 2, 5)), jnp.zeros((1, 4, 2), int), jnp.ones((1, 3), bool))
    with pytest.raises(ValueError, match=r"\(1, 3, 5\).*\(1, 4, 5\)"):
        losses.feature_loss(jnp.zeros((1, 3, 5)), jnp.zeros((1, 4, 5)), jnp.ones((1, 3), bool))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(batch_size=9), "batch_size 9"),
        (dict(accumulation=3), "accumulation=3"),
        (dict(total_steps=0), "total_steps is 0"),
        (dict(teachers=()), "name at least one"),
        (dict(teachers=("cqt", "cqt")), "each once"),
        (dict(model__num_heads=5), "num_heads 5"),
        (dict(model__remat="some"), "remat is 'some'"),
        (dict(objective__mixture_length=(10, 20_000)), "mixture_length reaches 20000"),
    ],
)
def test_configs_that_do_not_go_together_are_refused(overrides, message):
    with pytest.raises(UserError, match=message):
        build.check(small.config(**overrides))


def test_a_subset_of_the_codebooks():
    """Other books each step, without replacement, worth all of them on average; none in validation
    is left out."""
    run = Run(teacher__random_projection__books=4, objective__codebooks_per_step=2)
    whole = Run(teacher__random_projection__books=4)
    batch = {"audio": music(8), "looped": jnp.zeros(8, bool)}
    params = run.init().params
    rows, loss = (
        jnp.arange(8),
        jax.jit(
            lambda run, key: step.loss_fn(
                params, run.teacher_params, batch["audio"], rows, key, run.objective, True
            ),
            static_argnums=0,
        ),
    )
    drawn = set()
    for i in range(12):
        key = jax.random.fold_in(run.key, i)
        total, sums = loss(run, key)
        c, exact = sums.codes["random_projection"], loss(whole, key)
        books = tuple(np.flatnonzero(c.targets.sum(-1)).tolist())
        assert len(books) == 2
        picked = np.array(books)
        theirs = exact[1].codes["random_projection"]
        np.testing.assert_allclose(c.cross_entropy[picked], theirs.cross_entropy[picked], rtol=1e-5)
        others = np.delete(np.arange(4), picked)
        assert not np.asarray(c.cross_entropy)[others].any()
        rest = exact[0] - theirs.cross_entropy.sum()
        np.testing.assert_allclose(total, rest + 2 * c.cross_entropy.sum(), rtol=1e-5)
        drawn.add(books)
    assert len(drawn) > 3
    assert {book for books in drawn for book in books} == {0, 1, 2, 3}
    row = metrics.to_row(sums)
    assert [x is None for x in row["masked_accuracy"]] == [k not in books for k in range(4)]
    assert "-" in metrics.console_line(
        row | {"step": 1, "learning_rate": 0.0, "audio_seconds_per_second": 0.0}, 2, "?"
    )
    # one subset for all micro-batches: which rows they hold makes no difference
    other = jax.jit(
        lambda rows: step.loss_fn(
            params, run.teacher_params, batch["audio"], rows, key, run.objective, True
        )
    )(rows + 8)[1].codes["random_projection"]
    assert tuple(np.flatnonzero(other.targets.sum(-1)).tolist()) == books
    assert not np.array_equal(other.cross_entropy, c.cross_entropy)
    checked = run.evaluate(params, run.teacher_params, batch, run.key)
    assert checked.codes["random_projection"].targets.sum(-1).all()
