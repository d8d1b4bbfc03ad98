"""What mkdocs does besides: README and CONTRIBUTING become pages, links to other files of the checkout their names."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages that lie outside of docs/."""
    for source, page in PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Rewrites links between pages from how the checkout lies to how the site does."""
    here = "" if page.file.src_uri in PAGES.values() else "docs"
    return LINK.sub(lambda link: rewrite(link, here), markdown)


def rewrite(link: re.Match[str], here: str) -> str:
    """Returns a link of a file in folder `here` of the checkout as one of the site."""
    target, anchor = link["target"], link["anchor"] or ""
    if ":" in target:
        return link[0]
    path = posixpath.normpath(posixpath.join(here, target))
    if path not in PAGES and not path.startswith("docs/"):
        return f"{link['text']} (`{path}`)"
    return f"{link['image']}[{link['text']}]({PAGES.get(path, path.removeprefix('docs/'))}{anchor})"
