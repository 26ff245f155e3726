"""A model of one layer learns to recall, which needs memory: the task of associative recall."""

from __future__ import annotations

import torch

from loglinear.config import LogLinearConfig, ModelConfig
from loglinear.model import build_model

KEYS, VALUES, PAIRS = 8, 8, 4


def recall_batch(batch: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Four pairs of a key and a value, then the keys in another order: inputs [B, 16], the value due at each key."""
    order_bk = torch.rand(batch, KEYS, generator=rng).argsort(1)[:, :PAIRS]
    values_bk = KEYS + torch.randint(VALUES, (batch, PAIRS), generator=rng)
    asked_bk = torch.rand(batch, PAIRS, generator=rng).argsort(1)
    due_bk = values_bk.gather(1, asked_bk)
    shown_bt = torch.stack([order_bk, values_bk], 2).flatten(1)
    asked_bt = torch.stack([order_bk.gather(1, asked_bk), due_bk], 2).flatten(1)
    inputs_bt = torch.cat([shown_bt, asked_bt], 1)
    labels_bt = torch.full_like(inputs_bt, -100)
    labels_bt[:, 2 * PAIRS :: 2] = due_bk
    return inputs_bt, labels_bt


def test_one_layer_learns_to_recall() -> None:
    config = ModelConfig(
        vocab_size=KEYS + VALUES,
        seq_len=16,
        dim=32,
        layers=1,
        log_linear=LogLinearConfig(heads=2, head_dim=32, state_dim=16, conv_width=2),
        mlp_dim=64,
        init_std=0.15,
    )
    model, rng = build_model(config, 0), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    for _ in range(200):
        loss = model(*recall_batch(32, rng)) / (32 * PAIRS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    inputs_bt, labels_bt = recall_batch(500, rng)
    guesses_bt = model(inputs_bt).argmax(-1)
    right = guesses_bt[labels_bt >= 0] == labels_bt[labels_bt >= 0]
    assert right.float().mean() > 0.9, "chance is 1 in 8"
