"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const frame = page.frame;
  const TOP = 10;
  const dashes = ["none", "7 4", "2 3"];

  // A number with four significant digits.
  const short = (value) => (value === null ? "not finite" : Number(value.toPrecision(4)).toString());

  // Round numbers, 1, 2 or 5 times a power of ten apart, that span low to high.
  function ticks(low, high) {
    if (high <= low) {
      const half = (Math.abs(low) || 1) / 2;
      low -= half;
      high += half;
    }
    const raw = (high - low) / 4;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= raw * (1 - 1e-9));
    const found = [];
    for (let i = Math.floor(low / step + 1e-9); i <= Math.ceil(high / step - 1e-9); i += 1) found.push(i * step);
    return found;
  }

  // Powers of ten that span low to high, at most six of them.
  function powers(low, high) {
    const first = Math.floor(Math.log10(low) + 1e-9);
    const last = Math.max(first + 1, Math.ceil(Math.log10(high) - 1e-9));
    const step = Math.ceil((last - first) / 5);
    const found = [];
    for (let i = first; i < last + step; i += step) found.push(10 ** i);
    return found;
  }

  // Means over `width` neighbouring values, at the middle of each value's neighbours; gaps stay out of the means.
  function smoothed(values, width) {
    const before = Math.floor((width - 1) / 2);
    return values.map((value, i) => {
      const start = Math.max(0, Math.min(i - before, values.length - width));
      const part = values.slice(start, start + width).filter((v) => v !== null);
      return value === null || !part.length ? null : part.reduce((a, b) => a + b, 0) / part.length;
    });
  }

  // Whole cycles of the schedule, about a twentieth of the curve; 1 where there are few values.
  function windowOf(series) {
    const cycle = page.runs[series.run].cycle;
    const width = cycle * Math.max(1, Math.round(series.y.length / 20 / cycle));
    return series.y.length >= 3 * width ? width : 1;
  }

  function make(parent, name, attributes, text) {
    const element = document.createElementNS(parent.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  const visible = () => {
    const boxes = [...document.querySelectorAll(".show")];
    return new Set(boxes.length ? boxes.filter((b) => b.checked).map((b) => Number(b.value)) : page.runs.keys());
  };

  const charts = [...document.querySelectorAll(".chart")].map((box) => ({
    box,
    svg: box.querySelector("svg"),
    readout: box.parentElement.querySelector(".readout"),
    data: page.charts[Number(box.dataset.chart)],
    at: null,
  }));

  function draw(chart) {
    const { svg, data } = chart;
    const log = find("log").checked;
    const smooth = find("smooth").checked;
    const shown = visible();
    svg.replaceChildren();
    chart.scale = null;
    const usable = (v) => v !== null && (!log || v > 0);
    const all = data.series.filter((s) => shown.has(s.run));
    const lines = all.map((s) => ({ ...s, mean: smooth && windowOf(s) > 1 ? smoothed(s.y, windowOf(s)) : null }));
    const values = lines.flatMap((s) => s.y).filter(usable);
    if (!values.length) {
      const why = !all.length ? "no run is shown" : log ? "no value above 0" : "no finite value";
      make(svg, "text", { x: frame.width / 2, y: frame.height / 2, "text-anchor": "middle" }, why);
      return;
    }

    // Axes: the same iterations in all charts of the page.
    const least = values.reduce((a, b) => Math.min(a, b));
    const most = values.reduce((a, b) => Math.max(a, b));
    const rows = log ? powers(least, most) : ticks(least, most);
    const on = log ? Math.log10 : (v) => v;
    const [low, high] = [on(Math.min(rows[0], least)), on(Math.max(rows[rows.length - 1], most))];
    const last = Math.max(2, ...page.charts.flatMap((c) => c.series.map((s) => s.x[s.x.length - 1])));
    const x = (i) => frame.left + (i / last) * (frame.right - frame.left);
    const y = (v) => TOP + ((high - on(v)) / (high - low)) * (frame.bottom - TOP);
    for (const value of rows) {
      make(svg, "line", { class: "grid", x1: frame.left, x2: frame.right, y1: y(value), y2: y(value) });
      make(svg, "text", { x: frame.left - 6, y: y(value) + 3.5, "text-anchor": "end" }, short(value));
    }
    for (const value of ticks(0, last).filter((v) => v <= last && Number.isInteger(v)))
      make(svg, "text", { x: x(value), y: frame.bottom + 14, "text-anchor": "middle" }, value.toLocaleString("en"));
    make(svg, "line", { class: "axis", x1: frame.left, x2: frame.right, y1: frame.bottom, y2: frame.bottom });
    make(svg, "text", { x: frame.right, y: frame.height - 3, "text-anchor": "end" }, "iteration");

    // Curves, interrupted where a value is missing.
    const path = (xs, ys) => {
      let pen = "M";
      return xs.map((i, k) => {
        if (!usable(ys[k])) {
          pen = "M";
          return "";
        }
        const part = `${pen}${x(i).toFixed(1)} ${y(ys[k]).toFixed(1)}`;
        pen = "L";
        return part;
      }).join("");
    };
    for (const line of lines) {
      const look = { "stroke-dasharray": dashes[Math.floor(line.run / 8) % dashes.length] };
      const group = make(svg, "g", { class: `c${line.run % 8}`, "data-run": line.run });
      if (line.mean) make(group, "path", { class: "raw", d: path(line.x, line.y) });
      make(group, "path", { class: "mean", d: path(line.x, line.mean || line.y), ...look });
      if (line.x.length <= 40 && !line.mean)
        line.x.forEach((i, k) => usable(line.y[k]) && make(group, "circle", { class: "point", cx: x(i), cy: y(line.y[k]), r: 2.5 }));
    }
    chart.cursor = make(svg, "line", { class: "cursor", y1: TOP, y2: frame.bottom, visibility: "hidden" });
    chart.scale = { x, last, lines };
    if (chart.at !== null) read(chart, chart.at);
  }

  // The values nearest to an iteration, in words below the chart.
  function read(chart, iteration) {
    if (!chart.scale) return;
    const { x, lines } = chart.scale;
    const known = [...new Set(lines.flatMap((s) => s.x))];
    const at = known.reduce((a, b) => (Math.abs(b - iteration) < Math.abs(a - iteration) ? b : a));
    chart.at = at;
    chart.cursor.setAttribute("visibility", "visible");
    chart.cursor.setAttribute("x1", x(at));
    chart.cursor.setAttribute("x2", x(at));
    const parts = lines.filter((s) => s.x.includes(at)).map((s) => {
      const k = s.x.indexOf(at);
      const mean = s.mean ? ` (mean ${short(s.mean[k])})` : "";
      return `${lines.length > 1 ? `${page.runs[s.run].name} ` : ""}${short(s.y[k])}${mean}`;
    });
    chart.readout.textContent = `iteration ${at.toLocaleString("en")}: ${parts.join(", ")}`;
  }

  for (const chart of charts) {
    chart.box.addEventListener("pointermove", (event) => {
      if (!chart.scale) return;
      const area = chart.svg.getBoundingClientRect();
      const place = ((event.clientX - area.left) / area.width) * frame.width;
      read(chart, ((place - frame.left) / (frame.right - frame.left)) * chart.scale.last);
    });
    chart.box.addEventListener("keydown", (event) => {
      if (!chart.scale) return;
      const known = [...new Set(chart.scale.lines.flatMap((s) => s.x))].sort((a, b) => a - b);
      const here = chart.at === null ? -1 : known.indexOf(chart.at);
      const next = {
        ArrowLeft: Math.max(0, (here < 0 ? known.length : here) - 1),
        ArrowRight: Math.min(known.length - 1, here + 1),
        Home: 0,
        End: known.length - 1,
      }[event.key];
      if (next === undefined) return;
      event.preventDefault();
      read(chart, known[next]);
    });
  }

  function drawAll() {
    charts.forEach(draw);
    const widths = new Set(page.charts.flatMap((c) => c.series.map(windowOf)).filter((w) => w > 1));
    const text = [...widths].sort((a, b) => a - b).join(", ");
    find("smoothing").textContent = find("smooth").checked && widths.size
      ? `Bold: mean over ${text} neighbouring values (whole cycles of the schedule). Faint: every value.`
      : "Every value.";
  }

  if (charts.length) {
    for (const box of document.querySelectorAll("#smooth, #log, .show")) box.addEventListener("change", drawAll);
    drawAll();
  }

  // Sample sheets: the newest one of each run up to the chosen iteration, its first one before that.
  const slider = find("iteration");
  if (slider) {
    const images = [...document.querySelectorAll("img.sheet")];
    slider.addEventListener("input", () => {
      const wanted = page.iterations[Number(slider.value)];
      find("at").textContent = wanted.toLocaleString("en");
      slider.setAttribute("aria-valuetext", `iteration ${wanted}`);
      for (const image of images) {
        const sheets = page.samples[Number(image.dataset.sheet)];
        const k = Math.max(0, sheets.iterations.filter((i) => i <= wanted).length - 1);
        image.src = sheets.pictures[k];
        image.alt = `samples of ${image.dataset.run}, iteration ${sheets.iterations[k]}`;
        document.querySelector(`[data-caption="${image.dataset.sheet}"]`).textContent =
          `iteration ${sheets.iterations[k].toLocaleString("en")}`;
      }
    });
  }
})();
