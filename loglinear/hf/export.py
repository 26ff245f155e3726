"""A run's last checkpoint as a folder that transformers loads, tokenizer and code included; needs no transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from data_pipeline.tokenizer import Tokenizer
from loglinear.checkpoint import read_latest
from loglinear.checkpoint.files import write_tensors
from loglinear.checkpoint.weights import EXPORTED, PREFIX, whole_weights
from loglinear.config import Config
from loglinear.errors import UserError
from loglinear.hf.assemble import assemble
from loglinear.hf.tokenizer import fast_tokenizer
from loglinear.train.folder import RunFolder

MODULE = "modeling_loglinear"


def export_hf(root: Path, out: Path) -> None:
    """Write `out`: config.json, model.safetensors, generation_config.json, tokenizer and modelling file.

    Args:
        root: the run's folder.
        out: a folder that is not there yet, or is empty.

    Raises:
        UserError: there is no run or no complete checkpoint, the tokenizer cannot be converted, or `out` cannot be
            written or holds something.
    """
    run = RunFolder(root)
    config = run.load_config()
    snapshot = read_latest(run.checkpoints)
    bos = config.data.tokenizer.bos
    tokenizer = fast_tokenizer(run.tokenizer, bos)
    bos_id = Tokenizer(run.tokenizer, bos).bos_id
    if out.absolute() == Path.cwd():
        raise UserError(f"{out} is the folder in which you are, and is replaced as a whole: name another")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not an empty folder: remove it, or choose another")
    temporary = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        weights = {PREFIX + name: weight for name, weight in whole_weights(snapshot.folder).items()}
        write_tensors(temporary / EXPORTED, weights, {"format": "pt"})
        _write_texts(temporary, config, tokenizer, bos_id)
        temporary.replace(out)
    except OSError as error:
        raise UserError(f"cannot write {out} ({error.strerror or error}): choose another folder") from None


def _write_texts(folder: Path, config: Config, tokenizer: tokenizers.Tokenizer, bos_id: int) -> None:
    ids = {"bos_token_id": bos_id, "eos_token_id": bos_id, "pad_token_id": bos_id}
    name = tokenizer.id_to_token(bos_id)
    tokenizer.save(str(folder / "tokenizer.json"))
    files: dict[str, dict[str, Any]] = {
        "config.json": _config(config) | ids,
        # The piece that starts the next document ends this one.
        "generation_config.json": {"_from_model_config": True} | ids,
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": name,
            "eos_token": name,
            "pad_token": name,
            "padding_side": "left",
            "split_special_tokens": True,  # what looks like one in a text is text
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        },
    }
    for file, content in files.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / f"{MODULE}.py").write_text(assemble(), encoding="utf-8")


def _config(config: Config) -> dict[str, Any]:
    own = config.model.model_dump(mode="json")
    return {
        "model_type": "loglinear",
        "architectures": ["LogLinearForCausalLM"],
        "auto_map": {
            "AutoConfig": f"{MODULE}.LogLinearLMConfig",
            "AutoModelForCausalLM": f"{MODULE}.LogLinearForCausalLM",
        },
        "dtype": "float32",
        "tie_word_embeddings": own.pop("tie_embeddings"),
    } | own
