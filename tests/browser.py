"""TensorBoard in a browser without a window: Chromium, led by playwright."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PROGRAM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
IS_HERE = PROGRAM is not None and find_spec("playwright") is not None
SECONDS = 30.0  # until a page must show what it should


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """A TensorBoard for `logdir`; its address."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        addresses = (re.search(r" at (http://\S+)", line) for line in server.stderr)
        try:
            yield next(address[1] for address in addresses if address)
        finally:
            server.terminate()


@contextmanager
def empty_page() -> Iterator[Any]:
    """A page of a browser that nobody has used."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Without a GPU, Chromium shows no WebGL; without WebGL, TensorBoard draws SVG.
        browser = playwright.chromium.launch(executable_path=PROGRAM, args=["--disable-3d-apis"])
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


def eventually(page: Any, condition: Callable[[], bool]) -> None:
    """Return when `condition` holds for a page that is still being drawn, or when it has had time enough."""
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        page.wait_for_timeout(200)
