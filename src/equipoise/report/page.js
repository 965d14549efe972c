"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const light = {
    text: "#23262a", quiet: "#62676e", grid: "#e6e4de", page: "#fdfcfa",
    scale: [[0, "#2f7fb8"], [0.25, "#f3f0e9"], [0.55, "#e8954a"], [1, "#7f2a00"]],
  };
  const dark = {
    text: "#e2e4e6", quiet: "#9aa1a9", grid: "#2b3036", page: "#15181c",
    scale: [[0, "#4aa3df"], [0.25, "#262b31"], [0.55, "#c8691c"], [1, "#ffd9a0"]],
  };
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  const options = { responsive: true, displaylogo: false, displayModeBar: false };
  const hidden = new Set();
  let printing = false;
  let layer = 0;

  function themed(layout) {
    const colors = prefersDark.matches && !printing ? dark : light;
    const axis = { gridcolor: colors.grid, linecolor: colors.grid, tickfont: { color: colors.quiet, size: 12 } };
    const themedLayout = {
      ...layout,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Noto Sans, sans-serif", color: colors.text, size: 13 },
      hoverlabel: { bgcolor: colors.page, bordercolor: colors.grid, font: { color: colors.text }, namelength: -1 },
      xaxis: { ...layout.xaxis, ...axis },
      yaxis: { ...layout.yaxis, ...axis },
    };
    if (layout.coloraxis) themedLayout.coloraxis = { ...layout.coloraxis, colorscale: colors.scale };
    if (printing) themedLayout.width = 660;
    return themedLayout;
  }

  function drawCurves() {
    data.curves.forEach((figure, i) => {
      const traces = figure.data.map((trace) => ({ ...trace, visible: !hidden.has(trace.meta.strategy) }));
      Plotly.react(`curve-${i}`, traces, themed(figure.layout), options);
    });
  }

  function drawHeat() {
    data.heat.forEach((figure, i) => {
      const shown = figure.layers[Math.min(layer, figure.layers.length - 1)];
      Plotly.react(`heat-${i}`, [{ ...figure.data[0], x: shown.experts, z: shown.z }], themed(figure.layout), options);
    });
  }

  function draw() {
    drawCurves();
    drawHeat();
  }

  document.querySelectorAll("button[data-strategy]").forEach((button) => {
    button.addEventListener("click", () => {
      const strategy = Number(button.dataset.strategy);
      const show = hidden.delete(strategy);
      if (!show) hidden.add(strategy);
      button.setAttribute("aria-pressed", String(show));
      drawCurves();
    });
  });
  document.querySelectorAll("input[name=layer]").forEach((input) => {
    if (input.checked) layer = Number(input.value);
    input.addEventListener("change", () => {
      layer = Number(input.value);
      drawHeat();
    });
  });
  prefersDark.addEventListener("change", draw);
  addEventListener("beforeprint", () => { printing = true; draw(); });
  addEventListener("afterprint", () => { printing = false; draw(); });
  draw();
})();
