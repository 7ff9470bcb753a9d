"""The report in a real headless browser. Without chromium it is skipped; in CI it then fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers import evaluated_student
from PIL import Image

pytestmark = pytest.mark.slow

AFTERWARDS = """<script>
const before = [...document.querySelectorAll("#methods tbody tr")].map((row) => row.dataset.key);
const sorted = (name) => {
  const button = [...document.querySelectorAll("#methods th button")].find((b) => b.textContent === name);
  button.click();
  return [...document.querySelectorAll("#methods tbody tr")].map((row) => row.dataset.key);
};
const flops = sorted("FLOPs"), turned = sorted("FLOPs"), back = sorted("FLOPs");
const shown = () => [...document.querySelectorAll(".example")].filter((c) => !c.hidden).map((c) => c.dataset.kinds);
const all = shown();
const [system, kind] = document.querySelectorAll("#disagreements select");
const pick = (select, value) => { select.value = value; select.dispatchEvent(new Event("change")); };
pick(system, "a student");
const students = shown();
pick(kind, "lost");
const lost = shown();
pick(system, ""); pick(kind, "");
const gallery = document.querySelector(".gallery");
for (let i = 0; i < 30; i++) gallery.append(gallery.querySelector(".example").cloneNode(true));
pick(kind, "");
const pages = [shown().length];
while (!document.querySelector("#more").hidden) { document.querySelector("#more").click(); pages.push(shown().length); }
const found = {
  before, flops, turned, back, first: sorted("first token"), all, students, lost, pages,
  cards: document.querySelectorAll(".example").length,
  count: document.querySelector("#shown").textContent, of: document.querySelector("#fitting").textContent,
  wide: document.documentElement.scrollWidth - window.innerWidth,
  fetched: performance.getEntriesByType("resource").map((r) => r.name).filter((n) => !n.startsWith("data:")),
  background: getComputedStyle(document.body).backgroundColor,
};
const out = document.createElement("script");
out.type = "application/json"; out.id = "found"; out.textContent = JSON.stringify(found);
document.body.append(out);
</script></body>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if path := shutil.which(name):
            return path
    reason = "no chromium on this machine; install it (Debian: apt-get install chromium)"
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


def browse(chromium: str, page: Path, *arguments: str, width: int = 1280) -> subprocess.CompletedProcess[str]:
    words = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},1600"]
    words += [f"--user-data-dir={page.parent / 'profile'}", "--enable-logging=stderr"]
    done = subprocess.run([*words, *arguments, page.as_uri()], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr  # an error or a warning of the page
    return done


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    shutil.copy(evaluated_student.full_run()[0] / "report.html", path)
    return path


def measured_in(chromium: str, page: Path, *arguments: str, width: int = 1280) -> dict:
    """What a script that uses the page as a reader would finds."""
    used = page.with_name("used.html")
    text = page.read_text().replace('value="student"', 'value="a student"')  # keys may hold spaces
    used.write_text(text.replace("&#34;student&#34;", "&#34;a student&#34;").replace("</body>", AFTERWARDS))
    dom = browse(chromium, used, "--dump-dom", *arguments, width=width).stdout
    match = re.search(r'id="found">(.*?)</script>', dom, re.DOTALL)
    assert match, dom[-500:]
    return json.loads(match[1])


def test_table_sorts_and_gallery_filters(chromium: str, page: Path) -> None:
    shown = measured_in(chromium, page)
    systems = evaluated_student.full_run()[1]["systems"]
    assert shown["before"] == shown["back"] == list(systems)
    by_flops = sorted(systems, key=lambda key: systems[key]["flops"]["mean"])
    assert [systems[key]["flops"]["mean"] for key in shown["flops"]] == [
        systems[key]["flops"]["mean"] for key in by_flops
    ]
    assert shown["flops"] != shown["before"] and shown["turned"][0] == "dense"
    assert {systems[key]["control"] for key in shown["first"][-3:]} == {True}  # not timed: last
    assert len(shown["students"]) < len(shown["all"]) or all('"a student"' in k for k in shown["all"])
    assert all('"a student"' in kinds for kinds in shown["students"]) and shown["students"]
    assert all('["a student", "lost"]' in kinds for kinds in shown["lost"])
    pages, cards = shown["pages"], shown["cards"]
    assert pages == [min(12 * (i + 1), cards) for i in range(len(pages))] and pages[-1] == cards > 30
    assert shown["count"] == shown["of"] == str(cards)


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_nothing_sticks_out_at_any_width(chromium: str, page: Path, width: int, tmp_path: Path) -> None:
    assert measured_in(chromium, page, width=width)["wide"] <= 0
    picture = tmp_path / "page.png"
    browse(chromium, page, f"--screenshot={picture}", "--hide-scrollbars", width=width)
    image = Image.open(picture).convert("L")
    assert image.size == (width, 1600) and len(set(image.resize((64, 64)).get_flattened_data())) > 20


def test_light_and_dark(chromium: str, page: Path) -> None:
    dark = measured_in(chromium, page, "--blink-settings=preferredColorScheme=0")
    light = measured_in(chromium, page, "--blink-settings=preferredColorScheme=1")
    assert (dark["background"], light["background"]) == ("rgb(18, 21, 28)", "rgb(255, 255, 255)")


def test_prints_and_asks_nothing_of_the_network(chromium: str, page: Path, tmp_path: Path) -> None:
    assert measured_in(chromium, page)["fetched"] == []
    paper = tmp_path / "report.pdf"
    browse(chromium, page, f"--print-to-pdf={paper}")
    assert paper.read_bytes().startswith(b"%PDF") and paper.stat().st_size > 20_000
