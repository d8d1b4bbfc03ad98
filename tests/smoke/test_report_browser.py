"""The report in a real browser: every picture loads, nothing is wider than the screen, the console stays silent."""

import json
import re
import shutil
import subprocess

import pytest

from report import write as report
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
# Appended to a copy of the page: what the browser made of it, told to the frame around it.
VERDICT = """<script>addEventListener("load", () => {
  const images = [...document.images];
  parent.postMessage(JSON.stringify({images: images.length,
    loaded: images.filter(i => i.complete && i.naturalWidth > 0).length,
    page: document.documentElement.scrollWidth, screen: innerWidth}), "*");
});</script></body>"""
# A window of headless Chromium is no narrower than 500 pixels; a frame in it is as narrow as a phone.
FRAME = """<!doctype html><body style="margin:0"><iframe src="%s" style="border:0;width:%dpx;height:%dpx"></iframe>
<script>addEventListener("message", message => {
  const found = document.createElement("pre");
  found.id = "verdict";
  found.textContent = message.data;
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


def look_at(page, folder, width, height=1600):
    """Returns what the browser says of a page in a frame of that width, and its console."""
    copy, frame = page.with_name(f"{page.stem}-copy.html"), page.with_name(f"{page.stem}-frame.html")
    copy.write_text(page.read_text().replace("</body>", VERDICT))
    frame.write_text(FRAME % (copy.name, width, height))
    dumped = browse(frame, folder / "profile", max(width, 500), "--dump-dom")
    return json.loads(re.search(r'<pre id="verdict">(.*?)</pre>', dumped.stdout).group(1)), dumped.stderr


@pytest.mark.parametrize("width", [1280, 360])
def test_report_looks_right(tmp_path, width):
    runs = [
        write_run(tmp_path / name, seed=seed, with_patches=bool(seed))
        for seed, name in enumerate(("first", "a_run_with_a_long_name" * 3))
    ]
    page = report.write_report(runs, tmp_path / "report", with_images=False)
    verdict, console = look_at(page, tmp_path, width)
    # One a group of panels: loss, k-NN, prototypes, and both of patches.
    assert verdict["loaded"] == verdict["images"] == page.read_text().count("<img ") >= 5
    assert verdict["screen"] == width and verdict["page"] <= width
    assert "CONSOLE" not in console
    shot = tmp_path / "shot.png"  # compared by eye where it matters; pytest keeps its last three folders
    browse(page.with_name("index-frame.html"), tmp_path / "profile", max(width, 500), f"--screenshot={shot}")
    assert shot.stat().st_size > 20_000


def test_a_broken_picture_a_wide_page_and_an_error_would_be_noticed(tmp_path):
    page = tmp_path / "page.html"
    page.write_text(
        '<body><img src="data:image/png;base64,AAAA"><div style="width:900px">x</div>'
        "<script>console.error('planted')</script></body>"
    )
    verdict, console = look_at(page, tmp_path, 360)
    assert (verdict["images"], verdict["loaded"]) == (1, 0) and verdict["page"] > verdict["screen"]
    assert "CONSOLE" in console and "planted" in console
