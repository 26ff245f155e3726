"""A browser without a window: Debian's Chromium, led by playwright."""

from __future__ import annotations

import shutil
from importlib.util import find_spec

PROGRAM = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
IS_HERE = PROGRAM is not None and find_spec("playwright") is not None
