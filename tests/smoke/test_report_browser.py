"""The report in a real browser: every picture loads, nothing is wider than the screen, the console stays silent."""

import json
import re
import shutil
import subprocess

import pytest

from evaluation import report
from tests.unit.evaluation.conftest import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
    "--virtual-time-budget=4000",
)
# Appended to a copy of the page: what the browser made of it, written into the page itself.
VERDICT = """<script>addEventListener("load", () => {
  const images = [...document.images], found = document.createElement("pre");
  found.id = "verdict";
  found.textContent = JSON.stringify({images: images.length,
    loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
    page: document.documentElement.scrollWidth, screen: innerWidth});
  document.body.append(found);
});</script></body>"""

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, none is installed"),
]


def browse(page, profile, width, *arguments):
    return subprocess.run(
        [
            CHROMIUM,
            *FLAGS,
            f"--user-data-dir={profile}",
            f"--window-size={width},1600",
            *arguments,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.mark.parametrize("width", [1280, 500])  # headless Chromium is no narrower than 500 pixels
def test_report_looks_right(tmp_path, width):
    runs = [
        write_run(tmp_path / name, seed=seed)
        for seed, name in enumerate(("first", "a_run_with_a_long_name" * 3))
    ]
    page = report.write_report(runs, tmp_path / "report", with_images=False)
    copy = page.with_name("copy.html")
    copy.write_text(page.read_text().replace("</body>", VERDICT))
    dumped = browse(copy, tmp_path / "profile", width, "--dump-dom")
    verdict = json.loads(re.search(r'<pre id="verdict">(.*?)</pre>', dumped.stdout).group(1))
    assert verdict["images"] >= 5 and verdict["loaded"] == verdict["images"]
    assert verdict["page"] <= verdict["screen"]
    assert "CONSOLE" not in dumped.stderr
    shot = tmp_path / "shot.png"
    browse(page, tmp_path / "profile", width, f"--screenshot={shot}")
    assert shot.stat().st_size > 20_000


def test_a_broken_picture_would_be_noticed(tmp_path):
    page = tmp_path / "page.html"
    page.write_text('<body><img src="data:image/png;base64,AAAA">' + VERDICT)
    dumped = browse(page, tmp_path / "profile", 800, "--dump-dom")
    verdict = json.loads(re.search(r'<pre id="verdict">(.*?)</pre>', dumped.stdout).group(1))
    assert (verdict["images"], verdict["loaded"]) == (1, 0)
