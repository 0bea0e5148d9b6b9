"""Read the charts of a page, and open pages in a headless browser to measure what it draws."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import altair as alt

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HARNESS = """<!doctype html><meta charset="utf-8"><body><script>
const found = {};
const frames = %s.map(([page, width]) => {
  const frame = document.createElement("iframe");
  frame.style.cssText = `width:${width}px;height:900px;border:0`;
  frame.src = page;
  document.body.append(frame);
  return [`${page} ${width}`, frame];
});
const timer = setInterval(() => {
  for (const [name, frame] of frames) {
    const page = frame.contentDocument;
    if (!page?.documentElement?.dataset.drawn || found[name]) continue;
    const root = page.documentElement, boxes = [...page.querySelectorAll(".chart")];
    const right = (element) => element.getBoundingClientRect().right;
    const wide = (element) => right(element) > root.clientWidth + 1 && !element.closest(".scroll");
    found[name] = {
      drawn: root.dataset.drawn, charts: boxes.length, svgs: boxes.filter((box) => box.querySelector("svg")).length,
      overflow: root.scrollWidth - root.clientWidth,
      outside: [...page.querySelectorAll("body *")].filter(wide).map((element) => element.outerHTML.slice(0, 120)),
      csv: [...page.querySelectorAll("table")].map((table) => table.querySelector("a.save").href),
      flat: boxes.filter((box) => box.querySelector("svg").getBoundingClientRect().width < 200).length,
    };
  }
  if (Object.keys(found).length === frames.length) {
    clearInterval(timer);
    document.body.innerHTML = "<pre></pre>";
    document.querySelector("pre").textContent = JSON.stringify(found);
  }
}, 50);
</script>"""


def charts(page: str) -> list[str]:
    """Name the charts of a page, and fail where one is not as the schema of Vega-Lite wants it."""
    found = re.findall(r'<script type="application/json" id="chart-([^"]+)">(.*?)</script>', page, re.DOTALL)
    for _, specification in found:
        alt.Chart.from_dict(json.loads(specification))
    return [name for name, _ in found]


def browse(folder: Path, mode: str, *more: str) -> subprocess.CompletedProcess[str]:
    """Open the harness in a headless browser with an empty profile."""
    scheme = {"dark": 0, "light": 1}[mode]
    with tempfile.TemporaryDirectory() as profile:
        return subprocess.run(
            [
                str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                "--disable-component-update", "--disable-sync", "--allow-file-access-from-files",
                "--enable-logging=stderr", f"--user-data-dir={profile}", "--virtual-time-budget=20000",
                "--window-size=1400,1000", f"--blink-settings=preferredColorScheme={scheme}", *more,
                (folder / "harness.html").as_uri(),
            ],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip


def drawn(folder: Path, pages: dict[str, str], mode: str) -> dict[str, dict[str, Any]]:
    """Draw pages, wide and narrow, and return what became of each; a message on the console is a failure."""
    for name, page in pages.items():
        (folder / f"{name}.html").write_text(page, encoding="utf-8")
    frames = [[f"{name}.html", width] for name in pages for width in (1280, 400)]
    (folder / "harness.html").write_text(HARNESS % json.dumps(frames), encoding="utf-8")
    shown = browse(folder, mode, "--dump-dom")
    assert [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    match = re.search(r"<pre>(.*)</pre>", shown.stdout, re.DOTALL)
    assert match, "the pages were not drawn in time"
    found: dict[str, dict[str, Any]] = json.loads(html.unescape(match.group(1)))
    assert len(found) == len(frames)
    return found
