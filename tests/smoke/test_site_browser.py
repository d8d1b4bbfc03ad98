"""The pages as a site in a real browser without a network: the search finds what stands in them."""

import http.server
import re
import shutil
import subprocess
import sys
import threading
import time
from functools import partial

import pytest

from tests.helpers.starts import ROOT
from tests.smoke.test_report_browser import CHROMIUM, FLAGS

# The page counts as loaded once this picture is there, which the server holds back until the search has its index.
HELD_BACK = "held-back.png"
_PATIENCE_S, _SEARCH_S = 60, 3

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium, none is installed"),
]


class Handler(http.server.SimpleHTTPRequestHandler):
    indexed = threading.Event()

    def do_GET(self):
        if self.path.startswith("/" + HELD_BACK):
            self.indexed.wait(_PATIENCE_S)
            time.sleep(_SEARCH_S)
        super().do_GET()
        if self.path.endswith("search_index.json"):
            self.indexed.set()

    def log_message(self, *arguments):
        pass


def test_the_search_finds_what_stands_in_the_pages(tmp_path):
    site = tmp_path / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    shutil.copy(site / "images" / "prototypes.png", site / HELD_BACK)
    page = site / "looked-at.html"
    picture = f'<img src="{HELD_BACK}"></body>'
    page.write_text((site / "index.html").read_text().replace("</body>", picture))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = [flag for flag in FLAGS if not flag.startswith("--virtual-time")]
        # A word that stands in no sentence, as a part of the figure gmm/displacement alone.
        address = f"http://127.0.0.1:{server.server_port}/{page.name}?q=displacement"
        profile = f"--user-data-dir={tmp_path / 'profile'}"
        dumped = subprocess.run(
            [CHROMIUM, *flags, profile, "--dump-dom", address],
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        server.shutdown()
    found = re.findall(r'<article><h3><a href="([^"]+)">', dumped.stdout)
    assert Handler.indexed.is_set() and any(
        "estimator.html#reading-the-diagnostics" in place for place in found
    )
