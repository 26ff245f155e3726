"""Sampling from a model: the prompt through the chunked form, then token by token through the recurrent form."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from loglinear.model.decoder import Decoder
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
    graphs: bool = False,
) -> Iterator[int]:
    """Yield `count` tokens that continue `prompt`.

    Args:
        model: what to sample from.
        prompt: token ids of the document so far, bos among them; at least one.
        count: tokens to generate.
        temperature: divides the logits; 0 takes the most likely token.
        seed: of the sampling.
        device: where the model is.
        graphs: take `Decoder`, which is faster on a GPU; for a model without hooks whose weights are whole.
    """
    generator = torch.Generator(device).manual_seed(seed)
    tokens_bt = torch.tensor([prompt], device=device)
    logits_bv, state = model.decode(tokens_bt, model.initial_state(1))
    decoder = Decoder(model, state) if graphs else None
    for number in range(count):
        if number > 0 and decoder is not None:
            logits_bv = decoder.step(tokens_bt)
        elif number > 0:
            logits_bv, state = model.decode(tokens_bt, state)
        if temperature == 0:
            tokens_bt = logits_bv.argmax(-1, keepdim=True)
        else:
            below_bv = logits_bv - logits_bv.amax(-1, keepdim=True)  # so that no temperature makes them infinite
            tokens_bt = torch.multinomial((below_bv / temperature).softmax(-1), 1, generator=generator)
        yield int(tokens_bt)
