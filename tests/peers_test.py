"""Comparisons on the CPU with full-size HuBERT and EnCodec of transformers, and with nnAudio.

They need the extra [peers].
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

import mert_jax
from mert_jax import teachers
from mert_jax.checkpoints import fairseq, huggingface, in_memory
from mert_jax.checkpoints import tensor_names as names
from mert_jax.data import decoding
from mert_jax.models import encodec as codec
from mert_jax.models import quantize
from mert_jax.teachers import encodec_checkpoint as encodec
from mert_jax.teachers import rvq_vae
from tests import frame_padding

pytestmark = pytest.mark.peers
MUSIC = Path(__file__).parent.parent / "launch" / "music"
torch = pytest.importorskip("torch", reason="torch is missing; pip install mert_jax[peers]")


@pytest.fixture(scope="module", autouse=True)
def _optimised():
    """Run what users run: the other tests switch most of XLA's optimisations off."""
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


SIZES = {
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12),
    "large": dict(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16),
}


@pytest.mark.parametrize("size", ["base", pytest.param("large", marks=pytest.mark.slow)])
def test_all_hidden_states_of_a_full_size_model(size, record_property):
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        **SIZES[size],
        intermediate_size=4 * SIZES[size]["hidden_size"],
        do_stable_layer_norm=size == "large",
    )
    peer = transformers.HubertModel(config).eval()
    with torch.no_grad():  # norms and biases too, so that a mix-up shows
        for parameter in peer.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    wave = 0.1 * np.random.default_rng(0).normal(size=(2, 24_000)).astype(np.float32)
    valid = np.array([24_000, 17_000])
    wave[1, valid[1] :] = 0
    with torch.no_grad():
        theirs = peer(
            torch.tensor(wave),
            attention_mask=torch.arange(24_000)[None] < torch.tensor(valid)[:, None],
            output_hidden_states=True,
        )

    student = huggingface.student(config.to_dict())
    state = {name: x.numpy() for name, x in peer.state_dict().items()}
    params = names.params_from_hf(state, student)
    found = [x.numpy() for x in theirs.hidden_states], theirs.last_hidden_state.numpy()
    ours = hidden_states(student, params, wave, valid)
    error = assert_same_states(*found, *ours, transformers.__version__)
    record_property("max_error", error)


def hidden_states(student, params, wave, valid) -> tuple[list, np.ndarray]:
    """Return the encoder's input, the raw output of every layer, and the model's output."""
    padding = frame_padding.conv_frame_padding(
        jnp.asarray(valid),
        student.conv_kernels,
        student.conv_strides,
        student.num_frames(wave.shape[1]),
    )
    forward = jax.jit(
        lambda params, wave: student.apply(
            {"params": params}, wave, padding=padding, mutable=["intermediates"]
        )
    )
    output, seen = forward(params, wave)
    encoder = seen["intermediates"]["encoder"]
    states = [encoder["encoder_input"][0], *encoder["layers"]["hidden_states"][0]]
    return [np.asarray(x) for x in states], np.asarray(output.last_hidden_state)


@pytest.fixture(scope="module", params=["base", pytest.param("large", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    """A full-size model as `convert --to=hf` writes it, a batch with a short row, and the hidden
    states that mert_jax computes for it."""
    large = request.param == "large"
    sizes = SIZES[request.param]
    config = huggingface.DEFAULTS | sizes
    config |= dict(do_stable_layer_norm=large, intermediate_size=4 * sizes["hidden_size"])
    student, rng = huggingface.student(config), np.random.default_rng(0)
    flat = {  # norms and biases too, so that a mix-up shows
        name: (0.04 if name.startswith("feature_encoder") else 0.02)
        * rng.standard_normal(x.shape, np.float32)
        + np.float32(name.endswith(("scale", "_g")))
        for name, x in names.abstract_params(student).items()
    }
    params = traverse_util.unflatten_dict(flat, sep="/")
    folder = tmp_path_factory.mktemp("exported")
    about = in_memory.About(do_normalize=large)
    huggingface.write_checkpoint(str(folder), in_memory.Checkpoint(student, params, None, 0, about))
    wave = 0.1 * rng.normal(size=(2, 24_000)).astype(np.float32)
    valid = np.array([24_000, 17_000])
    wave[1, valid[1] :] = 0
    return folder, wave, valid, *hidden_states(student, params, wave, valid)


def assert_same_states(theirs, last, expected, expected_last, version: str) -> float:
    """Return the largest difference of hidden states; the last is after the final norm in 4.x."""
    after_norm = int(version.split(".")[0]) < 5
    ours = [*expected[:-1], expected_last if after_norm else expected[-1]]
    assert len(theirs) == len(ours)
    errors = [np.abs(a - b).max() for a, b in zip(ours, theirs, strict=True)]
    errors.append(np.abs(last - expected_last).max())
    print(f"largest differences from transformers {version}: {max(errors):.1e} of {errors}")
    assert max(errors) < 1e-4
    return float(max(errors))


def loaded(model_class, folder, **options):
    """Load a model, asserting that no tensor is missing or unexpected."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    wrong = {key: found for key, found in info.items() if found}
    assert not wrong
    return model.eval()


@pytest.mark.parametrize("seconds", [5, pytest.param(60, marks=pytest.mark.slow)])
def test_embeddings_of_real_music(exported, seconds):
    """`extract` pads a recording to a bucket and normalises it by its own moments."""
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    folder, *_ = exported
    found = []
    for path in sorted(MUSIC.glob("*.ogg")):
        with decoding.decode(str(path)) as (_, blocks):
            found += blocks
    wave = np.concatenate(found)[: seconds * 24_000]
    model = mert_jax.load(str(folder))
    ours = model(wave)
    if model.about.do_normalize:
        wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
    peer = loaded(transformers.HubertModel, folder)
    states, last = their_states(peer, wave[None], np.array([len(wave)]))
    theirs = [*states[:-1], last]  # 5.x leaves the final norm out of the last state
    error = max(np.abs(a - b[0]).max() for a, b in zip(ours, theirs, strict=True))
    print(f"{seconds} s: {error:.1e} of at most {np.abs(ours).max():.1f}")
    assert error < 1e-4


def their_states(model, wave, valid) -> tuple[list, np.ndarray]:
    attention = torch.arange(wave.shape[1])[None] < torch.tensor(valid)[:, None]
    with torch.no_grad():
        output = model(torch.tensor(wave), attention_mask=attention, output_hidden_states=True)
    return [x.numpy() for x in output.hidden_states], output.last_hidden_state.numpy()


def test_stock_transformers_loads_what_we_write(exported, record_property):
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    folder, wave, valid, *expected = exported
    model = loaded(transformers.HubertModel, folder)
    states = their_states(model, wave, valid)
    error = assert_same_states(*states, *expected, transformers.__version__)
    record_property("max_error", error)
    assert type(loaded(transformers.AutoModel, folder)) is transformers.HubertModel


def test_nothing_is_masked_in_training_mode(exported):
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    folder, wave, *_ = exported
    model = transformers.HubertModel.from_pretrained(folder)
    assert model.config.apply_spec_augment is False
    assert model.masked_spec_embed.shape == (model.config.hidden_size,)
    with torch.no_grad():
        trained, evaluated = (
            model.train(mode)(torch.tensor(wave[:, :8_000])).last_hidden_state
            for mode in (True, False)
        )
    assert torch.equal(trained, evaluated)


def test_the_processor_treats_waves_as_in_training(exported):
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    folder, wave, *_ = exported
    processor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
    large = json.loads((folder / "config.json").read_text())["do_stable_layer_norm"]
    assert processor.sampling_rate == 24_000
    assert processor.do_normalize == large
    values = processor(wave[0], sampling_rate=24_000, return_tensors="np").input_values[0]
    normal = (wave[0] - wave[0].mean()) / np.sqrt(wave[0].var() + 1e-7)
    np.testing.assert_allclose(values, normal if large else wave[0], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="24000"):
        processor(wave[0], sampling_rate=16_000)


def test_a_wrapper_with_a_config_of_its_own_loads_what_we_write(exported, record_property):
    """Load as MARBLE does: MERT's model type, settings without HuBERT's class, another prefix."""
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    hubert = transformers.HubertConfig().to_dict()

    class WrapperConfig(transformers.PretrainedConfig):
        model_type = "mert_model"

        def __init__(self, feature_extractor_cqt=True, attention_relax=-1.0, **settings):
            given = {key: x for key, x in hubert.items() if key != "model_type"} | settings
            super().__init__(**given)
            self.feature_extractor_cqt = feature_extractor_cqt
            self.attention_relax = attention_relax

    class Wrapper(transformers.HubertModel):
        config_class = WrapperConfig
        base_model_prefix = "music_hubert"

        def __init__(self, config):
            super().__init__(config)
            assert not config.feature_extractor_cqt, "asks for a CQT that no checkpoint has"

    folder, wave, valid, *expected = exported
    model = loaded(Wrapper, folder)
    assert isinstance(model.config, WrapperConfig)
    states = their_states(model, wave, valid)
    error = assert_same_states(*states, *expected, transformers.__version__)
    record_property("max_error", error)


def test_settings_left_out_mean_what_transformers_means():
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    theirs = transformers.HubertConfig().to_dict()

    def listed(x):
        return list(x) if isinstance(x, list | tuple) else x

    ours = {key: listed(x) for key, x in huggingface.DEFAULTS.items()}
    assert ours == {key: listed(theirs[key]) for key in ours}


OLD_TRANSFORMERS = """
import sys
import numpy as np, torch, transformers

folder, inputs, out = sys.argv[1:]
inputs = np.load(inputs)
model, info = transformers.HubertModel.from_pretrained(folder, output_loading_info=True)
auto = transformers.AutoModel.from_pretrained(folder)
processor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(folder)
assert type(auto) is transformers.HubertModel and processor.sampling_rate == 24000
assert not any(info.values()), info
wave, valid = torch.tensor(inputs["wave"]), torch.tensor(inputs["valid"])
attention = torch.arange(wave.shape[1])[None] < valid[:, None]
with torch.no_grad():
    output = model.eval()(wave, attention_mask=attention, output_hidden_states=True)
states = {f"state{i}": x.numpy() for i, x in enumerate(output.hidden_states)}
version = transformers.__version__
np.savez(out, last=output.last_hidden_state.numpy(), version=version, **states)
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory) -> str:
    """A Python with transformers 4.49, the last version before the names of weight norm and the
    meaning of `hidden_states[-1]` changed."""
    if given := os.environ.get("MERT_JAX_TRANSFORMERS_4"):
        return given
    folder = tmp_path_factory.mktemp("transformers_4")
    python = folder / "bin" / "python"
    try:
        for arguments in (
            [sys.executable, "-m", "venv", folder],
            [python, "-m", "pip", "install", "-q", "transformers==4.49.*", "torch", "numpy"],
        ):
            subprocess.run(arguments, check=True, capture_output=True, text=True, timeout=1800)
    except (subprocess.SubprocessError, OSError) as e:
        said = (getattr(e, "stderr", None) or str(e)).strip().splitlines()[-1]
        pytest.skip(
            f"transformers 4.49 cannot be installed ({said}): allow pip to, or name a Python that "
            "has it in the environment variable MERT_JAX_TRANSFORMERS_4"
        )
    return str(python)


@pytest.mark.slow
def test_transformers_4_loads_what_we_write(exported, old_python, tmp_path, record_property):
    folder, wave, valid, *expected = exported
    np.savez(tmp_path / "inputs.npz", wave=wave, valid=valid)
    (tmp_path / "old.py").write_text(OLD_TRANSFORMERS)
    done = subprocess.run(
        [old_python, "old.py", folder, "inputs.npz", "out.npz"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    found = dict(np.load(tmp_path / "out.npz"))
    version, last = str(found.pop("version")), found.pop("last")
    assert version.startswith("4.")
    states = [found[f"state{i}"] for i in range(len(found))]
    record_property("max_error", assert_same_states(states, last, *expected, version))


def test_nnaudios_tables_are_written_bit_for_bit():
    features = pytest.importorskip("nnAudio.features", reason="pip install mert_jax[peers]")
    for size in (336, 84):
        layer = features.cqt.CQT(
            sr=24_000,
            hop_length=320,
            fmin=fairseq.FMIN,
            n_bins=size,
            bins_per_octave=size // 7,
            verbose=False,
        )
        prefix = "encoder_cqt_model.spec_layer."
        theirs = {prefix + name: x.numpy() for name, x in layer.state_dict().items()}
        ours = fairseq.cqt_tables(size)
        assert ours.keys() == theirs.keys()
        for name, x in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (x.dtype, x.shape)
            assert np.ascontiguousarray(ours[name]).tobytes() == x.tobytes(), name


def test_nnaudio(record_property):
    features = pytest.importorskip("nnAudio.features", reason="pip install mert_jax[peers]")
    wave = 0.1 * np.random.default_rng(0).normal(size=(2, 24_320)).astype(np.float32)
    wave += 0.3 * np.sin(2 * np.pi * 220 * np.arange(24_320) / 24_000).astype(np.float32)
    layer = features.cqt.CQT(
        sr=24_000,
        hop_length=320,
        fmin=32.7,
        n_bins=336,
        bins_per_octave=48,
        pad_mode="constant",
        verbose=False,
    )
    with torch.no_grad():
        theirs = layer(torch.tensor(wave)).numpy().swapaxes(1, 2)
    teacher = teachers.make("cqt")
    ours = np.asarray(jax.jit(teacher.apply)(teacher.params, wave))
    record_property("max_error", float(np.abs(ours - theirs).max() / theirs.max()))
    assert np.abs(ours - theirs).max() <= 1e-4 * theirs.max()
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(theirs)


@pytest.fixture(scope="module")
def encodec_peer():
    """transformers' EnCodec with random weights, two clips, and their latents, codes and
    reconstructions."""
    transformers = pytest.importorskip("transformers", reason="pip install mert_jax[peers]")
    torch.manual_seed(0)
    peer = transformers.EncodecModel(transformers.EncodecConfig()).eval()
    # a chord with a gap and noise; 25 samples short of a whole frame
    rng, t = np.random.default_rng(0), np.arange(24_295) / 24_000
    chord = np.sin(2 * np.pi * 220 * np.array([[1], [1.5]]) * t) * (np.sin(9 * t) > 0)
    wave = (0.3 * chord + 0.1 * rng.normal(size=chord.shape)).astype(np.float32)
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            parameter += 0.02 * torch.randn_like(parameter)  # norms too, so that a mix-up shows
            if name.endswith("weight.original0"):
                parameter *= 2  # keeps the signal's level through all layers
        latents = peer.encoder(torch.tensor(wave)[:, None])
        # codebooks around the latents' mean (the first) or 0 (the others), with half their spread
        spread, mean = latents.std((0, 2)), latents.mean((0, 2))
        for k, layer in enumerate(peer.quantizer.layers):
            layer.codebook.embed[:] = 0.5 * spread * torch.randn(1024, 128) + mean * (k == 0)
    return peer, wave, latents.numpy().swapaxes(1, 2), *encodec_codes(peer, wave)


def encodec_codes(peer, wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes [B, T, 8] and reconstruction [B, 320 T] of transformers' EnCodec at 6 kbps."""
    with torch.no_grad():
        encoded = peer.encode(torch.tensor(wave)[:, None], bandwidth=6.0)
        decoded = peer.decode(encoded.audio_codes, encoded.audio_scales)
    return encoded.audio_codes[0].numpy().swapaxes(1, 2), decoded.audio_values[:, 0].numpy()


def clear_codes(latents: np.ndarray, codebooks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes [..., K] of `latents` [..., d] in float64, and which of them are certain.

    A code is certain if, at its codebook and all before it, the vector is more than 1e-4 away from
    the boundary to every other code's cell.
    """
    residual, codes, clear = latents.astype(np.float64), [], []
    for book in codebooks.astype(np.float64):
        squares = np.square(book).sum(-1)
        distances = squares - 2 * residual @ book.T
        code = distances.argmin(-1)
        apart = np.sqrt(np.maximum(squares[code][..., None] + squares - 2 * book[code] @ book.T, 0))
        beyond = distances - distances.min(-1, keepdims=True)
        boundary = np.where(apart > 1e-6, beyond / (2 * np.maximum(apart, 1e-6)), np.inf)
        residual = residual - book[code]
        codes.append(code)
        clear.append(boundary.min(-1) > 1e-4)
    return np.stack(codes, -1), np.logical_and.accumulate(np.stack(clear, -1), -1)


def encodec_checkpoint(kind: str, peer, folder: Path) -> str:
    """Save the peer as a Hugging Face directory, or under the official names as a .th file."""
    if kind == "hugging_face":
        peer.save_pretrained(folder)
        return str(folder)
    shapes = Path(__file__).parent / "golden" / "shapes_encodec_24khz.json"
    names = json.loads(shapes.read_text())["official_to_hf_new"]
    state = peer.state_dict()
    torch.save({name: state[theirs] for name, theirs in names.items()}, folder / "encodec.th")
    return str(folder / "encodec.th")


@pytest.mark.parametrize("kind", ["hugging_face", "official"])
def test_a_full_size_encodec(kind, encodec_peer, tmp_path, record_property):
    peer, wave, their_latents, their_codes, _ = encodec_peer
    path = encodec_checkpoint(kind, peer, tmp_path)
    teacher = teachers.make("rvq_vae", checkpoint=path)
    network = rvq_vae.encoder(teacher.params)
    latents = jax.jit(lambda params, x: network.apply({"params": params["encoder"]}, x))
    latents = np.asarray(latents(teacher.params, wave))
    codes = np.asarray(jax.jit(teacher.apply)(teacher.params, wave))

    error = np.abs(latents - their_latents).max()
    record_property("max_error", float(error))
    assert error <= 3e-5 * max(1, np.abs(their_latents).max())
    exact, clear = clear_codes(their_latents, teacher.params["codebooks"])
    record_property("nearly_tied", int((~clear).sum()))
    record_property("flipped", int((codes != their_codes).sum()))
    np.testing.assert_array_equal(codes[clear], their_codes[clear])
    np.testing.assert_array_equal(codes[clear], exact[clear])
    assert clear.mean() > 0.9
    used = [len(np.unique(codes[..., k])) for k in range(8)]
    assert min(used) > 20, f"too few codes to tell the books apart: {used}"


def test_transformers_reads_the_encodec_we_write(encodec_peer, tmp_path):
    import transformers

    peer, wave, latents, codes, _ = encodec_peer
    params = encodec.from_state({name: x.numpy() for name, x in peer.state_dict().items()})
    books, decoder = params["codebooks"][:8], codec.Decoder()
    weights = jax.jit(decoder.init)(jax.random.key(0), jnp.zeros((1, 8, 128)))["params"]
    # biases too, so that a mix-up shows
    weights = jax.tree.map(lambda x: x + 0.02 * np.sin(np.arange(x.size)).reshape(x.shape), weights)
    encodec.write_encodec(str(tmp_path), params | {"codebooks": books, "decoder": weights})
    theirs = transformers.EncodecModel.from_pretrained(tmp_path).eval()
    their_codes, reconstruction = encodec_codes(theirs, wave)
    clear = clear_codes(latents, books)[1]
    np.testing.assert_array_equal(their_codes[clear], codes[clear])
    summed = quantize.residual_decode(jnp.asarray(their_codes), jnp.asarray(books))
    decoded = np.asarray(jax.jit(decoder.apply)({"params": weights}, summed))
    assert np.abs(reconstruction - decoded).max() <= 3e-5 * max(1, np.abs(decoded).max())
