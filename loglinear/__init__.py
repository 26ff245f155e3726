"""Pretraining of language models with adaptive log-linear attention."""

__version__ = "0.1.0"
