"use strict";
(() => {
  const all = (selector) => [...document.querySelectorAll(selector)];
  const one = (selector) => document.querySelector(selector);
  const root = document.documentElement;

  // What a reader has chosen is kept while the page loads itself again. A browser may refuse storage to a file.
  const memory = {
    get(name) { try { return sessionStorage.getItem(`infopo ${name}`); } catch { return null; } },
    set(name, value) { try { sessionStorage.setItem(`infopo ${name}`, value); } catch { /* not kept */ } },
  };

  // --- curves ---

  let figures = [];
  const read = (id) => JSON.parse(one(id)?.textContent || "{}");
  const panels = read("#curves"), colours = read("#colours");
  const model = (name, values) => new (Bokeh.Models.get(name))(values);

  // The columns of a curve are bytes in base64, little-endian as in the file whatever the machine is.
  function column(text, kind) {
    if (text === null) return null;
    const bytes = Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
    const view = new DataView(bytes.buffer);
    return Float64Array.from({ length: bytes.length / 4 }, (_, i) => view[`get${kind}`](4 * i, true));
  }

  function addCurves(figure) {
    const lines = [], others = [];
    for (const curve of panels[figure.name].curves) {
      const data = { x: column(curve.x, "Int32"), y: column(curve.y, "Float32") };
      if (curve.low !== null) Object.assign(data, { low: column(curve.low, "Float32"), high: column(curve.high, "Float32") });
      const data_source = model("ColumnDataSource", { data });
      const line_color = colours[curve.run % colours.length], tags = [curve.run];
      const field = (name) => ({ field: name });
      const add = (list, glyph, name = null) => list.push(model("GlyphRenderer", { data_source, glyph, tags, name }));
      if (curve.low !== null) add(others, model("VArea", { x: field("x"), y1: field("low"), y2: field("high"), fill_color: line_color, fill_alpha: 0.15 }));
      add(lines, model("Line", { x: field("x"), y: field("y"), line_color, line_width: 1.8, line_dash: dashes[curve.dash] }), curve.name);
      if (data.x.length <= 40) add(others, model("Scatter", { x: field("x"), y: field("y"), size: { value: 5 }, line_color: { value: line_color }, fill_color: { value: line_color } }));
    }
    figure.renderers = [...others, ...lines];
    figure.center = [...figure.center, model("Span", { name: "mark", dimension: "height", line_color: "#888888", visible: false })];
    for (const tool of figure.toolbar.tools) if (tool.type === "HoverTool") tool.renderers = lines;
  }

  const dashes = { solid: [], dashed: [6, 4], dotted: [2, 4], dotdash: [2, 4, 6, 4] };

  async function draw() {
    if (!one("#figures")) return;
    const Document = Bokeh.Document || Bokeh.require("document").Document;
    const doc = Document.from_json(read("#figures"));
    figures = doc.roots();
    figures.forEach(addCurves);
    const places = figures.map((each) => one(`.panel[data-key="${each.name}"] .plot`));
    await Bokeh.embed.add_document_standalone(doc, document.body, places, false);
    figures.forEach((figure, i) => addKeys(figure, places[i]));
    paint();
    show();
    const x = figures[0].x_range;
    for (const [field, end] of [["#from", "start"], ["#to", "end"]]) {
      const write = () => { one(field).value = Math.round(x[end]); };
      x.properties[end].change.connect(write);
      write();
      one(field).addEventListener("change", () => {
        const from = Number(one("#from").value), to = Number(one("#to").value);
        if (from < to) x.setv({ start: from, end: to });
      });
    }
    one("#whole").addEventListener("click", showWhole);
    for (const box of all(".logscale")) box.addEventListener("change", () => rescale(box));
    root.dataset.drawn = "yes";
  }

  function showWhole() {
    const x = figures[0].x_range;
    x.setv({ start: x.reset_start, end: x.reset_end });
    for (const each of figures) if (each.y_range.reset_start !== null) each.y_range.setv({ start: each.y_range.reset_start, end: each.y_range.reset_end });
  }

  // Hovering and dragging need a pointer. With a plot in focus, keys do the same: arrows go from point to point and the
  // values there are written below, + and - zoom about the mark.
  function addKeys(figure, place) {
    const x = figure.x_range, mark = figure.center.find((each) => each.name === "mark");
    const output = place.closest(".panel").querySelector(".at");
    const lines = () => figure.renderers.filter((each) => each.name !== null && each.visible);
    place.tabIndex = 0;
    place.setAttribute("role", "application");
    leaveToPointer(place);

    function read(step) {
      mark.setv({ location: step, visible: step !== null });
      const values = step === null ? [] : lines().flatMap((line) => {
        const { x: steps, y } = line.data_source.data, i = steps.findLastIndex((each) => each <= step);
        return i < 0 ? [] : [`${line.name} ${Number(y[i].toPrecision(4))}${steps[i] < step ? ` (step ${steps[i]})` : ""}`];
      });
      output.textContent = values.length ? `Step ${step}: ${values.join("; ")}` : "";
    }

    function move(key) {
      const steps = [...new Set(lines().flatMap((line) => [...line.data_source.data.x]))]
        .filter((each) => x.start <= each && each <= x.end).sort((a, b) => a - b);
      const at = mark.visible ? mark.location : null;
      const next = { Home: steps.at(0), End: steps.at(-1),
        ArrowRight: at === null ? steps.at(0) : steps.find((each) => each > at),
        ArrowLeft: at === null ? steps.at(-1) : steps.findLast((each) => each < at) }[key];
      if (next !== undefined) read(next);
    }

    function zoom(factor) {
      const middle = mark.visible ? mark.location : (x.start + x.end) / 2, half = factor * (x.end - x.start) / 2;
      x.setv({ start: Math.max(middle - half, x.reset_start), end: Math.min(middle + half, x.reset_end) });
    }

    const does = { "+": () => zoom(0.5), "=": () => zoom(0.5), "-": () => zoom(2), 0: showWhole, Escape: () => read(null) };
    for (const key of ["ArrowLeft", "ArrowRight", "Home", "End"]) does[key] = () => move(key);
    place.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey || !(event.key in does)) return;
      event.preventDefault();
      does[event.key]();
    });
  }

  // Bokeh's own parts take the focus without showing it, and do nothing with keys that `addKeys` does not do.
  function leaveToPointer(part) {
    for (const each of part.querySelectorAll("*")) {
      if (each.hasAttribute("tabindex")) each.tabIndex = -1;
      if (each.shadowRoot) leaveToPointer(each.shadowRoot);
    }
  }

  function rescale(box) {
    const key = box.closest(".panel").dataset.key;
    const each = figures.find((one) => one.name === key);
    const [start, end] = panels[key].ranges[box.checked ? "log" : "linear"];
    each.y_range.setv({ start, end, reset_start: start, reset_end: end });
    each.y_scale = model(box.checked ? "LogScale" : "LinearScale");
    const ticker = model(box.checked ? "LogTicker" : "BasicTicker");
    for (const axis of each.left) axis.ticker = ticker;
    for (const grid of each.center) if (grid.type === "Grid" && grid.dimension === 1) grid.ticker = ticker;
  }

  // --- light and dark ---

  const system = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";

  function paint(dark = isDark()) {
    const ink = dark ? "#e6e9ec" : "#1d2329", quiet = dark ? "#a3adb7" : "#59636e", rule = dark ? "#353d45" : "#d9dee3";
    for (const each of figures) {
      each.outline_line_color = rule;
      for (const axis of [...each.left, ...each.below]) {
        axis.setv({ axis_line_color: quiet, major_tick_line_color: quiet, minor_tick_line_color: null,
          major_label_text_color: ink, axis_label_text_color: quiet });
      }
      for (const grid of each.center) if (grid.type === "Grid") grid.grid_line_color = rule;
    }
    one("#theme").textContent = dark ? "Light" : "Dark";
  }

  one("#theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    memory.set("theme", root.dataset.theme);
    paint();
  });
  system.addEventListener("change", () => paint());
  addEventListener("beforeprint", () => { root.dataset.before = root.dataset.theme || ""; root.dataset.theme = "light"; paint(false); });
  addEventListener("afterprint", () => {
    if (root.dataset.before) root.dataset.theme = root.dataset.before; else delete root.dataset.theme;
    paint();
  });

  // --- runs ---

  const toggles = all(".toggle");

  function show() {
    const shown = new Set(toggles.filter((box) => box.checked).map((box) => Number(box.value)));
    for (const each of figures) for (const renderer of each.renderers) {
      if (renderer.tags.length) renderer.visible = shown.has(renderer.tags[0]);
    }
    for (const part of all("[data-run]")) part.hidden = !shown.has(Number(part.dataset.run));
    memory.set("hidden", JSON.stringify(toggles.filter((box) => !box.checked).map((box) => box.value)));
  }

  const hidden = JSON.parse(memory.get("hidden") || "[]");
  for (const box of toggles) {
    box.checked = !hidden.includes(box.value);
    box.addEventListener("change", show);
  }
  for (const [id, on] of [["#all", true], ["#none", false]]) {
    one(id)?.addEventListener("click", () => { for (const box of toggles) box.checked = on; show(); });
  }

  // --- tables whose columns sort ---

  for (const button of all(".sort")) {
    button.addEventListener("click", () => {
      const heading = button.closest("th"), body = heading.closest("table").tBodies[0];
      const column = heading.cellIndex, up = heading.getAttribute("aria-sort") === "descending";
      // Rows without a value stay at the end.
      const value = (row) => Number(row.cells[column].dataset.value ?? NaN);
      const rows = [...body.rows].sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
        return up ? x - y : y - x;
      });
      body.append(...rows);
      for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
    });
  }

  // --- completions ---

  const search = one("#search"), which = one("#which"), prompts = all("#completions .prompt");

  function filter() {
    const wanted = search.value.trim().toLowerCase();
    let count = 0;
    for (const prompt of prompts) {
      const kind = which.value === "all" || prompt.dataset[which.value] === "True";
      prompt.hidden = !(kind && (!wanted || prompt.textContent.toLowerCase().includes(wanted)));
      count += !prompt.hidden;
    }
    one("#count").textContent = `${count} of ${prompts.length}`;
    memory.set("search", search.value);
  }

  if (search) {
    search.value = memory.get("search") || "";
    search.addEventListener("input", filter);
    which.addEventListener("change", filter);
    filter();
  }

  const theme = memory.get("theme");
  if (theme) root.dataset.theme = theme;
  show();
  paint();
  draw().catch((error) => {
    console.error(error);
    for (const place of all(".plot")) place.textContent = "This curve could not be drawn; its values are below.";
  });
})();
