"""A training run from start, or from where it stopped, to its end."""

from __future__ import annotations

import gc
import importlib.metadata
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from data_pipeline.background import start_preparation, wait_until_ready
from data_pipeline.batch import Batch
from data_pipeline.held_out import held_out_batches
from data_pipeline.loader import TrainLoader
from data_pipeline.manifest import tokenizer_path
from data_pipeline.prepared import complete_index, fingerprint, is_complete, open_tokenizer
from data_pipeline.state import DataState
from loglinear import __version__
from loglinear.checkpoint import CheckpointStore, Snapshot, load_exported, load_weights
from loglinear.config import Config
from loglinear.model import LanguageModel
from loglinear.model.generation import generate
from loglinear.ops.fenwick import num_levels
from loglinear.ops.peak import TRAINING_FLOPS, peak_flops
from loglinear.parallel import Mesh, make_mesh, parallel_model, start_world
from loglinear.train.console import TrainConsole
from loglinear.train.curve import draw_losses
from loglinear.train.engine import Engine, StepResult
from loglinear.train.evaluation import held_out_loss
from loglinear.train.events import EventLog
from loglinear.train.folder import RunFolder, check_unchanged, git_revision
from loglinear.train.level_scales import LevelScaleStatistics
from loglinear.train.monitor import Monitor
from loglinear.train.preflight import preflight, require_agreement
from loglinear.train.schedule import learning_rate
from loglinear.train.signals import StopRequest
from loglinear.train.stability import Guard, Rollbacks
from loglinear.train.timing import StepTimer
from loglinear.train.watchdog import Watchdog
from loglinear.train.weights_and_biases import WandbRun, require_wandb

RECORDED_VERSIONS = ("torch", "deepspeed")


def train(config: Config, stop: StopRequest | None = None) -> None:
    """Train until `config.train.steps`, or until asked to stop; called again, it goes on.

    Args:
        config: the run.
        stop: listens already, if the caller could be asked to stop before this.

    Raises:
        UserError: the configuration does not fit the ranks, the data or the run folder; or going back to a checkpoint
            does not make the loss finite.
        FailedNodes: a node computes wrongly.
    """
    if stop is None:
        stop = StopRequest()
        stop.listen()
    config = config.with_absolute_paths()
    with Watchdog(config.train.hang_seconds) as watchdog:
        watchdog.beat("meeting the other ranks")
        world = start_world()
        mesh = make_mesh(world, config.parallel)
        _Run(config, mesh, stop, watchdog).go()
        world.close()


@dataclass(frozen=True)
class _Data:
    """This rank's share."""

    loader: TrainLoader
    stream: Iterator[Batch]


class _Run:
    """Everything that lives as long as a run does."""

    def __init__(self, config: Config, mesh: Mesh, stop: StopRequest, watchdog: Watchdog) -> None:
        self.config, self.mesh, self.stop, self.watchdog = config, mesh, stop, watchdog
        world = self.world = mesh.world
        self.first = world.rank == 0
        self.micro_batches = world.together(lambda: config.train.micro_batches(mesh.data.size))[0]
        peak = world.together(lambda: peak_flops(world.device, config.train.peak_tflops))[0]
        world.together(lambda: require_wandb(config) if self.first else None)
        checked = preflight(config, world) if world.size > 1 else None
        self.folder = RunFolder(config.run.folder)
        self.store = CheckpointStore(self.folder.checkpoints, config.checkpoint, mesh)
        snapshot = self.store.latest()
        if snapshot is not None:
            check_unchanged(snapshot.state["config"], config)
        world.together(lambda: self.folder.prepare() if self.first else None)
        self.wandb: WandbRun | None = None
        world.together(self._show_in_wandb)

        start = 0 if snapshot is None else snapshot.step
        self.console = TrainConsole(start, config.train.steps, config.monitor.every, self.first)
        if checked is not None:
            self.console.say(checked)
        self.peak = peak * world.size
        self.timer = StepTimer(world.device)
        self.rollbacks = Rollbacks()
        self.events = EventLog(self.folder.events) if self.first else None
        self.snapshot = snapshot

    def _begin(self, snapshot: Snapshot | None, samples: int | None = None) -> None:
        """Stand where a checkpoint was made, or at the start; the data may go on elsewhere, behind `samples`."""
        self.start = 0 if snapshot is None else snapshot.step
        self.save_due = False
        self.guard = Guard(self.config.stability, None if snapshot is None else snapshot.state.get("stability"))
        self.data = self._open_data(snapshot, samples)
        self.engine = self._make_engine(snapshot)
        self.statistics = LevelScaleStatistics(self.engine.model) if self.first else None
        self.monitor = self._make_monitor() if self.first else None

    def go(self) -> None:
        """Train, evaluate, save; say how it ended."""
        self.watchdog.rest()
        if not self.world.together(self._wait_for_data)[0]:
            self.console.say("Asked to stop before the data were there. The same command goes on.")
            self._close()
            return
        self._begin(self.snapshot)
        self.world.together(self._describe)  # nothing was refused, so this is what the run is from now on
        config, step = self.config, self.start
        with self.console:
            while step < config.train.steps:
                step += 1
                result = self._step(step)
                ends = step == config.train.steps
                self.save_due |= step % config.checkpoint.every == 0 or ends or result.stop
                if self.guard.gives_up or (ends and self.guard.in_a_row):
                    step = self._roll_back(step, f"{result.refusal}")
                    continue
                looks = step % config.eval.every == 0 or ends
                if (looks or self.save_due) and not self.store.is_sound(self.engine.deepspeed):
                    step = self._roll_back(step, "a weight or moment is not finite")
                    continue
                if looks:
                    self._aside(self._evaluate, step)
                if self.save_due and not self.guard.in_a_row:  # weights that may be to blame are no good checkpoint
                    self._aside(self._save, step)
                if result.stop and not ends:
                    saved = "the last checkpoint" if self.save_due else "there"
                    self.console.say(f"Asked to stop after step {step}. The same command goes on from {saved}.")
                    break
            else:
                self._finish()
        if self.monitor is not None:
            self.monitor.close()
        self._close()

    def _close(self) -> None:
        if self.wandb is not None:
            self.wandb.close()

    def _roll_back(self, step: int, reason: str) -> int:
        """Go back to the last checkpoint, and on from there with data that come after all that was read; its step."""
        self.watchdog.beat(f"going back from step {step}")
        snapshot = self.store.latest()
        self.rollbacks.count(None if snapshot is None else snapshot.folder, step, reason)
        assert snapshot is not None
        samples = self.data.loader.state(step - self.start).samples
        self.console.say(f"step {step}: {reason}. Back to step {snapshot.step}, and on with later data.")
        if self.events is not None and self.monitor is not None:
            self.events.write("rolled back", step, reason=reason, to_step=snapshot.step, to_sample=samples)
            self.monitor.close()
        refused = self.guard.refused
        self.engine.deepspeed.destroy()
        del self.engine, self.statistics
        gc.collect()  # else the next engine has to fit into memory beside this one
        self._begin(snapshot, samples)
        self.guard.refused = refused
        if self.monitor is not None:
            self.monitor.stability(snapshot.step, refused, self.rollbacks.total)
            self.monitor.event(snapshot.step, f"back from step {step}: {reason}")
        return snapshot.step

    def _open_data(self, snapshot: Snapshot | None, samples: int | None) -> _Data:
        config, model = self.config, self.config.model
        self.watchdog.beat("loading model and data")
        is_whole = self.world.from_first(is_complete(config.data, model.vocab_size) if self.first else None)
        require_agreement(self.world, {f"data index of {config.data.dir}": fingerprint(config.data, is_whole)})
        saved = None if snapshot is None else DataState.from_dict(snapshot.state["data"])
        start_sample = samples if samples is not None else 0 if saved is None else saved.samples
        loader = TrainLoader(
            config.data,
            vocab_size=model.vocab_size,
            seq_len=model.seq_len,
            global_batch=config.train.global_batch,
            micro_batch=config.train.micro_batch,
            rank=self.mesh.data.index,
            world_size=self.mesh.data.size,
            start_sample=start_sample,
        )
        if saved is not None and samples is None:
            saved.require_same_order(loader.state(0))
        if samples is None:  # a run that went back needs more, and may train on what there is
            loader.require(config.train.steps - self.start)
        return _Data(loader, iter(loader))

    def _wait_for_data(self) -> bool:
        """The first rank prepares what the first step needs, and the others wait for it; not if it is asked to stop."""
        if not self.first:
            return True
        config = self.config
        self.console.say(
            f"Data in {config.data.dir}: training starts as soon as "
            + ("all is" if config.data.is_mixture else "the first shard is")
            + " prepared."
        )
        return wait_until_ready(
            config.data,
            vocab_size=config.model.vocab_size,
            samples=config.train.global_batch,
            seq_len=config.model.seq_len,
            process=start_preparation(config),
            is_over=lambda: self.stop.asked,
        )

    def _describe(self) -> None:
        if self.first:
            self.folder.describe(self.config, tokenizer_path(self.config.data))

    def _make_engine(self, snapshot: Snapshot | None) -> Engine:
        config = self.config
        model = parallel_model(self.mesh, config, fresh=snapshot is None)
        init_from = config.run.init_from
        if snapshot is not None:
            load_weights(snapshot.folder, model)
        elif init_from is not None:
            self.world.together(lambda: load_exported(init_from, model))
        engine = Engine(model, config, self.mesh, self.guard)
        if snapshot is not None:
            self.store.restore(snapshot, engine.deepspeed)
            self.console.say(f"Going on after step {snapshot.step} of {config.train.steps}.")
        return engine

    def _show_in_wandb(self) -> None:
        if self.first and self.config.monitor.wandb is not None:
            self.wandb = WandbRun(self.folder, self.config)

    def _make_monitor(self) -> Monitor:
        with torch.device("meta"):
            whole = LanguageModel(self.config.model)
        flops = TRAINING_FLOPS * whole.flops_per_token(self.config.model.seq_len)
        return Monitor(self.folder, self.config, self.start, flops, self.peak, self.wandb)

    def _step(self, step: int) -> StepResult:
        config = self.config
        self.watchdog.beat(f"training step {step}")
        self.timer.precise = step % config.monitor.every == 0
        if self.statistics is not None:
            self.statistics.recording = step % config.monitor.levels_every == 0
        self.timer.take()
        self.data.loader.require(step - self.start)
        with self.timer("data"):
            batches = list(islice(self.data.stream, self.micro_batches))
        rate = learning_rate(config, step - 1)
        result = self.engine.step(batches, rate, self.stop.asked, self.timer)
        if self.monitor is not None and self.statistics is not None:
            self.monitor.step(step, result, rate, self.timer.take())
            self.monitor.stability(step, self.guard.refused, self.rollbacks.total)
            self.monitor.level_scales(step, self.statistics)
            self.statistics.recording = False
            self.console.step(step, result.loss, self.monitor.tokens_per_second)
        if result.refusal is not None:
            self.console.say(f"step {step} is left out: {result.refusal}")
            if self.events is not None and self.monitor is not None:
                values = {"loss": result.loss, "grad_norm": result.grad_norm}
                last = self.data.loader.state(step - self.start).samples
                self.events.write("refused", step, reason=result.refusal, until_sample=last, **values)
                self.monitor.event(step, f"left out: {result.refusal}")
        return result

    def _evaluate(self, step: int) -> None:
        config = self.config
        batches = held_out_batches(
            config.data,
            vocab_size=config.model.vocab_size,
            seq_len=config.model.seq_len,
            batch=config.train.micro_batch,
            limit_samples=config.eval.samples,
            rank=self.mesh.data.index,
            world_size=self.mesh.data.size,
            meanwhile=lambda: self.watchdog.beat("waiting for held-out data to be prepared"),
        )
        loss = held_out_loss(self.engine.loss_sum, self._watched(batches, "evaluating"), self.mesh)
        text = self._sample()
        if self.monitor is not None:
            self.monitor.held_out(step, loss)
            self.monitor.text(step, text)
        self.console.say(f"step {step}: held-out loss {loss:.4f} nats/token{self._beside(step)}")
        if step == config.train.steps:
            self.console.say(f"A sample, decoded token by token:\n{text}")

    def _sample(self) -> str:
        """The prompt continued; all ranks take part, since under ZeRO 3 each holds a piece of the weights."""
        config = self.config
        tokenizer = open_tokenizer(config.data, config.model.vocab_size)
        prompt = [tokenizer.bos_id, *tokenizer.encode(config.eval.prompt)]
        count = config.eval.generate_tokens
        if config.model.log_linear.beyond_trained_levels == "error":
            most = 1 << (num_levels(config.model.seq_len) - 1)
            count = max(0, min(count, most - len(prompt)))
        tokens = generate(self.engine.model, prompt, count, seed=config.run.seed, device=self.world.device)
        return tokenizer.decode([*prompt, *tokens])

    def _save(self, step: int) -> None:
        state = {
            "step": step,
            "learning_rate": learning_rate(self.config, step - 1),
            "data": self.data.loader.state(step - self.start).to_dict(),
            "stability": self.guard.state(),
            "config": self.config.model_dump(mode="json"),
            "revision": git_revision(),
            "versions": _versions(),
        }
        self.store.save(self.engine.deepspeed, step, state)
        self.save_due = False

    def _aside(self, action: Callable[[int], None], step: int) -> None:
        """Do something that is no training, and leave its time out of the throughput."""
        start = time.perf_counter()
        self.watchdog.beat(f"evaluating or saving after step {step}")
        action(step)
        if self.monitor is not None:
            self.monitor.pause(time.perf_counter() - start)

    def _watched(self, batches: Iterable[Batch], doing: str) -> Iterator[Batch]:
        for batch in batches:
            self.watchdog.beat(doing)
            yield batch

    def _beside(self, step: int) -> str:
        """What a model that knows only the frequencies of tokens would reach; shown with the last held-out loss."""
        entropy = self._unigram_entropy()
        if step < self.config.train.steps or entropy is None:
            return ""
        return f" (unigram entropy of this tokenizer: {entropy:.4f})"

    def _unigram_entropy(self) -> float | None:
        """Nats per token of a single stream, once its preparation is complete."""
        data = self.config.data
        index = None if data.is_mixture else complete_index(data, self.config.model.vocab_size)
        return None if index is None else index.unigram_entropy

    def _finish(self) -> None:
        """Say where everything lies and what can be done next."""
        root = self.folder.root
        if self.first:
            draw_losses(self.folder.metrics, self.folder.curve, self._unigram_entropy())
        self.console.say(f"Done: {self.config.train.steps} steps; checkpoints and loss.png are in {root}.")
        prompt = shlex.quote(self.config.eval.prompt)
        self.console.say(f"  curves:    {_program('tensorboard')} --logdir {self.folder.tensorboard}")
        self.console.say(f"  evaluate:  {_program('loglinear')} eval {root}")
        self.console.say(f"  generate:  {_program('loglinear')} generate {root} --prompt {prompt}")
        self.console.say("  train on:  the same command with a larger train.steps=")


def _program(name: str) -> str:
    """How a program of this environment is started: by its path where its name alone would not do."""
    return name if shutil.which(name) else str(Path(sys.executable).with_name(name))


def _versions() -> dict[str, str]:
    return {"loglinear": __version__} | {name: importlib.metadata.version(name) for name in RECORDED_VERSIONS}
