"""What others do to a model: adapters, weights that come from the CPU, Trainer, autocast, more pieces."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from loglinear.config import DataConfig
from tests.corpus import VOCAB
from tests.hf.runs import exported
from tests.hf.test_model import CLOSE, load, tokens
from tests.model.model_cases import PATTERNS

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
accelerate = pytest.importorskip("accelerate")
LINEAR = ["q_proj", "k_proj", "v_proj", "z_proj", "dt_proj", "level_proj", "gate", "up", "out_proj", "down"]


@pytest.fixture(scope="module")
def folder(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exported hybrid."""
    return exported(tmp_path_factory.mktemp("hf"), prepared, pattern=PATTERNS["hybrid"])[1]


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder)


@pytest.mark.parametrize("name", LINEAR)
def test_an_adapter_of_any_linear_layer_counts(model: Any, name: str) -> None:
    plain_btv = model(tokens(2, 40)).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=[name], init_lora_weights=False))
    logits_btv = adapted(tokens(2, 40), labels=tokens(2, 40)).logits
    assert not torch.allclose(logits_btv, plain_btv, **CLOSE)
    logits_btv.square().sum().backward()
    gradients = [parameter.grad for parameter in adapted.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.norm() > 0 for gradient in gradients)
    torch.testing.assert_close(adapted.merge_and_unload()(tokens(2, 40)).logits, logits_btv, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_may_be_brought_when_they_are_needed(model: Any) -> None:
    inputs_bt, options = tokens(2, 40), {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    wanted_btv, written_bt = model(inputs_bt).logits, model.generate(inputs_bt, **options)
    elsewhere = accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in elsewhere.parameters())
    torch.testing.assert_close(elsewhere(inputs_bt).logits, wanted_btv, rtol=0, atol=0)
    assert elsewhere.generate(inputs_bt, **options).equal(written_bt)


class Samples(Dataset):
    """Rows with labels for different shares of their tokens."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens_t = tokens(1, 24, seed=index)[0]
        return {"input_ids": tokens_t, "labels": tokens_t.where(torch.arange(24) > index, -100)}


def gradient_norm(folder: Path, out: Path, **options: Any) -> tuple[float, float]:
    """The loss and the norm of the gradient of Trainer's first step."""
    arguments = transformers.TrainingArguments(
        str(out), max_steps=1, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, **options
    )
    trainer = transformers.Trainer(load(folder), arguments, train_dataset=Samples())
    trainer.train()
    (log,) = [log for log in trainer.state.log_history if "grad_norm" in log]
    return log["loss"], float(log["grad_norm"])


def test_trainer_may_accumulate_and_compute_in_bf16(folder: Path, tmp_path: Path) -> None:
    whole = gradient_norm(folder, tmp_path, per_device_train_batch_size=8)
    parts = gradient_norm(folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert parts == pytest.approx(whole, rel=1e-4)
    narrow = gradient_norm(folder, tmp_path, per_device_train_batch_size=8, bf16=True)
    assert narrow == pytest.approx(whole, rel=0.03)


@torch.no_grad()
def test_decoding_under_autocast_is_that_of_the_prompt(model: Any) -> None:
    inputs_bt = tokens(2, 60)
    with torch.autocast("cpu", torch.bfloat16):
        cache, logits = None, []
        for column_b1 in inputs_bt.split(1, 1):
            out = model(column_b1, use_cache=True, past_key_values=cache)
            cache, logits = out.get("cache", out.get("past_key_values")), [*logits, out.logits]
        whole_btv = model(inputs_bt).logits
    torch.testing.assert_close(torch.cat(logits, 1), whole_btv, rtol=0, atol=0.05 * float(whole_btv.std()))


def test_outputs_are_as_they_are_asked_for(model: Any) -> None:
    inputs_bt = tokens(2, 20)
    whole_btv = model(inputs_bt).logits
    torch.testing.assert_close(model(inputs_bt, logits_to_keep=torch.tensor([3, 5])).logits, whole_btv[:, [3, 5]])
    assert isinstance(model(inputs_bt, return_dict=False), tuple)


def test_pieces_may_be_added(model: Any) -> None:
    inputs_bt = tokens(2, 20)
    whole_btv = model(inputs_bt).logits
    model.resize_token_embeddings(VOCAB + 5)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    logits_btv = model(inputs_bt, labels=inputs_bt).logits
    assert logits_btv.shape == (2, 20, VOCAB + 5)
    torch.testing.assert_close(logits_btv[..., :VOCAB], whole_btv, **CLOSE)


def test_a_configuration_of_ones_own_makes_a_model(model: Any) -> None:
    settings = model.config.to_dict()
    settings.pop("tie_word_embeddings")
    fresh = type(model)(type(model.config)(**settings))
    assert fresh(tokens(1, 9)).logits.isfinite().all()
