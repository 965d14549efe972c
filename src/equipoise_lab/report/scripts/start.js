// What all scripts share: the data of the page, plotly, the colours, and the reader's choices.
// The page contains its data and plotly in compressed form.
async function unpack(id) {
  const bytes = Uint8Array.from(atob(document.getElementById(id).textContent.trim()), (c) => c.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
}
if (typeof DecompressionStream === "undefined") { // a browser from before 2023: the still pictures
  document.querySelectorAll(".plot + noscript").forEach((still) => { still.previousElementSibling.innerHTML = still.textContent; });
  return;
}
const data = JSON.parse(await unpack("data"));
const script = document.createElement("script");
script.textContent = await unpack("plotly");
document.head.append(script);

const byId = (id) => document.getElementById(id);
const sum = (values) => values.reduce((a, b) => a + b, 0);
// For plotly, which interprets tags, and formulas between two dollar signs.
const ENTITIES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", $: "&#36;" };
const plain = (text) => String(text).replace(/[&<>$]/g, (c) => ENTITIES[c]);
const unplain = (text) => text.replace(/&lt;|&gt;|&#36;|&amp;/g, (entity) => Object.keys(ENTITIES).find((c) => ENTITIES[c] === entity));

const light = {
  text: "#23262a", quiet: "#5c6168", grid: "#e6e4de", page: "#fdfcfa",
  scale: [[0, "#2f7fb8"], [0.25, "#f3f0e9"], [0.55, "#e8954a"], [1, "#7f2a00"]],
};
const dark = {
  text: "#e2e4e6", quiet: "#9aa1a9", grid: "#2b3036", page: "#15181c",
  scale: [[0, "#4aa3df"], [0.25, "#262b31"], [0.55, "#c8691c"], [1, "#ffd9a0"]],
};
const hidden = new Set(); // strategies, by number
const state = { layer: 0, second: null, at: data.steps.length - 1, sort: "domain", text: "", model: data.models.length - 1 };
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
