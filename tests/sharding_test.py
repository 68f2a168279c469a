"""Meshes: the same parameters from birth and the same losses on every one."""

import functools

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from mert_jax import recipe, sharding, step
from mert_jax.cli import UserError
from tests import small
from tests.step_test import music

pytestmark = pytest.mark.usefixtures("compiled_quickly")


def run(mesh, steps=3, **overrides):
    """Losses and gradient norms of a few steps on `mesh` (data, fsdp, tensor), the initial
    parameters, and the last state."""
    # a low rate: Adam turns the rounding of a gradient near 0 into the sign of a whole step
    overrides = {"optimizer__peak_learning_rate": 1e-4} | overrides
    config = recipe.check(small.config(**overrides))
    made = recipe.make_teachers(config)
    student = recipe.student(config, made)
    objective = recipe.objective(config, student, made)
    optimizer = recipe.make_optimizer(config)
    init = functools.partial(recipe.init, config, student, optimizer)
    mesh = sharding.make_mesh(*mesh)
    with jax.set_mesh(mesh):
        shardings = sharding.state_shardings(init, mesh)
        state = jax.jit(lambda: nn.unbox(init()), out_shardings=shardings)()
        first = jax.tree.map(np.asarray, state.params)
        update, _ = step.compiled(
            objective, optimizer, config.accumulation, config.group, 10.0, shardings
        )
        params = {name: t.params for name, t in made.items()}
        params = sharding.placed(params, sharding.replicated(mesh))
        audio = np.asarray(music(config.batch_size))
        batch = {"audio": audio, "looped": np.zeros(len(audio), bool)}
        batch = {name: sharding.global_batch(x, len(x), mesh) for name, x in batch.items()}
        seen = []
        for _ in range(steps):
            state, result = update(state, params, batch, jax.random.key(0))
            loss = float(result["sums"].loss / result["sums"].frames)
            seen.append((loss, float(result["grad_norm"])))
    return seen, first, state


@pytest.fixture(scope="module")
def reference():
    return run((8, 1, 1))


@pytest.mark.parametrize("mesh", [(2, 2, 2), (1, 8, 1), (1, 1, 8)])
def test_every_mesh_gives_the_same_run(reference, mesh):
    seen, first, state = run(mesh)
    jax.tree.map(np.testing.assert_array_equal, first, reference[1])  # bit for bit
    np.testing.assert_allclose(seen, reference[0], rtol=1e-5)
    kernel = state.params["encoder"]["layers"]["intermediate_dense"]["kernel"]  # [L, D, F]
    shard = kernel.addressable_shards[0].data.shape
    assert shard == (kernel.shape[0], kernel.shape[1] // mesh[1], kernel.shape[2] // mesh[2])


def test_optimiser_state_is_sharded_like_its_parameter():
    config = small.config()
    student = recipe.student(config, recipe.make_teachers(config))
    init = functools.partial(recipe.init, config, student, recipe.make_optimizer(config))
    shardings = sharding.state_shardings(init, sharding.make_mesh(1, 8, 1))
    adam = shardings.opt_state[1]
    specs = lambda tree: [s.spec for s in jax.tree.leaves(tree)]
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
