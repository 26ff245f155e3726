"""The one front door. Everything heavy is imported inside a command, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from launch.commands import app as launch_app
from loglinear.errors import EXIT_REFUSED, UserError
from loglinear.experiments.commands import experiment

ConfigFile = Annotated[Path, typer.Argument(help="A YAML file; examples are in configs/.", metavar="CONFIG")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings to change, such as optimizer.lr=1e-3.", metavar="[SECTION.KEY=VALUE]..."),
]
RunDir = Annotated[Path, typer.Argument(help="The folder of a training run (its run.dir).", metavar="RUN_DIR")]


TensorRanks = Annotated[int, typer.Option("--tensor", min=1, help="Ranks that share the weights, under torchrun.")]


class ExportFormat(StrEnum):
    """What `loglinear export` writes."""

    SAFETENSORS = "safetensors"
    HF = "hf"


app = typer.Typer(
    help="Pretrain language models with adaptive log-linear attention.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
config_app = typer.Typer(help="Say what can be configured.", no_args_is_help=True)
data_app = typer.Typer(help="Prepare training data.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed on this machine.", no_args_is_help=True)
app.add_typer(data_app, name="data")
app.add_typer(bench_app, name="bench")
app.add_typer(config_app, name="config")
app.command()(experiment)
app.add_typer(launch_app)


@app.command()
def train(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train, or go on with a run that was interrupted. Start it under torchrun for several ranks."""
    from loglinear.config import load_config

    settings = load_config(config, overrides or ())
    from loglinear.train.run import train as run

    run(settings)


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    ranks: Annotated[int, typer.Option(min=1, help="Ranks to plan for, all together.")] = 1,
) -> None:
    """Show parameters, FLOPs, memory and traffic per rank of a run; nothing is started."""
    from loglinear.config import load_config

    settings = load_config(config, overrides or ())
    from loglinear.train.plan import make_plan, print_plan

    print_plan(make_plan(settings, ranks))


@app.command()
def profile(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps to record.")] = 3,
    out: Annotated[Path, typer.Option(help="Where the trace and the snapshot go.")] = Path("runs/profile"),
) -> None:
    """Record a few training steps on random tokens: a Chrome trace, and on a GPU a memory snapshot."""
    from loglinear.config import load_config

    settings = load_config(config, overrides or ())
    from loglinear.train.profile import profile_steps

    profile_steps(settings, out, steps)


@app.command(name="eval")
def evaluate(
    run_dir: RunDir,
    samples: Annotated[int | None, typer.Option(min=1, help="Sequences or examples to use; all if not given.")] = None,
    by_position: Annotated[
        bool, typer.Option("--by-position", help="By the place of a token in its document.")
    ] = False,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of the lm-evaluation-harness, such as piqa,arc_easy.")
    ] = None,
    include: Annotated[Path | None, typer.Option(help="A folder with the YAML files of your own tasks.")] = None,
    needles: Annotated[
        str | None, typer.Option(help="Needles in haystacks of so many tokens, such as 1024,4096.", metavar="LENGTHS")
    ] = None,
    tensor: TensorRanks = 1,
) -> None:
    """Held-out loss of a run's last checkpoint, or what it achieves in tasks."""
    if by_position + (tasks is not None) + (needles is not None) > 1:
        raise UserError("eval does one thing at a time: give one of --by-position, --tasks and --needles")
    if tensor > 1 and (tasks is not None or needles is not None):
        raise UserError("--tensor goes with the held-out loss alone: leave it out, or --tasks and --needles")
    if needles is not None:
        from loglinear.experiments.needle_eval import evaluate_needles

        evaluate_needles(run_dir, _numbers("--needles", needles), samples)
        return
    if tasks is not None:
        from loglinear.hf.harness import evaluate_tasks

        evaluate_tasks(run_dir, tasks.split(","), include, samples)
        return
    from loglinear.train.inference import evaluate_run

    evaluate_run(run_dir, samples, by_position, tensor)


@app.command()
def export(
    run_dir: RunDir,
    out: Annotated[Path, typer.Argument(help="The file to write, or the folder for hf.", metavar="OUT")],
    form: Annotated[ExportFormat, typer.Option("--format", help="Weights alone, or all that transformers loads.")] = (
        ExportFormat.SAFETENSORS
    ),
) -> None:
    """Write a run's last checkpoint as one safetensors file of fp32 weights, or as a Hugging Face folder."""
    if form is ExportFormat.HF:
        from loglinear.hf.export import export_hf

        export_hf(run_dir, out)
        return
    from loglinear.checkpoint import export_weights, read_latest
    from loglinear.train.folder import RunFolder

    export_weights(read_latest(RunFolder(run_dir).checkpoints).folder, out)


@app.command()
def generate(
    run_dir: RunDir,
    prompt: Annotated[str, typer.Option(help="The text to continue.")],
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 always takes the most likely token.")] = 0.8,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sampling.")] = 0,
    tensor: TensorRanks = 1,
) -> None:
    """Continue a text with a run's last checkpoint, token by token."""
    from loglinear.train.inference import generate_text

    generate_text(run_dir, prompt, tokens, temperature, seed, tensor)


@config_app.command()
def reference() -> None:
    """Print every setting of runs, clusters and sweeps with its meaning: docs/config.md."""
    from launch.reference import reference as text

    typer.echo(text(), nl=False)


@data_app.command()
def prepare(config: ConfigFile, overrides: Overrides = None) -> None:
    """Train the tokenizer if need be and tokenise the sources into shards; called again, it goes on."""
    from loglinear.config import load_config

    settings = load_config(config, overrides or ())
    from data_pipeline.prepare import prepare_all
    from data_pipeline.progress import console_progress, summary

    with console_progress() as progress:
        indices = prepare_all(settings.data, settings.model.vocab_size, progress)
    for name, index in indices.items():
        typer.echo(f"{name}:\n{summary(index)}" if name else summary(index))


@data_app.command()
def inspect(
    config: ConfigFile,
    overrides: Overrides = None,
    documents: Annotated[int, typer.Option(min=0, help="Documents of each source to show.")] = 2,
) -> None:
    """Show what is prepared: shares, lengths and their histogram, what packing costs, and some documents."""
    from loglinear.config import load_config

    settings = load_config(config, overrides or ())
    from rich.console import Console

    from data_pipeline.inspection import inspect as run

    run(settings.data, settings.model.vocab_size, settings.model.seq_len, documents, Console())


@data_app.command()
def verify(config: ConfigFile, overrides: Overrides = None) -> None:
    """Check the SHA-256 of every token file; exit code 2 if one is damaged."""
    from loglinear.config import load_config

    settings = load_config(config, overrides or ())
    from data_pipeline.progress import counting
    from data_pipeline.verify import verify as run

    with counting("verifying") as progress:
        problems = run(settings.data, settings.model.vocab_size, progress)
    for problem in problems:
        typer.echo(problem)
    if problems:
        raise UserError(f"{settings.data.dir}: {len(problems)} files are missing or damaged; each is named above")
    typer.echo(f"{settings.data.dir}: every file is whole")


@data_app.command()
def contamination(
    config: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="A file for the report, as JSON.")] = None,
) -> None:
    """Look for held-out documents, and any 50 tokens of one, in training data; exit code 1 if there are any."""
    from loglinear.config import load_config

    settings = load_config(config, overrides or ())
    from data_pipeline.contamination import check_contamination
    from data_pipeline.files import write_json
    from data_pipeline.progress import counting, describe_contamination

    with counting("comparing") as progress:
        report = check_contamination(settings.data, settings.model.vocab_size, progress)
    if out is not None:
        write_json(out, report.to_dict())
    typer.echo(describe_contamination(report))
    raise typer.Exit(1 if report.contaminated_documents else 0)


@bench_app.command()
def ops(out: Annotated[Path, typer.Option(help="Where the table and the plot go.")] = Path("runs/bench-ops")) -> None:
    """Time of log-linear attention against sequence length on the CPU, beside softmax attention."""
    from loglinear.bench.ops import bench_ops

    bench_ops(out)


@bench_app.command()
def kernels(out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("runs/bench-kernels")) -> None:
    """Time and memory of the kernels on this GPU, beside softmax attention and flash-linear-attention."""
    from loglinear.bench.kernels import bench_kernels

    bench_kernels(out)


Configs = Annotated[
    list[Path], typer.Argument(help="YAML files of runs; the last is the baseline.", metavar="CONFIG...")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")]


@bench_app.command(name="decode")
def bench_decode_command(
    configs: Configs,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("runs/bench-decode"),
    contexts: Annotated[str, typer.Option(help="Tokens read before.")] = "1024,4096,16384,65536,131072,262144,1048576",
    batches: Annotated[str, typer.Option(help="Sequences decoded at once.")] = "1,64",
    device: Device = None,
) -> None:
    """Time and memory of decoding a token behind long contexts, beside a baseline."""
    from loglinear.bench.decode import bench_decode
    from loglinear.config import load_config

    sizes = _numbers("--contexts", contexts), _numbers("--batches", batches)
    bench_decode([load_config(config) for config in configs], *sizes, device, out)


@bench_app.command(name="model")
def bench_model_command(
    configs: Configs,
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("runs/bench-model"),
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence.")] = "2048,4096,8192,16384,32768,65536,131072",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a step, unless one sequence is longer.")] = 32768,
    device: Device = None,
) -> None:
    """Throughput, utilisation and peak memory of whole training steps on one device, beside a baseline."""
    from loglinear.bench.model import bench_model
    from loglinear.config import load_config

    sizes = _numbers("--lengths", lengths)
    bench_model([load_config(config) for config in configs], sizes, tokens, device, out)


@bench_app.command(name="scaling")
def bench_scaling_command(
    configs: Annotated[
        list[Path],
        typer.Argument(help="YAML files of runs; the first is also resharded and killed.", metavar="CONFIG..."),
    ],
    out: Annotated[Path, typer.Option(help="Where the numbers go; those that are there are kept.")] = Path(
        "runs/bench-scaling"
    ),
    parts: Annotated[str, typer.Option(help="What to measure.")] = "parity,reshard,speed,weak,recovery",
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence.")] = "4096,32768,131072",
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a pass, unless one sequence is longer.")] = 32768,
    ranks: Annotated[int | None, typer.Option(min=1, help="GPUs, or CPU processes; all GPUs if not given.")] = None,
) -> None:
    """All GPUs of this machine: parity, resharding, speed of every layout, weak scaling, recovery from a fault."""
    from loglinear.config import load_config
    from loglinear.scaling.bench import bench_scaling

    sizes = _numbers("--lengths", lengths)
    bench_scaling([load_config(config) for config in configs], parts.split(","), sizes, tokens, ranks, out)


@bench_app.command(name="data")
def bench_data_command(
    out: Annotated[Path, typer.Option(help="Where the numbers go.")] = Path("runs/bench-data"),
) -> None:
    """Speed of tokenising and of loading batches, beside datasets and mosaicml-streaming if that is installed."""
    from loglinear.bench.data import bench_data

    bench_data(out)


def _numbers(option: str, given: str) -> tuple[int, ...]:
    """The positive whole numbers that are `given` with commas between them."""
    parts = given.split(",")
    if not all(part.isascii() and part.isdecimal() and int(part) for part in parts):
        raise UserError(f"{option} {given} is no list of positive whole numbers: write it as 1024,4096")
    return tuple(map(int, parts))


def main() -> None:
    """Run the command line; a user's mistake is one sentence on stderr and exit code 2."""
    # An OpenMP thread that spins while it waits for one without a core slows a busy machine down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app()
    except UserError as error:
        rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        typer.echo(f"loglinear{rank}: {error}", err=True)
        sys.exit(EXIT_REFUSED)
