"""The report: what the stored results say, in Markdown with pictures. It says so where there are none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from data_pipeline.files import write_bytes
from loglinear.experiments import tables
from loglinear.experiments.answers import in_short, published, reviewers_points
from loglinear.experiments.figures import draw_figures
from loglinear.experiments.protocol import Protocol, load_protocol
from loglinear.experiments.results import check_protocol, read_results
from loglinear.experiments.summary import Summary

OPENING = """# Evidence: does decay that adapts beat decay that does not?

The method of this repository lets an MLP decide, for every token, head and level of log-linear attention, how much the
level counts (`mlp`). This report compares it with plain linear attention (`none`), levels that are weighted whatever
the input (`static`), the log-linear paper's weights (`scaled`), a linear layer (`linear`), other forms of the MLP, and
softmax attention as the ceiling. [protocol.md](protocol.md) fixed what is run and how it is judged before the runs.

This page is written by `loglinear experiment report` from the results in [evidence/](evidence/), a JSON line for every
finished run with its curve, its tests and the command that runs it again. Numbers are means ± standard deviations over
seeds. On one CPU a run gives the same numbers again bit for bit, alone or in its group; a GPU may round sums otherwise,
which training amplifies: what two modes gave when they were run twice is in [protocol.md](protocol.md#run-twice).
"""


def write_report(out: Path, protocol: Protocol | None = None) -> Path:
    """Write the report beside the folder `out` of results, as its name with .md, and the pictures into it.

    Returns:
        The report's path.

    Raises:
        UserError: results are damaged or of another protocol.
    """
    protocol = protocol or load_protocol()
    summaries = []
    for name, experiment in protocol.experiments.items():
        path = out / f"{name}.jsonl"
        results = read_results(path)
        check_protocol(path, results, experiment.fingerprint)
        summaries.append(Summary(name, experiment, protocol.statistics, results))
    report = out.with_name(f"{out.name}.md")
    parts = [OPENING, *in_short(summaries), _costs(summaries)]
    parts += [part for summary in summaries for part in _experiment(summary, out)]
    parts += reviewers_points(summaries) + published(summaries)
    report.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(report, "\n".join(parts).encode())
    Console().print(f"written: {report}", highlight=False)
    return report


def _costs(summaries: list[Summary]) -> str:
    rows = []
    for summary in summaries:
        devices = sorted({result["device"] for result in summary.results})
        days = sorted({result["date"] for result in summary.results})
        when = " to ".join(dict.fromkeys([days[0], days[-1]])) if days else ""
        finished = f"{len(summary.results)} ({summary.missing} missing)"
        rows.append([summary.name, finished, f"{summary.gpu_minutes:.1f}", ", ".join(devices), when])
    head = ["experiment", "finished runs", "minutes", "machine", "dates"]
    return "## What was run, and its cost\n\n" + tables.table(head, rows)


def _experiment(summary: Summary, out: Path) -> Iterator[str]:
    yield f"## {summary.experiment.title}\n"
    if not summary.final:
        yield f"No reported run is finished yet. `{_command(summary)}` runs them.\n"
        return
    if summary.missing:
        yield f"{summary.missing} runs of the protocol are missing: what follows is preliminary.\n"
    pictures = draw_figures(summary, out)
    for heading, text, picture in _sections(summary):
        yield f"### {heading}\n\n{text}"
        if picture in pictures:
            yield f"![{summary.name}: {picture}]({out.name}/{pictures[picture].name})\n"
    yield f"Every table above: `{_command(summary)}`, one mode by `--modes MODE`, then `loglinear experiment report`.\n"


def _sections(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """Heading, text and picture of what there is to show."""
    focus, rules = summary.rules.focus, summary.rules
    if summary.is_novels:
        yield "Loss by position", "Nats per token.\n\n" + tables.positions_table(summary), "loss by position"
        yield "Loss by novel", "Nats per token, at all positions.\n\n" + tables.novels_table(summary), ""
        yield (
            "Needles in haystacks",
            "Answers that are right in every token, in per cent, and nats per token of the answer.\n\n"
            + tables.needles_table(summary),
            "",
        )
    else:
        yield "Accuracy", "Per cent, by length / items.\n\n" + tables.accuracy_table(summary), "accuracy"
        yield (
            "Longer than trained",
            "Per cent, by length / items, for what levels get that were never trained: the last one's logit (`clamp`),"
            " its lambda (`extend`, which differs under a softmax alone), or `one`.\n\n" + tables.longer_table(summary),
            "",
        )
    unit = "test loss" if summary.is_novels else "mean test accuracy in per cent"
    yield "Every seed", f"The {unit}; * marks runs that failed.\n\n" + tables.seeds_table(summary), "training"
    yield (
        f"{focus} against the others",
        f"Differences of {'loss (less is better)' if summary.is_novels else 'accuracy in points'}, paired by seed"
        f"{' and novel' if summary.is_novels else ''}, with {rules.confidence:.0%} intervals of {rules.resamples:,}"
        f" resamples. A difference counts if p after Holm's correction is below {rules.significance:g} and it is at"
        f" least {summary.experiment.margin:g}.\n\n" + tables.comparisons_table(summary),
        "",
    )
    yield "Failures", tables.failures_table(summary), ""
    yield (
        "Level scales",
        "Lambda at the end of training, at the tokens that read the level, mean over layers and seeds.\n\n"
        + tables.levels_table(summary),
        "level scales",
    )
    yield "Gradients", "Norms by group of parameters, median over seeds.\n", "gradient norms"
    yield (
        "Learning rates",
        "Validation loss of the sweep; * if the best rate is the last one tried: a better may lie beyond.\n\n"
        + tables.sweep_table(summary),
        "",
    )


def _command(summary: Summary) -> str:
    novels = " --novels FOLDER" if summary.is_novels else ""
    return f"loglinear experiment {summary.name}{novels}"
