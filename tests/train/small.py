"""A run of seconds, and what it leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from loglinear.checkpoint import read_latest
from loglinear.checkpoint.weights import PieceReader
from loglinear.config import Config, DataConfig
from loglinear.parallel.shard import Shard
from tests.corpus import VOCAB

SEQ_LEN = 160  # more than two chunks
STEPS = 24
GLOBAL_BATCH = 8


def small_config(run_dir: Path, data: DataConfig, **changes: Any) -> Config:
    """Two layers, a log-linear and a softmax one; `changes` are sections' settings, such as train={"steps": 3}."""
    tree: dict[str, Any] = {
        "run": {"dir": run_dir},
        "model": {
            "vocab_size": VOCAB,
            "seq_len": SEQ_LEN,
            "dim": 32,
            "layers": 2,
            "pattern": ["log_linear", "softmax"],
            "log_linear": {"heads": 2, "head_dim": 16, "state_dim": 16},
            "softmax": {"heads": 2, "head_dim": 16},
            "mlp_dim": 64,
        },
        "data": data.model_dump(),
        "optimizer": {"lr": 1e-2, "eps": 1e-4},  # AdamW blows up what rounding leaves of gradients that vanish
        "schedule": {"warmup_steps": 2},
        "train": {"steps": STEPS, "global_batch": GLOBAL_BATCH, "micro_batch": 2, "peak_tflops": 0.1},
        "eval": {"every": 8, "samples": 8, "generate_tokens": 4},
        "monitor": {"every": 2, "levels_every": 8},
        "checkpoint": {"every": 4},
    }
    for section, settings in changes.items():
        tree[section] = tree.get(section, {}) | settings
    return Config.model_validate(tree)


def records(run_dir: Path) -> list[dict[str, Any]]:
    """What the run wrote down, step after step."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> torch.Tensor:
    """The loss of every step: float64 [steps]."""
    steps = [record for record in records(run_dir) if "loss" in record]
    assert [record["step"] for record in steps] == list(range(1, len(steps) + 1))
    return torch.tensor([record["loss"] for record in steps], dtype=torch.float64)


def saved_tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """Every weight and moment of the last checkpoint, flattened."""
    folder = read_latest(run_dir / "checkpoints").folder
    tensors = {}
    with PieceReader(folder) as reader:
        for name, entry in reader.parameters.items():
            for kind in ("weight", "exp_avg", "exp_avg_sq"):
                shape = tuple(entry["shape"])
                flat = torch.full((torch.Size(shape).numel(),), torch.nan)
                reader.read_into(flat, name, Shard(shape, 0, 0, shape[0]), 0, kind)
                tensors[f"{kind}/{name}"] = flat
    return tensors
