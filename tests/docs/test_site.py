"""The site is built from the pages by the real mkdocs, and nothing in it leads nowhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.pages import ROOT

WITHOUT = shutil.ignore_patterns(".*", "__pycache__", "build", "runs", "data", "*.egg-info")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the repository, to be changed."""
    return shutil.copytree(ROOT, tmp_path / "copy", ignore=WITHOUT)


def build(repository: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build"],
        cwd=repository,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site's folder."""
    repository = shutil.copytree(ROOT, tmp_path_factory.mktemp("site") / "copy", ignore=WITHOUT)
    done = build(repository)
    assert done.returncode == 0, done.stderr
    return repository / "build/site"


def test_the_site_shows_every_page_and_the_files_that_pages_link_to(site: Path) -> None:
    pages = {path.relative_to(ROOT / "docs") for path in ROOT.glob("docs/**/*.md")}
    assert len(pages) > 10
    assert all((site / page).with_suffix(".html").exists() for page in pages - {Path("evidence/README.md")})
    assert 'href="source/loglinear/hf/assemble.py.html"' in (site / "use.html").read_text()
    first_line = (ROOT / "loglinear/hf/assemble.py").read_text().partition("\n")[0].strip('"')
    assert first_line in (site / "source/loglinear/hf/assemble.py.html").read_text()
    assert "quickstart.yaml" in (site / "source/configs.html").read_text()
    assert 'src="quickstart.png"' in (site / "index.html").read_text()
    assert 'href="data.html"' in (site / "index.html").read_text()


def test_no_page_asks_another_site_for_anything(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.findall(r'<(?:script|img|link)[^>]*(?:src|href)="?https?:[^>]*>', page.read_text()), page


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[a](../loglinear/absent.py)", "the link ../loglinear/absent.py leads to nothing in the repository"),
        ("[a](../../outside.md)", "the link ../../outside.md leads to nothing in the repository"),
        ("[a](data.md#absent)", "#absent"),
        ("[a](https://example)", "https://example is no address of a web page"),
    ],
)
def test_a_link_that_leads_nowhere_fails_the_build(repository: Path, line: str, said: str) -> None:
    with (repository / "docs/use.md").open("a") as page:
        page.write(f"\n{line}\n")
    done = build(repository)
    assert done.returncode != 0
    assert said in done.stderr


def test_a_page_that_is_not_in_the_navigation_fails_the_build(repository: Path) -> None:
    (repository / "docs/forgotten.md").write_text("# Forgotten\n")
    done = build(repository)
    assert done.returncode != 0
    assert "forgotten.md" in done.stderr
