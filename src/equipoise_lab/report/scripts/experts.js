// Load by domain and expert, load by layer, and the table of experts.
const relative = (row) => { const total = sum(row); return row.map((c) => (total ? (c * row.length) / total : null)); };
const visible = (text) => text.replace(/ /g, "·").replace(/\n/g, "⏎").replace(/\t/g, "⇥");
const short = (text) => (text.length > 13 ? `${text.slice(0, 12)}…` : text);
const layerOf = (model) => Math.min(state.layer, model.layers.length - 1);
const pooled = (load) => load[0].map((_, e) => sum(load.map((row) => row[e])));
const times = (value) => (value === null ? "?" : `${value.toFixed(2)} × even`);

/** The model's last evaluation at or before the chosen step, else its first. */
function mapOf(model) {
  const step = data.steps[state.at];
  return model.maps.findLast((map) => map.step === null || map.step <= step) || model.maps[0];
}
const lastMap = (model) => model.maps.at(-1);
function whereOf(model, layer) {
  const map = mapOf(model);
  return [
    model.strategy, layer === null ? "" : `layer ${model.layers[layer]}`, map.step === null ? "" : `step ${map.step}`,
    model.seed === null ? "" : `seed ${model.seed}`,
  ].filter(Boolean).join(" · ");
}

/** Experts in the order of the reader's choice. It is that of the last evaluation, so columns stay when the step moves. */
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

const bare = { ticks: "", showgrid: false, zeroline: false, fixedrange: true };
const axisTitle = (text) => ({ text, standoff: 4, font: { size: 12 } });

function drawHeat(id, model, layer) {
  const load = mapOf(model).load[layer];
  const experts = order(lastMap(model).load[layer]);
  const z = load.map((row) => { const share = relative(row); return experts.map((e) => share[e]); });
  const typical = experts.map((e) => tokensOf(model, layer, e, 4));
  const text = load.map((row, d) => experts.map((e, i) =>
    `${plain(model.domains[d])}, expert ${e}: <b>${times(z[d][i])}</b><br>`
    + `${row[e].toLocaleString("en")} of ${sum(row).toLocaleString("en")} assignments`
    + (typical[i] ? `<br>typical: ${plain(typical[i])}` : "")));
  plot(id, [{
    type: "heatmap", x: experts.map(String), y: model.domains.map((_, d) => d), z, text, coloraxis: "coloraxis",
    xgap: experts.length > 96 ? 0 : 1, ygap: 1, hovertemplate: "%{text}<extra></extra>",
  }], {
    height: 56 + 21 * model.domains.length,
    margin: { l: 92, r: 6, t: 6, b: 30 },
    coloraxis: { cmin: 0, cmax: data.cap },
    xaxis: {
      ...bare, type: "category", showticklabels: state.sort === "number" && experts.length <= 32,
      title: axisTitle(state.sort === "number" ? "experts, by id" : "experts, sorted"),
    },
    yaxis: {
      ...bare, autorange: "reversed", tickmode: "array",
      tickvals: model.domains.map((_, d) => d), ticktext: model.domains.map((name) => plain(short(name))),
    },
  }, whereOf(model, layer));
}

function drawHeats() {
  const isPair = state.second !== null;
  document.querySelectorAll(".maps").forEach((maps) => maps.classList.toggle("paired", isPair));
  data.models.forEach((model, index) => {
    const layer = layerOf(model);
    drawHeat(`heat-${index}`, model, layer);
    const second = isPair ? Math.min(state.second, model.layers.length - 1) : null;
    if (isPair) drawHeat(`second-${index}`, model, second);
    [[`heat-${index}`, layer], [`second-${index}`, second]].forEach(([id, of]) => {
      const heading = byId(id) && byId(id).parentElement.querySelector(".layer-name");
      if (heading && of !== null) heading.textContent = `layer ${model.layers[of]}`;
    });
    const shown = document.querySelector(`.shown-step[data-model="${index}"]`);
    const map = mapOf(model);
    if (shown) shown.textContent = `step ${map.step}${map.split === "test" ? "" : ` (${map.split} text)`}`;
  });
}

function drawAll(index) {
  const model = data.models[index];
  const loads = lastMap(model).load;
  const width = Math.max(...loads.map((load) => load[0].length));
  const domain = model.domains.indexOf(state.text);
  const text = [];
  const z = loads.map((load, layer) => {
    const row = relative(domain < 0 ? pooled(load) : load[domain]);
    const experts = row.map((_, e) => e).sort((a, b) => (row[b] || 0) - (row[a] || 0) || a - b);
    text.push(experts.map((e) => `layer ${model.layers[layer]}, expert ${e}: ${times(row[e])}`));
    return [...experts.map((e) => row[e]), ...Array(width - row.length).fill(null)];
  });
  const labels = model.layers.length > 24 ? {}
    : { tickmode: "array", tickvals: model.layers.map((_, l) => l), ticktext: model.layers.map((name) => plain(`layer ${name}`)) };
  plot(`all-${index}`, [{
    type: "heatmap", y: model.layers.map((_, l) => l), z, text, coloraxis: "coloraxis", xgap: width > 96 ? 0 : 1,
    ygap: model.layers.length > 24 ? 0 : 1, hovertemplate: "%{text}<extra></extra>",
  }], {
    height: 60 + Math.min(420, 18 * model.layers.length),
    margin: { l: 92, r: 6, t: 6, b: 30 },
    coloraxis: { cmin: 0, cmax: data.cap },
    xaxis: { ...bare, showticklabels: false, title: axisTitle("experts, busiest first") },
    yaxis: { ...bare, autorange: "reversed", ...labels },
  }, [whereOf(model, null), state.text || "all domains"].join(" · "));
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
  const load = lastMap(model).load[layer];
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
  table.querySelectorAll("thead, tbody").forEach((part) => part.remove());
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
  drawHeats();
  data.models.forEach((_, index) => drawAll(index));
  drawExpertsTable();
}

function chooseLayer(layer) {
  state.layer = layer;
  const radio = document.querySelector(`input[name=layer][value="${layer}"]`);
  const select = document.querySelector("select[name=layer]");
  if (radio) radio.checked = true;
  if (select) select.value = String(layer);
  drawHeats();
  drawExpertsTable();
}
