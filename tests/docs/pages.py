"""The pages of the documentation as tests read them: blocks of code and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("docs/**/*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"])
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def name(page: Path) -> str:
    """How a page is called in the names of tests: docs/data.md."""
    return page.relative_to(ROOT).as_posix()


def read(page: Path | str) -> str:
    """The text of a page."""
    return (ROOT / page).read_text(encoding="utf-8")


def parts(text: str) -> dict[str, str]:
    """The text below every heading of the second level."""
    found = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return dict(zip(found[1::2], found[2::2], strict=True))


def blocks(text: str, language: str) -> list[str]:
    """The blocks of code in `language`, from the first to the last."""
    return [code for kind, code in BLOCK.findall(text) if kind == language]


def spans(text: str) -> list[str]:
    """What stands between backticks outside blocks, each on one line."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", text))]


def shell_commands(text: str) -> Iterator[list[str]]:
    """Every command of the blocks of shell, in words; comments are left out."""
    for block in blocks(text, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words
