// Draws every chart in the colours of the page, and again when they change.
(() => {
  const themes = JSON.parse(document.getElementById("themes").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();

  async function draw(box) {
    const mode = dark.matches ? "dark" : "light";
    const specification = JSON.parse(document.getElementById(box.dataset.specification).textContent);
    drawn.get(box)?.finalize();
    const chart = await window.vegaEmbed(box, specification, {
      mode: "vega-lite",
      renderer: "svg",
      config: themes[mode],
      actions: { export: true, source: false, compiled: false, editor: false },
      downloadFileName: box.dataset.name,
      tooltip: { theme: mode },
    });
    drawn.set(box, chart);
  }

  async function drawAll() {
    for (const box of document.querySelectorAll(".chart")) {
      await draw(box);
    }
    document.documentElement.dataset.drawn = dark.matches ? "dark" : "light";
  }

  // What a cell says, with a space where a line breaks, in quotes for CSV.
  function quoted(cell) {
    const copy = cell.cloneNode(true);
    copy.querySelectorAll("br").forEach((line) => line.replaceWith(" "));
    return `"${copy.textContent.replace(/\s+/g, " ").trim().replaceAll('"', '""')}"`;
  }

  for (const table of document.querySelectorAll("table")) {
    const name = table.caption.textContent.trim();
    const lines = [...table.rows].map((row) => [...row.cells].map(quoted).join(","));
    const link = document.createElement("a");
    link.className = "save";
    link.textContent = "CSV";
    link.download = `${name}.csv`;
    link.href = `data:text/csv;charset=utf-8,${encodeURIComponent(lines.join("\n"))}`;
    link.setAttribute("aria-label", `Save as CSV: ${name}`);
    table.caption.firstElementChild.append(" ", link);
  }

  dark.addEventListener("change", drawAll);
  drawAll();
})();
