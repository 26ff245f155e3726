"""Small experiments for tests: the protocol's own, with everything made small that costs time."""

from __future__ import annotations

import random
from typing import Any

from loglinear.experiments.protocol import Experiment, load_protocol

RECALL = {
    "train": [(16, 2, 40), (32, 2, 40)],
    "validation": [(32, 2, 8)],
    "test": [(16, 2, 8), (32, 2, 8)],
    "longer": [(64, 2, 4)],
}
NOVELS = {
    "length": 64,
    "test_length": 128,
    "edges": [32, 64],
    "validation_novels": 1,
    "test_rows": 2,
    "tokenizer_bytes": 20_000,
    "needles": [(1024, 1, 2)],
}


def small_experiment(name: str, **changes: Any) -> Experiment:
    """The experiment `name` of the protocol with tiny models, few rows and few steps."""
    whole = load_protocol().experiment(name).model_dump()
    novels = name == "novels"
    model = {
        "vocab_size": 512 if novels else 16,
        "seq_len": 64 if novels else 32,
        "dim": 16,
        "mlp_dim": 16 if novels else 0,
        "log_linear": {"heads": 2, "head_dim": 8, "state_dim": 8, "level_scale_hidden": 8},
        "softmax": {"heads": 2, "head_dim": 8},
        "init_std": 0.2,
    }
    small = {
        "task": whole["task"] | (NOVELS if novels else RECALL),
        "model": whole["model"] | model,
        "instead": {},
        "optimizer": {},
        "schedule": {"warmup_steps": 1},
        "steps": 6,
        "batch": 4,
        "rates": (1e-3, 1e-2),
        "sweep_seeds": 2,
        "seeds": 3,
        "records": 2,
    }
    return Experiment.model_validate(whole | small | changes)


def book(seed: int) -> str:
    """Sentences of random words."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 7))) for _ in range(300)]
    return " ".join(" ".join(rng.choices(words, k=8)).capitalize() + "." for _ in range(300))
