"""What was measured, as tables and as a plot."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from loglinear.scaling.results import Result, Results

ABOUT = (
    "A step takes the same global batch in every layout of a length. MFU is that of all ranks together, recomputation"
    " not counted; * blocks recomputed. Communication: GPU time in NCCL's kernels, as a share of the step, waiting for"
    " slower ranks counted; exposed: the part of it in which no other kernel ran (torch profiler, mean over ranks)."
)


def markdown(results: Results) -> str:
    """Every part that was measured, a table each."""
    found = results.read()
    about = results.machine()
    parts = [
        f"{about.get('device')} ({about.get('processor')}), {about.get('backend')}, {about.get('date')},"
        f" torch {about.get('torch')}; `{about.get('command')}`."
    ]
    for name, table in (
        ("parity", _parity),
        ("reshard", _reshard),
        ("speed", _speed),
        ("weak", _weak),
        ("recovery", _recovery),
    ):
        own = {key.partition("/")[2]: value for key, value in found.items() if key.startswith(f"{name}/")}
        whole = {key: value for key, value in own.items() if "error" not in value or "layout" in value}
        if whole:
            parts.append(table(whole))
        parts += [f"{name} of {key}: {value['error']}" for key, value in own.items() if key not in whole]
    return "\n\n".join(parts) + "\n"


def _table(heading: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heading = list(heading)
    lines = [heading, ["---", *["---:"] * (len(heading) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _parity(found: dict[str, Result]) -> str:
    rows = [
        (dtype, f"{each['cases']}", f"{each['tolerance']:g}", f"{each['largest']:.2g}", f"{len(each['found'])}")
        for dtype, each in found.items()
    ]
    text = _table(("parity in", "cases", "allowed error", "largest, of what is allowed", "above it"), rows)
    return "\n".join([text, *(f"- {dtype}: {line}" for dtype, each in found.items() for line in each["found"])])


def _reshard(found: dict[str, Result]) -> str:
    rows = []
    for name, each in found.items():
        if name.startswith("save"):
            size = f"{each['bytes'] / 1e9:.2f} GB, the loss falls by {each['fall']:.3f} in all"
            rows.append((name, f"{each['seconds']:.1f}", size))
        else:
            verdict = "as without stopping" if each["agrees"] else "DIFFERS"
            rows.append((name, f"{each['seconds']:.1f}", f"{verdict}, to {each['error']:.1e} nats"))
    return _table(("checkpoint", "seconds", "result"), rows)


def _speed(found: dict[str, Result]) -> str:
    heading = ("model, T, layout", "tokens/s", "MFU", "GB at the peak", "communication", "exposed")
    return f"{ABOUT}\n\n{_table(heading, ((_place(each), *_cells(each)) for each in found.values()))}"


def _weak(found: dict[str, Result]) -> str:
    heading = ("weak scaling", "tokens/s", "MFU", "GB at the peak", "communication", "exposed", "of linear")
    first = {each["layout"]: each for each in found.values() if each["ranks"] == 1}
    ordered = sorted(found.values(), key=lambda each: (each["layout"], each["ranks"]))
    return _table(heading, ((_place(each), *_cells(each), _efficiency(each, first)) for each in ordered))


def _efficiency(each: Result, first: dict[str, Result]) -> str:
    """Model FLOPs a second and rank, as a share of those of one rank: longer sequences cost more a token."""
    alone = first.get(each["layout"])
    return "-" if alone is None else f"{each['mfu'] / alone['mfu']:.0%}"


def _place(each: Result) -> str:
    parameters = each["parameters"] / 1e6
    return f"{each['model']} ({parameters:,.0f}M), {each['length']:,}, {each['layout']} on {each['ranks']}"


def _cells(each: Result) -> tuple[str, ...]:
    seconds = each["seconds"]
    shares = (each["communication_seconds"], each["exposed_seconds"])
    return (
        f"{each['tokens_per_second']:,.0f}{'*' if each['recomputes'] else ''}",
        f"{each['mfu']:.1%}",
        "-" if each["peak_bytes"] is None else f"{each['peak_bytes'] / 1e9:.1f}",
        *("-" if share is None else f"{share / seconds:.1%}" for share in shares),
    )


def _recovery(found: dict[str, Result]) -> str:
    heading = ("a rank is killed", "after step", "back to step", "noticed", "new ranks", "trains", "caught up")
    kinds = ("noticed_seconds", "started_seconds", "trains_seconds", "caught_up_seconds")
    rows = [
        (name, f"{each['killed_after']}", f"{each['from_step']}", *(f"{each[kind]:.1f} s" for kind in kinds))
        for name, each in found.items()
    ]
    return _table(heading, rows)


def draw(file: Path, results: Results) -> None:
    """Tokens a second by length for each layout and model, and weak scaling; nothing if neither was measured."""
    found = [(name, each) for name, each in results.read().items() if "tokens_per_second" in each]
    panels: dict[str, list[Result]] = {}
    for name, each in found:
        panels.setdefault("weak scaling" if name.startswith("weak/") else each["model"], []).append(each)
    if not panels:
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.5), layout="constrained", squeeze=False)
    for axis, (title, points) in zip(axes[0], panels.items(), strict=True):
        across = "ranks" if title == "weak scaling" else "length"
        for layout in dict.fromkeys(point["layout"] for point in points):
            line = sorted((p[across], p["tokens_per_second"] / p["ranks"]) for p in points if p["layout"] == layout)
            axis.plot(*zip(*line, strict=True), marker="o", label=layout)
        axis.set_xscale("log", base=2)
        axis.set(title=title, xlabel="ranks" if across == "ranks" else "tokens of a sequence")
        axis.set(ylabel="tokens a second and rank", ylim=(0, None))
        axis.grid(True, alpha=0.3)
        axis.legend()
    figure.savefig(file, dpi=130)
    plt.close(figure)
