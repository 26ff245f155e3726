"""The whole model: packing, decoding, loss, checkpointing, reproducibility. Shapes: b batch, t time, v vocabulary."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from loglinear.config import MixerName
from loglinear.errors import UserError
from loglinear.model import build_model
from loglinear.model.generation import generate
from loglinear.model.layers import Documents
from tests.model.model_cases import PATTERNS, VOCAB, assert_same_gradients, awake, gradients, random_tokens, tiny

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
LENGTHS = (3, 75, 0, 1, 2, 79)  # two rows of 80 tokens; one document lies across the rows
Pattern = tuple[MixerName, ...]


@pytest.fixture(params=PATTERNS)
def pattern(request: pytest.FixtureRequest) -> Pattern:
    return PATTERNS[request.param]


def packed_boundaries() -> torch.Tensor:
    return torch.tensor([0, *LENGTHS]).cumsum(0).int()


def packed_documents() -> Documents:
    return Documents.packed(packed_boundaries(), torch.device("cpu"))


def test_packed_documents_give_the_logits_of_documents_alone(pattern: Pattern) -> None:
    model, tokens_bt = awake(tiny(pattern)), random_tokens(2, 80)
    packed_btv = model(tokens_bt, documents=packed_documents())
    assert packed_btv.shape == (2, 80, VOCAB)
    for start, end in pairwise(packed_boundaries().tolist()):
        if end > start:
            alone_btv = model(tokens_bt.view(1, -1)[:, start:end])
            torch.testing.assert_close(packed_btv.view(1, 160, -1)[:, start:end], alone_btv, **CLOSE)


def test_packed_documents_give_the_gradients_of_documents_alone(pattern: Pattern) -> None:
    model, tokens_bt, labels_bt = awake(tiny(pattern)), random_tokens(2, 80), random_tokens(2, 80, seed=1)
    model(tokens_bt, labels_bt, packed_documents()).backward()
    packed = gradients(model)
    for start, end in pairwise(packed_boundaries().tolist()):
        if end > start:
            model(tokens_bt.view(1, -1)[:, start:end], labels_bt.view(1, -1)[:, start:end]).backward()
    assert_same_gradients(packed, gradients(model))


def test_the_future_does_not_reach_the_past(pattern: Pattern) -> None:
    model, tokens_bt = awake(tiny(pattern)), random_tokens(1, 80)
    before_btv = model(tokens_bt)
    tokens_bt[0, 50] = (tokens_bt[0, 50] + 1) % VOCAB
    after_btv = model(tokens_bt)
    torch.testing.assert_close(after_btv[:, :50], before_btv[:, :50], **CLOSE)
    assert (after_btv[:, -1] - before_btv[:, -1]).abs().max() > 1e-3, "but the past reaches the future"


@pytest.mark.parametrize("prompt", [1, 2, 37, 65])
@torch.no_grad()
def test_decoding_gives_the_logits_of_the_parallel_form(pattern: Pattern, prompt: int) -> None:
    """A prompt at once, a few single tokens, several at once, single tokens again."""
    model, tokens_bt = awake(tiny(pattern)), random_tokens(2, 90)
    wanted_btv = model(tokens_bt)
    state = model.initial_state(2)
    cuts = [0, *range(prompt, prompt + 5), prompt + 15, *range(prompt + 16, prompt + 20)]
    for start, end in pairwise(cuts):
        logits_bv, state = model.decode(tokens_bt[:, start:end], state)
        assert state.positions.tolist() == [end, end]
        torch.testing.assert_close(logits_bv, wanted_btv[:, end - 1], **CLOSE)


@torch.no_grad()
def test_documents_of_different_lengths_are_read_as_each_alone(pattern: Pattern) -> None:
    """Padded on the left, in a batch: the prompts in two parts, one document beginning in the second, then tokens."""
    model = awake(tiny(pattern))
    lengths, padding = [70, 37, 2, 90], VOCAB - 1
    documents = [random_tokens(1, length + 9, seed=length) for length in lengths]
    prompts_bt = torch.full((4, 90), padding)
    for row_t, document_bt, length in zip(prompts_bt, documents, lengths, strict=True):
        row_t[90 - length :] = document_bt[0, :length]
    total = torch.tensor(lengths)
    first_btd, state = model.read(prompts_bt[:, :40], model.initial_state(4), (total - 50).clamp(min=0))
    second_btd, state = model.read(prompts_bt[:, 40:], state, total.clamp(max=50))
    assert state.positions.tolist() == lengths
    logits_btv = model.logits(torch.cat([first_btd, second_btd], 1))
    for row_tv, document_bt, length in zip(logits_btv, documents, lengths, strict=True):
        torch.testing.assert_close(row_tv[90 - length :], model(document_bt)[0, :length], **CLOSE)
    for step in range(9):
        tokens_bt = torch.stack(
            [document_bt[0, length + step] for document_bt, length in zip(documents, lengths, strict=True)]
        )
        logits_bv, state = model.decode(tokens_bt[:, None], state)
        wanted = [model(document_bt)[0, length + step] for document_bt, length in zip(documents, lengths, strict=True)]
        torch.testing.assert_close(logits_bv, torch.stack(wanted), **CLOSE)


def test_padding_within_a_document_is_refused() -> None:
    model = awake(tiny())
    _, state = model.read(random_tokens(2, 5), model.initial_state(2))
    with pytest.raises(UserError, match="pad on the left"):
        model.read(random_tokens(2, 5), state, torch.tensor([5, 4]))


@pytest.mark.parametrize("name", ["none", "static", "mlp_masked_softmax"])
@torch.no_grad()
def test_decoding_with_other_level_scales(name: str) -> None:
    config = tiny(log_linear={"heads": 2, "head_dim": 4, "state_dim": 5, "conv_width": 1, "level_scale": name})
    model, tokens_bt = awake(config), random_tokens(1, 40)
    state = model.initial_state(1)
    for start, end in pairwise([0, 30, *range(31, 41)]):
        logits_bv, state = model.decode(tokens_bt[:, start:end], state)
    torch.testing.assert_close(logits_bv, model(tokens_bt)[:, -1], **CLOSE)


def test_decoding_past_the_trained_length_clamps_the_levels() -> None:
    model, tokens_bt = awake(tiny(seq_len=16)), random_tokens(1, 50)
    with torch.no_grad():
        wanted_btv = model(tokens_bt)
        _, state = model.decode(tokens_bt[:, :49], model.initial_state(1))
        logits_bv, _ = model.decode(tokens_bt[:, 49:], state)
    torch.testing.assert_close(logits_bv, wanted_btv[:, -1], **CLOSE)


def test_the_loss_is_the_sum_over_labelled_tokens() -> None:
    model, tokens_bt, labels_bt = awake(tiny()), random_tokens(2, 20), random_tokens(2, 20, seed=1)
    labels_bt[0, :7] = -100
    labels_bt[1, 19] = -100
    logits_btv = model(tokens_bt)
    surprise_bt = logits_btv.logsumexp(-1) - logits_btv.gather(-1, labels_bt.clamp(min=0)[..., None])[..., 0]
    wanted = sum(surprise_bt[b, t] for b in range(2) for t in range(20) if labels_bt[b, t] != -100)
    torch.testing.assert_close(model(tokens_bt, labels_bt), wanted)


def test_an_untrained_model_knows_nothing() -> None:
    model, tokens_bt = build_model(tiny(dim=64), 0), random_tokens(4, 60)
    loss = model(tokens_bt, random_tokens(4, 60, seed=1)) / 240
    assert float(loss.detach()) == pytest.approx(torch.tensor(float(VOCAB)).log().item(), rel=0.02)


@pytest.mark.parametrize("packed", [False, True])
def test_activation_checkpointing_changes_nothing(pattern: Pattern, packed: bool) -> None:
    tokens_bt, labels_bt = random_tokens(2, 80), random_tokens(2, 80, seed=1)
    results = []
    for recomputed in (0, 1, 2):
        model = awake(tiny(pattern), recomputed_blocks=recomputed)
        loss = model(tokens_bt, labels_bt, packed_documents() if packed else None)
        loss.backward()
        results.append((loss.detach(), gradients(model)))
    (plain, plain_gradients), *others = results
    for saved, saved_gradients in others:
        assert torch.equal(plain, saved)
        assert all(torch.equal(saved_gradients[name], gradient) for name, gradient in plain_gradients.items())


def test_activation_checkpointing_keeps_fewer_tensors() -> None:
    tokens_bt, counts = random_tokens(1, 70), []
    for recomputed in range(3):
        model, kept = awake(tiny(), recomputed_blocks=recomputed), []

        def keep(x: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(x.numel())
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model(tokens_bt, tokens_bt)
        counts.append(sum(kept))
    assert counts[2] < 0.3 * counts[0]
    assert counts[1] == pytest.approx((counts[0] + counts[2]) / 2, rel=0.01), "two blocks of equal size"


def test_a_compiled_model_is_the_plain_one() -> None:
    """In float64, traced for autograd but without code generation, which would need a compiler."""
    tokens_bt, losses, named = random_tokens(2, 80), [], []
    for wrap in (lambda model: model, torch.compile(backend="aot_eager")):
        model = awake(tiny()).double()
        loss = wrap(model)(tokens_bt, tokens_bt)
        loss.backward()
        losses.append(loss.detach())
        named.append(gradients(model))
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-12)
    assert all(torch.allclose(named[1][name], gradient, rtol=1e-9, atol=1e-11) for name, gradient in named[0].items())


def test_a_model_is_a_function_of_configuration_and_seed(pattern: Pattern) -> None:
    config = tiny(pattern)
    torch.manual_seed(5)
    first = build_model(config, 7).state_dict()
    torch.manual_seed(6)
    state_before = torch.get_rng_state()
    second = build_model(config, 7).state_dict()
    assert torch.equal(torch.get_rng_state(), state_before), "building draws nothing from the global generator"
    assert all(torch.equal(first[name], second[name]) for name in first)
    other = build_model(config, 8).state_dict()
    assert not torch.equal(first["embedding.weight"], other["embedding.weight"])


def test_bf16_weights_train_and_decode_like_fp32(pattern: Pattern) -> None:
    model, tokens_bt, labels_bt = awake(tiny(pattern)), random_tokens(2, 80), random_tokens(2, 80, seed=1)
    wanted = float(model(tokens_bt, labels_bt).detach())
    model = model.bfloat16()
    loss = model(tokens_bt, labels_bt, packed_documents())
    assert loss.dtype == torch.float32
    assert float(model(tokens_bt, labels_bt).detach()) == pytest.approx(wanted, rel=0.02)
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model).values())
    with torch.no_grad():
        _, state = model.decode(tokens_bt[:, :70], model.initial_state(2))
        logits_bv, _ = model.decode(tokens_bt[:, 70:71], state)
        wanted_btv = model(tokens_bt)
    assert (logits_bv - wanted_btv[:, 70]).norm() < 0.05 * wanted_btv[:, 70].norm()


def test_generation_is_reproducible(pattern: Pattern) -> None:
    model = awake(tiny(pattern))
    first, second, other = (list(generate(model, [1, 2, 3], 30, seed=seed)) for seed in (4, 4, 5))
    assert first == second != other
    assert len(first) == 30
    assert all(0 <= token < VOCAB for token in first)


@torch.no_grad()
def test_temperature_zero_takes_the_most_likely_token(pattern: Pattern) -> None:
    model, tokens = awake(tiny(pattern)), [1, 2, 3]
    for token in generate(model, tokens.copy(), 20, temperature=0):
        assert token == int(model(torch.tensor([tokens]))[0, -1].argmax())
        tokens.append(token)


@torch.no_grad()
def test_a_temperature_near_zero_takes_it_too(pattern: Pattern) -> None:
    model = awake(tiny(pattern))
    assert list(generate(model, [1, 2], 9, temperature=1e-42)) == list(generate(model, [1, 2], 9, temperature=0))


@torch.no_grad()
def test_samples_follow_the_models_probabilities() -> None:
    model = awake(tiny())
    shares_v = (model(torch.tensor([[1]]))[0, -1] / 2.0).softmax(-1)
    drawn = torch.tensor([next(generate(model, [1], 1, temperature=2.0, seed=seed)) for seed in range(400)])
    counts_v = drawn.bincount(minlength=VOCAB) / 400
    assert (counts_v - shares_v).abs().sum() < 0.3
