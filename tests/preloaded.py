"""What ranks need of other libraries: imported once in the process that they are forked from, not in each of them."""

from __future__ import annotations

import gc

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer  # which makes an engine import torch's compiler: seconds a rank

import loglinear.train.run

__all__ = ["deepspeed", "loglinear"]

gc.collect()
gc.freeze()  # engines collect garbage again and again, and need not look through all of this
