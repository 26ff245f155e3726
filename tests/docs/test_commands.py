"""Every command, file and setting that the documentation names exists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from launch.cluster import load_cluster, split_overrides
from launch.sweep import configurations, load_sweep
from loglinear.cli import app
from loglinear.config import Config, load_config
from loglinear.config_text import sections
from tests.docs.pages import PAGES, ROOT, name, read, shell_commands, spans

YOURS, ANY_CONFIG = ("CONFIG", "my_run.yaml"), "configs/loglinear_360m.yaml"  # which stands for a reader's own
FILES = re.compile(r"\b(?:configs|docker|docs|launch|tests|loglinear|data_pipeline)/[\w/.]*\.(?:yaml|md|py|png)\b")
SETTING = re.compile(rf"((?:{'|'.join(Config.model_fields)})\.[a-z_.]+[a-z])(=.*)?")
FILE_NAMES = (".md", ".yaml", ".json", ".jsonl", ".safetensors", ".png")
KEYS = {".".join((*path, key)) for path, section in sections(Config) for key in section.model_fields}


def after_loglinear(words: list[str]) -> list[str] | None:
    """The arguments of our command: alone, or behind torchrun or python."""
    before = [] if words[0] == "loglinear" else ["-m"]
    places = [place for place, word in enumerate(words) if word == "loglinear" and words[:place][-1:] == before]
    return words[places[0] + 1 :] if places else None


def parse(words: list[str]) -> dict[str, Any]:
    """What the real command line makes of the words, or what it raises; nothing is run."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert words, "only a group of commands"
        assert words[0] in command.commands, f"there is no command {words[0]!r}"
        command, words = command.commands[words[0]], words[1:]
    return command.make_context("loglinear", list(words)).params


COMMANDS = [
    pytest.param(arguments, id=f"{name(page)}: {' '.join(arguments)}")
    for page in PAGES
    for words in shell_commands(read(page))
    if (arguments := after_loglinear(words)) is not None
]
MENTIONED = sorted({span for page in PAGES for span in spans(read(page)) if span.startswith("loglinear ")})


@pytest.mark.parametrize("arguments", COMMANDS)
def test_a_command_parses_and_its_settings_are_valid(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    given = parse(arguments)
    of_run, of_cluster = split_overrides(given.get("overrides") or ())
    if "config" in given:
        load_config(ANY_CONFIG if str(given["config"]) in YOURS else given["config"], of_run)
    if "cluster" in given and given["cluster"] != "FILE":
        load_cluster(given["cluster"], of_cluster)
    if "sweep_file" in given and str(given["sweep_file"]) != "SWEEP":
        assert configurations(load_sweep(given["sweep_file"]), of_run)


@pytest.mark.parametrize("span", MENTIONED)
def test_a_command_that_a_sentence_names_exists(span: str) -> None:
    """Its arguments may be left out there, but its options exist."""
    assert complaint(span) in (None, "MissingParameter")


def test_enough_commands_are_found() -> None:
    assert len(COMMANDS) > 25
    assert len(MENTIONED) > 20


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("loglinear trian x", "AssertionError"),
        ("loglinear data", "AssertionError"),
        ("loglinear export", "MissingParameter"),
        ("loglinear plan x --rank 2", "NoSuchOption"),
        ("loglinear plan x --ranks two", "BadParameter"),
    ],
)
def test_a_command_that_does_not_exist_is_seen(line: str, seen: str) -> None:
    assert complaint(line) == seen


def complaint(line: str) -> str | None:
    """The kind of error that the command line would answer with; not all of them are public in typer."""
    try:
        parse(line.split()[1:])
    except Exception as error:
        return type(error).__name__
    return None


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_a_page_names_only_what_exists(page: Path) -> None:
    text = read(page)
    assert not {file for file in FILES.findall(text) if not (ROOT / file).exists()}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    made = {target for words in shell_commands(text) if words[0] == "make" for target in words[1:]}
    made |= {span.split()[1] for span in spans(text) if span.startswith("make ")}
    assert made <= targets
    named = {match[1] for span in spans(text) if not span.endswith(FILE_NAMES) and (match := SETTING.fullmatch(span))}
    assert named <= KEYS
