"""The peer of `step`: MERT's pretraining step in PyTorch, built from the same config.

It uses nnAudio's CQT, transformers' EnCodec and Hubert, and AdamW.

Shapes: B clips, N samples, T frames, D width, K codebooks.
"""

from typing import Any

import numpy as np
import torch
from ml_collections import ConfigDict
from nnAudio.features.cqt import CQT1992v2
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss, normalize
from transformers import EncodecModel, HubertConfig, HubertModel
from transformers.models.hubert.modeling_hubert import _compute_mask_indices

from mert_jax.constants import HOP_LENGTH

BOOKS, BINS = 8, 336


class Recipe(nn.Module):
    """The student with its heads, the teachers and the optimiser, in training."""

    def __init__(self, config: ConfigDict, checkpoint: str, compiled: bool, device: str):
        super().__init__()
        m, o, cqt = config.model, config.optimizer, config.teacher.cqt
        hubert = HubertConfig(
            hidden_size=m.hidden_size,
            num_hidden_layers=m.num_layers,
            num_attention_heads=m.num_heads,
            intermediate_size=m.intermediate_size,
            do_stable_layer_norm=m.pre_norm,
            feat_proj_dropout=m.input_dropout,
            hidden_dropout=m.hidden_dropout,
            attention_dropout=m.attention_dropout,
            activation_dropout=m.activation_dropout,
            layerdrop=m.layerdrop,
        )
        self.config, self.student = config, HubertModel(hubert)
        self.code_proj = nn.Linear(m.hidden_size, BOOKS * m.final_dim)
        classes = 1024 + config.objective.special_codes
        self.codebooks = nn.Parameter(torch.rand(BOOKS, classes, m.final_dim))
        self.cqt_proj = nn.Linear(m.hidden_size, BINS)
        self.to(device).train()
        trained = list(self.parameters())
        options = dict(lr=0.0, betas=(o.b1, o.b2), eps=o.eps, weight_decay=o.weight_decay)
        self.optimizer = torch.optim.AdamW(trained, **options)
        self.encodec = EncodecModel.from_pretrained(checkpoint).eval().to(device)
        sizes = dict(fmin=cqt.fmin, n_bins=cqt.n_bins, bins_per_octave=cqt.bins_per_octave)
        layer = CQT1992v2(sr=24_000, hop_length=320, **sizes, pad_mode="constant", verbose=False)
        self.cqt = layer.to(device)
        self.trained, self.device = trained, device
        self.encode = torch.compile(self._encode) if compiled else self._encode

    def _encode(self, wave: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Hidden states [B, T, D] of a masked `wave` [B, N], and the features penalty."""
        features = self.student.feature_extractor(wave)[..., : mask.shape[1]]
        factor = self.config.model.feature_grad_mult
        features = factor * features + (1 - factor) * features.detach()
        hidden = self.student.feature_projection(features.transpose(1, 2))
        hidden = torch.where(mask[..., None], self.student.masked_spec_embed, hidden)
        return self.student.encoder(hidden).last_hidden_state, features.float().square().mean()

    @torch.no_grad()
    def targets(self, audio: Tensor, codes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Codes [B, T, K], those given or EnCodec's, CQT [B, T, F] and clips [B, N] of int16
        [B, context + N]."""
        wave = audio.float() / 32768
        clips = wave[:, -self.config.data.num_samples :]
        if codes is None:
            found = self.encodec.encode(wave[:, None], bandwidth=6.0).audio_codes[0]
            before = (wave.shape[1] - clips.shape[1]) // HOP_LENGTH
            codes = found.transpose(1, 2)[:, before:]
        return codes, self.cqt(clips).transpose(1, 2), clips

    def loss(self, codes: Tensor, cqt: Tensor, wave: Tensor, mask: Tensor) -> Tensor:
        """Return the objective per masked frame."""
        o = self.config.objective
        autocast = torch.autocast(self.device, torch.bfloat16, enabled=self.half)
        with autocast:
            hidden, penalty = self.encode(wave, mask)
        hidden = hidden.float()[mask]
        projected = normalize(self.code_proj(hidden).view(len(hidden), BOOKS, -1), dim=-1)
        # upstream's cosine_similarity of all pairs takes gigabytes: normalise and multiply instead
        logits = torch.einsum("nkd,kvd->nkv", projected, normalize(self.codebooks, dim=-1))
        logits = logits / o.logit_temperature
        length = mask.shape[1]
        wanted = codes[:, :length][mask] + o.special_codes
        total = cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / len(hidden)
        total = total + mse_loss(self.cqt_proj(hidden), cqt[:, :length][mask])
        return total + o.features_penalty * penalty

    @property
    def half(self) -> bool:
        return self.config.model.dtype == "bfloat16"

    def mixed(self, wave: Tensor) -> Tensor:
        """Add noise from other clips of the batch, with the recipe's probabilities."""
        o, noisy = self.config.objective, wave.clone()
        rng, samples = np.random.default_rng(), wave.shape[1]
        for i in range(len(wave)):
            if rng.random() >= o.mixture_prob:
                continue
            pool = torch.cat([wave[:i].flatten(), wave[i + 1 :].flatten()])
            for _ in range(rng.integers(o.mixture_count[0], o.mixture_count[1] + 1)):
                length = rng.integers(o.mixture_length[0], o.mixture_length[1] + 1)
                start, at = rng.integers(len(pool) - length), rng.integers(samples - length)
                noisy[i, at : at + length] += o.mixture_volume * pool[start : start + length]
        return noisy

    def step(self, audio: Tensor, codes: Tensor | None = None) -> Any:
        """Update on int16 `audio` [B, context + N], with stored codes or EnCodec's.

        Returns the norm of the gradients.
        """
        o = self.config.objective
        codes, cqt, wave = self.targets(audio, codes)
        shape = (len(wave), min(codes.shape[1], wave.shape[1] // 320 - 1))
        mask = _compute_mask_indices(shape, o.mask_prob, o.mask_length, min_masks=2)
        mask = torch.tensor(mask, device=self.device)
        return self.update(codes, cqt, self.mixed(wave), mask)[1]

    def update(self, codes: Tensor, cqt: Tensor, wave: Tensor, mask: Tensor) -> tuple[Any, Any]:
        """Update on given draws; return the loss and the norm of the gradients."""
        self.optimizer.zero_grad()
        loss = self.loss(codes, cqt, wave, mask)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.trained, self.config.optimizer.clip_norm)
        self.optimizer.step()
        return loss.item(), norm.item()
