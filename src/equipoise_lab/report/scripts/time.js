// Load of each expert over training steps. The loads come as bytes in units of ``unit``.
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
  const time = data.times[Number(byId("time-run").value)];
  return [time, Math.min(Number(byId("time-layer").value), time.shape[1] - 1)];
}
function drawTime() {
  if (!byId("plot-time")) return;
  const [time, layer] = timeChoice();
  const experts = time.shape[2];
  const z = Array.from({ length: experts }, (_, e) => time.steps.map((_, t) => timeAt(time, t, layer, e)));
  plot("plot-time", [{
    type: "heatmap", x: time.steps, y: z.map((_, e) => e), z, coloraxis: "coloraxis",
    hovertemplate: "step %{x}, expert %{y}: %{z:.2f} × even<extra></extra>",
  }], {
    height: 120 + Math.min(320, 7 * Math.max(experts, 12)),
    margin: { l: 52, r: 6, t: 6, b: 44 },
    coloraxis: { cmin: 0, cmax: data.cap },
    xaxis: { title: { text: "step", standoff: 8, font: { size: 12 } }, showgrid: false, zeroline: false },
    yaxis: { title: { text: "expert", standoff: 8 }, showgrid: false, zeroline: false, autorange: "reversed" },
  }, [time.strategy, `layer ${time.layers[layer]}`, `seed ${time.seed}`].join(" · "));
}
