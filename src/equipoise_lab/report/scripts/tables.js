// Tables: sorted by a click on a title, and copied as Markdown, LaTeX or CSV.
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

/** The table as the reader sees it, in its present order: rows of texts, the headings first. */
function shownRows(table) {
  return [...table.rows].map((row) => [...row.cells].map((cell) => cell.textContent.replace(/\s+/g, " ").trim()));
}
function markdown([head, ...rows]) {
  const line = (cells) => `| ${cells.map((cell) => cell.replace(/\|/g, "\\|")).join(" | ")} |`;
  const sides = head.map((_, column) => (column ? "---:" : "---"));
  return [line(head), line(sides), ...rows.map(line)].join("\n") + "\n";
}
const LATEX = {
  "\\": "\\textbackslash{}", "~": "\\textasciitilde{}", "^": "\\textasciicircum{}", "−": "$-$", "±": "$\\pm$", "…": "\\ldots{}",
  "×": "$\\times$", "·": "$\\cdot$",
};
function latex([head, ...rows]) {
  const cell = (text) => text.replace(/[\\~^−±…×·&%#_${}]/g, (c) => LATEX[c] || `\\${c}`);
  const line = (cells) => `${cells.map(cell).join(" & ")} \\\\`;
  return [
    "% needs \\usepackage{booktabs}", `\\begin{tabular}{l${"r".repeat(head.length - 1)}}`, "\\toprule", line(head), "\\midrule",
    ...rows.map(line), "\\bottomrule", "\\end{tabular}",
  ].join("\n") + "\n";
}
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // not allowed on some pages opened from disk
    const area = Object.assign(document.createElement("textarea"), { value: text });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
}
