// The reader's controls, and the first drawing.
document.querySelectorAll("button[data-strategy]").forEach((button) => {
  button.addEventListener("click", () => {
    const strategy = Number(button.dataset.strategy);
    const show = hidden.delete(strategy);
    if (!show) hidden.add(strategy);
    button.setAttribute("aria-pressed", String(show));
    drawFigures();
  });
});

// A live page loads again while it trains. The reader's choices stay; the newest step is shown unless another is chosen.
const controls = [...document.querySelectorAll("select, input")];
const nameOf = (control) => `${control.id || control.name}${control.type === "radio" ? `=${control.value}` : ""}`;
function choiceOf(control) {
  if (control.type === "radio") return control.checked;
  if (control.type !== "range") return control.value;
  return control.value === control.max ? undefined : data.steps[Number(control.value)]; // undefined is not stored
}
function restore(control, choice) {
  if (control.type === "radio") control.checked = choice;
  else if (control.type !== "range") control.value = choice;
  else if (data.steps.includes(choice)) control.value = String(data.steps.indexOf(choice));
}
if (data.live) {
  try {
    const choices = JSON.parse(sessionStorage.getItem("equipoise-choices") || "{}");
    controls.filter((control) => nameOf(control) in choices).forEach((control) => restore(control, choices[nameOf(control)]));
    document.querySelectorAll("button[data-strategy]").forEach((button) => {
      if ((choices.hidden || []).includes(data.strategies[Number(button.dataset.strategy)])) button.click();
    });
  } catch { /* not allowed on some pages opened from disk */ }
  addEventListener("pagehide", () => {
    const choices = Object.fromEntries(controls.map((control) => [nameOf(control), choiceOf(control)]));
    choices.hidden = [...hidden].map((strategy) => data.strategies[strategy]);
    try { sessionStorage.setItem("equipoise-choices", JSON.stringify(choices)); } catch { /* as above */ }
  });
  setTimeout(() => location.reload(), 1000 * data.live);
}

document.querySelectorAll("input[name=layer]").forEach((input) => {
  if (input.checked) state.layer = Number(input.value);
  input.addEventListener("change", () => chooseLayer(Number(input.value)));
});
const layerSelect = document.querySelector("select[name=layer]");
if (layerSelect) {
  state.layer = Number(layerSelect.value);
  layerSelect.addEventListener("change", () => chooseLayer(Number(layerSelect.value)));
}
function listen(id, set, redraw) {
  const control = byId(id);
  if (!control) return;
  set(control.value);
  control.addEventListener(control.type === "range" ? "input" : "change", () => { set(control.value); redraw(); });
}
listen("sort", (value) => { state.sort = value; }, drawExperts);
listen("second", (value) => { state.second = value === "" ? null : Number(value); }, drawHeats);
listen("text", (value) => { state.text = value; }, () => data.models.forEach((_, index) => drawAll(index)));
listen("expert-model", (value) => { state.model = Number(value); }, drawExpertsTable);
listen("time-run", () => {}, drawTime);
listen("time-layer", () => {}, drawTime);

function showStep(value) {
  state.at = Number(value);
  byId("at").setAttribute("aria-valuetext", `step ${data.steps[state.at]}`);
  byId("at-step").textContent = `step ${data.steps[state.at]}`;
}
listen("at", showStep, drawHeats);
let player = null;
function stopPlaying() {
  clearInterval(player);
  player = null;
  byId("play").textContent = "Play";
}
if (byId("play")) {
  byId("at").addEventListener("pointerdown", stopPlaying);
  byId("play").addEventListener("click", () => {
    if (player !== null) { stopPlaying(); return; }
    byId("play").textContent = "Stop";
    let next = state.at === data.steps.length - 1 ? 0 : state.at + 1;
    player = setInterval(() => {
      byId("at").value = String(next);
      showStep(next);
      drawHeats();
      if (next === data.steps.length - 1) stopPlaying();
      next += 1;
    }, 700);
  });
}

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

// The contents mark the section that is on the screen.
const links = new Map([...document.querySelectorAll(".contents a")].map((link) => [link.hash.slice(1), link]));
function markSection() {
  const above = [...links.keys()].filter((id) => byId(id).getBoundingClientRect().top < innerHeight / 3);
  const current = links.get(above.at(-1) || [...links.keys()][0]);
  if (!current || current.hasAttribute("aria-current")) return;
  links.forEach((link) => link.removeAttribute("aria-current"));
  current.setAttribute("aria-current", "true");
  const list = current.parentElement;
  list.scrollTo({ left: current.offsetLeft - list.clientWidth / 2 + current.offsetWidth / 2 });
}
addEventListener("scroll", markSection, { passive: true });
markSection();
document.documentElement.dataset.ready = "yes";
