"""Add the pages that live outside docs/ to the site, and make the links between pages fit the site.

The Markdown files link to each other by their paths in the repository, so that the links also work on a code host.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# path in the repository -> page of the site
OUTSIDE = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
    "benchmarks/README.md": "benchmarks.md",
    "examples/README.md": "examples.md",
}
# In the repository the README is the first page, on the site docs/index.md.
TARGETS = {**OUTSIDE, "README.md": "index.md", "examples/tour.ipynb": "examples.md"}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:|#)([^)#\s]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for source, page in OUTSIDE.items():
        text = (ROOT / source).read_text()
        files.append(File.generated(config, page, content=_relink(text, posixpath.dirname(source))))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return markdown if page.file.src_uri in OUTSIDE.values() else _relink(markdown, "docs")


def _relink(text: str, folder: str) -> str:
    """Turn links from a file in `folder` of the repository into links between pages of the site, all in one folder."""

    def target(link: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, link[1]))
        return TARGETS.get(path, path.removeprefix("docs/"))

    return LINK.sub(target, text)
