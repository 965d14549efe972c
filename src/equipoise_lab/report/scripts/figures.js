// Plots: on the page, and whole, with title, legend and colour bar, for print and files.
const options = { responsive: true, displaylogo: false, displayModeBar: false };
const drawn = new Map(); // id -> {traces, layout, subtitle}

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
    result.coloraxis = { showscale: false, ...layout.coloraxis, colorscale: colors.scale };
    delete result.coloraxis.cmid;
  }
  return result;
}

function folded(text, width) { // plotly does not fold lines
  const lines = [""];
  for (const word of text.split(" ")) {
    if (lines.at(-1) && lines.at(-1).length + word.length >= width) lines.push("");
    lines[lines.length - 1] += (lines.at(-1) ? " " : "") + word;
  }
  return lines;
}

/** The figure as it stands alone, without the page around it. */
function whole(id, width) {
  const { traces, layout, subtitle } = drawn.get(id);
  const title = layout.title && layout.title.text ? unplain(layout.title.text) : byId(id).getAttribute("aria-label");
  const heading = folded(title, width / 8.5);
  const below = folded([subtitle, data.subtitle, subtitle ? "" : data.seeds].filter(Boolean).join(" · "), width / 6.6);
  const groups = new Set();
  const named = traces.map((trace) => {
    if (!trace.name || trace.showlegend === false || trace.visible === false) return trace;
    const isByStrategy = trace.meta && "strategy" in trace.meta;
    const name = isByStrategy ? plain(data.strategies[trace.meta.strategy]) : trace.name;
    const showlegend = !groups.has(name);
    groups.add(name);
    return { ...trace, name, showlegend, legendgroup: name };
  });
  const margin = { l: 60, r: 16, t: 0, b: 44, ...layout.margin };
  const above = 26 + 19 * heading.length + 17 * below.length;
  const legend = groups.size > 1 ? 12 + 20 * groups.size : 0;
  const height = (layout.height || 400) + above - margin.t + legend;
  const result = {
    ...layout,
    width,
    height,
    margin: { ...margin, t: above, r: layout.coloraxis ? 90 : 16 },
    title: {
      text: `<b>${heading.map(plain).join("<br>")}</b>` + below.map((line) => `<br><span style="font-size:12px">${plain(line)}</span>`).join(""),
      x: 12 / width, xref: "container", xanchor: "left", y: 1 - 20 / height, yref: "container", yanchor: "top", font: { size: 15 },
    },
    showlegend: legend > 0,
    legend: { orientation: "v", x: 0, xanchor: "left", y: -margin.b / (height - above - margin.b - legend), yanchor: "top", traceorder: "normal" },
  };
  if (layout.coloraxis) {
    const ticks = height - above - margin.b < 100 ? [0, 1, data.cap] : [...Array(data.cap + 1).keys()];
    result.coloraxis = {
      ...layout.coloraxis, showscale: true,
      colorbar: {
        thickness: 12, len: 1, title: { text: "load", side: "top", font: { size: 12 } }, tickvals: ticks, tickfont: { size: 11 },
        ticktext: ticks.map((tick) => (tick === 1 ? "1 even" : tick === data.cap ? `${tick}+` : String(tick))),
      },
    };
  }
  return [named, result];
}

/** Draws a plot. ``subtitle`` says, where the plot stands alone, which strategy, layer and step it shows. */
function plot(id, traces, layout, subtitle = "") {
  if (!byId(id)) return;
  drawn.set(id, { traces, layout, subtitle });
  const [shown, shape] = printing ? whole(id, 660) : [traces, layout];
  Plotly.react(id, shown, themed(shape, isDark() ? dark : light), options);
}

function drawFigures() { // those that Python prepared
  for (const [name, figure] of Object.entries(data.figures)) {
    const traces = figure.data.map((trace) =>
      trace.meta && "strategy" in trace.meta ? { ...trace, visible: !hidden.has(trace.meta.strategy) } : trace);
    plot(`plot-${name}`, traces, figure.layout);
  }
}
