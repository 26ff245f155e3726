"""What `mkdocs build` does beside its own: the site and the repository have the same links.

README.md is the first page and CONTRIBUTING.md the last. Pages link to files of the repository as they do on GitHub;
each such file, or each file of such a folder, becomes a page of the site that shows it. A link to what is not there
fails the build.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "CONTRIBUTING.md"}  # of the repository's top, and of the site
LANGUAGES = {".py": "python", ".yaml": "yaml"}
CODE_OR_LINK = re.compile(r"^```.*?^```|`[^`]*`|(?<=\]\()(?P<link>[^)\s]+)(?=\))", re.DOTALL | re.MULTILINE)
FENCE = "`" * 6


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages of the top, and a page for everything outside docs/ that a page links to."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, content=(ROOT / name).read_text(encoding="utf-8")))
    sources: dict[str, Path] = {}
    for file in files.documentation_pages():
        for link in _links(file.content_string):
            target = _target(file.src_uri, link)
            if target is not None and _page_of(target).startswith("source/"):
                sources[_page_of(target)] = target
    for uri, target in sources.items():
        files.append(File.generated(config, uri, content="\n".join(_shown(target))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """The page with its links to files of the repository as links to pages of the site."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown

    def within_site(link: str) -> str:
        target = _target(uri, link)
        if target is None:
            return link
        anchor = link.partition("#")[2]
        return posixpath.relpath(_page_of(target), posixpath.dirname(uri) or ".") + (anchor and f"#{anchor}")

    return _with_links(markdown, within_site)


def _with_links(markdown: str, change: Callable[[str], str]) -> str:
    """`markdown` with every link outside code changed."""
    return CODE_OR_LINK.sub(lambda found: change(found[0]) if found["link"] else found[0], markdown)


def _links(markdown: str) -> Iterator[str]:
    return (found["link"] for found in CODE_OR_LINK.finditer(markdown) if found["link"])


def _target(uri: str, link: str) -> Path | None:
    """The file or folder of the repository that a page's relative link leads to; None for any other link.

    Raises:
        PluginError: there is no such file, or the address of another site is none.
    """
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        if parts.scheme not in ("http", "https") or "." not in (parts.hostname or ""):
            raise PluginError(f"{uri}: {link} is no address of a web page")
        return None
    if not parts.path:
        return None
    origin = {page: name for name, page in PAGES.items()}.get(uri, f"docs/{uri}")
    target = Path(os.path.normpath(ROOT / posixpath.dirname(origin) / parts.path))
    if not target.is_relative_to(ROOT) or not target.exists():
        raise PluginError(f"{origin}: the link {link} leads to nothing in the repository")
    return target


def _page_of(target: Path) -> str:
    """The page, or the other file of docs/, that stands for a file or folder of the repository."""
    name = target.relative_to(ROOT).as_posix()
    if name in PAGES:
        return PAGES[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/") + ("/README.md" if target.is_dir() else "")
    return f"source/{name}.md"


def _shown(target: Path) -> Iterator[str]:
    """A page that shows a file, or the files that lie in a folder."""
    yield f"# {target.relative_to(ROOT).as_posix()}"
    for path in sorted(path for path in target.iterdir() if path.is_file()) if target.is_dir() else [target]:
        yield f"\n## {path.name}\n" if target.is_dir() else ""
        yield f"{FENCE}{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text(encoding='utf-8')}{FENCE}"
