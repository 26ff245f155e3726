"""Saving and loading checkpoints of a run, by all ranks together."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loglinear.checkpoint import files
from loglinear.checkpoint.blocks import Block
from loglinear.checkpoint.random_state import random_state, restore_random_state
from loglinear.checkpoint.weights import PieceReader, tensor_name
from loglinear.checkpoint.zero import Fragment, all_finite, fragments, optimizer_step, set_optimizer_step
from loglinear.config import CheckpointConfig
from loglinear.errors import UserError
from loglinear.parallel import Mesh


@dataclass(frozen=True)
class Snapshot:
    """A complete checkpoint: its folder and its `state.json`."""

    folder: Path
    state: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps that were made before it was saved."""
        return files.step_of(self.folder)


def read_latest(root: Path) -> Snapshot:
    """The last complete checkpoint in `root`, for one process that only reads; every file is verified.

    Raises:
        UserError: there is none, or it is damaged.
    """
    folders = files.complete_checkpoints(root)
    if not folders:
        raise UserError(f"{root} holds no complete checkpoint: train until checkpoint.every steps are made")
    snapshot, shards = _open(folders[-1])
    for name, digest in shards.items():
        files.verify_shard(snapshot.folder, name, digest)
    return snapshot


class CheckpointStore:
    """The checkpoints in `root`; "latest" is the last complete one, never a file that could lie."""

    def __init__(self, root: Path, config: CheckpointConfig, mesh: Mesh) -> None:
        self._root, self._config, self._mesh, self._world = root, config, mesh, mesh.world

    def latest(self) -> Snapshot | None:
        """The last complete checkpoint, after rank 0 has removed what interrupted saves left behind.

        Raises:
            UserError: it is damaged; the message names the file. Every rank raises alike.
        """
        if self._world.rank == 0:
            _remove_incomplete(self._root)
        folder = self._world.from_first(next(reversed(files.complete_checkpoints(self._root)), None))
        if folder is None:
            return None
        snapshot, shards = _open(folder)
        mine = sorted(shards)[self._world.rank :: self._world.size]
        self._world.together(lambda: [files.verify_shard(folder, name, shards[name]) for name in mine])
        return snapshot

    def restore(self, snapshot: Snapshot, engine: Any) -> None:
        """Fill a DeepSpeed engine's master weights, moments and step count, and this rank's random state.

        The model must have been given the same weights (`load_weights`) before DeepSpeed took it. The grid of
        ranks and the ZeRO stage may differ from those that saved.
        """
        with PieceReader(snapshot.folder) as reader, torch.no_grad():
            for fragment in fragments(engine):
                for kind, view in fragment.tensors.items():
                    reader.read_into(view, fragment.name, fragment.shard, fragment.start, kind)
        set_optimizer_step(engine, snapshot.state["optimizer_step"])
        if self._world.rank < snapshot.state["ranks"]:
            with files.open_shard(snapshot.folder, files.shard_name(self._world.rank)) as shard:
                restore_random_state(shard)

    def is_sound(self, engine: Any) -> bool:
        """Whether all weights and moments on all ranks are finite: nothing else may become a checkpoint."""
        (broken,) = self._world.sum(not all_finite(engine))
        return broken == 0

    def save(self, engine: Any, step: int, state: dict[str, Any]) -> Path:
        """Save after `step` steps; `state` goes into `state.json`. Returns the checkpoint's folder.

        Raises:
            UserError: a rank could not write; what was written is removed, and the checkpoint before stays the last.
        """
        temporary = self._root / (files.folder_name(step) + files.TEMPORARY)
        state = state | {"ranks": self._world.size, "optimizer_step": optimizer_step(engine)}
        try:
            self._saving(lambda: self._make_folder(temporary))
            shards = self._saving(lambda: self._write_shard(temporary, list(self._own(engine))))
            folder = self._saving(lambda: self._complete(temporary, shards, state))[0]
        except UserError:
            if self._world.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        return folder

    def _saving(self, action: Callable[[], Any]) -> list[Any]:
        """Every rank's result of a part of saving; if it fails on one, all raise the same error."""

        def explained() -> Any:
            try:
                return action()
            except OSError as failure:
                raise UserError(
                    f"cannot save a checkpoint in {self._root} on rank {self._world.rank} "
                    f"({failure.strerror or failure}): make room there and start again; the last complete one stays"
                ) from failure

        return self._world.together(explained)

    def _make_folder(self, temporary: Path) -> None:
        if self._world.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def _own(self, engine: Any) -> Iterator[Fragment]:
        """What this rank saves; of parameters that all tensor ranks hold whole, the first one's pieces."""
        for fragment in fragments(engine):
            if self._mesh.tensor.index == 0 or fragment.shard.is_cut:
                yield fragment

    def _write_shard(self, folder: Path, own: list[Fragment]) -> tuple[str, list[dict[str, Any]]]:
        """Returns the shard's SHA-256 and where its pieces belong."""
        tensors = {
            tensor_name(fragment.name, kind): view.cpu().contiguous()
            for fragment in own
            for kind, view in fragment.tensors.items()
        }
        digest = files.write_shard(folder, self._world.rank, tensors | random_state())
        return digest, [_describe(fragment, self._world.rank) for fragment in own]

    def _complete(self, temporary: Path, shards: list[Any], state: dict[str, Any]) -> Path | None:
        if self._world.rank != 0:
            return None
        files.write_json(temporary / files.INDEX, _index(shards))
        files.write_json(temporary / files.STATE, state)
        folder = files.complete(temporary)
        _prune(self._root, self._config)
        return folder


def _open(folder: Path) -> tuple[Snapshot, dict[str, str]]:
    """A complete checkpoint, and the SHA-256 of its shards by their names."""
    return Snapshot(folder, files.read_json(folder, files.STATE)), files.read_json(folder, files.INDEX)["sha256"]


def _describe(fragment: Fragment, rank: int) -> dict[str, Any]:
    numel = next(iter(fragment.tensors.values())).numel()
    place = {"block": Block.of(fragment.shard), "start": fragment.start, "numel": numel}
    return {"name": fragment.name, "shape": fragment.shard.shape, "piece": {"file": files.shard_name(rank)} | place}


def _index(shards: Iterable[tuple[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    index: dict[str, Any] = {"format": 1, "sha256": {}, "parameters": {}}
    for rank, (digest, pieces) in enumerate(shards):
        index["sha256"][files.shard_name(rank)] = digest
        for entry in pieces:
            parameter = index["parameters"].setdefault(entry["name"], {"shape": entry["shape"], "pieces": []})
            parameter["pieces"].append(entry["piece"])
    return index


def _remove_incomplete(root: Path) -> None:
    for folder in root.glob("step-*"):
        is_ours = files.is_checkpoint(folder.name.removesuffix(files.TEMPORARY))
        if is_ours and not (folder / files.COMPLETE).exists():
            shutil.rmtree(folder)


def _prune(root: Path, config: CheckpointConfig) -> None:
    """Remove all but the last `keep_last` and those at multiples of `keep_every`, the marker first."""
    for folder in files.complete_checkpoints(root)[: -config.keep_last]:
        if config.keep_every is None or files.step_of(folder) % config.keep_every:
            (folder / files.COMPLETE).unlink()
            shutil.rmtree(folder)
