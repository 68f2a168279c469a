"""Starting from the weights of a checkpoint: what is loaded, what is new, and the report."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import traverse_util

from mert_jax import sharding
from mert_jax.checkpoints import in_memory, init_from
from mert_jax.errors import UserError
from mert_jax.models import mert_v1
from mert_jax.pretraining import optimizer, step

CODES, CQT = mert_v1.Head("rvq_vae", 12, 2), mert_v1.Head("cqt", 5)
TEACHERS = {"rvq_vae": "a codec", "cqt": "a transform"}


def student(*heads: mert_v1.Head, **options) -> mert_v1.Student:
    sizes = dict(
        conv_dim=8,
        conv_kernels=(10, 3),
        conv_strides=(5, 2),
        hidden_size=16,
        num_layers=2,
        num_heads=4,
        intermediate_size=24,
        pre_norm=True,
        final_dim=4,
        pos_conv_kernel=8,
        pos_conv_groups=2,
    )
    return mert_v1.Student(heads=heads, **sizes | options)


def noise(tree, seed: int):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), tree)


def checkpoint(of: mert_v1.Student, moments: bool = True, **about) -> in_memory.Checkpoint:
    shapes = jax.eval_shape(of.init, jax.random.key(0), jnp.zeros((1, 400)))["params"]
    params = noise(nn.unbox(shapes), 0)
    adam = (noise(params, 1), noise(params, 2)) if moments else None
    return in_memory.Checkpoint(
        of, params, adam, 7, in_memory.About(**{"teachers": TEACHERS} | about)
    )


def match(source: in_memory.Checkpoint, of: mert_v1.Student, special_codes: int = 4, **teachers):
    return init_from.match_checkpoint(source, of, TEACHERS | teachers, special_codes)


def flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def test_the_same_student_loads_everything():
    source = checkpoint(student(CODES, CQT))
    start = match(source, source.student)
    given, taken = (source.params, *source.moments), (start.params, *start.moments)
    for tree, new in zip(given, taken, strict=True):
        assert new.keys() == flat(tree).keys()
        assert all(np.array_equal(new[name], x) for name, x in flat(tree).items())
    assert start.count == 7
    assert not [line for line in start.lines if "new, since" in line]


@pytest.mark.parametrize(
    ("heads", "options", "teachers", "reason"),
    [
        (
            (mert_v1.Head("rvq_vae", 12, 3), CQT),
            {},
            {},
            r"rvq_vae_codebooks \[2, 12, 4\], .*there and rvq_vae_codebooks \[3, 12, 4\]",
        ),
        (
            (mert_v1.Head("rvq_vae", 20, 2), CQT),
            {},
            {},
            r"rvq_vae_codebooks \[2, 12, 4\], .*there and rvq_vae_codebooks \[2, 20, 4\]",
        ),
        (
            (CODES, CQT),
            {"final_dim": 8},
            {},
            r"rvq_vae_proj/kernel \[16, 8\] there and .*rvq_vae_proj/kernel \[16, 16\] here",
        ),
        ((CODES, CQT), {}, {"rvq_vae": "another codec"}, "its teacher is another one"),
        ((mert_v1.Head("kmeans", 12, 2), CQT), {}, {"kmeans": "x"}, "has no head with that name"),
    ],
)
def test_a_head_of_another_teacher_is_new(heads, options, teachers, reason):
    source = checkpoint(student(CODES, CQT))
    start = match(source, student(*heads, **options), **teachers)
    name = heads[0].name
    assert [line for line in start.lines if re.match(f"head {name}: new, .*{reason}", line)]
    assert not [path for path in start.params if path.startswith(name)]
    assert "cqt_proj/kernel" in start.params
    assert "encoder/layer_norm/scale" in start.params
    assert all(m.keys() == start.params.keys() for m in start.moments)


def test_a_transform_of_other_settings_is_another_teacher():
    start = match(checkpoint(student(CODES, CQT)), student(CODES, CQT), cqt="other bins")
    assert not [path for path in start.params if path.startswith("cqt")]
    assert "rvq_vae_codebooks" in start.params


def test_an_unnamed_teacher_is_assumed_to_be_the_same_and_reported():
    source = checkpoint(student(CODES, CQT), teachers={})
    start = match(source, student(CODES, CQT))
    assert "rvq_vae_codebooks" in start.params
    assert len([line for line in start.lines if "does not name" in line]) == 2


def test_a_checkpoint_without_heads_and_moments():
    start = match(checkpoint(student(), moments=False), student(CODES, CQT))
    assert start.moments is None
    assert set(start.params) == set(flat(checkpoint(student()).params))
    assert len([line for line in start.lines if "new, since" in line]) == 3


def test_special_rows_are_dropped_if_the_run_has_none():
    source = checkpoint(student(CODES, CQT))
    start = match(source, student(mert_v1.Head("rvq_vae", 8, 2), CQT), special_codes=0)
    books = source.params["rvq_vae_codebooks"]
    np.testing.assert_array_equal(start.params["rvq_vae_codebooks"], books[:, 4:])
    np.testing.assert_array_equal(
        start.moments[0]["rvq_vae_codebooks"], source.moments[0]["rvq_vae_codebooks"][:, 4:]
    )
    assert any("without the 4 special rows" in line for line in start.lines)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 32}, "hidden_size is 16 there and 32 here"),
        ({"pre_norm": False}, "pre_norm is True there and False here"),
        ({"num_layers": 3, "num_heads": 8}, "num_layers is 2 .*num_heads is 4 there and 8 here"),
    ],
)
def test_another_body_is_refused_with_all_that_differs(options, message):
    with pytest.raises(UserError, match=message):
        match(checkpoint(student(CODES)), student(CODES, **options))


def test_another_sample_rate_is_refused():
    with pytest.raises(UserError, match="sample rate is 16000 there and 24000 here"):
        match(checkpoint(student(CODES), sample_rate=16_000), student(CODES))


def test_projection_matters_only_between_equal_widths():
    other = {"project_equal_widths": True}
    match(checkpoint(student(CODES, **other)), student(CODES))
    equal = {"conv_dim": 16}
    with pytest.raises(UserError, match="project_equal_widths"):
        match(checkpoint(student(CODES, **equal, **other)), student(CODES, **equal))


def test_normalised_waves_and_skipped_heads_are_reported():
    source = checkpoint(student(CODES, CQT), do_normalize=True)
    lines = match(source, student(CQT)).lines
    assert any("normalised" in line for line in lines)
    assert any(line.startswith("head rvq_vae: skipped") for line in lines)


@pytest.mark.parametrize("moments", [True, False])
def test_the_state_has_the_loaded_weights_and_keeps_the_rest(moments):
    of = student(CODES, CQT)
    chain = optimizer.make(optax.constant_schedule(0.1), clip_norm=1.0)

    def init():
        params = of.init(jax.random.key(3), jnp.zeros((1, 400)))["params"]
        return step.begin(params, chain, window=8)

    mesh = sharding.make_mesh(2, 2, 2)
    shardings = sharding.state_shardings(init, mesh)
    initialise = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)
    before, fresh = initialise(), initialise()
    source = checkpoint(student(CQT), moments=moments)
    state = init_from.apply_initial_weights(before, match(source, of))
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, fresh)
    assert int(state.step) == 0
    new, theirs = flat(state.params), flat(source.params)
    adam, empty = state.opt_state[1], fresh.opt_state[1]
    for name, x in flat(fresh.params).items():
        np.testing.assert_array_equal(new[name], theirs.get(name, x))
        mu = flat(source.moments[0] if moments else empty.mu).get(name, np.zeros(x.shape))
        np.testing.assert_array_equal(flat(adam.mu)[name], mu)
    assert int(adam.count) == (7 if moments else 0)
    assert int(state.opt_state[3].count) == 0  # of the learning rate's schedule
