"""tools/report.py: the page as a browser lays it out; its content is tested in tests/analysis/test_html_report.py."""

import html
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image

from mdistiller.experiments.summary import Row, Table, save_table
from tests.experiments.hand_made import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
         "--disable-background-networking", "--disable-component-update"]  # fmt: skip
# The page in a frame of the given width, because a window cannot be made as narrow as a phone.
FRAME = """<!DOCTYPE html><body><iframe id="f" style="border:0; width:{width}px; height:900px" srcdoc="{page}"></iframe>
<pre id="found"></pre><script>
document.getElementById("f").onload = e => {{
  const doc = e.target.contentDocument, root = doc.documentElement, out = [], boxes = [];
  doc.querySelectorAll("details").forEach(d => d.open = true);
  for (const x of doc.querySelectorAll("h1, h2, h3, p, td, img, figcaption, pre, summary, dt, dd")) {{
    const r = x.getBoundingClientRect();
    if (!r.width || !r.height) continue;
    const inner = x.tagName != "SUMMARY" && x.scrollWidth > x.clientWidth + 1;
    if (r.left < -0.5 || r.right > root.clientWidth + 0.5 || inner)
      out.push(x.tagName + " " + x.textContent.slice(0, 40));
    for (const b of boxes)
      if (r.left < b.right - 1 && b.left < r.right - 1 && r.top < b.bottom - 1 && b.top < r.bottom - 1)
        out.push("over another: " + x.tagName + " " + x.textContent.slice(0, 40));
    boxes.push(r);
  }}
  const sizes = [root.scrollWidth, root.clientWidth, boxes.length];
  document.getElementById("found").textContent = JSON.stringify({{sizes, out}});
}};
</script>"""


@pytest.fixture
def pages(tool, tmp_path):
    """A run's page and a table's, with long names and many columns."""
    rows = [{"lr": 0.1, "test_acc": 40.5, **{f"loss/a_part_with_a_long_name_{i}": i for i in range(9)}}] * 3
    run = write_run(tmp_path / ("kd," + "SOLVER.LR_DECAY_STAGES:[4,5]," * 5), rows)
    (run / "inspect").mkdir()
    for name in ("tsne", "cka"):
        Image.new("RGB", (1200, 600), "grey").save(run / "inspect" / f"{name}.png")
    cells = [
        Row("resnet32x4 -> MobileNetV2", name, 5, 5, 71.25, 0.25, 71.5, 0.5, 70.66, "crd", {"KD": 1.5}, 1e5, 60.25,
            1234, 1_234_567, 1_234_567, 123_456_789, (str(run),))
        for name in ("KD", "DCGD_KD, head: grouped")
    ]  # fmt: skip
    table = Table("A" * 60, "About " * 60, cells, ["KD"], {"crd": "x" * 200}, {}, ["5 run(s) on " + "y" * 100])
    save_table(table, tmp_path / "table.json")
    tool("report.py", run, "-o", tmp_path / "run.html")
    tool("report.py", tmp_path)
    return {"run": tmp_path / "run.html", "table": tmp_path / "report.html"}


@pytest.mark.skipif(not CHROMIUM, reason="Chromium is not installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_cut_and_nothing_overlaps_at_this_width(width, pages, tmp_path):
    for kind, page in pages.items():
        frame = tmp_path / f"{kind}{width}.html"
        frame.write_text(FRAME.format(width=width, page=html.escape(page.read_text())))
        data = tmp_path / f"browser-{kind}"
        done = subprocess.run(
            [str(CHROMIUM), *FLAGS, f"--user-data-dir={data}", "--window-size=1400,1000", "--dump-dom", frame.as_uri()],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        (found,) = re.findall(r'<pre id="found">(.*?)</pre>', done.stdout, re.S)
        measured = json.loads(html.unescape(found))
        scroll, client, boxes = measured["sizes"]
        assert scroll <= client and boxes > 50 and measured["out"] == [], kind


def test_the_page_is_written_to_the_given_file(pages, tmp_path):
    assert (tmp_path / "run.html").read_text().startswith("<!DOCTYPE html>")
    assert "<title>digits: kd," in (tmp_path / "run.html").read_text()
    assert "<title>AAAA" in (tmp_path / "report.html").read_text()
