"""Run folders that nobody trained: a model's weights as a complete checkpoint, and its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from loglinear.checkpoint import files
from loglinear.checkpoint.blocks import Block
from loglinear.config import Config, DataConfig, ModelConfig
from loglinear.hf.export import export_hf
from loglinear.model import LanguageModel
from loglinear.parallel.shard import shard_of
from loglinear.train.folder import RunFolder
from tests.corpus import VOCAB
from tests.model.model_cases import awake, tiny


def write_run(folder: Path, config: ModelConfig, model: LanguageModel, data: DataConfig) -> Path:
    """A run's folder with `model` as its checkpoint after 5 steps."""
    run = RunFolder(folder)
    run.prepare()
    sections = {"model": config.model_dump(), "data": data.model_dump(), "run": {"dir": folder}}
    run.describe(Config.model_validate(sections), data.dir / "tokenizer.model")
    temporary = run.checkpoints / (files.folder_name(5) + files.TEMPORARY)
    temporary.mkdir()
    parameters = dict(model.named_parameters())
    digest = files.write_shard(temporary, 0, {f"weight/{name}": p.detach().flatten() for name, p in parameters.items()})
    shard = files.shard_name(0)
    index = {name: {"shape": list(p.shape), "pieces": [_piece(shard, p)]} for name, p in parameters.items()}
    files.write_json(temporary / files.INDEX, {"format": 1, "sha256": {shard: digest}, "parameters": index})
    files.write_json(temporary / files.STATE, {"step": 5})
    files.complete(temporary)
    return folder


def _piece(shard: str, parameter: torch.Tensor) -> dict[str, Any]:
    return {"file": shard, "block": Block.of(shard_of(parameter)), "start": 0, "numel": parameter.numel()}


def exported(folder: Path, data: DataConfig, **changes: Any) -> tuple[LanguageModel, Path]:
    """A model in mid-training, and the folder that it was exported to."""
    config = tiny(vocab_size=VOCAB, **changes)
    model = awake(config).eval()
    export_hf(write_run(folder / "run", config, model, data), folder / "hf")
    return model, folder / "hf"
