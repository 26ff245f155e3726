"""What a configuration may say, and that every mistake in one is named in a sentence before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from loglinear.config import Config, TrainConfig, load_config
from loglinear.errors import UserError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An empty configuration, which says nothing but defaults."""
    path = tmp_path / "run.yaml"
    path.write_text("")
    return path


def mistake(file: Path, text: str, *overrides: str) -> str:
    """What is said about a configuration; it must be one line."""
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(file, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_an_empty_file_is_a_valid_run_of_defaults(file: Path) -> None:
    assert load_config(file) == Config()


def test_an_empty_section_says_nothing(file: Path) -> None:
    file.write_text("optimizer:\n  # lr: 1\nmodel: {dim: 64}\n")
    assert load_config(file, ["optimizer.eps=1e-6"]).optimizer.eps == 1e-6
    assert load_config(file).model.dim == 64


@pytest.mark.parametrize(
    ("text", "unknown", "nearest"),
    [
        ("modle: {dim: 8}", "modle", "model"),
        ("model: {dmi: 8}", "model.dmi", "model.dim"),
        ("model: {log_linear: {level_scales: mlp}}", "model.log_linear.level_scales", "model.log_linear.level_scale"),
        ("model: {heads: 8}", "model.heads", "model.softmax.heads"),
        ("lr: 1", "lr", "optimizer.lr"),
        ("train: {warmup_step: 1}", "train.warmup_step", "schedule.warmup_steps"),
        ("data: {sources: [{kind: stdlib}, {kind: stdlib, patern: x}]}", "data.sources.1.patern", "pattern"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_key(file: Path, text: str, unknown: str, nearest: str) -> None:
    said = mistake(file, text)
    assert said.startswith(f"{file}: unknown key {unknown!r}; did you mean '")
    assert said.endswith(f"{nearest}'?")


def test_a_key_like_no_other_is_answered_with_all(file: Path) -> None:
    assert mistake(file, "optimizer: {zzz: 1}").endswith("known there: lr, betas, eps, weight_decay, clip_norm")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: {dim: wide}", "model.dim = 'wide': Input should be a valid integer"),
        ("model: {dim: 1.5}", "model.dim = 1.5: Input should be a valid integer"),
        ("model: {dim: 0}", "model.dim = 0: Input should be greater than 0"),
        ("model: {layers: -1}", "model.layers = -1: Input should be greater than 0"),
        ("model: {pattern: [log_linear, mamba]}", "model.pattern.1 = 'mamba': Input should be 'log_linear' or"),
        ("model: {pattern: []}", "model.pattern = []: "),
        ("model: {pattern: softmax}", "model.pattern is a list"),
        ("model: {log_linear: {level_scale: mpl}}", "model.log_linear.level_scale = 'mpl': Input should be 'none', "),
        ("model: {softmax: {rope_base: 1}}", "model.softmax.rope_base = 1: "),
        ("model: 3", "model is a section"),
        ("model: {log_linear: [8]}", "model.log_linear is a section"),
        ("optimizer: {lr: 0}", "optimizer.lr = 0: Input should be greater than 0"),
        ("optimizer: {lr: .inf}", "optimizer.lr = inf: Input should be a finite number"),
        ("optimizer: {weight_decay: .nan}", "optimizer.weight_decay = nan: Input should be a finite number"),
        ("optimizer: {betas: [0.9, 1.0]}", "optimizer.betas.1 = 1.0: Input should be less than 1"),
        ("optimizer: {betas: [0.9]}", "optimizer.betas.1 is missing"),
        ("schedule: {kind: linear}", "schedule.kind = 'linear': Input should be 'cosine' or 'wsd'"),
        ("schedule: {final_ratio: 2}", "schedule.final_ratio = 2: Input should be less than or equal to 1"),
        ("train: {zero_stage: 0}", "train.zero_stage = 0: Input should be 1, 2 or 3"),
        ("train: {precision: fp16}", "train.precision = 'fp16': Input should be 'fp32' or 'bf16'"),
        ("data: {held_out: 0}", "data.held_out = 0: Input should be greater than 0"),
        ("data: {held_out: 1}", "data.held_out = 1: Input should be less than 1"),
        ("data: {sources: []}", "data.sources = []: "),
        ("data: {sources: {kind: stdlib}}", "data.sources is a list"),
        ("data: {sources: [{path: x}]}", "data.sources.0.kind is missing"),
        ("checkpoint: {keep_last: 0}", "checkpoint.keep_last = 0: Input should be greater than 0"),
        ("run: {seed: -1}", "run.seed = -1: Input should be greater than or equal to 0"),
        ("1: 2", "key 1 is no text"),
    ],
)
def test_a_value_out_of_its_domain_is_named(file: Path, text: str, said: str) -> None:
    assert mistake(file, text).startswith(f"{file}: {said}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "model: {log_linear: {heads: 8, groups: 3}}",
            "model.log_linear: heads (8) must be a multiple of groups (3)",
        ),
        ("model: {softmax: {head_dim: 7}}", "model.softmax: head_dim (7) must be even, for rotary positions"),
        (
            "model: {layers: 1, pattern: [softmax, log_linear]}",
            "model: pattern names 2 mixers, but there are only 1 layers",
        ),
        ("data: {sources: [{kind: hub}]}", "data.sources.0: kind hub needs a path"),
        ("data: {sources: [{kind: text, path: ''}]}", "data.sources.0: kind text needs a path"),
        (
            "data: {sources: [{kind: stdlib, path: /x}]}",
            "data.sources.0: kind stdlib takes no path: it is the running Python's own source",
        ),
        (
            "data: {sources: [{kind: jsonl, path: a, pattern: '*.jsonl'}]}",
            "data.sources.0: pattern belongs to kind folder, and does nothing for jsonl",
        ),
        (
            "data: {sources: [{kind: parquet, path: a, split: test}]}",
            "data.sources.0: split belongs to kind hub, and does nothing for parquet",
        ),
        (
            "data: {sources: [{kind: folder, path: a, text_field: body}]}",
            "data.sources.0: text_field belongs to kind hub or jsonl or parquet or arrow, and does nothing for folder",
        ),
        ("schedule: {kind: wsd}", "schedule: kind wsd needs decay_steps, the length of its final decay"),
        (
            "schedule: {decay_steps: 5}",
            "schedule: decay_steps belongs to kind wsd; a cosine decays over all steps after the warm-up",
        ),
        (
            "train: {global_batch: 8, micro_batch: 3}",
            "train: global_batch (8) must be a multiple of micro_batch (3)",
        ),
        (
            "{train: {steps: 10}, schedule: {kind: wsd, warmup_steps: 6, decay_steps: 5}}",
            "schedule.warmup_steps + schedule.decay_steps (11) exceed train.steps (10)",
        ),
        (
            "train: {activation_checkpointing: -1}",
            "train.activation_checkpointing: -1 is neither true nor false nor a number of blocks",
        ),
        (
            "{model: {layers: 6}, train: {activation_checkpointing: 7}}",
            "train.activation_checkpointing (7) exceeds model.layers (6): write true for all blocks",
        ),
        (
            "checkpoint: {every: 250, keep_every: 300}",
            "checkpoint: keep_every (300) must be a multiple of every (250)",
        ),
        ("data: {sources: [{kind: stdlib, weight: 1}]}", "data.sources.0: name and weight belong together"),
        (
            "data: {sources: [{kind: stdlib, max_epochs: 1}]}",
            "data.sources.0: max_epochs belongs to a source of a mixture",
        ),
        (
            "data: {sources: [{kind: stdlib, name: a, weight: 1}, {kind: stdlib}]}",
            "data: sources must all have a name, each its own, and a weight, or none of them",
        ),
        (
            "data: {sources: [{kind: stdlib, name: a, weight: 1}, {kind: stdlib, name: a, weight: 1}]}",
            "data: sources must all have a name, each its own",
        ),
        (
            "data: {curriculum: [{from_step: 5, seq_len: 64}, {from_step: 5, seq_len: 128}]}",
            "data: curriculum must be in the order of from_step",
        ),
        (
            "data: {curriculum: [{from_step: 5, weights: {web: 1}}]}",
            "data: curriculum gives a weight to 'web', but sources have no such name",
        ),
        (
            "data: {curriculum: [{from_step: 5, weights: {web: 0}}]}",
            "data.curriculum.0: weights must give a source more than 0",
        ),
        (
            "data: {curriculum: [{from_step: 5, seq_len: 100}]}",
            "data.curriculum: seq_len (100) must divide model.seq_len (512)",
        ),
        ("data: {best_fit: 100}", "data.best_fit (100) must equal model.seq_len (512)"),
        (
            "data: {shuffle_window: 10, contiguous: 4}",
            "data: shuffle_window (10) must be a multiple of contiguous (4)",
        ),
        ("data: {tokenizer: {bos: <s>}}", "data.tokenizer: bos belongs to a tokenizer.json in path"),
        ("parallel: {tensor: 3}", "model.vocab_size (4096) must be a multiple of parallel.tensor (3)"),
        (
            "{model: {log_linear: {heads: 4}}, parallel: {tensor: 8}}",
            "model.log_linear.heads (4) must be a multiple of parallel.tensor (8)",
        ),
        (
            "{model: {pattern: [softmax]}, parallel: {tensor: 8}}",
            "model.softmax.heads (4) must be a multiple of parallel.tensor (8)",
        ),
        (
            "{model: {vocab_size: 4098, log_linear: {heads: 18, groups: 3}, mlp_dim: 768}, parallel: {tensor: 2}}",
            "model.log_linear.groups (3) must be a multiple of parallel.tensor (2), or divide it",
        ),
        ("parallel: {context: 5}", "model.seq_len (512) must be a multiple of parallel.context (5)"),
        (
            "{model: {seq_len: 128}, parallel: {context: 64}}",
            "model.seq_len / parallel.context (2) must be at least model.log_linear.conv_width - 1 (3)",
        ),
        (
            "{model: {seq_len: 9}, train: {global_batch: 1, micro_batch: 1}, parallel: {tensor: 2}}",
            "train.micro_batch x model.seq_len / parallel.context (9) must be a multiple of parallel.tensor (2)",
        ),
        ("run: {name: ..}", "run: name '..' names a folder"),
        ("run: {name: a/b}", "run: name 'a/b' names a folder"),
    ],
)
def test_settings_that_contradict_each_other_are_both_named(file: Path, text: str, said: str) -> None:
    assert mistake(file, text).startswith(f"{file}: {said}")


@pytest.mark.parametrize(
    "text",
    [
        "train: {global_batch: 12, micro_batch: 3}",
        "model: {log_linear: {heads: 6, groups: 3}, layers: 2, pattern: [softmax, log_linear]}",
        "{train: {steps: 11}, schedule: {kind: wsd, warmup_steps: 6, decay_steps: 5}}",
        "checkpoint: {every: 250, keep_every: 500}",
        "data: {sources: [{kind: hub, path: a/b, subset: c, split: test, text_field: body}]}",
        "data: {sources: [{kind: folder, path: a, pattern: '**/*.md'}, {kind: jsonl, path: a, text_field: body}]}",
        "run: {name: 350m.try-2_b}",
    ],
)
def test_the_nearest_combinations_without_contradiction_are_fine(file: Path, text: str) -> None:
    file.write_text(text)
    load_config(file)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent.yaml: no such configuration file; the examples are in configs/"):
        load_config(tmp_path / "absent.yaml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model: [", "not a readable YAML file ("),
        ("model: {dim: 8}\ntrain:\n  steps: 1\nmodel: {layers: 2}\n", "not a readable YAML file (key 'model' stands"),
        ("model: {dim: 8, dim: 9}", "not a readable YAML file (key 'dim' stands twice"),
        ("model: !!python/name:os.system", "not a readable YAML file (could not determine a constructor"),
        ("- model", "the top level must be sections such as `model:` and `train:`"),
        ("model", "the top level must be sections"),
    ],
)
def test_what_is_no_configuration_is_said(file: Path, text: str, said: str) -> None:
    assert mistake(file, text).startswith(f"{file}: {said}")


def test_bytes_that_are_no_text_are_said(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="not a readable YAML file"):
        load_config(file)
    with pytest.raises(UserError, match="not a readable YAML file"):
        load_config(file.parent)


def test_overrides_are_dotted_paths_to_yaml_values(file: Path) -> None:
    file.write_text("optimizer: {lr: 1.0, eps: 1.0e-6}\n")
    overrides = [
        "optimizer.lr=1e-3",
        "model.pattern=[softmax, log_linear]",
        "model.log_linear.heads=16",
        "train.activation_checkpointing=true",
        "run.dir=/somewhere/else",
        "checkpoint.keep_every=null",
        "data.sources=[{kind: jsonl, path: a=b.jsonl}]",
        "eval.prompt=",
        "eval.prompt='3: '",
        "optimizer.lr=2.0e-3",
    ]
    config = load_config(file, overrides)
    assert config.optimizer.lr == 2e-3, "the last one holds"
    assert config.optimizer.eps == 1e-6, "its neighbours stay"
    assert config.model.pattern == ("softmax", "log_linear")
    assert config.model.log_linear.heads == 16
    assert config.train.activation_checkpointing is True
    assert config.run.dir == Path("/somewhere/else")
    assert config.checkpoint.keep_every is None
    assert config.data.sources[0].path == "a=b.jsonl"
    assert config.eval.prompt == "3: "


@pytest.mark.parametrize(("value", "blocks"), [("true", 8), ("false", 0), ("1", 1), ("8", 8)])
def test_activation_checkpointing_is_all_none_or_a_number_of_blocks(file: Path, value: str, blocks: int) -> None:
    overrides = ["model.layers=8", f"train.activation_checkpointing={value}"]
    assert load_config(file, overrides).recomputed_blocks == blocks


@pytest.mark.parametrize("number", ["1e-3", "1.0e-3", "0.001", "1E-3"])
def test_numbers_may_be_written_as_in_python(file: Path, number: str) -> None:
    assert load_config(file, [f"optimizer.lr={number}"]).optimizer.lr == 1e-3


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr", "override 'optimizer.lr': write it as section.key=value, such as optimizer.lr=1e-3"),
        ("=3", "override '=3': write it as section.key=value"),
        ("optimizer..lr=3", "override 'optimizer..lr=3': write it as section.key=value"),
        ("--lr=3", "{file}: unknown key '--lr'; did you mean 'optimizer.lr'?"),
        ("optimiser.lr=3", "{file}: unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("optimizer.rl=3", "{file}: unknown key 'optimizer.rl'; did you mean 'optimizer.lr'?"),
        ("model.dim=[", "override 'model.dim=[': the value is not YAML; quote it"),
        ("run.name=2026-02-30", "override 'run.name=2026-02-30': the value is not YAML; quote it"),
        ("model.dim=x", "{file}: model.dim = 'x': Input should be a valid integer"),
        ("train.steps.more=3", "override 'train.steps.more': 'steps' is a value, not a section"),
        ("data.sources.0.kind=hub", "override 'data.sources.0.kind': 'sources' is a list, to be given as a whole"),
        ("train=3", "{file}: train is a section"),
    ],
)
def test_a_bad_override_is_named(file: Path, override: str, said: str) -> None:
    text = "train: {steps: 5}\ndata: {sources: [{kind: stdlib}]}\n"
    assert mistake(file, text, override).startswith(said.format(file=file))


def test_a_configuration_is_frozen() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.model.dim = 3  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValidationError, match="frozen"):
        config.run = config.run  # pyright: ignore[reportAttributeAccessIssue]


def some_config() -> st.SearchStrategy[Config]:
    """Configurations that use every kind of value."""
    sections: dict[str, st.SearchStrategy[Any]] = {
        "run": st.fixed_dictionaries({"seed": st.integers(0, 2**63 - 1), "dir": st.none() | st.just("/a b/c")}),
        "optimizer": st.fixed_dictionaries({"lr": st.floats(1e-12, 1e3), "betas": st.just([0.5, 0.25])}),
        "eval": st.fixed_dictionaries({"prompt": st.text()}),
        "model": st.fixed_dictionaries(
            {"pattern": st.lists(st.sampled_from(["softmax", "log_linear"]), min_size=1)}
        ).map(lambda model: model | {"layers": len(model["pattern"])}),
        "data": st.sampled_from([{}, {"sources": [{"kind": "jsonl", "path": "*", "text_field": "no: text"}]}]),
    }
    return st.fixed_dictionaries(sections).map(Config.model_validate)


@given(some_config())
def test_the_resolved_yaml_says_all_and_reads_back(config: Config) -> None:
    text = config.to_yaml()
    assert Config.model_validate(yaml.safe_load(text)) == config
    assert set(yaml.safe_load(text)) == set(Config.model_fields)
    assert "weight_decay" in text, "defaults are written out"


def test_a_resolved_configuration_file_reads_back(file: Path) -> None:
    config = load_config(file, ["run.dir=/x/y", "data.tokenizer.path=t.model", "model.log_linear.heads=2"])
    file.write_text(config.to_yaml())
    assert load_config(file) == config


@pytest.mark.parametrize(("ranks", "count"), [(1, 12), (2, 6), (3, 4), (4, 3), (6, 2), (12, 1)])
def test_micro_batches_share_the_global_batch(ranks: int, count: int) -> None:
    assert TrainConfig(global_batch=24, micro_batch=2).micro_batches(ranks) == count


@pytest.mark.parametrize("ranks", [5, 8, 24, 100])
def test_ranks_that_do_not_divide_the_batch_are_refused(ranks: int) -> None:
    with pytest.raises(UserError, match=rf"batch \(24\) must be .*_batch \(2\) times .* ranks \({ranks}\)"):
        TrainConfig(global_batch=24, micro_batch=2).micro_batches(ranks)


def test_absolute_paths_mean_the_same_elsewhere(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(file, ["run.name=a", "data.dir=data/x", "data.tokenizer.path=t.model"])
    absolute = config.with_absolute_paths()
    assert config.run.folder == Path("runs/a")
    assert absolute.run.folder == tmp_path / "runs/a"
    assert absolute.data.dir == tmp_path / "data/x"
    assert absolute.data.tokenizer.path == tmp_path / "t.model"
    assert absolute.with_absolute_paths() == absolute
    assert load_config(file).with_absolute_paths().data.tokenizer.path is None
    assert absolute.model == config.model


def test_the_pattern_is_repeated_along_the_depth(file: Path) -> None:
    model = load_config(file, ["model.layers=5", "model.pattern=[log_linear, softmax]"]).model
    assert [model.mixer_of(layer) for layer in range(5)] == ["log_linear", "softmax"] * 2 + ["log_linear"]
