"""The student beyond the golden numbers: other options, precision, names of parameters."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.extend.core import jaxprs_in_params

from configs import base, large, tiny
from mert_jax import teachers
from mert_jax.models import mert_v1
from mert_jax.pretraining import build, step

PARAMETERS = Path(__file__).parents[1] / "parameters.json"
OFFICIAL_CONVOLUTIONS = dict(
    conv_kernels=(10, 3, 3, 3, 3, 2, 2), conv_strides=(5, 2, 2, 2, 2, 2, 2)
)
FLAVOURS = pytest.mark.parametrize("pre_norm", [False, True], ids=["post_norm", "pre_norm"])


def student(**options) -> mert_v1.Student:
    sizes = dict(
        conv_dim=16,
        conv_kernels=(10, 8, 8),
        conv_strides=(5, 8, 8),  # 320 samples a frame, as the official seven layers
        hidden_size=32,
        num_layers=3,
        num_heads=4,
        intermediate_size=64,
        pre_norm=False,
        pos_conv_kernel=16,
        pos_conv_groups=4,
    )
    return mert_v1.Student(**sizes | options)


def noise(clips: int, samples: int, seed: int = 0) -> jax.Array:
    return 0.1 * jax.random.normal(jax.random.key(seed), (clips, samples))


@functools.cache
def init(student: mert_v1.Student):
    return nn.unbox(jax.jit(student.init)(jax.random.key(0), noise(1, 4000)))


@functools.partial(jax.jit, static_argnums=0, static_argnames=("num_frames", "deterministic"))
def apply(student: mert_v1.Student, params, wave, **options):
    return student.apply(params, wave, **options, mutable=["intermediates"])


def relative_l2(ours, exact) -> float:
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True)
    errors = [(np.sum(np.square(a - b)), np.sum(np.square(b))) for a, b in pairs]
    return float(np.sqrt(sum(e for e, _ in errors) / sum(s for _, s in errors)))


# sizes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "frames"), [(24000, 74), (24320, 75), (72000, 224), (120000, 374), (122880, 383)]
)
def test_frames_of_a_clip(samples, frames):
    assert student(**OFFICIAL_CONVOLUTIONS).num_frames(samples) == frames


def test_too_short_a_clip_has_no_frames():
    assert student(**OFFICIAL_CONVOLUTIONS).num_frames(399) == 0
    assert student(**OFFICIAL_CONVOLUTIONS).num_frames(1) == 0


def test_fewer_target_frames_crop_the_conv_features_before_everything_else():
    small, wave = student(), noise(2, 24000)
    params = init(small)
    _, whole = apply(small, params, wave)
    output, cropped = apply(small, params, wave, num_frames=60)
    features = whole["intermediates"]["conv_features"][0][:, :60]
    np.testing.assert_array_equal(cropped["intermediates"]["conv_features"][0], features)
    np.testing.assert_allclose(output.features_penalty, np.square(features).mean(), rtol=1e-6)
    assert output.last_hidden_state.shape == (2, 60, 32)


def test_the_shortest_teacher_sets_the_length_of_all_targets():
    codes, features = jnp.zeros((2, 60, 3), jnp.int32), jnp.zeros((2, 76, 5))
    objective = dict.fromkeys(step.Objective._fields)
    objective |= dict(
        teachers=dict(codes=lambda *_: codes, features=lambda *_: features), context={}
    )
    nothing = dict(codes=None, features=None)
    target = step.compute_targets(step.Objective(**objective), nothing, noise(2, 24000), 74)
    assert {name: t.shape for name, t in target.items()} == dict(
        codes=(2, 60, 3), features=(2, 60, 5)
    )


def test_equal_widths_have_no_projection_unless_asked_for():
    plain, asked = student(conv_dim=32), student(conv_dim=32, project_equal_widths=True)
    params = init(plain)
    assert set(params["params"]["feature_projection"]) == {"layer_norm"}
    assert set(init(asked)["params"]["feature_projection"]) == {"layer_norm", "projection"}
    _, seen = apply(plain, params, noise(1, 8000))
    seen = seen["intermediates"]
    np.testing.assert_array_equal(
        seen["features_proj"][0], seen["feature_projection"]["features_ln"][0]
    )


def test_stereo_is_refused_with_both_shapes_in_the_message():
    # prepare and extract average channels while decoding, so that every wave here is [B, N]
    with pytest.raises(ValueError, match=r"\(1, 2, 8000\).*\[B, N\].*average"):
        student().init(jax.random.key(0), jnp.zeros((1, 2, 8000)))


# what training turns on --------------------------------------------------------------------------


def train_pass(small, params, key, wave):
    return apply(small, params, wave, deterministic=False, rngs={"dropout": key})


@pytest.mark.parametrize(
    ("option", "before", "after"),
    [
        ("input_dropout", ("features_proj",), ("masked_input",)),
        ("hidden_dropout", None, ("encoder", "encoder_input")),
    ],
)
def test_dropout_acts_where_it_should(option, before, after):
    probability, wave = 0.3, noise(8, 24000)
    small = student(**{option: probability})
    params = init(small)
    _, seen = train_pass(small, params, jax.random.key(1), wave)
    _, calm = apply(small, params, wave)

    def pick(tree, path):
        for name in path:
            tree = tree[name]
        return np.asarray(tree[0])

    dropped = pick(seen["intermediates"], after)
    kept = pick((seen if before else calm)["intermediates"], before or after)
    zero = dropped == 0
    assert abs(zero.mean() - probability) < 4 * (0.21 / zero.size) ** 0.5
    np.testing.assert_allclose(dropped[~zero], kept[~zero] / 0.7, rtol=1e-5)


@pytest.mark.parametrize("option", ["attention_dropout", "activation_dropout", "hidden_dropout"])
@FLAVOURS
def test_dropout_in_layers_is_random_and_stops_in_evaluation(option, pre_norm):
    small, wave = student(pre_norm=pre_norm, **{option: 0.2}), noise(1, 8000)
    params = init(small)
    outs = [train_pass(small, params, jax.random.key(i), wave)[0][0] for i in (0, 1, 0)]
    assert relative_l2(outs[0], outs[1]) > 1e-3
    np.testing.assert_array_equal(outs[0], outs[2])
    plain = student(pre_norm=pre_norm).apply(params, wave)
    np.testing.assert_array_equal(small.apply(params, wave)[0], plain[0])


@FLAVOURS
def test_layerdrop_skips_whole_layers_at_its_rate(pre_norm):
    probability, passes = 0.25, 300
    small, wave = student(pre_norm=pre_norm, layerdrop=probability), noise(2, 2000)
    params = init(small)

    @jax.jit
    @jax.vmap
    def skipped(key):
        _, seen = train_pass(small, params, key, wave)
        encoder = seen["intermediates"]["encoder"]
        after = encoder["layers"]["hidden_states"][0]  # [L, B, T, D]
        before = jnp.concatenate([encoder["encoder_input"][0][None], after[:-1]])
        return (after == before).all((2, 3))  # [L, B]

    skip = np.asarray(skipped(jax.random.split(jax.random.key(0), passes)))
    assert (skip == skip[..., :1]).all()  # the batch as one
    rates = skip[..., 0].mean(0)
    assert (abs(rates - probability) < 4 * (probability * 0.75 / passes) ** 0.5).all()
    # layers are skipped independently of each other
    assert abs(np.corrcoef(skip[..., 0].T)[0, 1]) < 4 / passes**0.5


@pytest.mark.parametrize(("remat", "unroll"), [("dots", 1), ("full", 3)])
def test_recomputing_and_unrolling_change_nothing(remat, unroll):
    wave = noise(1, 8000)
    params = init(student())

    def gradient(small):
        def loss(params):
            return jnp.square(small.apply(params, wave).last_hidden_state).sum()

        return jax.jit(jax.grad(loss))(params)

    changed = gradient(student(remat=remat, unroll=unroll))
    assert relative_l2(changed, gradient(student())) < 1e-5


def test_recomputing_layers_keeps_nothing_of_frames_by_frames():
    small, wave = student(remat="dots"), noise(2, 24_000)

    def loss(params):
        return jnp.square(small.apply(params, wave).last_hidden_state).sum()

    pull = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], init(small))
    shapes = [x.shape for x in jax.tree.leaves(pull)]
    frames = small.num_frames(24_000)
    assert (3, 2, frames, 64) in shapes  # what the layers' products gave
    assert (3, 2, frames, 4, 8) in shapes or (3, 2, frames, 32) in shapes
    assert not [shape for shape in shapes if shape.count(frames) > 1]


# precision ---------------------------------------------------------------------------------------


def primitives(jaxpr, found):
    for equation in jaxpr.eqns:
        for value in equation.invars:
            found.add((equation.primitive.name, getattr(value.aval, "dtype", None)))
        for inner in jaxprs_in_params(equation.params):
            primitives(inner, found)
    return found


def objective(small, target, mask):
    """The loss of `small` against fixed targets."""
    fixed = {name: lambda *_, name=name: target[name] for name in target}
    return step.Objective(
        student=lambda params, wave, mask, length, key: small.apply(
            {"params": params}, wave, mask, num_frames=length
        ),
        num_frames=small.num_frames,
        teachers=fixed,
        weights=dict.fromkeys(fixed, 1.0),
        mask=lambda keys, length: mask,
        mixture=None,
        logit_temperature=0.1,
        special_codes=4,
        penalty_weight=10.0,
    )


def precision_case(pre_norm, dtype):
    """Hidden states, loss and gradient of a student that computes in `dtype`."""
    heads = (mert_v1.Head("codes", 68, 2), mert_v1.Head("chroma", 12))
    sizes = dict(conv_dim=64, hidden_size=128, num_layers=4, intermediate_size=512)
    small = student(pre_norm=pre_norm, heads=heads, dtype=dtype, **sizes)
    audio = (32768 * noise(2, 8000)).astype(jnp.int16)
    codes = jax.random.randint(jax.random.key(1), (2, 25, 2), 0, 64)
    target = dict(codes=codes, chroma=jax.random.uniform(jax.random.key(2), (2, 26, 12)))
    mask = jax.random.uniform(jax.random.key(3), (2, 24)) < 0.5

    def loss(params):
        return step.loss_fn(
            params,
            dict(codes=None, chroma=None),
            audio,
            jnp.arange(2),
            jax.random.key(0),
            objective(small, target, mask),
            train=False,
        )

    def hidden(params):
        return apply(small, {"params": params}, audio / 32768.0, mask=mask)

    return init(small)["params"], hidden, loss


@pytest.mark.parametrize("pre_norm", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bfloat16_stays_near_float32(pre_norm, record_property):
    params, hidden, loss = precision_case(pre_norm, jnp.float32)
    _, hidden16, loss16 = precision_case(pre_norm, jnp.bfloat16)
    states, states16 = (
        np.asarray(
            jax.jit(f)(params)[1]["intermediates"]["encoder"]["layers"]["hidden_states"][0],
            np.float32,
        )
        for f in (hidden, hidden16)
    )
    layers = [relative_l2(a, b) for a, b in zip(states16, states, strict=True)]
    grads, grads16 = (jax.jit(jax.grad(f, has_aux=True))(params)[0] for f in (loss, loss16))
    gradient = relative_l2(grads16, grads)
    print(f"bfloat16 against float32, relative L2: layers {layers}, gradient {gradient}")
    record_property("bf16_hidden_states", max(layers))
    record_property("bf16_gradient", gradient)
    assert max(layers) < 0.02
    assert gradient < 0.05


@FLAVOURS
def test_softmax_norms_and_losses_are_float32_in_bfloat16_compute(pre_norm):
    params, hidden, loss = precision_case(pre_norm, jnp.bfloat16)
    value, sums = jax.eval_shape(loss, params)
    output = jax.eval_shape(hidden, params)[0]
    assert output.last_hidden_state.dtype == jnp.bfloat16
    assert value.dtype == output.features_penalty.dtype == jnp.float32
    full = [output.predictions, sums.loss, sums.penalty, sums.features]
    full += [code.cross_entropy for code in sums.codes.values()]
    assert {x.dtype for x in jax.tree.leaves(full)} == {jnp.dtype("float32")}
    # what only norms, softmax, cosine logits and losses are made of
    found = primitives(jax.make_jaxpr(loss)(params).jaxpr, set())
    sensitive = {"exp", "log", "sqrt", "rsqrt", "reduce_sum", "reduce_max", "reduce_min"}
    assert {name for name, dtype in found if name in sensitive} >= {"exp", "log", "reduce_sum"}
    assert {name for name, dtype in found if dtype == jnp.bfloat16} & sensitive == set()
    assert ("dot_general", jnp.dtype(jnp.bfloat16)) in found  # it does compute in bfloat16


def test_the_cqt_target_is_float32_of_a_half_precision_wave():
    teacher = teachers.make("cqt", n_bins=12, bins_per_octave=12, fmin=440.0)
    wave = jax.ShapeDtypeStruct((1, 8000), jnp.bfloat16)
    assert jax.eval_shape(teacher.apply, teacher.params, wave).dtype == jnp.float32


def test_the_penalty_sends_its_gradient_through_the_scale():
    wave = noise(1, 8000)

    def penalty(params, mult):
        return student(feature_grad_mult=mult, num_layers=1).apply(params, wave).features_penalty

    params, gradient = init(student(num_layers=1)), jax.jit(jax.grad(penalty), static_argnums=1)
    whole, tenth = (gradient(params, mult) for mult in (1.0, 0.1))
    assert relative_l2(jax.tree.map(lambda g: 10 * g, tenth), whole) < 1e-5


# parameters --------------------------------------------------------------------------------------


def parameters() -> dict[str, dict[str, str]]:
    """Name -> "dtype [shape]" for each config."""
    listed = {}
    for name, config in dict(tiny=tiny, base=base, large=large).items():
        config = config.get_config()
        small = build.make_student(config, build.make_teachers(config))
        shapes = nn.unbox(jax.eval_shape(small.init, jax.random.key(0), noise(1, 4000)))["params"]
        listed[name] = {
            jax.tree_util.keystr(path, simple=True, separator="/"): f"{x.dtype} {list(x.shape)}"
            for path, x in jax.tree_util.tree_leaves_with_path(shapes)
        }
    return listed


def test_parameter_names_shapes_and_dtypes():
    assert parameters() == json.loads(PARAMETERS.read_text()), (
        "parameters differ from tests/parameters.json, and old checkpoints would not load; if that "
        "is meant, run: python -m tests.models.mert_v1_test"
    )


@pytest.mark.parametrize(("name", "count"), [("base", 95_550_160), ("large", 317_875_664)])
def test_parameter_counts_are_the_official_ones(name, count):
    shapes = [json.loads(x.split(" ", 1)[1]) for x in parameters()[name].values()]
    assert sum(int(np.prod(shape)) for shape in shapes) == count


def test_the_gain_of_a_new_positional_convolution_is_its_norm():
    positions = init(student())["params"]["encoder"]["pos_conv_embed"]
    norm = np.linalg.norm(positions["weight_v"], axis=(1, 2))
    np.testing.assert_allclose(positions["weight_g"], norm, rtol=1e-6)


if __name__ == "__main__":
    PARAMETERS.write_text(json.dumps(parameters(), indent=1) + "\n")
