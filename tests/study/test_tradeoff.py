"""Pareto fronts, the files of a trade-off, and its page in a real browser."""

import base64
import csv
import dataclasses
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from fairseq_w2v2_light.study.speed import read_pieces
from fairseq_w2v2_light.study.tradeoff import Row, Tradeoff, format_table, labels, with_fronts, write_tradeoff
from fairseq_w2v2_light.study.tradeoff_page import page

ABOUT = {
    "references": "data/test.tsv",
    "utterances": 4,
    "words": 200,
    "audio_seconds": 60.0,
    "seconds": 10.0,
    "pieces": 3,
    "repeats": 7,
    "date": "2026-01-01",
    "cpu": "a <CPU>",
    "cores": "2",
    "threads": "1",
    "torch": "2",
}
HOSTILE = [
    "</script><script>document.title='attacked'</script>",
    '"><img src="http://127.0.0.1:9/a.png" onerror=alert(1)>',
    "a & b | 'c' $x_1$ \\frac \u2028 größe 模型 \u202e",
    "_hidden]]>-->",
]


def row(model="a", point="s1q1k1", wer=10.0, factor=0.01, macs=10**9, parameters=10**6, size=4 * 10**6, **changes):
    counts = dict(substitutions=5, deletions=3, insertions=2, words=200)
    return Row(model, point, "float32", parameters, size, macs, factor, 1.0, wer, 2.5, **{**counts, **changes})


def tradeoff(*rows):
    return Tradeoff(with_fronts(rows), ABOUT)


def hostile():
    models = [row(name, f"s{number}q1k1", 8.0 + number, 0.01 / number) for number, name in enumerate(HOSTILE, start=1)]
    return tradeoff(*models, row(HOSTILE[0], "s9q1k1", 30.0, 0.02), row(HOSTILE[1], "s2q2k2", 9.5, 0.02))


def test_pareto_front_of_each_axis():
    found = tradeoff(
        row("plain", wer=5.0, factor=0.04, macs=4),
        row("worse", wer=6.0, factor=0.04, macs=4),
        row("fast", wer=7.0, factor=0.01, macs=2),
        row("as fast", wer=7.0, factor=0.01, macs=3),
        row("fastest", wer=9.0, factor=0.005, macs=2),
    ).rows
    fronts = {one.model: one.pareto for one in found}
    of = {key: [model for model, front in fronts.items() if key in front] for key in ("real_time_factor", "macs")}
    # equals stand beside each other
    assert of["real_time_factor"] == ["plain", "fast", "as fast", "fastest"]
    assert of["macs"] == ["plain", "fast"]
    # all have as many parameters: the most accurate alone
    assert [model for model, front in fronts.items() if "parameters" in front] == ["plain"]
    assert found[0].record()["pareto_macs"] is True and found[1].record()["pareto_macs"] is False


def test_pareto_front_by_its_definition():
    chance = np.random.default_rng(0)
    rows = [row(str(i), wer=float(wer), macs=int(macs)) for i, (wer, macs) in enumerate(chance.integers(1, 9, (60, 2)))]
    for one in with_fronts(rows):
        better = [
            other
            for other in rows
            if (other.macs < one.macs and other.wer <= one.wer) or (other.macs <= one.macs and other.wer < one.wer)
        ]
        assert ("macs" in one.pareto) == (not better)


def test_points_are_labelled_by_what_tells_them_apart():
    rows = [row("a"), row("b"), row("b", "s2q1k1"), row("c"), dataclasses.replace(row("c"), dtype="int8")]
    assert labels(rows) == ["a", "s1q1k1", "s2q1k1", "float32", "int8"]


def test_table_is_markdown_whatever_names_hold():
    lines = format_table(hostile()).splitlines()
    assert len(lines) == 2 + 6
    unescaped = [re.findall(r"(?<!\\)\|", line) for line in lines]
    assert {len(bars) for bars in unescaped} == {len(unescaped[0])}
    assert format_table(tradeoff(row("a\nb"))).splitlines()[2].startswith("| a b |")


def test_files(tmp_path):
    pytest.importorskip("matplotlib", reason="pip install matplotlib to draw the plot")
    result = hostile()
    write_tradeoff(result, tmp_path / "out", "x < y & $z$")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        *("tradeoff.csv", "tradeoff.html", "tradeoff.png")
    ]
    with open(tmp_path / "out/tradeoff.csv", encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["model"] for line in lines] == [one.model for one in result.rows]
    for line, one in zip(lines, result.rows):
        assert line == {key: str(value) for key, value in one.record().items()}
    assert (tmp_path / "out/tradeoff.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_only_the_plot_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said = []
    write_tradeoff(tradeoff(row()), tmp_path, "t", said.append)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["tradeoff.csv", "tradeoff.html"]
    assert said == [f"{tmp_path / 'tradeoff.png'}: left out: the plot needs matplotlib: pip install matplotlib"]


class Reader(HTMLParser):
    """Collects elements, attributes and the JSON of a page."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.elements, self.attributes, self.data, self.cells, self._within = [], [], "", [], None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.elements.append(tag)
        self.attributes.extend(attributes)
        self._within = dict(attributes).get("id") or tag
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag):
        self._within = None

    def handle_data(self, data):
        if self._within == "data":
            self.data += data
        elif self._within == "td":
            self.cells[-1] += data


def test_page_holds_names_as_text_and_names_no_other_file():
    result = hostile()
    found = Reader(page(result, "</title><script>alert(1)</script>"))
    assert found.elements.count("script") == 2 and found.elements.count("img") == 0
    names = [name for name, _ in found.attributes]
    assert not [name for name in names if name.startswith("on") or name in ("src", "action", "srcset")]
    assert [value for name, value in found.attributes if name == "href"] == ["data:,"]
    assert [one["wer"] for one in json.loads(found.data)["rows"]] == [one.wer for one in result.rows]
    assert json.loads(found.data)["models"] == HOSTILE
    assert found.cells[0] == HOSTILE[0]
    assert "default-src 'none'" in page(result, "t") and "url(" not in page(result, "t")


def test_pieces_are_as_long_as_asked_for_and_begin_again_where_the_audio_ends(tmp_path):
    for number, samples in enumerate((1600, 800)):
        soundfile.write(tmp_path / f"{number}.wav", np.full(samples, (number + 1) / 8, dtype=np.float32), 16000)
    paths = [tmp_path / "0.wav", tmp_path / "1.wav", tmp_path / "missing.wav"]
    # what is not needed is not read
    pieces = read_pieces(paths, 0.05, 3, 16000)
    assert [piece.shape for piece in pieces] == [(1, 800)] * 3
    assert [piece.unique().tolist() for piece in pieces] == [[0.125], [0.125], [0.25]]
    pieces = read_pieces(paths[:2], 0.1, 2, 16000)
    assert pieces[1][0, :800].unique().tolist() == [0.25] and pieces[1][0, 800:].unique().tolist() == [0.125]
    soundfile.write(tmp_path / "empty.wav", np.zeros(0, dtype=np.float32), 16000)
    with pytest.raises(ValueError, match="empty.wav: no samples in it"):
        read_pieces([tmp_path / "empty.wav"], 1.0, 1, 16000)


# ---- in a browser

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_a_browser = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome on PATH")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--enable-logging=stderr"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--virtual-time-budget=1000", "--window-size=1200,900", "--host-resolver-rules=MAP * ~NOTFOUND", "--dump-dom"),
)


def opened(folder, address=""):
    """The elements of a page after its script ran, as text; fails where the console has anything to say."""
    target = (folder / "tradeoff.html").as_uri() + address
    options = [*OPTIONS, f"--user-data-dir={folder / 'browser'}", f"--log-net-log={folder / 'net.json'}", target]
    result = subprocess.run([BROWSER, *options], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "CONSOLE" not in result.stderr, result.stderr[-2000:]
    return result.stdout


def tooltip(dom):
    inside = re.search(r'<div id="tip" role="tooltip"([^>]*)>(.*?)</div>', dom, re.DOTALL)
    return None if "hidden" in inside.group(1) else inside.group(2)


def requests_of_pages(file):
    """Addresses that a page asked for: those of the browser's own services have no origin."""
    events = json.loads(file.read_text(encoding="utf-8", errors="replace"))["events"]
    asked = [event.get("params") or {} for event in events]
    return {one["url"] for one in asked if "url" in one and one.get("initiator", "not an origin") != "not an origin"}


@needs_a_browser
def test_page_in_a_browser(tmp_path):
    result = hostile()
    (tmp_path / "tradeoff.html").write_text(page(result, "Trade-off <1>"), encoding="utf-8")
    dom = opened(tmp_path)
    circles = re.findall(r'<circle[^>]* data-row="(\d+)"[^>]*>', dom)
    assert circles == [str(number) for number in range(1, 7)]
    assert tooltip(dom) is None and "<title>Trade-off &lt;1&gt;</title>" in dom
    assert dom.count('tabindex="0" role="button"') == 6 and "seconds of compute per second of audio" in dom
    assert requests_of_pages(tmp_path / "net.json") == set()


@needs_a_browser
def test_an_address_leads_to_an_axis_and_a_row(tmp_path):
    result = tradeoff(*hostile().rows, row("twin"))
    (tmp_path / "tradeoff.html").write_text(page(result, "t"), encoding="utf-8")
    dom = opened(tmp_path, "#x=macs&log=1&row=2")
    shown = tooltip(dom)
    # its MACs and WER are those of another
    assert "<small>on the same spot: twin s1q1k1 float32</small>" in shown and ">s2q1k1, twin</text>" in dom
    assert f"<strong>{html.escape(HOSTILE[1], quote=False)}</strong>" in shown
    for name, value in (("real-time factor", "0.0050"), ("WER %", "10.00"), ("words", "200"), ("S", "5")):
        assert f"<dt>{name}</dt><dd>{value}</dd>" in shown
    assert re.findall(r'<circle[^>]* data-row="(\d+)"[^>]* class="hot"', dom) == ["2", "7"]
    assert re.search(r'<tr id="row-2"[^>]* aria-current="true"', dom)
    assert ">GMACs for 10 s of audio</text>" in dom


# what a person does; each step's outcome is written down in the page's title
HANDS = """
const said = [], tip = document.getElementById("tip");
const note = value => said.push(String(value));
const circle = row => document.querySelector(`circle[data-row="${row}"]`);
const model = () => tip.hidden ? "-" : tip.querySelector("strong").textContent;
const order = () => [...document.querySelector("tbody").rows].map(line => line.dataset.row).join("");
const hit = (target, name, more) => target.dispatchEvent(new KeyboardEvent(name, {bubbles: true, ...more}));
circle(2).dispatchEvent(new PointerEvent("pointerenter")); note(model());
circle(2).dispatchEvent(new PointerEvent("pointerleave")); note(model());
circle(3).focus(); note(model());
hit(circle(3), "keydown", {key: "ArrowRight"}); note(document.activeElement.dataset.row + model());
document.activeElement.blur(); note(model());
const [first, , , , , , , , wer] = document.querySelectorAll("th button");
wer.click(); note(order() + wer.parentElement.getAttribute("aria-sort"));
wer.click(); note(order() + wer.parentElement.getAttribute("aria-sort"));
first.click(); note(order() + wer.parentElement.getAttribute("aria-sort"));
document.querySelector("#legend button").click(); note(document.querySelectorAll("circle.dim").length);
document.querySelector("#legend button").click(); note(document.querySelectorAll("circle.dim").length);
const at = circle(1).getAttribute("cx");
document.querySelector("input[value=macs]").click(); circle(1).dispatchEvent(new MouseEvent("click"));
setTimeout(() => { note(location.hash + (at !== circle(1).getAttribute("cx")) + model());
  document.title = JSON.stringify(said); }, 100);
"""


@needs_a_browser
def test_pointer_keys_and_buttons(tmp_path):
    result = tradeoff(row("a", wer=5, factor=3, macs=9), row("b", wer=9, factor=1), row("c", wer=7, factor=2))
    # the page's policy runs no script but its own: this one is added to it
    allowed = base64.b64encode(hashlib.sha256(HANDS.encode()).digest()).decode()
    driven = page(result, "t").replace("script-src", f"script-src 'sha256-{allowed}'")
    driven = driven.replace("</body>", f"<script>{HANDS}</script></body>")
    (tmp_path / "tradeoff.html").write_text(driven, encoding="utf-8")
    said = json.loads(html.unescape(re.search("<title>(.*?)</title>", opened(tmp_path)).group(1)))
    assert said[:5] == ["b", "-", "c", "1a", "-"]
    assert said[5:8] == ["132ascending", "231descending", "123null"]
    assert said[8:] == ["2", "0", "#x=macs&row=1truea"]


@needs_a_browser
def test_an_address_that_leads_nowhere_shows_the_page(tmp_path):
    # one row, without errors and with all costs alike at their smallest
    (tmp_path / "tradeoff.html").write_text(page(tradeoff(row(wer=0.0)), "t"), encoding="utf-8")
    dom = opened(tmp_path, "#x=nonsense&row=77&log=1")
    assert tooltip(dom) is None and dom.count("data-row=") == 2 and "NaN" not in dom.partition("<script")[0]
