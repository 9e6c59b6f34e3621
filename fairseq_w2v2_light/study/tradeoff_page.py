"""The trade-off as one HTML page that needs nothing else: no network, no other files. Without fairseq."""

import base64
import hashlib
import json
from html import escape

from .tradeoff import Row, Tradeoff, axes, cells, describe, labels

STYLE = """
:root {
  color-scheme: light dark;
  --back: #ffffff; --panel: #f6f7f9; --text: #1b1f24; --soft: #5c6773; --line: #d9dee4; --grid: #e9ecf0;
  --front: #8a94a0; --chosen: #e4effa;
  --c0: #0072b2; --c1: #d55e00; --c2: #008f6b; --c3: #b5519c;
  --c4: #8a6d00; --c5: #3d9bd6; --c6: #6a3db8; --c7: #4d5763;
}
@media (prefers-color-scheme: dark) {
  :root {
    --back: #14171b; --panel: #1d2127; --text: #e6e9ed; --soft: #9aa5b1; --line: #363d46; --grid: #262b32;
    --front: #7d8894; --chosen: #20344a;
    --c0: #4ea8e6; --c1: #ff8a4c; --c2: #35c79a; --c3: #e58fd0;
    --c4: #e0c04a; --c5: #94d2ff; --c6: #b79bf5; --c7: #b8c1cb;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.45 system-ui, sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 40px; }
h1 { font-size: 1.45rem; line-height: 1.25; margin: 0 0 6px; overflow-wrap: anywhere; }
.about { color: var(--soft); font-size: .87rem; margin: 0 0 18px; max-width: 100ch; overflow-wrap: anywhere; }
.controls { display: flex; flex-wrap: wrap; gap: 8px 16px; align-items: center; margin-bottom: 10px; }
fieldset { display: flex; flex-wrap: wrap; border: 1px solid var(--line); border-radius: 8px; padding: 0; margin: 0; }
fieldset legend { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
fieldset label { cursor: pointer; padding: 5px 12px; border-radius: 7px; }
fieldset label:has(:checked) { background: var(--text); color: var(--back); }
fieldset label:has(:focus-visible) { outline: 2px solid var(--c0); outline-offset: 2px; }
fieldset input { position: absolute; opacity: 0; width: 0; height: 0; }
.check { color: var(--soft); cursor: pointer; }
#legend { display: flex; flex-wrap: wrap; gap: 4px 6px; align-items: center; margin: 0 0 4px; }
#legend button {
  font: inherit; font-size: .87rem; color: inherit; background: none; cursor: pointer; max-width: 100%;
  border: 1px solid transparent; border-radius: 999px; padding: 2px 10px 2px 6px;
  display: inline-flex; align-items: center; gap: 6px;
}
#legend button span { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
#legend button:hover { background: var(--panel); }
#legend button[aria-pressed="true"] { border-color: var(--line); background: var(--panel); }
#legend svg { flex: none; }
.key { font-size: .87rem; color: var(--soft); display: inline-flex; align-items: center; gap: 6px; padding: 2px 6px; }
#chart { position: relative; }
#chart > svg { display: block; width: 100%; overflow: visible; }
#chart text { fill: var(--soft); font-size: 12px; }
#chart text.title { fill: var(--text); font-size: 13px; }
#chart text.name { fill: var(--text); pointer-events: none; }
.grid { stroke: var(--grid); }
.axis { stroke: var(--line); }
.front { fill: none; stroke: var(--front); stroke-width: 1.5; stroke-dasharray: 5 4; }
circle { stroke-width: 2.5; cursor: pointer; transition: opacity .15s; }
circle:focus { outline: none; }
/* over what the script paints */
circle.hot { stroke: var(--text) !important; stroke-width: 3; }
.dim { opacity: .13; }
#tip {
  position: absolute; z-index: 2; pointer-events: none; max-width: min(320px, 100%); padding: 8px 12px;
  background: var(--back); border: 1px solid var(--line); border-radius: 8px; font-size: .84rem;
  box-shadow: 0 4px 18px rgb(0 0 0 / .18);
}
#tip[hidden] { display: none; }
#tip strong { display: block; overflow-wrap: anywhere; margin-bottom: 2px; }
#tip dl { display: grid; grid-template-columns: auto auto; gap: 0 14px; margin: 0; }
#tip small { display: block; color: var(--soft); overflow-wrap: anywhere; margin-top: 4px; }
#tip dt { color: var(--soft); }
#tip dd { margin: 0; text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin-top: 22px; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-size: .82rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
tbody tr:last-child td { border-bottom: 0; }
th { background: var(--panel); font-weight: 600; white-space: normal; vertical-align: bottom; }
.text { text-align: left; }
td.text:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 9em; }
th button { font: inherit; color: inherit; text-align: inherit; background: none; border: 0; padding: 0; }
th button, tbody tr { cursor: pointer; }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
tbody tr.hot { background: var(--panel); }
tbody tr[aria-current="true"] { background: var(--chosen); }
.note { color: var(--soft); font-size: .84rem; max-width: 100ch; }
@media print { .controls { display: none; } }
"""

SCRIPT = """
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const chart = document.getElementById("chart"), tip = document.getElementById("tip");
  const legend = document.getElementById("legend"), log = document.getElementById("log");
  const body = document.querySelector("tbody"), lines = [...body.rows];
  // pixels: the width of a letter, about, and a point
  const LETTER = 6.9, RADIUS = 6.5;
  let circles = [], places = [], emphasised = -1;

  // what is shown stands in the address, so that it can be linked to: #x=macs&log=1&row=3
  const state = () => {
    const given = new URLSearchParams(location.hash.slice(1));
    const axis = data.axes.find(one => one.key === given.get("x")) || data.axes[0];
    const row = /^[0-9]+$/.test(given.get("row") || "") ? Number(given.get("row")) - 1 : -1;
    return {axis, log: given.get("log") === "1", row: row < data.rows.length ? row : -1};
  };
  const go = change => {
    const now = state(), next = {x: now.axis.key, log: now.log, row: now.row, ...change};
    const parts = [`x=${next.x}`];
    if (next.log) parts.push("log=1");
    if (next.row >= 0) parts.push(`row=${next.row + 1}`);
    location.replace("#" + parts.join("&"));
  };

  const svg = (name, attributes, parent, text) => {
    const made = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.append(made);
    return made;
  };
  const html = (name, parent, text) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };

  // eight colours, then the same ones hollow, then half filled
  const paint = (circle, model) => {
    const colour = `var(--c${model % 8})`, fill = [1, 0, 0.4][Math.floor(model / 8) % 3];
    circle.style.fill = fill ? colour : "var(--back)";
    circle.style.fillOpacity = fill || 1;
    circle.style.stroke = colour;
  };

  // from zero, unless the values lie close together; never so that a small difference fills the chart
  const range = (values, logarithmic) => {
    const low = Math.min(...values), high = Math.max(...values);
    if (logarithmic) return low === high ? [low / 2, high * 2] : [low / 1.15, high * 1.15];
    const from = high > low && low > 0.4 * high ? Math.min(0.9 * low, 0.6 * high) : 0;
    return [from, high + 0.08 * (high - from || 1)];
  };
  const ticks = ([low, high], most, logarithmic) => {
    const found = [];
    if (logarithmic && high / low > 3) {
      const wide = high / low > 10 ** most;
      for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
        for (const digit of wide ? [1] : high / low > 60 ? [1, 3] : [1, 2, 5]) {
          const value = digit * 10 ** power;
          if (value >= low && value <= high) found.push(value);
        }
      return found;
    }
    const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
    const step = power * [1, 2, 5, 10].find(factor => factor * power >= rough);
    for (let number = Math.ceil(low / step - 1e-9); number * step <= high + 1e-9 * step; number++)
      found.push(number * step);
    return found;
  };
  const written = value => String(Number(value.toPrecision(6)));

  const draw = () => {
    const {axis, log: logarithmic} = state();
    const focused = circles.indexOf(document.activeElement);
    chart.querySelector("svg")?.remove();
    const width = Math.max(chart.clientWidth, 240), height = Math.min(Math.max(width * 0.5, 300), 480);
    const left = 54, right = width - 14, top = 12, bottom = height - 46;
    const root = svg("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "group",
      "aria-label": `Word error rate against ${axis.unit}`});
    chart.prepend(root);
    const costs = data.rows.map(row => row.costs[axis.key]), rates = data.rows.map(row => row.wer);
    const across = range(costs, logarithmic), up = range(rates, false);
    const bend = logarithmic ? Math.log : value => value;
    const x = value => left + (right - left) * (bend(value) - bend(across[0])) / (bend(across[1]) - bend(across[0]));
    const y = value => bottom - (bottom - top) * (value - up[0]) / (up[1] - up[0]);
    for (const value of ticks(up, Math.max(3, (bottom - top) / 56), false)) {
      svg("line", {class: "grid", x1: left, x2: right, y1: y(value), y2: y(value)}, root);
      svg("text", {x: left - 8, y: y(value) + 4, "text-anchor": "end"}, root, written(value));
    }
    for (const value of ticks(across, Math.max(3, (right - left) / 110), logarithmic)) {
      svg("line", {class: "grid", x1: x(value), x2: x(value), y1: top, y2: bottom}, root);
      svg("text", {x: x(value), y: bottom + 18, "text-anchor": "middle"}, root, written(value));
    }
    svg("path", {class: "axis", fill: "none", d: `M${left} ${top}V${bottom}H${right}`}, root);
    svg("text", {class: "title", x: (left + right) / 2, y: height - 6, "text-anchor": "middle"}, root, axis.unit);
    svg("text", {class: "title", "text-anchor": "middle", transform: `translate(13 ${(top + bottom) / 2}) rotate(-90)`},
      root, "WER %");

    places = data.rows.map((row, index) => [x(costs[index]), y(rates[index])]);
    const front = data.rows.flatMap((row, index) => row.fronts.includes(axis.key) ? [places[index]] : []);
    front.sort((one, other) => one[0] - other[0] || other[1] - one[1]);
    const steps = front.map(([a, b], index) => index ? `H${a}V${b}` : `M${a} ${top}V${b}`).join("");
    svg("path", {class: "front", d: `${steps}H${right}`}, root);

    circles = data.rows.map((row, index) => {
      const [cx, cy] = places[index];
      const circle = svg("circle", {cx, cy, r: RADIUS, tabindex: 0, role: "button", "data-row": index + 1,
        "aria-label": row.cells.map(cell => cell.join(": ")).join(", ")}, root);
      paint(circle, row.model);
      circle.addEventListener("pointerenter", () => show(index));
      circle.addEventListener("pointerleave", () => show(state().row));
      circle.addEventListener("focus", () => show(index));
      circle.addEventListener("blur", () => show(state().row));
      circle.addEventListener("click", () => go({row: state().row === index ? -1 : index}));
      circle.addEventListener("keydown", event => key(event, index));
      return circle;
    });
    names(root, left, right, top, bottom, axis);
    emphasise();
    if (focused >= 0) circles[focused].focus();
    show(state().row);
  };

  // the rows whose points lie on one another, such as one model in several dtypes against its MACs
  const together = index => [...places.keys()].filter(other =>
    Math.hypot(places[other][0] - places[index][0], places[other][1] - places[index][1]) < 2);

  // names beside the points, those of the front first; where there is no room, the tooltip has them
  const names = (root, left, right, top, bottom, axis) => {
    const taken = places.map(([a, b]) => [a - RADIUS, b - RADIUS, a + RADIUS, b + RADIUS]);
    const order = [...places.keys()];
    const rank = index => data.rows[index].fronts.includes(axis.key) ? 0 : 1;
    order.sort((one, other) => rank(one) - rank(other) || one - other);
    for (const index of order) {
      const here = together(index);
      if (order.find(other => here.includes(other)) !== index) continue;
      const text = [...new Set(here.map(other => data.rows[other].label))].join(", ");
      const long = text.length * LETTER, [a, b] = places[index];
      const boxes = [[9, -14], [9, 1], [-9 - long, -14], [-9 - long, 1], [-long / 2, -22], [-long / 2, 9]]
        .map(([dx, dy]) => [a + dx, b + dy, a + dx + long, b + dy + 13]);
      const free = boxes.find(box => box[0] >= left && box[2] <= right + 10 && box[1] >= top - 8 && box[3] <= bottom
        && !taken.some(other => box[0] < other[2] && box[2] > other[0] && box[1] < other[3] && box[3] > other[1]));
      if (!free) continue;
      taken.push(free);
      svg("text", {class: "name", x: free[0], y: free[1] + 11, "data-name": index}, root, text);
    }
  };

  const key = (event, index) => {
    const order = [...places.keys()].sort((one, other) => places[one][0] - places[other][0] || one - other);
    const step = {ArrowRight: 1, ArrowUp: 1, ArrowLeft: -1, ArrowDown: -1}[event.key];
    if (step) circles[order[(order.indexOf(index) + step + order.length) % order.length]].focus();
    else if (event.key === "Enter" || event.key === " ") go({row: index});
    else if (event.key === "Escape") go({row: -1});
    else return;
    event.preventDefault();
  };

  const show = index => {
    const spot = index < 0 ? [] : together(index);
    circles.forEach((circle, number) => circle.classList.toggle("hot", spot.includes(number)));
    lines.forEach(line => line.classList.toggle("hot", Number(line.dataset.row) === index + 1));
    tip.hidden = index < 0;
    if (index < 0) return;
    const [[, model], [, point], ...rest] = data.rows[index].cells;
    tip.replaceChildren();
    html("strong", tip, model);
    html("span", tip, point);
    const list = html("dl", tip);
    for (const [name, value] of rest) {
      html("dt", list, name);
      html("dd", list, value);
    }
    const others = spot.filter(other => other !== index)
      .map(other => data.rows[other].cells.slice(0, 3).map(cell => cell[1]).join(" "));
    if (others.length) html("small", tip, `on the same spot: ${others.join("; ")}`);
    const [a, b] = places[index], wide = tip.offsetWidth, high = tip.offsetHeight, room = chart.clientWidth;
    const beside = a + 16 + wide <= room ? a + 16 : a - 16 - wide;
    const fits = beside >= 0;
    tip.style.left = `${fits ? beside : Math.max(0, Math.min(a - wide / 2, room - wide))}px`;
    tip.style.top = `${fits ? Math.max(0, Math.min(b - high / 2, chart.clientHeight - high)) : b + 16}px`;
  };

  const emphasise = () => {
    const faint = index => emphasised >= 0 && data.rows[index].model !== emphasised;
    circles.forEach((circle, index) => circle.classList.toggle("dim", faint(index)));
    for (const name of chart.querySelectorAll(".name")) name.classList.toggle("dim", faint(Number(name.dataset.name)));
    for (const button of legend.querySelectorAll("button"))
      button.setAttribute("aria-pressed", Number(button.dataset.model) === emphasised);
  };
  data.models.forEach((model, number) => {
    const button = html("button", legend);
    button.type = "button";
    button.dataset.model = number;
    button.title = `Show ${model} alone`;
    const picture = svg("svg", {width: 16, height: 16, "aria-hidden": "true"}, button);
    paint(svg("circle", {cx: 8, cy: 8, r: 5}, picture), number);
    html("span", button, model);
    button.addEventListener("click", () => {
      emphasised = emphasised === number ? -1 : number;
      emphasise();
    });
  });
  const mark = html("span", legend);
  mark.className = "key";
  svg("path", {class: "front", d: "M0 8H26"}, svg("svg", {width: 26, height: 16, "aria-hidden": "true"}, mark));
  html("span", mark, "Pareto front");

  for (const line of lines) {
    const index = Number(line.dataset.row) - 1;
    line.addEventListener("pointerenter", () => show(index));
    line.addEventListener("pointerleave", () => show(state().row));
    line.addEventListener("click", () => go({row: state().row === index ? -1 : index}));
  }
  document.querySelectorAll("th button").forEach((button, column) => button.addEventListener("click", () => {
    const head = button.parentElement, down = head.getAttribute("aria-sort") === "ascending";
    for (const other of head.parentElement.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = line => line.cells[column].dataset.value;
    const compare = head.classList.contains("text")
      ? (one, other) => value(one).localeCompare(value(other)) : (one, other) => value(one) - value(other);
    body.append(...lines.slice().sort((one, other) => down ? compare(other, one) : compare(one, other)));
  }));

  const apply = () => {
    const now = state();
    for (const choice of document.getElementsByName("x")) choice.checked = choice.value === now.axis.key;
    log.checked = now.log;
    for (const line of lines) line.setAttribute("aria-current", Number(line.dataset.row) === now.row + 1);
    draw();
  };
  for (const choice of document.getElementsByName("x")) choice.addEventListener("change", () => go({x: choice.value}));
  log.addEventListener("change", () => go({log: log.checked}));
  window.addEventListener("hashchange", apply);
  let before = 0;
  new ResizeObserver(() => {
    if (chart.clientWidth === before) return;
    before = chart.clientWidth;
    draw();
  }).observe(chart);
  apply();
})();
"""


def page(result: Tradeoff, title: str) -> str:
    """The HTML of a page with a chart of WER against each cost, and the table.

    Names may hold anything: they stand in the page as text only, and its policy runs no script but its own and loads
    nothing. `#x=macs&row=3` in the address chooses an axis (a field of `Row`) and shows the third row.
    """
    seconds = result.about["seconds"]
    head, table = cells(result.rows, seconds)
    models = list(dict.fromkeys(row.model for row in result.rows))
    data = {
        "axes": [axis._asdict() for axis in axes(seconds)],
        "models": models,
        "rows": [
            {
                "model": models.index(row.model),
                "label": _short(label),
                "wer": row.wer,
                "costs": {axis.key: getattr(row, axis.key) / axis.scale for axis in axes()},
                "fronts": row.pareto,
                "cells": list(zip(head, texts)),
            }
            for row, texts, label in zip(result.rows, table, labels(result.rows))
        ],
    }
    choices = "".join(
        f'<label><input type="radio" name="x" value="{axis.key}">{escape(axis.name)}</label>' for axis in axes(seconds)
    )
    headings = "".join(
        f'<th scope="col"{_text(column)}><button type="button">{escape(name)}</button></th>'
        for column, name in enumerate(head)
    )
    lines = "\n".join(
        f'<tr id="row-{number}" data-row="{number}">'
        + "".join(
            f'<td{_text(column)} data-value="{escape(str(value))}">{escape(text)}</td>'
            for column, (value, text) in enumerate(zip(_values(row), texts))
        )
        + "</tr>"
        for number, (row, texts) in enumerate(zip(result.rows, table), start=1)
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode()
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; img-src data:">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>{STYLE}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="about">{escape(describe(result.about))}</p>
<div class="controls">
<fieldset><legend>Cost on the horizontal axis</legend>{choices}</fieldset>
<label class="check"><input type="checkbox" id="log"> logarithmic</label>
</div>
<div id="legend"></div>
<div id="chart"><noscript>The chart needs JavaScript; the table has all its numbers.</noscript>
<div id="tip" role="tooltip" hidden></div></div>
<div class="scroll"><table>
<thead><tr>{headings}</tr></thead>
<tbody>
{lines}
</tbody>
</table></div>
<p class="note">On the Pareto front: no other row is cheaper and at least as accurate, or more accurate and at most as
expensive. S, D, I: words substituted, deleted, inserted. MiB: of the weights as stored in that dtype.</p>
</main>
<script type="application/json" id="data">{_json(data)}</script>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _values(row: Row):
    """What the columns of `cells` are sorted by."""
    return (
        *(row.model, row.operating_point, row.dtype, row.parameters, row.bytes, row.macs, row.real_time_factor),
        *(row.speed_up, row.wer, -1 if row.cer is None else row.cer),
        *(row.substitutions, row.deletions, row.insertions, row.words, len(row.pareto)),
    )


def _text(column: int) -> str:
    return ' class="text"' if column in (0, 1, 2, 14) else ""


def _short(name: str, most: int = 28) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _json(data) -> str:
    """JSON that cannot end the element it stands in, whatever its texts are."""
    text = json.dumps(data)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
