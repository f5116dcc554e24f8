// Shows the interactive plots, which scripts/site_plots.py writes, in the colors of the page.
const narrow = matchMedia("(max-width: 44.99em)");

function showPlots() {
  for (const plot of document.querySelectorAll(".plot")) {
    const figure = JSON.parse(plot.querySelector("script").textContent);
    const layout = narrow.matches ? figure.narrow : figure.wide;
    layout.font.color = getComputedStyle(document.body).color;
    const options = { responsive: true, displayModeBar: false };
    Plotly.react(plot.querySelector("div"), figure.data, layout, options);
  }
}

if (document.querySelector(".plot")) {
  showPlots();
  narrow.addEventListener("change", showPlots);
  const schemes = new MutationObserver(showPlots);
  schemes.observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
}
