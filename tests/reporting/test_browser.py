"""A page in a real browser: nothing overflows, nothing is covered, nothing is complained about."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from report_data import Json
from secateur.reporting.page.records import Records
from secateur.reporting.page.render import render_page

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")

KINDS = (
    "full",
    "shrunk",
    "shrunk unfinished",
    "shrunk hostile",
    "trained",
    "trained packed",
    "trained unfinished",
    "trained hostile",
    "packed int8",
    "unfinished",
    "hostile",
    "comparison",
    "models",
    "hostile comparison",
    "beyond",
)
WIDTHS = (360, 1440)

# Each page in a frame of the width in question: a window cannot be as narrow as a phone.
MEASURE = """
<!DOCTYPE html><meta charset="utf-8"><meta name="color-scheme" content="light dark"><body>FRAMES
<script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement, inside = [];
    for (const svg of page.querySelectorAll("svg")) {
      const edge = svg.getBoundingClientRect(), texts = [...svg.querySelectorAll("text")];
      const boxes = texts.map(text => text.getBoundingClientRect());
      boxes.forEach((a, i) => {
        if (a.left < edge.left - 1 || a.right > edge.right + 1 || a.top < edge.top - 1 || a.bottom > edge.bottom + 1)
          inside.push("outside its picture: " + texts[i].textContent);
        for (const [j, b] of boxes.entries())
          if (j > i && a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 2 && b.top < a.bottom - 2)
            inside.push("covered: " + texts[i].textContent + " by " + texts[j].textContent);
      });
    }
    const colour = (node, what) => node && frame.contentWindow.getComputedStyle(node)[what];
    const mark = page.querySelector("svg use[style*='series-0']"), text = page.querySelector("svg text");
    return {
      kind: frame.title, asked: Number(frame.width), width: frame.contentWindow.innerWidth, scroll: root.scrollWidth,
      surface: colour(page.body, "backgroundColor"), text: colour(text, "fill"), mark: colour(mark, "fill"),
      typeface: [colour(text, "fontFamily"), colour(page.body, "fontFamily")], faults: inside.slice(0, 5),
    };
  });
  const answer = document.createElement("pre");
  answer.id = "answer"; answer.textContent = JSON.stringify(found);
  document.body.replaceChildren(answer);
};
</script>
"""


def browse(folder: Path, *options: str, page: str) -> tuple[str, str]:
    """What the browser prints of a page, and what it complains of."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr", "--v=0", *options, (folder / "page.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, page_as_html: Callable[[str], str]) -> dict[str, list[Any]]:
    """What was measured of all pages at all widths, in light and dark."""
    frames = "".join(
        f'<iframe title="{kind}" width="{width}" height="800" style="border:0" '
        f'srcdoc="{html.escape(page_as_html(kind))}"></iframe>'
        for kind in KINDS
        for width in WIDTHS
    )
    found = {}
    for theme, number in (("dark", 0), ("light", 1)):
        scheme = f"--blink-settings=preferredColorScheme={number}"
        page = MEASURE.replace("FRAMES", frames)
        dom, complaints = browse(tmp_path_factory.mktemp(theme), "--dump-dom", scheme, page=page)
        answer = re.search(r'<pre id="answer">(.*?)</pre>', dom, re.DOTALL)
        assert answer, dom[:300]
        found[theme] = [json.loads(html.unescape(answer[1])), complaints]
    return found


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_nothing_is_wider_than_the_screen(seen: dict[str, list[Any]], theme: str) -> None:
    pages, complaints = seen[theme]
    assert complaints == ""
    assert [page["width"] for page in pages] == [page["asked"] for page in pages] == list(WIDTHS) * len(KINDS)
    assert [(page["kind"], page["scroll"]) for page in pages if page["scroll"] > page["asked"]] == []


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_no_label_of_a_picture_is_cut_off_or_covered(seen: dict[str, list[Any]], theme: str) -> None:
    assert [(page["kind"], page["asked"], page["faults"]) for page in seen[theme][0] if page["faults"]] == []


def brightness(colour: str) -> float:
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_pictures_follow_the_theme_and_the_typeface(seen: dict[str, list[Any]]) -> None:
    for light, dark in zip(seen["light"][0], seen["dark"][0], strict=True):
        assert brightness(light["surface"]) > 240 and brightness(dark["surface"]) < 40
        if light["text"]:  # not every page has a picture
            assert brightness(light["text"]) < 60 and brightness(dark["text"]) > 200
            assert light["typeface"][0] == light["typeface"][1] and "system-ui" in light["typeface"][0]
        if light["mark"]:
            assert brightness(light["mark"]) < brightness(dark["mark"])


def test_a_printed_page_shows_the_numbers_too(tmp_path: Path, pruned: Json) -> None:
    pruned["blocks"] = [{"block": block, "seconds": 1.0, "output_error": 0.5} for block in range(150)]
    page = render_page(Records("pruned", "out", pruned))
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'with.pdf'}", page=page)
    bare = re.sub("(?s)<details>.*?</details>", "", page)
    browse(tmp_path, f"--print-to-pdf={tmp_path / 'without.pdf'}", page=bare)
    pages = [
        len(re.findall(rb"/Type ?/Page\b", (tmp_path / name).read_bytes())) for name in ("with.pdf", "without.pdf")
    ]
    assert pages[0] > pages[1] + 2
