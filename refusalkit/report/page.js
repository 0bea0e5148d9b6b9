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

  dark.addEventListener("change", drawAll);
  drawAll();
})();
