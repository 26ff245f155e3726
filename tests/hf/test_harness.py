"""The lm-evaluation-harness on a task and data of our own, fetched from nowhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from data_pipeline.tokenizer import Tokenizer
from loglinear.config import DataConfig
from loglinear.errors import UserError
from loglinear.hf.harness import evaluate_tasks
from loglinear.model import LanguageModel
from tests.hf.runs import exported

lm_eval = pytest.importorskip("lm_eval")
QUESTIONS = [("bad cab", [" fed", " abcde", " h"], 0), ("head", [" dead", " a bad cab"], 0), ("", [" face", " a"], 0)]


def write_tasks(folder: Path) -> Path:
    """A multiple-choice task and a perplexity, on local files."""
    folder.mkdir()
    rows = [{"context": context, "choices": choices, "gold": gold} for context, choices, gold in QUESTIONS]
    (folder / "choice.json").write_text("\n".join(map(json.dumps, rows)))
    (folder / "texts.json").write_text(
        "\n".join(json.dumps({"text": text}) for text in ("a bad cab fed", "head\nface"))
    )
    common: dict[str, Any] = {"dataset_path": "json", "test_split": "test"}
    choice = common | {
        "task": "own_choice",
        "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(folder / "choice.json")}},
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "target_delimiter": "",
    }
    texts = common | {
        "task": "own_text",
        "output_type": "loglikelihood_rolling",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.json")}},
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "byte_perplexity"}],
    }
    for task in (choice, texts):
        (folder / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


@pytest.fixture(scope="module")
def run(prepared: DataConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, Path]:
    """A model, and the folder that holds its run and its export."""
    folder = tmp_path_factory.mktemp("harness") / "model"
    return exported(folder, prepared, pattern=("log_linear", "softmax"))[0], folder


@torch.no_grad()
def log_likelihood(model: LanguageModel, tokenizer: Tokenizer, context: str, text: str) -> float:
    """Of `text` behind bos and `context`, token by token."""
    known = [tokenizer.bos_id, *tokenizer.encode(context)]
    new = tokenizer.encode(context + text)[len(known) - 1 :]
    surprise_tv = model(torch.tensor([known + new]))[0].log_softmax(-1)
    return sum(float(surprise_tv[len(known) - 1 + place, token]) for place, token in enumerate(new))


def expected(model: LanguageModel, tokenizer: Tokenizer) -> tuple[float, float]:
    """Accuracy of the choices, and perplexity per byte of the texts, without the harness."""
    right = 0
    for context, choices, gold in QUESTIONS:
        scores = [log_likelihood(model, tokenizer, context, choice) for choice in choices]
        right += scores.index(max(scores)) == gold
    texts = ("a bad cab fed", "head\nface")
    surprise = -sum(log_likelihood(model, tokenizer, "", text) for text in texts)
    return right / len(QUESTIONS), 2.718281828459045 ** (surprise / sum(map(len, texts)))


def test_a_run_is_evaluated_as_by_hand(run: tuple[LanguageModel, Path], tasks: Path) -> None:
    model, folder = run
    found = evaluate_tasks(folder / "run", ["own_choice", "own_text"], tasks, None)
    accuracy, perplexity = expected(model, Tokenizer(folder / "run" / "tokenizer.model"))
    assert 0 < accuracy < 1, "else a constant would do"
    assert found["own_choice"]["acc,none"] == pytest.approx(accuracy)
    assert found["own_text"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)
    assert json.loads((folder / "run" / "tasks.json").read_text()) == found


def test_the_harness_runs_on_the_exported_folder_itself(run: tuple[LanguageModel, Path], tasks: Path) -> None:
    model, folder = run
    wrapped = pytest.importorskip("lm_eval.models.huggingface").HFLM(
        pretrained=str(folder / "hf"), trust_remote_code=True, add_bos_token=False, device="cpu"
    )
    manager = pytest.importorskip("lm_eval.tasks").TaskManager(include_path=str(tasks), include_defaults=False)
    results = lm_eval.simple_evaluate(wrapped, tasks=["own_text"], task_manager=manager)
    assert results is not None
    _, perplexity = expected(model, Tokenizer(folder / "run" / "tokenizer.model"))
    assert results["results"]["own_text"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-4)


def test_an_unknown_task_is_named(run: tuple[LanguageModel, Path], tasks: Path) -> None:
    with pytest.raises(UserError, match="the harness knows no task own_chioce"):
        evaluate_tasks(run[1] / "run", ["own_chioce", "own_text"], tasks, None)
