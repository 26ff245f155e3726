"""What transformers makes of an exported folder equals our model. Shapes: b batch, t time, v vocabulary."""

from __future__ import annotations

import subprocess
import sys
import typing
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from loglinear.checkpoint import load_exported
from loglinear.config import DataConfig, LevelScaleName
from loglinear.errors import UserError
from loglinear.model import LanguageModel, build_model
from loglinear.model.generation import generate
from tests.corpus import VOCAB
from tests.hf.runs import exported
from tests.model.model_cases import PATTERNS, gradients, tiny

transformers = pytest.importorskip("transformers")
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
LOG_LINEAR = {"heads": 4, "head_dim": 6, "groups": 2, "state_dim": 5, "conv_width": 4, "level_scale_hidden": 7}
Pair = tuple[LanguageModel, Any]


def tokens(batch: int, time: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, time), generator=torch.Generator().manual_seed(seed))


def load(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


@pytest.fixture(scope="module", params=PATTERNS)
def pair(request: pytest.FixtureRequest, prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Our model and transformers', of every pattern of mixers."""
    model, folder = exported(tmp_path_factory.mktemp("hf"), prepared, pattern=PATTERNS[request.param])
    return model, load(folder)


@pytest.mark.parametrize("level_scale", typing.get_args(LevelScaleName))
@torch.no_grad()
def test_logits_are_ours_with_every_level_scale(prepared: DataConfig, tmp_path: Path, level_scale: str) -> None:
    model, folder = exported(tmp_path, prepared, log_linear=LOG_LINEAR | {"level_scale": level_scale})
    torch.testing.assert_close(load(folder)(tokens(2, 150)).logits, model(tokens(2, 150)), **CLOSE)


@torch.no_grad()
def test_logits_are_ours_with_every_pattern(pair: Pair) -> None:
    ours, theirs = pair
    wanted_btv = ours(tokens(2, 150))
    assert wanted_btv.std() > 0.1, "else agreeing would be no feat"
    torch.testing.assert_close(theirs(tokens(2, 150)).logits, wanted_btv, **CLOSE)
    for use_cache in (True, False):
        last_btv = theirs(tokens(2, 150), use_cache=use_cache, logits_to_keep=3).logits
        torch.testing.assert_close(last_btv, wanted_btv[:, -3:], **CLOSE)


def test_untied_embeddings_are_exported(prepared: DataConfig, tmp_path: Path) -> None:
    model, folder = exported(tmp_path, prepared, tie_embeddings=False)
    theirs = load(folder)
    torch.testing.assert_close(theirs(tokens(1, 20)).logits, model(tokens(1, 20)), **CLOSE)
    assert theirs.get_output_embeddings().weight is not theirs.get_input_embeddings().weight


def test_it_runs_where_loglinear_is_not_installed(prepared: DataConfig, tmp_path: Path) -> None:
    """In another process that cannot import anything of ours, nor what only we need."""
    model, folder = exported(tmp_path, prepared, pattern=PATTERNS["hybrid"])
    save_file({"tokens": tokens(2, 70)}, tmp_path / "in")
    absent = ("loglinear", "data_pipeline", "deepspeed", "pydantic", "sentencepiece", "datasets")
    code = f"""
import sys
for name in {absent}: sys.modules[name] = None
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
tokens = load_file({str(tmp_path / "in")!r})["tokens"]
written = model.generate(tokens, max_new_tokens=5, do_sample=False)
assert AutoTokenizer.from_pretrained({str(folder)!r})("abc")["input_ids"]
save_file({{"logits": model(tokens).logits.contiguous(), "written": written}}, {str(tmp_path / "out")!r})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = load_file(tmp_path / "out")
    torch.testing.assert_close(out["logits"], model(tokens(2, 70)), **CLOSE)
    assert out["written"].shape == (2, 75)


def test_the_loss_and_its_gradients_are_ours(pair: Pair) -> None:
    ours, theirs = pair
    inputs_bt, labels_bt = tokens(2, 90), tokens(2, 90)
    labels_bt[0, :30] = -100
    theirs.train()
    loss = theirs(inputs_bt, labels=labels_bt).loss
    loss.backward()
    counted = int((labels_bt[:, 1:] != -100).sum())
    wanted = ours(inputs_bt, F.pad(labels_bt[:, 1:], (0, 1), value=-100)) / counted
    wanted.backward()
    theirs.eval()
    torch.testing.assert_close(loss, wanted, **CLOSE)
    own = gradients(ours)
    for name, gradient in gradients(theirs.model).items():
        torch.testing.assert_close(gradient, own[name], rtol=1e-4, atol=1e-6, msg=name)


def test_generation_is_ours_token_by_token(pair: Pair) -> None:
    ours, theirs = pair
    prompt_bt = tokens(1, 70)
    wanted = list(generate(ours, prompt_bt[0].tolist(), 30, temperature=0))
    for use_cache in (True, False):
        written_bt = theirs.generate(
            prompt_bt, max_new_tokens=30, do_sample=False, use_cache=use_cache, eos_token_id=None
        )
        assert written_bt[0, 70:].tolist() == wanted


def left_padded(lengths: list[int], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts of these lengths, padded on the left, and their mask."""
    time = max(lengths)
    prompts_bt, mask_bt = torch.full((len(lengths), time), padding), torch.zeros(len(lengths), time, dtype=torch.int64)
    for row, length in enumerate(lengths):
        prompts_bt[row, time - length :] = tokens(1, length, seed=length)[0]
        mask_bt[row, time - length :] = 1
    return prompts_bt, mask_bt


@pytest.mark.parametrize("use_cache", [True, False])
def test_prompts_padded_on_the_left_are_continued_as_each_alone(pair: Pair, use_cache: bool) -> None:
    _, theirs = pair
    lengths = [70, 3, 128, 64]
    prompts_bt, mask_bt = left_padded(lengths, 1)
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "use_cache": use_cache}
    written_bt = theirs.generate(prompts_bt, attention_mask=mask_bt, **options)
    for row, length in enumerate(lengths):
        alone_bt = theirs.generate(tokens(1, length, seed=length), **options)
        assert written_bt[row, 128:].tolist() == alone_bt[0, length:].tolist()


def test_beams_and_samples_with_a_cache_are_those_without(pair: Pair) -> None:
    _, theirs = pair
    prompts_bt, mask_bt = left_padded([40, 9], 1)
    for options in ({"num_beams": 4, "num_return_sequences": 2}, {"do_sample": True, "top_k": 20, "temperature": 0.9}):
        written = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            written.append(
                theirs.generate(
                    prompts_bt,
                    attention_mask=mask_bt,
                    max_new_tokens=15,
                    eos_token_id=None,
                    use_cache=use_cache,
                    **options,
                )
            )
        assert written[0].equal(written[1])
        assert len({tuple(row.tolist()) for row in written[0]}) == len(written[0])


def test_guesses_that_a_cache_could_not_forget_are_refused(pair: Pair) -> None:
    _, theirs = pair
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        theirs.generate(tokens(1, 40), max_new_tokens=5, prompt_lookup_num_tokens=3)


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it(pair: Pair) -> None:
    _, theirs = pair
    inputs_bt, mask_bt = tokens(2, 40), torch.ones(2, 40)
    wanted_btv = theirs(inputs_bt).logits
    inputs_bt[1, 25:], mask_bt[1, 25:] = 1, 0
    logits_btv = theirs(inputs_bt, attention_mask=mask_bt).logits
    torch.testing.assert_close(logits_btv[0], wanted_btv[0], **CLOSE)
    torch.testing.assert_close(logits_btv[1, :25], wanted_btv[1, :25], **CLOSE)
    with pytest.raises(ValueError, match="pad on the left"):
        theirs(inputs_bt, attention_mask=mask_bt, use_cache=True)


def size(part: Any) -> int:
    """Bytes of all tensors in a state."""
    if isinstance(part, torch.Tensor):
        return part.nbytes
    parts = [getattr(part, field.name) for field in fields(part)] if is_dataclass(part) else part
    return sum(map(size, parts))


@torch.no_grad()
def test_a_cache_holds_a_matrix_for_every_power_of_two(prepared: DataConfig, tmp_path: Path) -> None:
    theirs = load(exported(tmp_path, prepared)[1])
    matrices = 2 * 2 * 4 * 5 * 6 * 4  # layers, batch, heads, state, head size, bytes
    rest = 2 * 2 * 3 * (5 * 2 * 2 + 4 * 6) * 4 + (2 + 1) * 2 * 8  # inputs of the convolutions; positions
    for time in (1, 2, 31, 32, 500, 4000):
        written = theirs(tokens(2, time), use_cache=True, logits_to_keep=1)
        (name,) = {"cache", "past_key_values"} & set(written)
        cache = written[name]
        assert size(cache.state) == time.bit_length() * matrices + rest
        assert theirs(tokens(2, 3), **{name: cache})[name].get_seq_length() == time + 3
        assert cache.get_seq_length() == time


def test_weights_come_back(prepared: DataConfig, tmp_path: Path) -> None:
    """From the exported folder, and from what transformers saves after it."""
    model, folder = exported(tmp_path, prepared, pattern=PATTERNS["hybrid"])
    load(folder).save_pretrained(tmp_path / "again")
    for path in (folder, folder / "model.safetensors", tmp_path / "again"):
        fresh = build_model(tiny(vocab_size=VOCAB, pattern=PATTERNS["hybrid"]), seed=7)
        load_exported(path, fresh)
        wanted = dict(model.named_parameters())
        assert all(parameter.equal(wanted[name]) for name, parameter in fresh.named_parameters())


def test_weights_of_another_model_are_refused(prepared: DataConfig, tmp_path: Path) -> None:
    _, folder = exported(tmp_path, prepared)
    with pytest.raises(
        UserError, match=r"holds blocks.0.mlp.gate.weight with shape \[20, 16\], but this model has \[24"
    ):
        load_exported(folder, build_model(tiny(vocab_size=VOCAB, mlp_dim=24), 0))
    with pytest.raises(UserError, match=r"run\.init_from: cannot read weights from"):
        load_exported(tmp_path / "absent", build_model(tiny(), 0))
