"""A trained run goes to Hugging Face and back, by the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loglinear.config import DataConfig
from loglinear.errors import UserError
from loglinear.hf.export import export_hf
from loglinear.train.run import train
from tests.hf.runs import exported
from tests.processes import exit_codes, start_ranks
from tests.train.small import losses, saved_tensors, small_config

transformers = pytest.importorskip("transformers")


def loglinear(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loglinear", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_run_starts_from_what_another_exported(prepared: DataConfig, tmp_path: Path) -> None:
    """Its weights are those, but for one tiny update; tensor ranks cut them."""
    first = small_config(tmp_path / "first", prepared, train={"steps": 8})
    assert exit_codes(start_ranks(1, train, first)) == [0]
    done = loglinear("export", tmp_path / "first", tmp_path / "hf", "--format", "hf")
    assert done.returncode == 0, done.stderr
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1, "all may read what one may"
    assert losses(tmp_path / "first")[7] < losses(tmp_path / "first")[0] - 0.1

    again = small_config(
        tmp_path / "second",
        prepared,
        run={"dir": tmp_path / "second", "init_from": tmp_path / "hf"},
        train={"steps": 1},
        schedule={"warmup_steps": 0},
        optimizer={"lr": 1e-9},
        parallel={"tensor": 2},
    )
    assert exit_codes(start_ranks(2, train, again)) == [0, 0]
    wanted = saved_tensors(tmp_path / "first")
    for name, tensor in saved_tensors(tmp_path / "second").items():
        if name.startswith("weight/"):
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-8)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    text = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf", trust_remote_code=True)(
        "abc", return_tensors="pt"
    )
    written = model.generate(**text, max_new_tokens=3, do_sample=False)
    assert written.shape[1] <= text["input_ids"].shape[1] + 3


def test_export_does_not_overwrite(prepared: DataConfig, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "precious").touch()
    _, folder = exported(tmp_path / "other", prepared)
    done = loglinear("export", folder.parent / "run", tmp_path / "hf", "--format", "hf")
    assert done.returncode == 2
    assert f"{tmp_path / 'hf'} is there already and not an empty folder" in done.stderr
    assert [path.name for path in tmp_path.glob("hf*")] == ["hf"]


def test_the_present_folder_is_not_replaced(
    prepared: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = exported(tmp_path / "other", prepared)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="is the folder in which you are, and is replaced as a whole: name another"):
        export_hf(folder.parent / "run", Path())
