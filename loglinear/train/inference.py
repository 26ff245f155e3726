"""What is done with a run's last checkpoint: evaluate it, generate from it."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track

from data_pipeline.batch import Batch
from data_pipeline.held_out import held_out_batches
from data_pipeline.tokenizer import load_tokenizer
from loglinear.checkpoint import load_weights, read_latest
from loglinear.config import Config, ParallelConfig
from loglinear.model import LanguageModel, build_model
from loglinear.model.generation import generate
from loglinear.parallel import local_batch, make_mesh, start_world
from loglinear.train.curve import report_positions
from loglinear.train.engine import DTYPES
from loglinear.train.evaluation import held_out_loss, losses_by_position
from loglinear.train.folder import RunFolder


def evaluate_run(root: Path, samples: int | None, by_position: bool = False) -> None:
    """Print the held-out loss of the run in `root`; under torchrun the ranks share the work.

    Args:
        root: the run's folder.
        samples: held-out sequences to use, the first ones; all if None.
        by_position: print it by how far into its document a token stands, and write `positions.json` and a plot.

    Raises:
        UserError: there is no run, no complete checkpoint, or no held-out data.
    """
    folder = RunFolder(root)
    config = folder.load_config()
    world = start_world()
    mesh = make_mesh(world, ParallelConfig())
    model, step = load_model(folder, config, world.device)
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
        if world.rank == 0:
            report_positions(root, losses)
    else:
        loss = held_out_loss(loss_sum, shown, mesh)
        if world.rank == 0:
            print(f"step {step}: held-out loss {loss:.4f} nats/token, perplexity {math.exp(loss):.3f}")
    world.close()


def generate_text(root: Path, prompt: str, tokens: int, temperature: float, seed: int) -> None:
    """Print `prompt` and `tokens` tokens that continue it, as they come.

    Raises:
        UserError: there is no run, or no complete checkpoint.
    """
    folder = RunFolder(root)
    config = folder.load_config()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, _ = load_model(folder, config, device)
    tokenizer = load_tokenizer(folder.tokenizer, config.model.vocab_size, config.data.tokenizer.bos)
    known = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    shown = 0
    for token in generate(model, known, tokens, temperature=temperature, seed=seed, device=device):
        known.append(token)
        text = tokenizer.decode(known).rstrip("\N{REPLACEMENT CHARACTER}")  # the rest of a character may follow
        print(text[shown:], end="", flush=True)
        shown = max(shown, len(text))
    print()


def load_model(folder: RunFolder, config: Config, device: torch.device) -> tuple[LanguageModel, int]:
    """The model of the last complete checkpoint, and the steps that it was trained for.

    Raises:
        UserError: there is no complete checkpoint.
    """
    snapshot = read_latest(folder.checkpoints)
    model = build_model(config.model, config.run.seed)
    load_weights(snapshot.folder, model)
    return model.to(device, DTYPES[config.train.precision]).eval(), snapshot.step
