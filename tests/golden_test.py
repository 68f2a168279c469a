"""Golden numbers of the official code: fairseq's MERT, Hugging Face's, nnAudio, the optimiser.

Reads the folder named by MERT_JAX_GOLDEN (default: tests/golden), whose README.md explains each
array and tolerance, takes every size from its files and runs whatever files, cases and keys are
there. The student and the optimiser run in float32 and, in a second process, in float64.
"""

import contextlib
import functools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from safetensors.numpy import save_file

from mert_jax import teachers
from mert_jax.checkpoints import fairseq, huggingface
from mert_jax.checkpoints import tensor_names as official
from mert_jax.errors import UserError
from mert_jax.models import quantize
from mert_jax.pretraining import losses, masking, mixture, optimizer, step
from mert_jax.teachers import cqt, encodec_checkpoint
from mert_jax.teachers import rvq_vae as acoustic
from mert_jax.teachers.teacher import Teacher
from mert_jax.tensors.state_dict import read_tensors as read_weights
from tests import cqt_definition

FOLDER = Path(os.environ.get("MERT_JAX_GOLDEN") or Path(__file__).parent / "golden").resolve()
X64 = jax.config.jax_enable_x64
DTYPE = jnp.float64 if X64 else jnp.float32
SPECIALS = 4  # fairseq's dictionary: code c is class c + 4


@functools.cache
def npz(name: str) -> dict[str, np.ndarray]:
    path = FOLDER / name
    if not path.exists():
        return {}
    with np.load(path) as file:
        return dict(file)


@functools.cache
def read_json(name: str) -> dict:
    path = FOLDER / name
    return json.loads(path.read_text()) if path.exists() else {}


def names(pattern: str) -> list[str]:
    return sorted(path.name for path in FOLDER.glob(pattern))


def keys(name: str, but: str = "$^") -> list[str]:
    return [key for key in npz(name) if not re.fullmatch(but, key)]


def every_frame_stored(ours: np.ndarray, stored: np.ndarray, axis: int) -> np.ndarray:
    """The frames that a decimated array holds: 0, s, 2s, ... with s from the two shapes."""
    stride = math.ceil(ours.shape[axis] / max(stored.shape[axis], 1))
    ours = np.take(ours, np.arange(0, ours.shape[axis], stride), axis)
    assert ours.shape == stored.shape
    return ours


def check(record, error: float, tolerance: float, what: str = "error") -> None:
    record("error_over_tolerance", float(error / tolerance) if tolerance else float(error))
    assert error <= tolerance, f"{what} {error:.3g} is above {tolerance:.3g}"


def max_error(ours, stored) -> float:
    ours, stored = np.asarray(ours, np.float64), np.asarray(stored, np.float64)
    assert ours.shape == stored.shape
    return float(np.abs(ours - stored).max(initial=0))


def relative_error(ours, stored) -> float:
    """The largest error of single values, each relative to its own size."""
    ours, stored = np.asarray(ours, np.float64), np.asarray(stored, np.float64)
    assert ours.shape == stored.shape
    error = np.abs(ours - stored)
    return float((error / np.where(stored == 0, 1, np.abs(stored))).max(initial=0))


def relative_l2(ours, stored) -> float:
    ours, stored = np.asarray(ours, np.float64), np.asarray(stored, np.float64)
    assert ours.shape == stored.shape
    return float(np.linalg.norm(ours - stored) / max(np.linalg.norm(stored), 1e-300))


# A. the student in fairseq's flavour -------------------------------------------------------------

STUDENT_FILES = names("student_*_case*.npz")
INPUTS = "audio_i16|padding_mask_samples_valid_len|labels|mask"


def five_seconds() -> np.ndarray:
    return npz("audio_5s.npz")["audio_i16"][None]


@functools.cache
def target_cqt(wave: bytes, rows: int, bins: int, sample_rate: int, hop: int) -> np.ndarray:
    """Ours in float32; in float64 the definition, whose kernels are rounded to float32."""
    audio = np.frombuffer(wave, np.int16).reshape(rows, -1) / 32768
    options = dict(sample_rate=sample_rate, hop=hop, n_bins=bins, bins_per_octave=bins // 7)
    if X64:
        return cqt_definition.magnitudes(audio, **options)
    teacher = teachers.make("cqt", **options)
    return np.asarray(jax.jit(teacher.apply)(teacher.params, jnp.asarray(audio, jnp.float32)))


@contextlib.contextmanager
def compiled_quickly():
    """Without most of XLA's optimisations: small programs compile for longer than they run.

    The full-size peer in peers_test.py and the training tests run what the optimiser makes.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def student_run(file: str) -> dict[str, np.ndarray]:
    """Everything that a case file may hold, computed by our code from its inputs."""
    case, name = npz(file), re.fullmatch(r"(.+)_case.+\.npz", file)[1]
    settings, weights = read_json(f"{name}_config.json"), npz(f"{name}_weights.npz")
    if not (settings and weights):
        pytest.skip(f"{file} needs {name}_config.json and {name}_weights.npz in the same folder")
    config = settings["config"]
    student = fairseq.student(config, weights).clone(dtype=DTYPE)
    params = official.params_from_fairseq(weights, student)
    params = jax.tree.map(lambda x: jnp.asarray(x, DTYPE), params)

    audio = case["audio_i16"] if "audio_i16" in case else five_seconds()
    batch, num_samples = audio.shape
    valid = case.get("padding_mask_samples_valid_len", np.full(batch, num_samples))
    sources = {}
    for head in student.heads:
        if head.num_codebooks and "labels" in case:
            # as our teachers give them: codes [B, T, K], counted from 0
            codes = jnp.asarray(case["labels"].transpose(1, 2, 0).astype(np.int32) - SPECIALS)
            sources[head.name] = lambda params, wave, codes=codes: codes
        elif not head.num_codebooks:
            rates = settings.get("sample_rate", 24000), settings.get("label_rate", 75)
            features = target_cqt(
                audio.tobytes(), batch, head.size, rates[0], int(rates[0] // rates[1])
            )
            sources[head.name] = lambda params, wave, features=features: jnp.asarray(features)
    length = min(
        [student.num_frames(num_samples)]
        + [jax.eval_shape(source, None, audio).shape[1] for source in sources.values()]
    )
    padding = masking.fairseq_frame_padding(jnp.asarray(valid), num_samples, length)
    mask = jnp.asarray(case["mask"] if "mask" in case else case["masked_frames"])
    masked = mask & ~padding
    seen = {}

    def apply(params, wave, mask_of_the_loss, num_frames, key):
        output, variables = student.apply(
            {"params": params}, wave, mask, padding, num_frames, mutable=["intermediates"]
        )
        seen.update(variables["intermediates"], output=output)
        return output

    temperature = config.get("logit_temp", 0.1)
    objective = step.Objective(
        student=apply,
        num_frames=student.num_frames,
        teachers=sources,
        weights=dict.fromkeys(sources, 1.0),
        mask=lambda row_keys, length: masked,
        mixture=lambda row_keys, wave: wave,
        logit_temperature=temperature,
        special_codes=SPECIALS,
        penalty=10.0,
    )

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(params):
        nothing = dict.fromkeys(sources)
        rows, key = jnp.arange(batch), jax.random.key(0)
        loss, sums = step.loss_fn(
            params, nothing, jnp.asarray(audio), rows, key, objective, train=False
        )
        return loss, (sums, dict(seen))

    with compiled_quickly():
        grads, (sums, seen) = gradient(params)
    return results(student, grads, sums, seen, case, mask, padding, temperature, sources)


def results(student, grads, sums, seen, case, mask, padding, temperature, sources) -> dict:
    """Our numbers under the fixtures' names, arrays in their layout."""
    masked = np.asarray(mask & ~padding)
    output, encoder = seen["output"], seen["encoder"]
    layers = encoder["layers"]["hidden_states"][0]
    ours = {
        "frame_padding_mask": padding,
        "masked_frames": masked,
        "act/conv_features": np.moveaxis(seen["conv_features"][0], -1, 1),
        "act/features_ln": seen["feature_projection"]["features_ln"][0],
        "act/features_proj_unmasked": seen["features_proj"][0],
        "act/masked_input": seen["masked_input"][0],
        "act/pos_conv_out": encoder["pos_conv_out"][0],
        "act/encoder_input": encoder["encoder_input"][0],
        "act/final_out": output.last_hidden_state,
        "features_pen": output.features_penalty,
        "loss_total": sums.loss,
        "loss_total_float32run": sums.loss,
        "sample_size": sums.frames,
    }
    for i in range(student.num_layers):
        ours[f"act/layer{i}_out"] = layers[i]
    for i in range(len(student.conv_kernels)):
        ours[f"act/conv_layer{i}"] = seen["feature_encoder"][f"conv_layer{i}"][0][0].T
    for head in student.heads:
        if not head.num_codebooks:
            frames = np.asarray(output.predictions[head.name])[masked]
            ours["act/cqt_pred_masked"] = frames
            ours["act/cqt_target_full"] = sources[head.name](None, None)
            ours["cqt_loss"] = sums.features[head.name] / sums.frames
            continue
        proj, codebooks = output.predictions[head.name]
        proj = jnp.asarray(np.asarray(proj)[masked])
        ours["act/proj_masked"] = proj.reshape(proj.shape[0], -1)
        logits = losses.cosine_logits(proj, codebooks, temperature)  # [M, K, V]
        ours["logits"] = np.swapaxes(logits, 0, 1)
        ours["logits_logsumexp"] = jax.nn.logsumexp(logits, -1).T
        if head.name in sources:
            codes = sources[head.name](None, None)[:, : masked.shape[1]][masked]
            target = np.take_along_axis(np.asarray(logits), np.asarray(codes)[..., None] + 4, -1)
            ours["logits_positive"] = target[..., 0].T
            ours["ce_sum_per_codebook"] = sums.codes[head.name].cross_entropy
            ours["correct_per_codebook"] = sums.codes[head.name].correct
            ours["count_per_codebook"] = sums.codes[head.name].targets.sum(-1)
    grads = jax.tree.map(lambda g: g / sums.frames, grads)
    ours["grads"] = grads
    ours["grad_global_norm"] = ours["grad_global_norm_float32run"] = optax.tree.norm(grads)
    ours |= {f"grad/{key}": g for key, g in official.params_to_fairseq(grads).items()}
    return {key: x if key == "grads" else np.asarray(x) for key, x in ours.items()}


@pytest.mark.parametrize(
    ("file", "key"), [(file, key) for file in STUDENT_FILES for key in keys(file, INPUTS)]
)
def test_student(file, key, record_property):
    ours, stored = student_run(file), npz(file)[key]
    if first := re.fullmatch(r"(act/conv_layer\d+)_b0_first(\d+)", key):
        value = ours[first[1]][:, : int(first[2])]
    elif key == "logits_first_rows":
        value = ours["logits"][:, : stored.shape[1]]
    elif key.startswith("grad_flat_stride7/"):
        value = ours["grad/" + key.split("/", 1)[1]].reshape(-1)[::7]
    else:
        if key not in ours and "labels" not in npz(file):
            pytest.skip(f"{key} needs the case's labels, which {file} lacks")
        assert key in ours, f"no test knows what {key} of {file} is"
        value = ours[key]
    if value.shape != stored.shape and key.startswith("act/"):
        axis = value.ndim - 1 if key == "act/conv_features" else value.ndim - 2
        value = every_frame_stored(value, stored, axis)

    if key.endswith("float32run"):
        check(record_property, relative_error(value, stored), 1e-5)
    elif stored.dtype.kind != "f":
        np.testing.assert_array_equal(value, stored)
    elif key.startswith("grad") and "/" in key:
        norm = ours["grad_global_norm"]
        if key.endswith("self_attn.k_proj.bias"):  # its true gradient is 0
            bar = 1e-12 if X64 else 1e-6
            check(record_property, np.linalg.norm(value), bar * norm, "norm")
        elif not X64:
            check(record_property, relative_l2(value, stored), 1e-4)
        elif stored.dtype == np.float32:
            check(record_property, max_error(value, stored), 1e-7 * np.abs(stored).max())
        else:
            check(record_property, relative_l2(value, stored), 1e-9)
    elif X64 and stored.dtype == np.float32:
        check(record_property, max_error(value, stored), 1e-7 * np.abs(stored).max())
    elif X64:
        check(record_property, relative_error(value, stored), 1e-9)
    elif key.startswith("act/"):
        check(record_property, max_error(value, stored), 2e-5 * np.abs(stored).max())
    elif key.startswith("logits"):
        check(record_property, max_error(value, stored), 3e-4)
    else:
        tight = key in ("ce_sum_per_codebook", "cqt_loss")
        check(record_property, relative_error(value, stored), 2e-6 if tight else 1e-5)


def summary(file: str) -> dict:
    """What student_summary.json says of a case; its keys may be longer."""
    found = [v for k, v in read_json("student_summary.json").items() if k.endswith(file[:-4])]
    return found[0] if found else {}


SUMMARISED = (
    "B L T label_frames sample_size masked_per_row loss_total ce features_pen cqt_loss "
    "grad_global_norm grad_norm_per_param clip_coef"
).split()


@pytest.mark.parametrize(
    ("file", "field"),
    [(file, field) for file in STUDENT_FILES for field in SUMMARISED if field in summary(file)],
)
def test_student_summary(file, field, record_property):
    ours, stored, case = student_run(file), summary(file)[field], npz(file)
    scalar = 1e-9 if X64 else 1e-5
    if field in ("B", "L", "T", "label_frames", "sample_size", "masked_per_row"):
        audio = case["audio_i16"] if "audio_i16" in case else five_seconds()
        masked = ours["masked_frames"]
        value = dict(
            B=len(audio),
            L=audio.shape[1],
            T=masked.shape[1],
            label_frames=case["labels"].shape[2] if "labels" in case else stored,
            sample_size=ours["sample_size"],
            masked_per_row=list(masked.sum(1)),
        )[field]
        assert value == stored
    elif field == "grad_norm_per_param":
        norms = {key[5:]: np.linalg.norm(x) for key, x in ours.items() if key.startswith("grad/")}
        zero = {key for key in stored if key.endswith("self_attn.k_proj.bias")}
        assert all(norms[key] < 1e-6 * ours["grad_global_norm"] for key in zero)
        assert set(norms) == set(stored)
        errors = {key: abs(norms[key] / stored[key] - 1) for key in set(stored) - zero}
        check(record_property, max(errors.values()), 1e-9 if X64 else 1e-4, str(errors))
    elif field == "clip_coef":
        for limit, coefficient in stored.items():
            clip = optimizer.clip_by_global_norm(float(limit))
            clipped, _ = clip.update(ours["grads"], clip.init(None))
            ratio = optax.tree.norm(clipped) / ours["grad_global_norm"]
            check(record_property, relative_error(ratio, coefficient), scalar)
    else:
        value = ours[{"ce": "ce_sum_per_codebook"}.get(field, field)]
        check(record_property, relative_error(value, stored), scalar)


@pytest.fixture(scope="module", autouse=True)
def second_process(request, tmp_path_factory):
    """The tests of student, optimiser and schedule again, with 64-bit types, meanwhile."""
    if not any(item.name == "test_in_float64" for item in request.session.items):
        yield None
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [__file__, "-k", "test_student or test_optimizer or test_learning_rate"]
    environment = os.environ | {"JAX_ENABLE_X64": "1", "MERT_JAX_GOLDEN": str(FOLDER)}
    environment.pop("PYTEST_ADDOPTS", None)  # such as the name of this run's report
    output = tmp_path_factory.mktemp("float64") / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=Path(__file__).parents[1], stdout=file, stderr=file
        )
    yield process, output
    process.kill()
    process.wait()


# B. the student in Hugging Face's flavour --------------------------------------------------------

HF_WEIGHTS = [
    (file, weights)
    for file in names("hf_*.npz")
    for weights in names(f"{file[:-4]}_weights*.safetensors") or [None]
]


@functools.cache
def hf_run(file: str, weights: str) -> dict[str, np.ndarray]:
    """Everything that an hf_*.npz may hold, from the weights of one spelling."""
    stored, config = npz(file), read_json(f"{file[:-4]}_config.json")
    if not (config and weights):
        pytest.skip(f"{file} needs its _config.json and _weights.safetensors in the same folder")
    student = huggingface.student(config)
    params = official.params_from_hf(read_weights(FOLDER / weights), student)
    audio = stored["audio_i16"] if "audio_i16" in stored else five_seconds()
    wave = audio.astype(np.float32) / 32768
    length = student.num_frames(wave.shape[1])

    @jax.jit
    def forward(wave, padding):
        return student.apply(
            {"params": params}, wave, padding=padding, deterministic=True, mutable="intermediates"
        )

    ours = {}
    for mode in ("nomask", "mask"):
        padding = None
        if mode == "mask":
            if "valid_len" not in stored:
                continue
            valid = jnp.asarray(stored["valid_len"])
            padding = masking.conv_frame_padding(
                valid, student.conv_kernels, student.conv_strides, length
            )
            ours["mask/frame_attention_mask"] = ~np.asarray(padding)
            wave = np.where(np.arange(wave.shape[1]) < stored["valid_len"][:, None], wave, 0)
        output, variables = forward(wave, padding)
        seen = variables["intermediates"]
        layers = np.asarray(seen["encoder"]["layers"]["hidden_states"][0])
        ours[f"{mode}/hidden_states_0"] = seen["encoder"]["encoder_input"][0]
        for i, layer in enumerate(layers, 1):
            last = i == student.num_layers
            ours[f"{mode}/hidden_states_{i}"] = output.last_hidden_state if last else layer
        ours[f"{mode}/last_layer_raw"] = layers[-1]
        ours[f"{mode}/conv_features"] = np.moveaxis(seen["conv_features"][0], -1, 1)
    return {key: np.asarray(x) for key, x in ours.items()}


@pytest.mark.parametrize(
    ("file", "weights", "key"),
    [(file, w, key) for file, w in HF_WEIGHTS for key in keys(file, "audio_i16|valid_len")],
)
def test_hugging_face(file, weights, key, record_property):
    ours, stored = hf_run(file, weights)[key], npz(file)[key]
    if stored.dtype == bool:
        np.testing.assert_array_equal(ours, stored)
        return
    if ours.shape != stored.shape:
        ours = every_frame_stored(ours, stored, 2 if key.endswith("conv_features") else 1)
    check(record_property, max_error(ours, stored), 1e-4)


def fake_state(tensors: list) -> dict[str, np.ndarray]:
    return {name: np.broadcast_to(np.float32(0), shape) for name, shape, *_ in tensors}


@pytest.mark.parametrize("file", names("shapes_student_*.json"))
def test_names_and_shapes_of_the_full_size(file):
    listed = read_json(file)
    state = fake_state(listed["fairseq_state_dict"])
    student = fairseq.student({"encoder_attention_heads": 1}, state)
    shapes = jax.eval_shape(student.init, jax.random.key(0), jnp.zeros((1, 4000)))["params"]
    zeros = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), nn.unbox(shapes))
    ours = official.params_to_fairseq(zeros)
    assert set(ours) == set(listed["fairseq_trainable_names"])
    assert all(ours[name].shape == state[name].shape for name in ours)
    assert sum(x.size for x in ours.values()) == listed["fairseq_trainable_parameter_count"]

    body = official.params_to_hf(zeros)
    assert sum(x.size for x in body.values()) == listed["hf_parameter_count"]
    old = {name: tuple(shape) for name, shape in listed["hf_state_dict_old_names"]}
    assert {name: x.shape for name, x in body.items()} == old
    headless = student.clone(heads=(), project_equal_widths=True)
    for names_of in ("hf_state_dict_old_names", "hf_state_dict_new_names"):
        params = official.params_from_hf(fake_state(listed[names_of]), headless)
        assert official.params_to_hf(params).keys() == body.keys()

    paths = set(jax.tree.leaves(jax.tree_util.tree_map_with_path(lambda p, _: _path(p), zeros)))
    mapping = {}
    for path in paths:
        theirs, hf = (official.official_name(path, paths, style) for style in (0, 1))
        for layer in range(student.num_layers if path.startswith("encoder/layers") else 1):
            mapping[theirs.format(layer)] = hf and hf.format(layer)
    unused = {name for name, hf in mapping.items() if hf is None}
    assert unused == {
        name for name in listed["converter_unused_or_skipped"] if not official.BUFFERS.search(name)
    }
    expected = listed["converter_mapping_fairseq_to_hf_oldnames"]
    assert {name: hf for name, hf in mapping.items() if hf} == expected


def _path(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


# C. the CQT --------------------------------------------------------------------------------------

CQT_ARRAYS = r"cqt(\d+)(_sum_over_frames|_sumsq_over_bins)?"


def cqt_wave(clip: str) -> np.ndarray:
    """The clip's samples; mixtures are the first ones of the 5 s of music."""
    stored = npz("cqt.npz")
    if f"{clip}/audio_i16" in stored:
        audio = stored[f"{clip}/audio_i16"]
    else:
        audio = five_seconds()[0, : int(clip.rpartition("_")[2])]
    return audio[None].astype(np.float32) / 32768


@functools.cache
def our_cqt(clip: str, bins: int) -> np.ndarray:
    """[F, T], bins first as nnAudio has them."""
    teacher = teachers.make("cqt", n_bins=bins, bins_per_octave=bins // 7)
    return np.asarray(jax.jit(teacher.apply)(teacher.params, cqt_wave(clip)))[0].T


def stored_bins_and_frames(clip: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
    stored = npz("cqt.npz")
    frames = stored.get(f"{clip}/frames")
    bins = stored.get(f"{clip}/bins")
    if kind == "cqt84":
        return np.arange(84), frames[::2]
    return (bins[::4] if kind == "librosa336" else bins), frames


@pytest.mark.parametrize(
    ("clip", "key"),
    [key.rsplit("/", 1) for key in keys("cqt.npz") if re.search(rf"/{CQT_ARRAYS}$", key)],
)
def test_cqt(clip, key, record_property):
    stored = npz("cqt.npz")[f"{clip}/{key}"]
    bins, over = re.fullmatch(CQT_ARRAYS, key).groups()
    ours = our_cqt(clip, int(bins)).astype(np.float64)
    if over == "_sum_over_frames":
        ours = ours.sum(1)
    elif over == "_sumsq_over_bins":
        ours = np.square(ours).sum(0)
    else:
        rows, frames = stored_bins_and_frames(clip, key)
        ours = ours[np.ix_(rows, frames)]
    check(record_property, max_error(ours, stored), 1e-4 * np.abs(stored).max())
    check(record_property, relative_l2(ours, stored), 1e-4)


@pytest.mark.parametrize("clip", [k[:-11] for k in keys("cqt.npz") if k.endswith("/librosa336")])
def test_cqt_tells_librosa_apart(clip):
    """A CQT by recursive downsampling is outside the tolerance, of nnAudio's and of ours."""
    rows, frames = stored_bins_and_frames(clip, "librosa336")
    librosa = npz("cqt.npz")[f"{clip}/librosa336"]
    ours = our_cqt(clip, 336)[np.ix_(rows, frames)]
    assert relative_l2(librosa, ours) > 1e-3


@pytest.mark.parametrize("key", keys("cqt_kernels.npz"))
def test_cqt_kernels(key):
    stored, (kind, *bin_, what) = npz("cqt_kernels.npz")[key], key.split("/")
    bins = int(kind[1:])
    made, lengths, frequencies = cqt_definition.kernels(bins, bins // 7)
    if what == "lengths":
        np.testing.assert_array_equal(lengths, stored)
        ours, _ = cqt.lengths_and_frequencies(24000, 32.7, bins, bins // 7)
        np.testing.assert_array_equal(ours, stored)
        return
    if what == "freqs":
        np.testing.assert_allclose(frequencies, stored, rtol=1e-12)
        _, ours = cqt.lengths_and_frequencies(24000, 32.7, bins, bins // 7)
        np.testing.assert_allclose(ours, stored, rtol=1e-12)
        return
    kernel = made[int(bin_[0])]
    nonzero = np.flatnonzero(kernel)
    if what == "first_last_nonzero":
        width = 2 ** math.ceil(math.log2(lengths[0]))
        first = width // 2 - (len(kernel) + 1) // 2
        np.testing.assert_array_equal(first + nonzero[[0, -1]], stored)
    else:
        part = getattr(kernel, what)[nonzero[0] :][: len(stored)]
        assert max_error(part, stored) <= 1e-7 * np.abs(kernel).max()


@pytest.mark.skipif(not names("cqt_info.json"), reason="the folder has no cqt_info.json")
def test_cqt_info():
    info = read_json("cqt_info.json")
    teacher = teachers.make("cqt")
    for samples, frames in info.get("frames_per_length", {}).items():
        wave = jax.ShapeDtypeStruct((1, int(samples)), jnp.float32)
        assert jax.eval_shape(teacher.apply, teacher.params, wave).shape == (1, frames, 336)
    for bins in (336, 84):
        lengths, frequencies = cqt.lengths_and_frequencies(24000, 32.7, bins, bins // 7)
        if f"lengths{bins}_first_last" in info:
            assert lengths[[0, -1]].tolist() == info[f"lengths{bins}_first_last"]
        if f"top_freq_{bins}" in info:
            np.testing.assert_allclose(frequencies[-1], info[f"top_freq_{bins}"], rtol=1e-12)
        if f"kernel_width_{bins}" in info:
            assert 2 ** math.ceil(math.log2(lengths[0])) == info[f"kernel_width_{bins}"]


@pytest.mark.parametrize(
    "clip",
    [
        clip
        for clip in read_json("cqt_summary.json")
        if f"{clip}/audio_i16" in npz("cqt.npz") or names("audio_5s.npz")
    ],
)
def test_cqt_summary(clip):
    stored, ours = read_json("cqt_summary.json")[clip], our_cqt(clip, 336).astype(np.float64)
    if "frames" in stored:
        assert ours.shape[1] == stored["frames"]
    values = dict(max=ours.max(), mean=ours.mean(), rms=np.square(ours).mean() ** 0.5)
    for key in set(values) & set(stored):
        np.testing.assert_allclose(values[key], stored[key], rtol=1e-4)


# D. the acoustic teacher -------------------------------------------------------------------------


ENCODEC = keys("encodec.npz", r".*/audio_i16") if names("encodec_weights.npz") else []
ENCODEC_TIE = 1e-4  # of the distance to a decision boundary: closer, and rounding may decide


@functools.cache
def rvq_vae() -> Teacher:
    """The teacher, made of a file with the official names."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "encodec.safetensors")
        save_file(npz("encodec_weights.npz"), path)
        return teachers.make("rvq_vae", checkpoint=path)


@functools.cache
def encodec_run(clip: str) -> dict[str, np.ndarray]:
    """Every stored array of a clip, by its key, and `codes` of the teacher itself."""
    stored, teacher = npz("encodec.npz"), rvq_vae()
    audio = stored.get(f"{clip}/audio_i16")
    audio = five_seconds()[:, : int(clip.rpartition("_")[2])] if audio is None else audio
    wave = np.atleast_2d(audio).astype(np.float32) / 32768

    @jax.jit
    def run(params, wave):
        network = acoustic.encoder(params)
        variables = {"params": params["encoder"]}
        latents, seen = network.apply(
            variables, wave, capture_intermediates=True, mutable=["intermediates"]
        )
        squares = quantize.residual_encode(latents, params["codebooks"])[1]
        return latents, squares, seen["intermediates"], teacher.apply(params, wave)

    latents, squares, seen, codes = run(teacher.params, wave)
    out = lambda name: seen[name]["__call__"][0]
    stages = {0: out("conv_in"), 15: latents}
    for i in range(4):
        stages |= {1 + 3 * i: out(f"block_{i}"), 3 + 3 * i: out(f"down_{i}")}
        stages[2 + 3 * i] = jax.nn.elu(stages[1 + 3 * i])
    stages[13] = out("down_3") + out("lstm_1")
    stages[14] = jax.nn.elu(stages[13])
    entering = np.concatenate([np.square(latents).sum(-1, keepdims=True), squares[..., :-1]], -1)
    found = {"latent": latents, "codes": codes, "residual_sqnorm": entering}
    for number, x in stages.items():
        found[f"stage{number:02}_b0_first8"] = x[:1, :8]
        found[f"stage{number:02}_b0_last8"] = x[:1, -8:]
    found = {key: np.asarray(x).swapaxes(1, 2) for key, x in found.items()}
    return {key: x[0] if key.startswith("stage") else x for key, x in found.items()}


def surely_equal(clip: str) -> np.ndarray:
    """Codes [B, K, T] that rounding cannot change: theirs and all earlier levels' boundaries are
    far enough away."""
    distance = npz("encodec.npz").get(f"{clip}/boundary_distance")
    if distance is None:
        return np.ones_like(npz("encodec.npz")[f"{clip}/codes"], bool)
    return np.logical_and.accumulate(distance > ENCODEC_TIE, 1)


@pytest.mark.parametrize("key", ENCODEC)
def test_encodec(key, record_property):
    clip, what = key.rsplit("/", 1)
    stored, ours = npz("encodec.npz")[key], encodec_run(clip)
    if what.startswith("codes"):
        differ = ours["codes"] != stored
        assert differ.shape == stored.shape
        assert not (differ & surely_equal(clip)).any()
        record_property("excused_flips", int(differ.sum()))
    elif what in ("margin", "boundary_distance"):  # what the codes' rule is made of
        assert stored.shape == ours["codes"].shape
        assert (stored >= 0).all()
    elif what == "residual_sqnorm":
        same = surely_equal(clip)
        reached = np.concatenate([np.ones_like(same[:, :1]), same[:, :-1]], 1)
        error = np.abs(ours[what] - stored)[reached]
        check(record_property, error.max(), 1e-4 * stored.max())
    else:
        scale = 1 if what == "latent" else max(np.abs(stored).max(), 1)
        check(record_property, max_error(ours[what], stored), 3e-5 * scale)


@pytest.mark.parametrize(
    "clip",
    [
        k
        for k, x in read_json("encodec_summary.json").items()
        if isinstance(x, dict) and "frames" in x
    ],
)
def test_encodec_summary(clip):
    stored = read_json("encodec_summary.json")[clip]
    if f"{clip}/codes" not in npz("encodec.npz"):
        pytest.skip(f"encodec.npz has no {clip}")
    codes = encodec_run(clip)["codes"]
    assert codes.shape[-1] == stored["frames"]
    if "n_codes" in stored:
        assert codes.size == stored["n_codes"]
    if "unique_codes" in stored and surely_equal(clip).all():
        assert [len(np.unique(codes[:, k])) for k in range(codes.shape[1])] == stored[
            "unique_codes"
        ]
    if "latent_std" in stored:
        latent = encodec_run(clip)["latent"]
        np.testing.assert_allclose(latent.std(ddof=1), stored["latent_std"], rtol=1e-4)


@pytest.mark.parametrize("names_of", ["official", "hf_new_names"])
@pytest.mark.skipif(not names("shapes_encodec_24khz.json"), reason="no shapes_encodec_24khz.json")
def test_names_and_shapes_of_the_full_size_encodec(names_of):
    listed = read_json("shapes_encodec_24khz.json")
    state = {name: np.broadcast_to(np.float32(1), shape) for name, shape, *_ in listed[names_of]}
    params = encodec_checkpoint.from_state(state)
    assert params["codebooks"].shape == (listed["n_q"], 1024, 128)
    needed = dict.fromkeys(listed["needed_for_encoding_at_6kbps"])
    if names_of == "official":
        assert listed["needed_parameter_count"] == sum(state[name].size for name in needed)
        without = {name: x for name, x in state.items() if name in needed}
        assert encodec_checkpoint.from_state(without)["codebooks"].shape == (8, 1024, 128)
        for name in needed:
            if "codebook.embed" not in name:
                with pytest.raises(UserError, match="1 tensors missing"):
                    encodec_checkpoint.from_state({k: x for k, x in without.items() if k != name})
                break


# E. masks, mixture, schedule, optimiser, initialisation ------------------------------------------

MASKS = read_json("mask_stats.json")
ROWS = 20_000


def mask_settings() -> dict[str, float]:
    text = MASKS.get("settings", "")
    found = {
        name: re.search(rf"{name} ([\d.]+)", text)
        for name in ("mask_prob", "mask_length", "min_masks")
    }
    default = dict(mask_prob=0.8, mask_length=5, min_masks=2)
    return {
        name: type(default[name])(float(match[1])) if match else default[name]
        for name, match in found.items()
    }


@functools.cache
def untrimmed_masks(frames: int) -> jax.Array:
    row_keys = jax.random.split(jax.random.key(frames), ROWS + ROWS // 100)
    make = functools.partial(masking.span_mask, length=frames, group=1, **mask_settings())
    return jax.jit(make)(row_keys, jnp.full(row_keys.shape, frames))


def masks(frames: int, group: int) -> np.ndarray:
    """At least 20,000 masks of our own, bool [rows, T], trimmed within groups."""
    mask = untrimmed_masks(frames)
    mask = mask[: len(mask) // group * group]
    if group == 1:
        return np.asarray(mask)
    # what span_mask itself does last, so that the spans need not be drawn for each group again
    row_keys = jax.random.split(jax.random.key(group), len(mask))
    return np.asarray(
        jax.jit(masking.trim_to_equal_counts, static_argnums=2)(row_keys, mask, group)
    )


def runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The runs of masked frames: how many each row has, and all their lengths."""
    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    starts, ends = np.nonzero(edges == 1), np.nonzero(edges == -1)
    return (edges == 1).sum(1), ends[1] - starts[1]


def exact_masking(frames: int) -> np.ndarray:
    """The probability that each frame is masked, before trimming: [T]."""
    settings = mask_settings()
    length = settings["mask_length"]
    count = settings["mask_prob"] * frames / length
    choices = frames - length
    # frame t is hidden by the starts from t - length + 1 to t that are allowed
    t = np.arange(frames)
    covering = np.minimum(t, choices - 1) - np.maximum(t - length + 1, 0) + 1
    probability = np.zeros(frames)
    for n, weight in (
        (math.floor(count), 1 - count % 1),
        (math.floor(count) + 1, count % 1),
    ):
        n = max(n, settings["min_masks"])
        missed = [math.comb(choices - c, n) / math.comb(choices, n) for c in map(int, covering)]
        probability += weight * (1 - np.array(missed))
    return probability


def within_4_standard_errors(ours, stored, spread, ours_n, stored_n) -> None:
    error = spread * (1 / ours_n + 1 / stored_n) ** 0.5
    assert abs(ours - stored) <= 4 * error + 1e-12, f"{ours} and {stored} differ by > 4 x {error}"


MASK_CASES = [
    (frames, key)
    for frames in MASKS
    if re.fullmatch(r"T\d+", frames)
    for key in MASKS[frames]
    if "trimmed_batch" in key
]


@pytest.mark.parametrize(("frames", "key"), MASK_CASES)
def test_mask_statistics(frames, key):
    stored, length = MASKS[frames][key], int(frames[1:])
    group = int(re.search(r"\d+$", key)[0])
    mask = masks(length, group)
    num_runs, run_lengths = runs(mask)
    counts = mask.sum(1)
    # rows of a group are not independent: groups are
    ours_n, stored_n = len(mask) // group, stored["rows"] // group
    by_group = mask.mean(1).reshape(-1, group).mean(1)
    compare = functools.partial(within_4_standard_errors, ours_n=ours_n, stored_n=stored_n)

    # The recorded statistics of runs scatter three times as widely as those of 20,000 rows do, as
    # if from a tenth of the rows; masking_test.py compares ours with an independent generator's.
    compare_runs = functools.partial(compare, stored_n=stored_n / 10)

    assert len(mask) >= ROWS
    if stored.get("every_row_same_count"):
        assert (counts.reshape(-1, group) == counts.reshape(-1, group)[:, :1]).all()
    if "mean_fraction" in stored:
        compare(mask.mean(), stored["mean_fraction"], by_group.std())
    if "mean_count" in stored:
        compare(counts.mean(), stored["mean_count"], by_group.std() * length)
    if "std_fraction" in stored:
        compare(mask.mean(1).std(), stored["std_fraction"], by_group.std() / 2**0.5)
    if "std_count" in stored:
        compare(counts.std(), stored["std_count"], by_group.std() * length / 2**0.5)
    if "contiguous_runs" in stored:
        spread = num_runs.reshape(-1, group).mean(1).std()
        compare(num_runs.mean(), stored["contiguous_runs"]["mean"], spread)
        # the spread over rows has both a group's and a row's share
        relative = ((num_runs.reshape(-1, group) - num_runs.mean()) ** 2).mean(1).std()
        compare(num_runs.var(), stored["contiguous_runs"]["std"] ** 2, relative)
        for extreme in {"min", "max"} & set(stored["contiguous_runs"]):
            value = getattr(num_runs, extreme)()
            assert abs(value - stored["contiguous_runs"][extreme]) <= 2 * num_runs.std()
    if "fraction_of_runs_shorter_than_5" in stored:
        short = run_lengths < 5
        per_row = np.repeat(np.arange(len(mask)), num_runs) // group
        per_group = np.bincount(per_row, short) / np.bincount(per_row)
        compare_runs(short.mean(), stored["fraction_of_runs_shorter_than_5"], per_group.std())
    for extreme in {"min", "max"} & set(stored):
        value = getattr(mask.mean(1), extreme)()
        assert abs(value - stored[extreme]) <= 2 * mask.mean(1).std()
    if "run_length" in stored:
        lengths = stored["run_length"]
        spread = np.bincount(np.repeat(np.arange(len(mask)), num_runs), run_lengths) / num_runs
        compare_runs(run_lengths.mean(), lengths["mean"], spread.std())
        assert run_lengths.min() == lengths["min"]
        assert np.median(run_lengths) == lengths["median"]
        assert np.percentile(run_lengths, 95) == lengths["p95"]
        # the tail is exponential: the largest of n grows by a scale for each factor of e in n and
        # strays by 1.28 scales
        scale = (lengths["p95"] - lengths["min"]) / math.log(20)
        expected = lengths["max"] + scale * math.log(10)
        assert abs(run_lengths.max() - expected) <= 4 * 1.28 * 2**0.5 * scale
    for key, ours in (
        ("p_masked_first_frames", mask.mean(0)[:6]),
        ("p_masked_last_frames", mask.mean(0)[-6:]),
    ):
        for p, q in zip(ours, stored.get(key, []), strict=False):
            compare(p, q, (q * (1 - q)) ** 0.5)
    if "p_masked_last_frames" in stored:
        assert not mask[:, -1].any()
    if "p_masked_middle" in stored:
        # frames of a row lean against each other; the row's own mean bounds how much
        inner = mask[:, 10:-10].mean(1)
        compare(inner.mean(), stored["p_masked_middle"], inner.std())


@pytest.mark.parametrize("frames", [key for key in MASKS if re.fullmatch(r"T\d+", key)])
def test_masks_against_exact_means(frames):
    length, exact = int(frames[1:]), exact_masking(int(frames[1:]))
    mask = masks(length, 1)
    by_row = mask.mean(1)
    error = by_row.std() / len(mask) ** 0.5
    assert abs(by_row.mean() - exact.mean()) <= 4 * error
    errors = np.sqrt(exact * (1 - exact) / len(mask))
    # 4 standard errors of each frame, allowing for having looked at all of them
    assert (np.abs(mask.mean(0) - exact) <= 5 * errors).all()
    assert exact[-1] == 0
    assert not mask[:, -1].any()
    if "theory_middle_frame" in MASKS[frames]:
        theory = MASKS[frames]["theory_middle_frame"]
        np.testing.assert_allclose(exact[length // 2], theory, rtol=1e-3)


MIXTURE = read_json("mixture.json") if names("mixture.npz") else {}


def recorded_draws() -> mixture.Draws:
    rows, most = MIXTURE["rows"], MIXTURE["number_range"][1]

    def column(key: str) -> jax.Array:
        filled = [(list(row.get(key, [])) + [0] * most)[:most] for row in rows]
        return jnp.asarray(filled, jnp.int32)

    return mixture.Draws(
        mixed=jnp.asarray([row["mixed"] for row in rows]),
        count=jnp.asarray([row.get("n", 0) for row in rows], jnp.int32),
        starts=column("starts"),
        durations=column("durations"),
        positions=column("positions"),
    )


@pytest.mark.skipif(not MIXTURE, reason="the folder has no mixture.json and mixture.npz")
def test_mixture_of_the_recorded_draws(record_property):
    stored = npz("mixture.npz")
    wave = jnp.asarray(stored["audio_i16"].astype(np.float32) / 32768)
    ours = mixture.mix(
        wave,
        recorded_draws(),
        group=len(wave),
        max_length=MIXTURE["len_range"][1],
        volume=MIXTURE["volume"],
    )
    check(record_property, max_error(ours, stored["mixed"]), 1e-6)
    for row in MIXTURE["rows"]:
        assert row["mixed"] == (row["u"] > MIXTURE["mixture_prob"])


@pytest.mark.skipif(not MIXTURE, reason="the folder has no mixture.json and mixture.npz")
def test_our_draws_follow_the_recorded_ranges():
    batch, num_samples = npz("mixture.npz")["audio_i16"].shape
    draws = mixture.draw(
        jax.random.split(jax.random.key(0), 50_000),
        num_samples,
        batch,
        prob=1 - MIXTURE["mixture_prob"],
        count=tuple(MIXTURE["number_range"]),
        length=tuple(MIXTURE["len_range"]),
    )
    draws = mixture.Draws(*map(np.asarray, draws))
    assert abs(draws.mixed.mean() - (1 - MIXTURE["mixture_prob"])) < 4 * 0.5 / 50_000**0.5
    for row in MIXTURE["rows"]:
        if not row["mixed"]:
            continue
        for ours, key in ((draws.count, "n"), (draws.durations, "duration")):
            low, high = row[f"{key}_range"]  # torch.randint's: without `high`
            assert (ours.min(), ours.max()) == (low, high - 1)
        low, high = row["start_range"]
        assert draws.starts.min() >= low
        assert draws.starts.max() < high
        assert draws.starts.max() > 0.999 * high
        for duration, (low, high) in zip(row["durations"], row["position_ranges"], strict=True):
            assert (low, high) == (0, num_samples - duration + 1)
    last = num_samples - draws.durations
    assert (draws.positions >= 0).all()
    assert (draws.positions <= last).all()
    assert (draws.positions / last).max() > 0.999
    assert draws.positions.min() < 3


def schedule_numbers(points: dict[int, float]) -> tuple[float, int, int]:
    """Peak, warmup and total steps: official ones, unless the points themselves say otherwise."""
    peak = max(points.values())
    warmup = max(points, key=points.get)
    ends = [k for k, rate in points.items() if k > warmup and rate == 0]
    first = min((k for k, rate in points.items() if rate > 0), default=None)
    if (
        first is not None
        and first < warmup
        and not math.isclose(points[first] / first, peak / warmup, rel_tol=1e-9)
    ):
        warmup, peak = 32_000, points[first] / first * 32_000
    return peak, warmup, min(ends, default=400_000)


@pytest.mark.parametrize("model_name", read_json("lr_schedule.json"))
def test_learning_rate(model_name):
    points = {int(k): rate for k, rate in read_json("lr_schedule.json")[model_name].items()}
    schedule = optimizer.warmup_linear_decay(*schedule_numbers(points))
    ours = [schedule(jnp.asarray(k)) for k in points]
    rtol = 1e-9 if X64 else 1e-6
    np.testing.assert_allclose(ours, list(points.values()), rtol=rtol, atol=1e-20)


@pytest.mark.skipif(not names("optimizer.npz"), reason="the folder has no optimizer.npz")
def test_optimizer(record_property):
    stored = npz("optimizer.npz")
    parameters = sorted({key.split("/")[1] for key in stored if key.startswith("grad/")})
    updates = 1 + max(int(key.split("/")[2]) for key in stored if key.startswith("grad/"))
    b1, b2, eps, decay = (float(x) for x in stored["betas_eps_wd"])
    peak, warmup, total = (float(x) for x in stored["hyper_lr_warmup_total"])
    schedule = optimizer.warmup_linear_decay(peak, warmup, total)
    official = optimizer.make(
        schedule,
        clip_norm=float(stored["clip_norm"]),
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=decay,
    )
    tolerance = 1e-12 if X64 else 2e-6
    params = {name: jnp.asarray(stored[f"param/{name}/0"], DTYPE) for name in parameters}
    state, update = official.init(params), jax.jit(official.update)
    worst = 0.0
    for t in range(updates):
        grads = {name: jnp.asarray(stored[f"grad/{name}/{t}"], DTYPE) for name in parameters}
        if "lr" in stored:
            worst = max(worst, relative_error(schedule(jnp.asarray(t)), stored["lr"][t]))
        if "grad_norm_before_clip" in stored:
            norm = stored["grad_norm_before_clip"][t]
            worst = max(worst, relative_error(optax.tree.norm(grads), norm))
        change, state = update(grads, state, params)
        params = optax.apply_updates(params, change)
        for name in parameters:
            if f"param/{name}/{t + 1}" in stored:
                expected = stored[f"param/{name}/{t + 1}"]
                worst = max(worst, max_error(params[name], expected))
    check(record_property, worst, tolerance)


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
    [(name, key) for name, listed in read_json("init_stats.json").items() for key in listed],
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


def test_the_folder_holds_something():
    found = [
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
    assert found, f"MERT_JAX_GOLDEN={FOLDER} holds no golden numbers that this test knows"


IN_FLOAT64 = STUDENT_FILES + names("optimizer.npz") + names("lr_schedule.json")
if IN_FLOAT64 and not X64:

    def test_in_float64(second_process):
        process, output = second_process
        process.wait()
        text = output.read_text()
        print(text)
        assert process.returncode == 0, text[-4000:]
