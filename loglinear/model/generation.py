"""Sampling from a model: the prompt through the chunked form, then token by token through the recurrent form."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loglinear.model.lm import LanguageModel


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompt: list[int],
    count: int,
    *,
    temperature: float = 0.8,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> Iterator[int]:
    """Yield `count` tokens that continue `prompt`.

    Args:
        model: what to sample from.
        prompt: token ids of the document so far, bos among them; at least one.
        count: tokens to generate.
        temperature: divides the logits; 0 takes the most likely token.
        seed: of the sampling.
        device: where the model is.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens_bt = torch.tensor([prompt], device=device)
    state = model.initial_state(1)
    for _ in range(count):
        logits_bv, state = model.decode(tokens_bt, state)
        if temperature == 0:
            tokens_bt = logits_bv.argmax(-1, keepdim=True)
        else:
            tokens_bt = torch.multinomial((logits_bv / temperature).softmax(-1), 1, generator=generator)
        yield int(tokens_bt)
