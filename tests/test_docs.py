"""No broken link or anchor in README, CONTRIBUTING and docs/; the same pages build as a site."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_CODE = re.compile(r"^(```|~~~).*?^\1|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors_of(text: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    found: dict[str, int] = {}
    names = set()
    for line in re.sub(r"^(```|~~~).*?^\1", "", text, flags=re.MULTILINE | re.DOTALL).splitlines():
        heading = re.match(r"#{1,6}\s+(.*?)\s*#*$", line)
        if heading:
            plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
            names.add(slug if slug not in found else f"{slug}-{found[slug]}")
            found[slug] = found.get(slug, 0) + 1
    return names


def broken_links(page: Path, text: str) -> list[str]:
    """Links of a page whose file or anchor is not there; addresses of the web are not asked."""
    broken = []
    for link in _LINK.findall(_CODE.sub("", text)):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        path = page if not target else page.parent / target
        if not path.exists() or (anchor and anchor not in anchors_of(path.read_text())):
            broken.append(link)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    assert broken_links(page, page.read_text()) == []


def test_planted_broken_links_are_found() -> None:
    text = "# A `b` & c\n[a](docs/nowhere.md) [b](docs/data.md) [c](#no-such-heading) `[d](x.md)`\n"
    text += "[e](docs/engines.md#accumulation) [f](docs/engines.md#nothing)\n```\n[g](y.md)\n```\n"
    broken = ["docs/nowhere.md", "#no-such-heading", "docs/engines.md#nothing"]
    assert broken_links(ROOT / "README.md", text) == broken
    assert anchors_of(text + "## Twice\n## Twice\n```\n# no heading\n```\n") == {"a-b--c", "twice", "twice-1"}


def test_every_page_is_reached_from_the_front() -> None:
    front = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[2:] if f"docs/{page.name}" not in front] == []


def test_the_pages_build_as_a_site_that_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "mkdocs",
            "build",
            "--strict",
            "--quiet",
            "--site-dir",
            str(tmp_path / "site"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.name: path.read_text() for path in (tmp_path / "site").glob("*.html")}
    assert {"index.html", "contributing.html", "estimator.html", "options.html"} <= pages.keys()
    for name, text in pages.items():
        fetched = re.findall(r"<(?:script|img|link)[^>]*?(?:src|href)=\"([^\"]+)\"", text)
        assert fetched and [place for place in fetched if "//" in place] == [], name
    assert "decoupled" in (tmp_path / "site" / "search" / "search_index.json").read_text()
    assert 'src="images/prototypes.png"' in pages["index.html"]
