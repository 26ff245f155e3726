"""Crash-safe sharded checkpoints in a format of their own: safetensors and JSON, loadable at any number of ranks."""

from loglinear.checkpoint.store import CheckpointStore, Snapshot, read_latest
from loglinear.checkpoint.weights import export_weights, load_exported, load_weights

__all__ = ["CheckpointStore", "Snapshot", "export_weights", "load_exported", "load_weights", "read_latest"]
