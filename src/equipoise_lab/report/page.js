"use strict";
(async () => {
  // The page contains its data and plotly in compressed form.
  async function unpack(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  if (typeof DecompressionStream === "undefined") {
    document.querySelectorAll(".plot").forEach((plot) => {
      plot.textContent = "This figure needs a browser from 2023 or later. The tables do not.";
    });
    return;
  }
  const data = JSON.parse(await unpack("data"));
  const script = document.createElement("script");
  script.textContent = await unpack("plotly");
  document.head.append(script);

  const byId = (id) => document.getElementById(id);
  const light = {
    text: "#23262a", quiet: "#62676e", grid: "#e6e4de", page: "#fdfcfa",
    scale: [[0, "#2f7fb8"], [0.25, "#f3f0e9"], [0.55, "#e8954a"], [1, "#7f2a00"]],
  };
  const dark = {
    text: "#e2e4e6", quiet: "#9aa1a9", grid: "#2b3036", page: "#15181c",
    scale: [[0, "#4aa3df"], [0.25, "#262b31"], [0.55, "#c8691c"], [1, "#ffd9a0"]],
  };
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  const hidden = new Set();
  const state = { layer: 0, sort: "domain", text: "", model: data.models.length - 1 };
  let printing = false;

  // ---- theme: the system's, or the one that the reader selected
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const remembered = (() => { try { return localStorage.getItem("equipoise-theme"); } catch { return null; } })();
  let theme = ["light", "dark"].includes(remembered) ? remembered : "auto";
  const isDark = () => !printing && (theme === "dark" || (theme === "auto" && prefersDark.matches));
  function showTheme() {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `theme: ${theme}`;
  }
  byId("theme").addEventListener("click", () => {
    theme = { auto: "light", light: "dark", dark: "auto" }[theme];
    try { localStorage.setItem("equipoise-theme", theme); } catch { /* not allowed on some pages opened from disk */ }
    showTheme();
    draw();
  });

  function themed(layout, colors) {
    const axis = { gridcolor: colors.grid, linecolor: colors.grid, tickfont: { color: colors.quiet, size: 12 } };
    const result = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif", color: colors.text, size: 13 },
      hoverlabel: { bgcolor: colors.page, bordercolor: colors.grid, font: { color: colors.text }, namelength: -1, align: "left" },
    };
    for (const name of Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key)).concat("xaxis", "yaxis")) {
      result[name] = { ...layout[name], ...axis };
    }
    if (layout.coloraxis) {
      result.coloraxis = { ...layout.coloraxis, colorscale: colors.scale, showscale: false };
      delete result.coloraxis.cmid;
    }
    if (printing) result.width = 660;
    return result;
  }

  const drawn = new Map(); // id -> [traces, layout], for saving to files
  function plot(id, traces, layout) {
    if (!byId(id)) return;
    drawn.set(id, [traces, layout]);
    Plotly.react(id, traces, themed(layout, isDark() ? dark : light), options);
  }

  // ---- figures that Python prepared
  function drawFigures() {
    for (const [name, figure] of Object.entries(data.figures)) {
      const traces = figure.data.map((trace) =>
        trace.meta && "strategy" in trace.meta ? { ...trace, visible: !hidden.has(trace.meta.strategy) } : trace);
      plot(`plot-${name}`, traces, figure.layout);
    }
  }

  // ---- experts
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const relative = (row) => { const total = sum(row); return row.map((c) => (total ? (c * row.length) / total : null)); };
  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
  const short = (text) => (text.length > 13 ? `${text.slice(0, 12)}…` : text);
  const layerOf = (model) => Math.min(state.layer, model.load.length - 1);
  const pooled = (load) => load[0].map((_, e) => sum(load.map((row) => row[e])));

  function order(load) {
    const experts = load[0].map((_, e) => e);
    if (state.sort === "number") return experts;
    const total = pooled(load);
    if (state.sort === "load") return experts.sort((a, b) => total[b] - total[a] || a - b);
    const share = load.map(relative);
    const best = experts.map((e) => share.reduce((most, row, d) => ((row[e] || 0) > (share[most][e] || 0) ? d : most), 0));
    return experts.sort((a, b) => best[a] - best[b] || (share[best[b]][b] || 0) - (share[best[a]][a] || 0) || a - b);
  }

  function tokensOf(model, layer, expert, most) {
    const tokens = (model.typical[layer] || [])[expert] || [];
    return tokens.slice(0, most).map(([text, share]) => `“${visible(text)}” (${Math.round(100 * share)} %)`).join(", ");
  }

  function drawHeat(index) {
    const model = data.models[index];
    const layer = layerOf(model);
    const load = model.load[layer];
    const experts = order(load);
    const z = load.map((row) => { const share = relative(row); return experts.map((e) => share[e]); });
    const typical = experts.map((e) => tokensOf(model, layer, e, 4));
    const text = load.map((row, d) => experts.map((e, i) =>
      `${plain(model.domains[d])}, expert ${e}: <b>${z[d][i] === null ? "?" : z[d][i].toFixed(2)} × even</b><br>`
      + `${row[e].toLocaleString("en")} of ${sum(row).toLocaleString("en")} assignments`
      + (typical[i] ? `<br>typical: ${plain(typical[i])}` : "")));
    plot(`heat-${index}`, [{
      type: "heatmap", x: experts.map(String), y: model.domains.map((_, d) => d), z, text, coloraxis: "coloraxis",
      xgap: experts.length > 96 ? 0 : 1, ygap: 1, hovertemplate: "%{text}<extra></extra>",
    }], {
      height: 56 + 21 * model.domains.length,
      margin: { l: 92, r: 6, t: 6, b: 30 },
      coloraxis: { cmin: 0, cmax: data.cap },
      xaxis: {
        type: "category", showticklabels: state.sort === "number" && experts.length <= 32, ticks: "", showgrid: false,
        fixedrange: true, title: { text: state.sort === "number" ? "experts, by id" : "experts, sorted", standoff: 4, font: { size: 12 } },
      },
      yaxis: {
        autorange: "reversed", showgrid: false, zeroline: false, ticks: "", fixedrange: true, tickmode: "array",
        tickvals: model.domains.map((_, d) => d), ticktext: model.domains.map((name) => plain(short(name))),
      },
    });
  }

  function drawAll(index) {
    const model = data.models[index];
    const width = Math.max(...model.load.map((load) => load[0].length));
    const domain = model.domains.indexOf(state.text);
    const text = [];
    const z = model.load.map((load, layer) => {
      const row = relative(domain < 0 ? pooled(load) : load[domain]);
      const experts = row.map((_, e) => e).sort((a, b) => (row[b] || 0) - (row[a] || 0) || a - b);
      text.push(experts.map((e) => `layer ${model.layers[layer]}, expert ${e}: ${row[e] === null ? "?" : row[e].toFixed(2)} × even`));
      return [...experts.map((e) => row[e]), ...Array(width - row.length).fill(null)];
    });
    plot(`all-${index}`, [{
      type: "heatmap", y: model.layers.map((_, l) => l), z, text, coloraxis: "coloraxis", xgap: width > 96 ? 0 : 1,
      ygap: model.layers.length > 24 ? 0 : 1, hovertemplate: "%{text}<extra></extra>",
    }], {
      height: 60 + Math.min(420, 18 * model.layers.length),
      margin: { l: 92, r: 6, t: 6, b: 30 },
      coloraxis: { cmin: 0, cmax: data.cap },
      xaxis: { showticklabels: false, ticks: "", showgrid: false, zeroline: false, fixedrange: true, title: { text: "experts, busiest first", standoff: 4, font: { size: 12 } } },
      yaxis: {
        autorange: "reversed", showgrid: false, zeroline: false, ticks: "", fixedrange: true,
        ...(model.layers.length > 24 ? {} : { tickmode: "array", tickvals: model.layers.map((_, l) => l), ticktext: model.layers.map((name) => plain(`layer ${name}`)) }),
      },
    });
    const element = byId(`all-${index}`);
    if (element && !element.dataset.listens) {
      element.dataset.listens = "1";
      element.on("plotly_click", (event) => chooseLayer(event.points[0].y));
    }
  }

  function drawExpertsTable() {
    const table = byId("experts-table");
    const model = data.models[state.model];
    if (!table || !model) return;
    const layer = layerOf(model);
    const load = model.load[layer];
    const total = pooled(load);
    const share = relative(total);
    const byDomain = load.map(relative);
    const hasPartners = (model.partners[layer] || []).length > 0;
    const head = ["Expert", "Load, × even", "Top domain", "× even in it", ...(hasPartners ? ["Often with"] : []), "Typical tokens"];
    const rows = order(load).map((e) => {
      const best = byDomain.reduce((most, row, d) => ((row[e] || 0) > (byDomain[most][e] || 0) ? d : most), 0);
      const partners = hasPartners ? [model.partners[layer][e].map(([o, s]) => `${o} (${Math.round(100 * s)} %)`).join(", ") || "–"] : [];
      return [
        String(e), share[e] === null ? "?" : share[e].toFixed(2), total[e] ? model.domains[best] : "–",
        total[e] ? (byDomain[best][e] || 0).toFixed(2) : "–", ...partners, tokensOf(model, layer, e, 6) || "–",
      ];
    });
    table.replaceChildren();
    const header = table.createTHead().insertRow();
    for (const title of head) header.append(Object.assign(document.createElement("th"), { scope: "col", textContent: title }));
    const body = table.createTBody();
    for (const row of rows) {
      const line = body.insertRow();
      row.forEach((value, i) => line.append(Object.assign(document.createElement(i ? "td" : "th"), { textContent: value, ...(i ? {} : { scope: "row" }) })));
    }
    makeSortable(table);
    document.querySelectorAll(".shown-layer").forEach((span) => { span.textContent = model.layers[layer]; });
  }

  function drawExperts() {
    data.models.forEach((_, index) => { drawHeat(index); drawAll(index); });
    drawExpertsTable();
  }

  function chooseLayer(layer) {
    state.layer = layer;
    const radio = document.querySelector(`input[name=layer][value="${layer}"]`);
    const select = document.querySelector("select[name=layer]");
    if (radio) radio.checked = true;
    if (select) select.value = String(layer);
    data.models.forEach((_, index) => drawHeat(index));
    drawExpertsTable();
  }

  // ---- load over time
  const bytes = new Map();
  function cellsOf(time) {
    if (!bytes.has(time)) bytes.set(time, Uint8Array.from(atob(time.cells), (c) => c.charCodeAt(0)));
    return bytes.get(time);
  }
  function timeAt(time, step, layer, expert) {
    const [, layers, experts] = time.shape;
    return Math.round(cellsOf(time)[(step * layers + layer) * experts + expert] * time.unit * 100) / 100;
  }
  function timeChoice() {
    const model = Number(byId("time-model").value);
    const strategy = data.models[model].strategy;
    const time = data.times.find((candidate) => candidate.strategy === strategy);
    return [time, time ? Math.min(Number(byId("time-layer").value), time.shape[1] - 1) : 0];
  }
  function drawTime() {
    if (!byId("plot-time")) return;
    const [time, layer] = timeChoice();
    const [, , experts] = time ? time.shape : [0, 0, 0];
    const z = Array.from({ length: experts }, (_, e) => time.steps.map((_, t) => timeAt(time, t, layer, e)));
    plot("plot-time", [{
      type: "heatmap", x: time ? time.steps : [], y: z.map((_, e) => e), z, coloraxis: "coloraxis",
      hovertemplate: "step %{x}, expert %{y}: %{z:.2f} × even<extra></extra>",
    }], {
      height: 120 + Math.min(320, 7 * Math.max(experts, 12)),
      margin: { l: 52, r: 6, t: 6, b: 44 },
      coloraxis: { cmin: 0, cmax: data.cap },
      xaxis: { title: { text: "step", standoff: 8, font: { size: 12 } }, showgrid: false, zeroline: false },
      yaxis: { title: { text: "expert", standoff: 8 }, showgrid: false, zeroline: false, autorange: "reversed" },
    });
  }

  // ---- sortable tables
  function valueOf(cell) {
    const text = cell.firstChild && cell.firstChild.nodeType === Node.TEXT_NODE && cell.firstChild.textContent.trim()
      ? cell.firstChild.textContent.trim() : cell.textContent.trim();
    const number = Number.parseFloat(text.replace(/,/g, "").replace("−", "-").replace(/^\+/, ""));
    return Number.isNaN(number) ? text : number;
  }
  function makeSortable(table) {
    table.querySelectorAll("thead th").forEach((title, column) => {
      const button = Object.assign(document.createElement("button"), { type: "button", className: "sort", textContent: title.textContent });
      title.replaceChildren(button);
      button.addEventListener("click", () => {
        const upwards = title.getAttribute("aria-sort") !== "ascending";
        table.querySelectorAll("thead th").forEach((other) => other.removeAttribute("aria-sort"));
        title.setAttribute("aria-sort", upwards ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].map((row) => [valueOf(row.cells[column]), row]);
        rows.sort(([a], [b]) => {
          if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // numbers first
          const before = typeof a === "number" ? a - b : a.localeCompare(b);
          return upwards ? before : -before;
        });
        table.tBodies[0].append(...rows.map(([, row]) => row));
      });
    });
  }

  // ---- saving to files
  function save(name, blob) {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }
  function csv(rows) {
    const cell = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      return /[",\r\n]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
    };
    return rows.map((row) => row.map(cell).join(",")).join("\r\n") + "\r\n";
  }
  const unplain = (text) => text.replace(/&lt;/g, "<").replace(/&gt;/g, ">").replace(/&amp;/g, "&");
  function rowsOf(source) {
    const [kind, index] = source.split("-");
    if (source === "runs") return [data.table.columns, ...data.table.rows];
    if (kind === "heat") {
      const model = data.models[index];
      const rows = [["strategy", "seed", "layer", "domain", "expert", "load", "tokens"]];
      const layer = layerOf(model);
      model.load[layer].forEach((row, d) => row.forEach((load, e) =>
        rows.push([model.strategy, model.seed, model.layers[layer], model.domains[d], e, load, sum(row) / model.k])));
      return rows;
    }
    if (kind === "all") {
      const model = data.models[index];
      const rows = [["strategy", "seed", "layer", "expert", "load", "text"]];
      const domain = model.domains.indexOf(state.text);
      model.load.forEach((load, layer) => (domain < 0 ? pooled(load) : load[domain]).forEach((value, e) =>
        rows.push([model.strategy, model.seed, model.layers[layer], e, value, state.text || "all"])));
      return rows;
    }
    if (source === "time") {
      const [time, layer] = timeChoice();
      const rows = [["strategy", "seed", "step", "layer", "expert", "relative_load"]];
      if (time) time.steps.forEach((step, t) => {
        for (let e = 0; e < time.shape[2]; e += 1) rows.push([time.strategy, time.seed, step, time.layers[layer], e, timeAt(time, t, layer, e)]);
      });
      return rows;
    }
    const table = byId(source);
    if (table && table.tagName === "TABLE") return [...table.rows].map((row) => [...row.cells].map((c) => c.textContent.trim()));
    const rows = [["name", "x", "y"]];
    for (const trace of data.figures[source.replace("plot-", "")].data) {
      const [x, y] = [values(trace.x), values(trace.y)];
      x.forEach((at, i) => rows.push([unplain(trace.name), at, y[i]]));
    }
    return rows;
  }
  const ARRAYS = { f8: Float64Array, f4: Float32Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, u4: Uint32Array };
  function values(array) { // plotly may pack numbers as {dtype, bdata}
    if (Array.isArray(array) || !array || !array.bdata) return array || [];
    return [...new ARRAYS[array.dtype](Uint8Array.from(atob(array.bdata), (c) => c.charCodeAt(0)).buffer)];
  }
  async function picture(id, format) {
    const [traces, layout] = drawn.get(id);
    const figure = { data: traces, layout: { ...themed(layout, light), paper_bgcolor: "#ffffff" } };
    const size = { width: Math.max(byId(id).clientWidth, 400), height: layout.height || 400 };
    const url = await Plotly.toImage(figure, { format, ...size, scale: format === "png" ? 2 : 1 });
    const content = format === "svg"
      ? decodeURIComponent(url.slice(url.indexOf(",") + 1))
      : Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (c) => c.charCodeAt(0));
    save(`${id}.${format}`, new Blob([content], { type: format === "svg" ? "image/svg+xml" : "image/png" }));
  }
  document.querySelectorAll(".tools").forEach((place) => {
    const add = (name, label, action) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
      button.setAttribute("aria-label", label);
      button.addEventListener("click", action);
      place.append(button);
    };
    const { plot: id, csv: source } = place.dataset;
    if (id) for (const format of ["svg", "png"]) add(format.toUpperCase(), `Save the figure as ${format.toUpperCase()}`, () => picture(id, format));
    if (source) add("CSV", "Save the data as CSV", () => save(`${source}.csv`, new Blob([csv(rowsOf(source === "cost" ? "plot-cost" : source))], { type: "text/csv" })));
  });

  // ---- controls
  document.querySelectorAll("button[data-strategy]").forEach((button) => {
    button.addEventListener("click", () => {
      const strategy = Number(button.dataset.strategy);
      const show = hidden.delete(strategy);
      if (!show) hidden.add(strategy);
      button.setAttribute("aria-pressed", String(show));
      drawFigures();
    });
  });
  document.querySelectorAll("input[name=layer]").forEach((input) => {
    if (input.checked) state.layer = Number(input.value);
    input.addEventListener("change", () => chooseLayer(Number(input.value)));
  });
  const layerSelect = document.querySelector("select[name=layer]");
  if (layerSelect) {
    state.layer = Number(layerSelect.value);
    layerSelect.addEventListener("change", () => chooseLayer(Number(layerSelect.value)));
  }
  const listen = (id, action) => { if (byId(id)) byId(id).addEventListener("change", () => action(byId(id).value)); };
  listen("sort", (value) => { state.sort = value; drawExperts(); });
  listen("text", (value) => { state.text = value; data.models.forEach((_, index) => drawAll(index)); });
  listen("expert-model", (value) => { state.model = Number(value); drawExpertsTable(); });
  listen("time-model", drawTime);
  listen("time-layer", drawTime);

  function draw() {
    drawFigures();
    drawTime();
    drawExperts();
  }
  document.querySelectorAll("table.sortable:not(#experts-table)").forEach(makeSortable);
  prefersDark.addEventListener("change", draw);
  addEventListener("beforeprint", () => { printing = true; draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });
  showTheme();
  draw();
  document.documentElement.dataset.ready = "yes";
})();
