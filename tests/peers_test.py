"""Live peers on the CPU: transformers' HuBERT and EnCodec at full size, and nnAudio (the extra
[peers])."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mert_jax import codec, encodec, masking, quantize, teachers
from mert_jax.formats import huggingface, names
from mert_jax.teachers import rvq_vae

pytestmark = pytest.mark.peers
torch = pytest.importorskip("torch", reason="torch is missing; pip install mert_jax[peers]")

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
    padding = masking.conv_frame_padding(
        jnp.asarray(valid), student.conv_kernels, student.conv_strides, student.num_frames(24_000)
    )
    forward = jax.jit(
        lambda params, wave: student.apply(
            {"params": params}, wave, padding=padding, mutable=["intermediates"]
        )
    )
    output, seen = forward(params, wave)
    encoder = seen["intermediates"]["encoder"]
    # transformers 5 returns the raw last layer, 4 returned it after the final norm
    ours = [encoder["encoder_input"][0], *encoder["layers"]["hidden_states"][0]]
    if int(transformers.__version__.split(".")[0]) < 5:
        ours[-1] = output.last_hidden_state
    assert len(theirs.hidden_states) == len(ours)
    errors = [np.abs(a - b.numpy()).max() for a, b in zip(ours, theirs.hidden_states, strict=True)]
    last = np.abs(output.last_hidden_state - theirs.last_hidden_state.numpy()).max()
    print(f"largest differences from transformers {transformers.__version__}: {errors}, {last}")
    record_property("max_error", float(max(*errors, last)))
    assert max(*errors, last) < 1e-4


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
    """transformers' EnCodec of random weights, two clips, and their latents, codes and
    reconstruction."""
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
                parameter *= 2  # so that a signal keeps its size through all the layers
        latents = peer.encoder(torch.tensor(wave)[:, None])
        # the first book about the latents' mean, the others about 0, all of half their spread
        spread, mean = latents.std((0, 2)), latents.mean((0, 2))
        for k, layer in enumerate(peer.quantizer.layers):
            layer.codebook.embed[:] = 0.5 * spread * torch.randn(1024, 128) + mean * (k == 0)
    return peer, wave, latents.numpy().swapaxes(1, 2), *encodec_codes(peer, wave)


def encodec_codes(peer, wave: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [B, T, 8] and reconstruction [B, 320 T] of transformers' EnCodec at 6 kbps."""
    with torch.no_grad():
        encoded = peer.encode(torch.tensor(wave)[:, None], bandwidth=6.0)
        decoded = peer.decode(encoded.audio_codes, encoded.audio_scales)
    return encoded.audio_codes[0].numpy().swapaxes(1, 2), decoded.audio_values[:, 0].numpy()


def clear_codes(latents: np.ndarray, codebooks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [..., K] of `latents` [..., d], and whether at this book and those before it the
    vector is more than 1e-4 from the boundary to any other code's cell; in float64."""
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
    """The peer as a Hugging Face directory, or under the official names as a .th file."""
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
    peer, wave, their_latents, their_codes, their_decoded = encodec_peer
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

    params = encodec.read(path)
    summed = quantize.residual_decode(jnp.asarray(their_codes), params["codebooks"][:8])
    decoder = jax.jit(codec.Decoder().apply)
    decoded = np.asarray(decoder({"params": params["decoder"]}, summed))
    assert np.abs(decoded - their_decoded).max() <= 3e-5 * max(1, np.abs(their_decoded).max())


def test_transformers_reads_the_encodec_we_write(encodec_peer, tmp_path):
    import transformers

    peer, wave, latents, codes, decoded = encodec_peer
    params = encodec.from_state({name: x.numpy() for name, x in peer.state_dict().items()})
    books = params["codebooks"][:8]
    encodec.write(str(tmp_path), params | {"codebooks": books})
    ours = transformers.EncodecModel.from_pretrained(tmp_path).eval()
    found_codes, found = encodec_codes(ours, wave)
    clear = clear_codes(latents, books)[1]
    np.testing.assert_array_equal(found_codes[clear], codes[clear])
    same = (found_codes == codes).all((1, 2))  # a clip without a flip
    assert same.any()
    scale = max(1, np.abs(decoded).max())
    assert np.abs(found - decoded)[same].max() <= 3e-5 * scale
