"""Crash-safe sharded checkpoints in a format of their own: safetensors and JSON, loadable at any number of ranks."""

from loglinear.checkpoint.store import CheckpointStore, Snapshot, read_latest
from loglinear.checkpoint.weights import export_weights, load_exported, load_weights
from loglinear.checkpoint.zero import check_gradients_by_norm_alone, grad_norm

__all__ = [
    "CheckpointStore",
    "Snapshot",
    "check_gradients_by_norm_alone",
    "export_weights",
    "grad_norm",
    "load_exported",
    "load_weights",
    "read_latest",
]
