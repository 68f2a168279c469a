"""The student in fairseq's flavour against the official code, in float32 and in float64."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mert_jax import teachers
from mert_jax.checkpoints import fairseq
from mert_jax.checkpoints import tensor_names as official
from mert_jax.pretraining import losses, optimizer, step
from tests import cqt_definition, frame_padding
from tests.golden_files import (
    DTYPE,
    FOLDER,
    SPECIALS,
    X64,
    check,
    every_frame_stored,
    five_seconds,
    keys,
    max_error,
    names,
    npz,
    read_json,
    relative_error,
    relative_l2,
)

STUDENT_FILES = names("student_*_case*.npz")
INPUTS = "audio_i16|padding_mask_samples_valid_len|labels|mask"


@functools.cache
def target_cqt(wave: bytes, rows: int, bins: int, sample_rate: int, hop: int) -> np.ndarray:
    """Ours in float32; in float64 the definition, whose kernels are rounded to float32."""
    audio = np.frombuffer(wave, np.int16).reshape(rows, -1) / 32768
    options = dict(sample_rate=sample_rate, hop=hop, n_bins=bins, bins_per_octave=bins // 7)
    if X64:
        return cqt_definition.magnitudes(audio, **options)
    teacher = teachers.make("cqt", **options)
    return np.asarray(jax.jit(teacher.apply)(teacher.params, jnp.asarray(audio, jnp.float32)))


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
    padding = frame_padding.fairseq_frame_padding(jnp.asarray(valid), num_samples, length)
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
        penalty_weight=10.0,
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


def cases(numbers) -> list:
    """The numbers of each file; a model's first case is quick, the others are slow."""
    return [
        pytest.param(file, name, marks=() if "caseA" in file else pytest.mark.slow)
        for file in STUDENT_FILES
        for name in numbers(file)
    ]


@pytest.mark.parametrize(("file", "key"), cases(lambda file: keys(file, INPUTS)))
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
    cases(lambda file: [field for field in SUMMARISED if field in summary(file)]),
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
    """Run the tests of student and optimiser with 64-bit types in a second process."""
    if not any(item.name == "test_in_float64" for item in request.session.items):
        yield None
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += [__file__, str(Path(__file__).with_name("optimizer_test.py"))]
    environment = os.environ | {"JAX_ENABLE_X64": "1", "MERT_JAX_GOLDEN": str(FOLDER)}
    environment.pop("PYTEST_ADDOPTS", None)  # such as the name of this run's report
    output = tmp_path_factory.mktemp("float64") / "output"
    with output.open("w") as file:
        process = subprocess.Popen(
            command, env=environment, cwd=Path(__file__).parents[2], stdout=file, stderr=file
        )
    yield process, output
    process.kill()
    process.wait()


IN_FLOAT64 = STUDENT_FILES + names("optimizer.npz") + names("lr_schedule.json")
if IN_FLOAT64 and not X64:

    @pytest.mark.slow
    def test_in_float64(second_process):
        process, output = second_process
        process.wait()
        text = output.read_text()
        print(text)
        assert process.returncode == 0, text[-4000:]
