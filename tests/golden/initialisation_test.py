"""Initial parameters against statistics of the official ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from mert_jax.checkpoints import fairseq
from mert_jax.checkpoints import tensor_names as official
from tests.golden_files import fake_state, read_json


@functools.cache
def our_initial_parameters(name: str) -> dict[str, np.ndarray]:
    """A fresh full-size student's parameters, under fairseq's names."""
    listed = read_json("init_stats.json")[name]
    state = fake_state([(key, stats["shape"]) for key, stats in listed.items()])
    # heads leave no trace in the parameters; of the layers, the first and one other are listed
    student = fairseq.student({"encoder_attention_heads": 1}, state)
    last = max(int(key.split(".")[2]) for key in state if key.startswith("encoder.layers."))
    student = student.clone(num_layers=last + 1)
    init = jax.jit(lambda key: nn.unbox(student.init(key, jnp.zeros((1, 4000)))["params"]))
    return official.params_to_fairseq(init(jax.random.key(7)))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        pytest.param(name, key, marks=() if name == "95m" else pytest.mark.slow)
        for name, listed in read_json("init_stats.json").items()
        for key in listed
    ],
)
def test_initialisation(name, key):
    """Mean, spread and shape of each tensor, both being one draw: 5 standard errors of both."""
    stored, x = read_json("init_stats.json")[name][key], our_initial_parameters(name)[key]
    assert list(x.shape) == stored["shape"]
    mean, std = x.mean(dtype=np.float64), x.std(dtype=np.float64)
    if stored["std"] == 0:
        assert std == 0
        assert mean == stored["mean"]
        return
    kurtosis = ((x - np.float32(mean)) ** 4).mean(dtype=np.float64) / std**4
    both = (2 / x.size) ** 0.5
    assert abs(mean - stored["mean"]) <= 5 * stored["std"] * both
    # the variance of a sample's variance is (kurtosis - 1) / n, which small tensors know badly
    assert abs(std / stored["std"] - 1) <= 5 * both * (max(kurtosis, 1.8) - 1) ** 0.5 / 2
    assert abs(kurtosis - stored["kurtosis"]) <= 5 * both * (24**0.5 if kurtosis > 2.4 else 1)
    if kurtosis < 2.4:  # uniform: the same bounds, which large samples nearly reach
        width = stored["max"] - stored["min"]
        assert abs(x.min() - stored["min"]) <= 20 / x.size * width
        assert abs(x.max() - stored["max"]) <= 20 / x.size * width
