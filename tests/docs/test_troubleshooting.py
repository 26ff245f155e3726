"""Every sentence that docs/troubleshooting.md quotes stands in the source, with … for what differs."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.docs.pages import ROOT, read

TREES = [
    ast.parse(path.read_text(encoding="utf-8"))
    for package in ("loglinear", "data_pipeline", "launch")
    for path in sorted((ROOT / package).rglob("*.py"))
]
QUOTED = re.findall(r"^> (.*)$", read("docs/troubleshooting.md"), re.MULTILINE)


def constants() -> dict[str, str]:
    """The texts of all modules that have a name in capitals."""
    assigned = [node for tree in TREES for node in tree.body if isinstance(node, ast.Assign)]
    return {
        ast.unparse(node.targets[0]): node.value.value
        for node in assigned
        if isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }


NAMED = constants()


def texts() -> Iterator[str]:
    """Every text of the source; what an f-string fills in is …, unless it is a text that has a name."""
    for tree in TREES:
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(map(part, node.values))


def part(node: ast.expr) -> str:
    if isinstance(node, ast.Constant):
        return str(node.value)
    return NAMED.get(ast.unparse(node.value), "…") if isinstance(node, ast.FormattedValue) else "…"


TEXTS = list(texts())


@pytest.mark.parametrize("sentence", QUOTED)
def test_a_quoted_sentence_is_one_that_the_code_can_say(sentence: str) -> None:
    fixed = re.sub(r"^(…: )+|^… ", "", sentence)  # a path in front, which may be put there by a caller
    assert any(fixed in text for text in TEXTS)


def test_enough_is_quoted_and_a_changed_word_would_be_seen() -> None:
    assert len(QUOTED) > 30
    assert all(len(re.sub("…", "", sentence)) > 15 for sentence in QUOTED)
    assert not any(QUOTED[2].replace("multiple", "fraction") in text for text in TEXTS)
