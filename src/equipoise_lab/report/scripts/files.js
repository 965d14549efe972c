// The buttons beside figures and tables: pictures, CSV, Markdown and LaTeX.
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
const ARRAYS = { f8: Float64Array, f4: Float32Array, i1: Int8Array, u1: Uint8Array, i2: Int16Array, u2: Uint16Array, i4: Int32Array, u4: Uint32Array };
function values(array) { // plotly may pack numbers as {dtype, bdata}
  if (Array.isArray(array) || !array || !array.bdata) return array || [];
  return [...new ARRAYS[array.dtype](Uint8Array.from(atob(array.bdata), (c) => c.charCodeAt(0)).buffer)];
}

/** The data of a figure or of the runs, with the headings first. */
const SOURCES = {
  runs: () => [data.table.columns, ...data.table.rows],
  heat: (index) => mapRows(data.models[index], layerOf(data.models[index])),
  second: (index) => mapRows(data.models[index], Math.min(state.second, data.models[index].layers.length - 1)),
  all: (index) => {
    const model = data.models[index];
    const rows = [["strategy", "seed", "layer", "expert", "load", "text"]];
    const domain = model.domains.indexOf(state.text);
    lastMap(model).load.forEach((load, layer) => (domain < 0 ? pooled(load) : load[domain]).forEach((value, e) =>
      rows.push([model.strategy, model.seed, model.layers[layer], e, value, state.text || "all"])));
    return rows;
  },
  time: () => {
    const [time, layer] = timeChoice();
    const rows = [["strategy", "seed", "step", "layer", "expert", "relative_load"]];
    time.steps.forEach((step, t) => {
      for (let e = 0; e < time.shape[2]; e += 1) rows.push([time.strategy, time.seed, step, time.layers[layer], e, timeAt(time, t, layer, e)]);
    });
    return rows;
  },
  plot: (name) => {
    const rows = [["name", "x", "y"]];
    for (const trace of data.figures[name].data) {
      const [x, y] = [values(trace.x), values(trace.y)];
      x.forEach((at, i) => rows.push([unplain(trace.name), at, y[i]]));
    }
    return rows;
  },
};
function mapRows(model, layer) {
  const map = mapOf(model);
  const rows = [["strategy", "seed", "step", "layer", "domain", "expert", "load", "tokens"]];
  map.load[layer].forEach((row, d) => row.forEach((load, e) =>
    rows.push([model.strategy, model.seed, map.step, model.layers[layer], model.domains[d], e, load, sum(row) / model.k])));
  return rows;
}
function rowsOf(source) {
  if (byId(source) && byId(source).tagName === "TABLE") return shownRows(byId(source));
  const [kind, part] = source.split("-");
  return SOURCES[kind](part);
}

async function picture(id, format) {
  const width = Math.max(byId(id).clientWidth, 660);
  const [traces, layout] = whole(id, width);
  const figure = { data: traces, layout: { ...themed(layout, light), paper_bgcolor: "#ffffff" } };
  const url = await Plotly.toImage(figure, { format, width, height: layout.height, scale: format === "png" ? 2 : 1 });
  const content = format === "svg"
    ? decodeURIComponent(url.slice(url.indexOf(",") + 1))
    : Uint8Array.from(atob(url.slice(url.indexOf(",") + 1)), (c) => c.charCodeAt(0));
  save(`${id}.${format}`, new Blob([content], { type: format === "svg" ? "image/svg+xml" : "image/png" }));
}

document.querySelectorAll(".tools").forEach((place) => {
  const add = (name, label, action) => {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
    button.setAttribute("aria-label", label);
    button.addEventListener("click", () => action(button));
    place.append(button);
  };
  const { plot: id, csv: source, table } = place.dataset;
  const copies = (format) => async (button) => {
    await copy(format(shownRows(byId(table))));
    const name = button.textContent;
    button.textContent = "copied";
    setTimeout(() => { button.textContent = name; }, 1500);
  };
  if (id) for (const format of ["svg", "png"]) add(format.toUpperCase(), `Save the figure as ${format.toUpperCase()}`, () => picture(id, format));
  if (source) add("CSV", "Save the data as CSV", () => save(`${source}.csv`, new Blob([csv(rowsOf(source))], { type: "text/csv" })));
  if (table) {
    add("Markdown", "Copy the table as Markdown", copies(markdown));
    add("LaTeX", "Copy the table as LaTeX", copies(latex));
  }
});
