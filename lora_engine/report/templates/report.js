// Pointing at a chart shows its values at the nearest recorded step.
for (const plot of document.querySelectorAll(".plot")) {
  const [low, high] = JSON.parse(plot.dataset.range);
  const series = JSON.parse(plot.dataset.series);
  const readout = plot.querySelector(".readout");
  const cursor = plot.querySelector(".cursor");
  const nearest = (points, step) =>
    points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));

  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const pointed = low + ((event.clientX - box.left) / box.width) * (high - low);
    const step = nearest(series[0].points, pointed)[0];
    const across = (100 * (step - low)) / (high - low);
    const lines = series.map(({ name, points }) => {
      const [at, label] = nearest(points, step);
      return `${name}: ${label}${at === step ? "" : ` (step ${at})`}`;
    });
    readout.textContent = [`step ${step}`, ...lines].join("\n");
    readout.hidden = false;
    readout.style.left = across < 50 ? `calc(${across}% + 12px)` : "auto";
    readout.style.right = across < 50 ? "auto" : `calc(${100 - across}% + 12px)`;
    cursor.setAttribute("d", `M${across},0V100`);
  });
  plot.addEventListener("pointerleave", () => {
    readout.hidden = true;
    cursor.setAttribute("d", "");
  });
}
