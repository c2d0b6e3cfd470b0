"""A small SigLIP vision tower that can read digits: the stand-in for SigLIP's pretraining.

Trained with a linear probe on single cells of mosaics. From random weights inside the whole model a
tower learns next to nothing in the time of the default experiment; as in LLaVA, it comes pretrained
and stays frozen.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from examples.digits.mosaics import Originals, draw_mosaics
from student_train.models.huggingface import import_transformers

if TYPE_CHECKING:
    from transformers import SiglipVisionModel

IMAGE_PIXELS, PATCH_PIXELS, HIDDEN, LAYERS = 32, 8, 128, 3
FEATURE_LAYER = -2  # the hidden state that LLaVA's projector reads; the probe reads it too


def pretrain_tower(
    train: Originals, test: Originals, *, steps: int, num_mosaics: int = 8000, batch: int = 64, seed: int = 0
) -> tuple[SiglipVisionModel, float]:
    """The trained tower and its probe's accuracy on single digits of held-out mosaics."""
    transformers = import_transformers()
    torch.manual_seed(seed)
    tower = transformers.SiglipVisionModel(
        transformers.SiglipVisionConfig(
            hidden_size=HIDDEN,
            intermediate_size=4 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HIDDEN // 32,
            image_size=IMAGE_PIXELS,
            patch_size=PATCH_PIXELS,
        )
    )
    probe = nn.Linear(HIDDEN, 10)
    parameters = [*tower.parameters(), *probe.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps, pct_start=0.1)
    rng = np.random.default_rng(seed)
    pixels, digits = _mosaics(train, num_mosaics, rng)
    bar = tqdm(range(steps), desc="vision tower", unit="step")
    for _ in bar:
        chosen = torch.from_numpy(rng.integers(0, num_mosaics, size=batch))
        logits = probe(_cell_features(tower, pixels[chosen]))
        loss = F.cross_entropy(logits.flatten(0, 1), digits[chosen].flatten(), label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    tower.eval()
    test_pixels, test_digits = _mosaics(test, 500, rng)
    with torch.no_grad():
        accuracy = (probe(_cell_features(tower, test_pixels)).argmax(-1) == test_digits).float().mean().item()
    return tower, accuracy


def _mosaics(originals: Originals, num: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    drawn = list(islice(draw_mosaics(originals, rng), num))
    grey = torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).float()
    pixels = ((grey / 255 - 0.5) / 0.5)[:, None].expand(-1, 3, -1, -1)  # (m, 3, 32, 32), as SigLIP's processor does
    return pixels, torch.from_numpy(np.stack([digits for _, digits in drawn]))


def _cell_features(tower: SiglipVisionModel, pixels: Tensor) -> Tensor:
    hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
    side = IMAGE_PIXELS // PATCH_PIXELS // 2  # patches along a cell's edge
    return hidden.view(-1, 2, side, 2, side, HIDDEN).mean(dim=(2, 4)).flatten(1, 2)  # (m, 4, HIDDEN)
