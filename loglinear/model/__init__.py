"""The language model: readable top to bottom, and free of anything that knows about ranks."""

from loglinear.model.lm import DecodeState, LanguageModel, build_model

__all__ = ["DecodeState", "LanguageModel", "build_model"]
