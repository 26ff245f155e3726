"""What is done with a run's last checkpoint: evaluate it, generate from it."""

from __future__ import annotations

import math
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import track

from data_pipeline.batch import Batch
from data_pipeline.held_out import held_out_batches
from data_pipeline.tokenizer import load_tokenizer
from loglinear.checkpoint import load_weights, read_latest
from loglinear.config import Config
from loglinear.config_text import explain
from loglinear.errors import UserError
from loglinear.model import LanguageModel
from loglinear.model.generation import generate
from loglinear.parallel import Mesh, local_batch, lone_mesh, make_mesh, parallel_model, start_world
from loglinear.train.curve import report_positions
from loglinear.train.engine import DTYPES
from loglinear.train.evaluation import held_out_loss, losses_by_position
from loglinear.train.folder import RunFolder


def evaluate_run(root: Path, samples: int | None, by_position: bool = False, tensor: int = 1) -> float:
    """Print the held-out loss of the run in `root`; under torchrun the ranks share the work.

    Args:
        root: the run's folder.
        samples: held-out sequences to use, the first ones; all if None.
        by_position: print it by how far into its document a token stands, and write `positions.json` and a plot.
        tensor: how many ranks share the weights.

    Returns:
        The loss, in nats per token.

    Raises:
        UserError: there is no run, no complete checkpoint, or no held-out data, or ranks or weights do not divide.
    """
    folder = RunFolder(root)
    config = _over(folder.load_config(), tensor)
    world = start_world()
    mesh = make_mesh(world, config.parallel)
    model, step = load_model(folder, config, mesh)
    batches = held_out_batches(
        config.data,
        vocab_size=config.model.vocab_size,
        seq_len=config.model.seq_len,
        batch=config.train.micro_batch,
        limit_samples=samples or sys.maxsize,
        rank=mesh.data.index,
        world_size=mesh.data.size,
    )

    def loss_sum(batch: Batch) -> torch.Tensor:
        return model(*local_batch(*batch, mesh))

    console = Console(stderr=True, quiet=world.rank > 0)
    shown = track(batches, "evaluating", console=console, transient=True)
    if by_position:
        losses = losses_by_position(model, shown, mesh)
        loss = sum(part.loss * part.tokens for part in losses) / sum(part.tokens for part in losses)
        if world.rank == 0:
            report_positions(root, losses)
    else:
        loss = held_out_loss(loss_sum, shown, mesh)
        if world.rank == 0:
            print(f"step {step}: held-out loss {loss:.4f} nats/token, perplexity {math.exp(loss):.3f}")
    world.close()
    return loss


def generate_text(root: Path, prompt: str, tokens: int, temperature: float, seed: int, tensor: int = 1) -> None:
    """Print `prompt` and `tokens` tokens that continue it, as they come.

    With `tensor` above 1, torchrun's ranks share the weights, and the first prints.

    Raises:
        UserError: there is no run, or no complete checkpoint, or ranks or weights do not divide.
    """
    folder = RunFolder(root)
    config = _over(folder.load_config(), tensor)
    if tensor > 1:
        world = start_world()
        mesh = make_mesh(world, config.parallel)
    else:
        mesh = lone_mesh(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    model, _ = load_model(folder, config, mesh)
    tokenizer = load_tokenizer(folder.tokenizer, config.model.vocab_size, config.data.tokenizer.bos)
    known = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    # All ranks see the same logits and draw alike; the others' words go nowhere.
    with nullcontext(sys.stdout) if mesh.world.rank == 0 else Path(os.devnull).open("w") as out:
        shown = 0
        options = {"temperature": temperature, "seed": seed, "device": mesh.world.device}
        for token in generate(model, known, tokens, **options, graphs=tensor == 1):
            known.append(token)
            text = tokenizer.decode(known).rstrip("\N{REPLACEMENT CHARACTER}")  # the rest of a character may follow
            print(text[shown:], end="", flush=True, file=out)
            shown = max(shown, len(text))
        print(file=out)
    if tensor > 1:
        mesh.world.close()


def _over(config: Config, tensor: int) -> Config:
    """The run with its weights shared by `tensor` ranks, however it was trained.

    Raises:
        UserError: they do not divide.
    """
    tree = config.model_dump() | {"parallel": {"tensor": tensor, "sequence": False}}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"--tensor {tensor}: {explain(error, Config)}") from None


def load_model(folder: RunFolder, config: Config, mesh: Mesh) -> tuple[LanguageModel, int]:
    """This rank's part of the model of the last complete checkpoint, and the steps that it was trained for.

    Raises:
        UserError: there is no complete checkpoint.
    """
    snapshot = read_latest(folder.checkpoints)
    model = parallel_model(mesh, config, fresh=False)
    load_weights(snapshot.folder, model)
    return model.to(mesh.world.device, DTYPES[config.train.precision]).eval(), snapshot.step
