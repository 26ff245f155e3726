"""Tasks of the lm-evaluation-harness on a run's last checkpoint."""

from __future__ import annotations

import json
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from loglinear.errors import UserError
from loglinear.hf.export import export_hf

BATCH = 8  # sequences in a forward pass


def evaluate_tasks(root: Path, tasks: list[str], include: Path | None, limit: int | None) -> dict[str, Any]:
    """Run the harness on the run in `root`, print its table and write `tasks.json` into the run's folder.

    Args:
        root: the run's folder.
        tasks: names as the harness knows them.
        include: a folder with tasks of one's own as YAML files, or None.
        limit: examples of each task to use; all if None.

    Returns:
        The metrics by task.

    Raises:
        UserError: the harness is not installed, does not know a task, or there is no run to evaluate.
    """
    if find_spec("lm_eval") is None:
        raise UserError("eval --tasks needs the lm-evaluation-harness: pip install 'loglinear[eval]'")
    harness: Any = import_module("lm_eval")  # Any, since its own types are wrong
    manager = import_module("lm_eval.tasks").TaskManager(include_path=None if include is None else str(include))
    unknown = sorted(set(tasks) - set(manager.all_tasks))
    if unknown:
        raise UserError(f"the harness knows no task {', '.join(unknown)}: `lm_eval ls tasks` lists those that it knows")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "hf"
        export_hf(root, folder)
        model = _harness_model(folder)
        results = harness.simple_evaluate(model, tasks=tasks, task_manager=manager, limit=limit, log_samples=False)
    print(import_module("lm_eval.utils").make_table(results))
    metrics: dict[str, Any] = results["results"]
    (root / "tasks.json").write_text(json.dumps(metrics, indent=1, default=str) + "\n", encoding="utf-8")
    return metrics


def _harness_model(folder: Path) -> Any:
    """An exported folder as the harness sees models; with our own code, so with the kernels where there are any."""
    from transformers import PreTrainedTokenizerFast

    from loglinear.hf.modeling import LogLinearForCausalLM

    base: Any = import_module("lm_eval.models.huggingface").HFLM

    class Model(base):
        """Every context begins with bos."""

        def loglikelihood_rolling(self, *args: Any, **options: Any) -> list[float]:
            """Without the text's own bos, which would be counted: the harness puts one before it."""
            self.add_bos_token = False
            try:
                return super().loglikelihood_rolling(*args, **options)
            finally:
                self.add_bos_token = True

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = LogLinearForCausalLM.from_pretrained(folder).to(device).eval()  # pyright: ignore[reportArgumentType]
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return Model(pretrained=model, tokenizer=tokenizer, add_bos_token=True, batch_size=BATCH)
