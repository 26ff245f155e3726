"""Tests with the real transformers: nothing is fetched, and code of exported folders is cached apart."""

from __future__ import annotations

import os
import tempfile

os.environ |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": tempfile.mkdtemp(prefix="loglinear-hf-modules-")}
