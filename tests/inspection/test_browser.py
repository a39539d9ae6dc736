"""The HTML report, opened in a real browser: CHROMIUM names one, or it is on the path."""

from __future__ import annotations

import fcntl
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import save_compressed

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--no-zygote",
    "--single-process",
    "--in-process-gpu",
    "--disable-gpu",
]

pytestmark = [
    pytest.mark.skipif(BROWSER is None, reason="no Chromium on the path; CHROMIUM=FILE names one"),
    pytest.mark.usefixtures("one_thread"),
]

SEEN = """new Promise(resolve => {
  const box = element => { const r = element.getBoundingClientRect(); return [r.width, r.height]; };
  const look = () => resolve(JSON.stringify({
    title: document.title, text: document.body.innerText,
    overflow: document.documentElement.scrollWidth - innerWidth,
    figures: [...document.querySelectorAll('body > svg')].map(box),
    rows: [...document.querySelectorAll('tr')].map(row => [row.innerText, box(row)[1]]),
    requests: performance.getEntriesByType('resource').map(entry => entry.name),
  }));
  document.readyState == 'complete' ? look() : addEventListener('load', look);
})"""


class Browser:
    """Chromium, told what to do over a pair of pipes: JSON objects that end in a zero byte."""

    def __init__(self, orders: int, answers: int) -> None:
        self._orders, self._answers, self._rest, self._number = orders, answers, b"", 0

    def ask(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._number += 1
        order = {"id": self._number, "method": method, "params": params}
        os.write(
            self._orders, json.dumps(order | ({"sessionId": session} if session else {})).encode() + b"\0"
        )
        deadline = time.monotonic() + 60
        while True:
            while b"\0" not in self._rest:
                assert select.select([self._answers], [], [], deadline - time.monotonic())[0], method
                read = os.read(self._answers, 1 << 20)
                assert read, "the browser ended"
                self._rest += read
            message, _, self._rest = self._rest.partition(b"\0")
            if (answer := json.loads(message)).get("id") == self._number:
                return dict(answer["result"])


@contextmanager
def browser(profile: Path) -> Iterator[Browser]:
    (its_orders, orders), (answers, its_answers) = os.pipe(), os.pipe()

    def connect() -> None:
        read, write = (fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (its_orders, its_answers))
        os.dup2(read, 3)  # where the browser reads
        os.dup2(write, 4)  # and writes

    command = [str(BROWSER), *OPTIONS, "--remote-debugging-pipe", "--window-size=1000,1200"]
    process = subprocess.Popen(
        [*command, f"--user-data-dir={profile}"],
        preexec_fn=connect,
        close_fds=False,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_orders)
    os.close(its_answers)
    try:
        yield Browser(orders, answers)
    finally:
        process.kill()
        process.wait()
        os.close(orders)
        os.close(answers)


def look(page: Path, profile: Path) -> dict[str, Any]:
    """What the browser makes of a page."""
    with browser(profile) as chromium:
        target = chromium.ask("Target.createTarget", url="about:blank")["targetId"]
        session = chromium.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        chromium.ask("Page.navigate", session, url=page.resolve().as_uri())
        result = chromium.ask(
            "Runtime.evaluate", session, expression=SEEN, awaitPromise=True, returnByValue=True
        )
        return dict(json.loads(result["result"]["value"]))


def test_the_report(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: pip install 'oats-torch[plot]'")
    from typer.testing import CliRunner

    from oats.cli import app

    model, page = save_compressed(tmp_path / "small"), tmp_path / "report.html"
    result = CliRunner().invoke(app, ["report", str(model), "--speed", "--out", str(page)])
    assert result.exit_code == 0, result.output
    seen = look(page, tmp_path / "profile")
    assert seen["requests"] == [] and seen["title"] and seen["overflow"] <= 0
    assert len(seen["figures"]) >= 3 and all(min(size) > 100 for size in seen["figures"])
    rows = [row for row, _ in seen["rows"]]
    assert sum("self_attn.q_proj" in row and "64 × 64" in row for row in rows) >= 2  # layers and speed
    assert all(height < 40 for _, height in seen["rows"]), "a row of a table is broken into lines"
    for heading in ("Where the bytes are", "Spectra of the low-rank parts", "Sparsity", "Layers", "Speed"):
        assert heading in seen["text"]
