"use strict";
// Draws every chart of the page. Where a chart goes is an element with data-chart; what it shows is JSON beside it.
const charts = [...document.querySelectorAll("[data-chart]")];
const options = { responsive: true, displayModeBar: false };

for (const place of charts) {
  const { data, layout } = JSON.parse(document.getElementById(place.dataset.chart).textContent);
  Plotly.newPlot(place, data, layout, options);
}

// A sheet of paper is narrower than a window, and a chart's width is fixed when it is drawn.
const PAPER_WIDTH = 688; // A4 without its margins, in CSS pixels.
addEventListener("beforeprint", () => charts.forEach((place) => Plotly.relayout(place, { width: PAPER_WIDTH })));
addEventListener("afterprint", () => charts.forEach((place) => Plotly.relayout(place, { width: null, autosize: true })));
