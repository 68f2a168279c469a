"""Meshes: the same parameters from birth and the same losses on every one."""

import functools
import math
import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mert_jax import sharding
from mert_jax.errors import UserError
from mert_jax.pretraining import build
from tests import small
from tests.small_run import music


def run(mesh, **overrides):
    """Losses and gradient norms of five steps of two micro-batches on `mesh` (data, fsdp, tensor),
    the initial parameters, and the last state."""
    # a low rate: Adam turns the rounding of a gradient near 0 into the sign of a whole step
    few = {"optimizer__peak_learning_rate": 1e-4, "batch_size": 16, "accumulation": 2}
    config = build.check(small.config(**few | overrides))
    made = build.make_teachers(config)
    student = build.make_student(config, made)
    mesh = sharding.make_mesh(*mesh, devices=jax.devices()[: math.prod(mesh)])
    sharding.check_batch(config.batch_size // config.accumulation, mesh)
    with jax.set_mesh(mesh):
        experiment = build.make_experiment(config, student, made, mesh)
        state = experiment.init()
        first = jax.tree.map(np.asarray, state.params)
        params = {name: t.params for name, t in made.items()}
        params = sharding.placed(params, sharding.replicated(mesh))
        audio = np.asarray(music(config.batch_size))
        batch = {"audio": audio, "looped": np.zeros(len(audio), bool)}
        batch = {name: sharding.global_batch(x, len(x), mesh) for name, x in batch.items()}
        seen = []
        for _ in range(5):
            state, result = experiment.train_step(state, params, batch, jax.random.key(0))
            loss = float(result["sums"].loss / result["sums"].frames)
            seen.append((loss, float(result["grad_norm"])))
    return seen, first, state


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module", params=["330m", *slow("95m")])
def flavour(request):
    """Its options, and its run on eight devices of one axis."""
    options = {"model__pre_norm": request.param == "330m"}
    return options, run((8, 1, 1), **options)


@pytest.mark.parametrize("mesh", [(2, 2, 2), *slow((1, 1, 1), (1, 8, 1), (1, 1, 8))])
def test_every_mesh_gives_the_same_run(flavour, mesh):
    options, (expected, first, _) = flavour
    seen, born, state = run(mesh, **options)
    jax.tree.map(np.testing.assert_array_equal, born, first)  # bit for bit
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    kernel = state.params["encoder"]["layers"]["intermediate_dense"]["kernel"]  # [L, D, F]
    shard = kernel.addressable_shards[0].data.shape
    assert shard == (kernel.shape[0], kernel.shape[1] // mesh[1], kernel.shape[2] // mesh[2])


def test_neighbours_of_a_group_share_their_noise_and_nobody_else():
    """Where a group lies within a device's clips, the step moves no audio between devices."""
    mesh = sharding.make_mesh(8, 1, 1)
    keys = jax.random.split(jax.random.key(0), 32)
    config = small.config(group=4)
    made = build.make_teachers(config)
    objective = build.make_objective(config, build.make_student(config, made), made)
    layout = jax.NamedSharding(mesh, sharding.BATCH)
    wave = jax.ShapeDtypeStruct((32, 16_000), np.float32, sharding=layout)
    both = jax.jit(lambda wave: (objective.mixture(keys, wave), objective.mask(keys, 50)))
    with jax.set_mesh(mesh):
        text = both.lower(wave).compile().as_text()
    assert not re.findall(r"all-gather|all-to-all|collective-permute|all-reduce", text)


def test_optimiser_state_is_sharded_like_its_parameter():
    config = small.config()
    student = build.make_student(config, build.make_teachers(config))
    init = functools.partial(build.init, config, student, build.make_optimizer(config))
    shardings = sharding.state_shardings(init, sharding.make_mesh(1, 8, 1))
    adam = shardings.opt_state[1]

    def specs(tree):
        return [s.spec for s in jax.tree.leaves(tree)]

    assert specs(adam.mu) == specs(adam.nu) == specs(shardings.params)
    assert any("fsdp" in spec for spec in specs(shardings.params))


def test_a_dimension_that_does_not_divide_stays_whole():
    mesh = sharding.make_mesh(1, 1, 8)
    fitting = functools.partial(sharding._fitting, ("embed", "mlp"), mesh=mesh)
    assert fitting((32, 64)) == PartitionSpec("fsdp", "tensor")
    assert fitting((32, 60)) == PartitionSpec("fsdp", None)


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (16, 1, 1), (-1, -1, 1), (0, 8, 1)])
def test_meshes_that_do_not_fit_are_refused(sizes):
    with pytest.raises(UserError, match=r"does not make 8 devices; set mesh\.data"):
        sharding.make_mesh(*sizes)


def test_minus_one_is_the_rest():
    assert dict(sharding.make_mesh(-1, 2, 1).shape) == {"data": 4, "fsdp": 2, "tensor": 1}


def test_a_batch_that_cannot_be_split_is_refused():
    mesh = sharding.make_mesh(4, 2, 1)
    sharding.check_batch(16, mesh)
    with pytest.raises(UserError, match=r"micro-batches of 12 clips .* 8 shards"):
        sharding.check_batch(12, mesh)
