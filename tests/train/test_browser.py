"""TensorBoard as a person sees it: its pages in a real browser, with the curves of a real run."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests import browser
from tests.train.small import records

pytestmark = pytest.mark.browser

PIXELS = 0.5  # that a point may lie beside its place
# The curves of every chart, as people who begin with this page should find them.
FIRST_PAGE = {
    "loss, nats per token": ("loss/train", "loss/held_out"),
    "tokens per second": ("throughput/tokens_per_second",),
    "model FLOP utilisation": ("throughput/mfu",),
    "gradient norm": ("optimizer/grad_norm",),
    "learning rate": ("optimizer/learning_rate",),
    "steps left out, and returns to a checkpoint": ("stability/refused_steps", "stability/rollbacks"),
    "seconds of a step": tuple(f"step_seconds/{phase}" for phase in ("data", "forward", "backward", "optimizer")),
    "memory at the peak, GiB": ("memory/peak_GiB",),
    "layer 0": tuple(f"lambda_mean/layer_00/level_{level:02d}" for level in range(9)),
}
CHART = "tf-custom-scalar-multi-line-chart-card"


@pytest.fixture(scope="module")
def tensorboard(reference: Path) -> Iterator[str]:
    """The address of a TensorBoard that shows the reference run."""
    with browser.tensorboard(reference / "tensorboard") as address:
        yield address


@pytest.fixture
def page() -> Iterator[Any]:
    with browser.empty_page() as page:
        yield page


def curves(page: Any, title: str) -> list[np.ndarray]:
    """The curves of a chart, each float64 [points, 2] in pixels: to the right, and down."""
    chart = page.locator(CHART).filter(has=page.get_by_text(title, exact=True))
    paths = chart.locator("path.line").evaluate_all("paths => paths.map(path => path.getAttribute('d') || '')")
    return [np.array([point.split(",") for point in re.split("[ML]", path)[1:]], float) for path in paths]


def test_the_first_page_draws_the_curves_of_a_run(page: Any, tensorboard: str, reference: Path) -> None:
    events = EventAccumulator(str(reference / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    logged = {
        title: [np.array([(event.step, event.value) for event in events.Scalars(tag)]) for tag in tags]
        for title, tags in FIRST_PAGE.items()
    }
    loss = [[record["step"], record["loss"]] for record in records(reference) if "loss" in record]
    assert np.allclose(logged["loss, nats per token"][0], loss[1::2]), "every second step"

    page.goto(tensorboard + "#custom_scalars&_smoothingWeight=0")
    page.get_by_text("Ignore outliers in chart scaling").click()  # else what lies far away is not drawn
    points = {title: sorted(map(len, of_chart)) for title, of_chart in logged.items()}

    def drawn() -> dict[str, list[int]]:
        return {title: sorted(map(len, curves(page, title))) for title in FIRST_PAGE}

    browser.eventually(page, lambda: drawn() == points)
    assert page.locator(f"{CHART} .heading-label").all_inner_texts() == list(FIRST_PAGE)
    assert drawn() == points
    for title, of_chart in logged.items():
        wanted = np.concatenate(sorted(of_chart, key=lambda curve: curve[:, 1].tolist()))
        shown = np.concatenate(sorted(curves(page, title), key=lambda curve: (-curve[:, 1]).tolist()))
        assert_same_shape(shown[:, 0], wanted[:, 0])
        assert_same_shape(-shown[:, 1], wanted[:, 1])


def assert_same_shape(pixels: np.ndarray, values: np.ndarray) -> None:
    """Pixels are values, moved and stretched."""
    scale = np.ptp(pixels) / np.ptp(values) if np.ptp(values) else 0.0
    assert np.abs(pixels - pixels.mean() - scale * (values - values.mean())).max() < PIXELS


def test_samples_are_shown_as_texts(page: Any, tensorboard: str, reference: Path) -> None:
    events = EventAccumulator(str(reference / "tensorboard"), size_guidance={"tensors": 0})
    events.Reload()
    samples = [event.tensor_proto.string_val[0].decode() for event in events.Tensors("sample/text_summary")]
    page.goto(tensorboard + "#text")
    shown = page.locator("pre").filter(has_text=re.compile(r"^\s*def "))
    browser.eventually(page, lambda: shown.count() == len(samples))
    assert sorted(f"```\n{text.strip()}\n```" for text in shown.all_inner_texts()) == sorted(samples)
    assert len(samples) == 3, "one an evaluation"
