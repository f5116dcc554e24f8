"use strict";

const POLL_MS = 2000;
const NUM_COLORS = 8;
const MISSING = "–";
const TESTS = { personal: "Local test", global: "Global test", server: "Server" };
const X_AXES = {
  round: { title: "Rounds", label: "round", format: (v) => String(v), integer: true },
  seconds: { title: "Time", label: "time", format: formatDuration, unit: timeUnit },
  bytes: { title: "Bytes", label: "bytes up and down", format: formatBytes, unit: byteUnit },
};
// Positions in the rows of `curves` and `scores`.
const CURVE = { round: 0, seconds: 1, up: 2, down: 3, loss: 4, epsilon: 5 };
const SCORE = { round: 0, seconds: 1, bytes: 2, mean: 3, std: 4, worst: 5 };

const view = { test: "", metric: "", x: "round", band: false, run: "", client: "" };
const hiddenRuns = new Set();
const colorIndex = new Map();
let shown = { runs: "", clients: "" };
let content = null;
let clientContent = null;

// Elements

const byId = (id) => document.getElementById(id);

function create(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function createSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) element.setAttribute(name, value);
  }
  // Text is never parsed as HTML.
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Numbers

function formatSignificant(value) {
  const before = value === 0 ? 1 : Math.floor(Math.log10(Math.abs(value))) + 1;
  return value.toFixed(Math.min(20, Math.max(0, 3 - before)));
}

function formatScore(value, isPercentage) {
  if (value === null || value === undefined) return MISSING;
  return isPercentage ? `${(100 * value).toFixed(1)}%` : formatSignificant(value);
}

function formatChange(value, isPercentage) {
  return isPercentage ? `${(100 * value).toFixed(1)} points` : formatSignificant(value);
}

function byteUnit(largest) {
  const units = [[1e12, "TB"], [1e9, "GB"], [1e6, "MB"], [1e3, "kB"]];
  return units.find(([factor]) => largest >= 0.9995 * factor) ?? [1, "B"];
}

function formatBytes(count) {
  const [factor, unit] = byteUnit(count);
  const value = count / factor;
  return unit === "B" || value >= 100 ? `${value.toFixed(0)} ${unit}` : `${formatSignificant(value)} ${unit}`;
}

function timeUnit(seconds) {
  const units = [[2 * 86400, 86400, "d"], [2 * 3600, 3600, "h"], [300, 60, "min"]];
  const found = units.find(([least]) => seconds >= least);
  return found ? found.slice(1) : [1, "s"];
}

function formatDuration(seconds) {
  if (seconds < 9.95) return `${seconds.toFixed(1)} s`;
  const rounded = Math.round(seconds);
  if (rounded < 60) return `${rounded} s`;
  const minutes = Math.floor(rounded / 60);
  if (minutes < 60) return `${minutes} min ${rounded % 60} s`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

// Charts

function niceTicks(low, high, count, integer) {
  const raw = (high - low) / Math.max(1, count) || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  let step = [1, 2, 5, 10].map((factor) => factor * power).find((s) => s >= 0.999 * raw);
  if (integer) step = Math.max(1, step);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  return { ticks, decimals: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

function axis(low, high, count, { unit, integer, isPercentage }) {
  const [factor, name] = unit ? unit(high) : isPercentage ? [0.01, "%"] : [1, ""];
  const { ticks, decimals } = niceTicks(low / factor, high / factor, count, integer);
  const suffix = name === "%" ? "%" : name ? ` ${name}` : "";
  return ticks.map((tick) => ({ value: tick * factor, text: tick.toFixed(decimals) + suffix }));
}

function extent(values) {
  let low = Infinity;
  let high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
}

/* Draw a chart into a figure.

   A series has a label, a color, a dash pattern and points [x, y, low, high], of which the last two
   are optional. `y` has `format`, `unit`, `isPercentage` and `fromZero`. With `nearest`, the tooltip
   shows the nearest series only. */
function drawChart(figure, { title, detail = "", series, x, y, height = 240, nearest = false }) {
  const pointer = figure.pointer ?? null;
  const width = Math.max(260, figure.clientWidth - 2 * parseFloat(getComputedStyle(figure).paddingLeft));
  figure.replaceChildren(create("figcaption", {}, title, detail ? create("span", {}, detail) : null));
  const drawn = series.filter((s) => s.points.length);
  if (!drawn.length) {
    figure.append(create("p", { class: "empty" }, "No values yet."));
    return;
  }
  const points = drawn.flatMap((s) => s.points);
  let [left, right] = extent(points.map((p) => p[0]));
  let [low, high] = extent(points.flatMap((p) => (p.length > 2 ? [p[1], p[2], p[3]] : [p[1]])));
  if (y.fromZero) low = 0;
  if (x.fromZero) left = 0;
  const padding = 0.06 * (high - low) || 0.05 * Math.abs(high) || 1;
  high += padding;
  if (!y.fromZero) low -= padding;
  if (y.isPercentage) [low, high] = [Math.max(0, low), Math.min(1, high)];
  if (right === left) [left, right] = [left - 0.5, right + 0.5];

  const yTicks = axis(low, high, height / 50, y);
  const margin = { left: 14 + 6.6 * Math.max(...yTicks.map((t) => t.text.length)), right: 14, top: 6, bottom: 38 };
  const innerWidth = width - margin.left - margin.right;
  const innerHeight = height - margin.top - margin.bottom;
  const toX = (value) => margin.left + ((value - left) / (right - left)) * innerWidth;
  const toY = (value) => margin.top + (1 - (value - low) / (high - low)) * innerHeight;
  const picture = createSvg("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `${title} ${detail}` });
  for (const tick of yTicks) {
    picture.append(
      createSvg("line", { class: "grid-line", x1: margin.left, x2: width - margin.right, y1: toY(tick.value), y2: toY(tick.value) }),
      createSvg("text", { x: margin.left - 7, y: toY(tick.value) + 4, "text-anchor": "end" }, tick.text),
    );
  }
  for (const tick of axis(left, right, innerWidth / 60, x)) {
    picture.append(createSvg("text", { x: toX(tick.value), y: height - 21, "text-anchor": "middle" }, tick.text));
  }
  picture.append(
    createSvg("line", { class: "axis-line", x1: margin.left, x2: width - margin.right, y1: height - margin.bottom, y2: height - margin.bottom }),
    createSvg("text", { x: margin.left + innerWidth / 2, y: height - 4, "text-anchor": "middle" }, x.label),
  );
  const clamp = (value) => Math.min(high, Math.max(low, value));
  for (const s of drawn) {
    const banded = s.points.filter((p) => p.length > 2);
    if (banded.length > 1) {
      const upper = banded.map((p) => `${toX(p[0]).toFixed(1)},${toY(clamp(p[3])).toFixed(1)}`);
      const lower = banded.map((p) => `${toX(p[0]).toFixed(1)},${toY(clamp(p[2])).toFixed(1)}`).reverse();
      picture.append(createSvg("polygon", { class: "band", points: [...upper, ...lower].join(" "), style: `fill: ${s.color}` }));
    }
  }
  for (const s of drawn) {
    const path = s.points.map((p) => `${toX(p[0]).toFixed(1)},${toY(p[1]).toFixed(1)}`).join(" ");
    picture.append(createSvg("polyline", { class: "line", points: path, style: `stroke: ${s.color}; stroke-width: ${s.width ?? 1.8}; opacity: ${s.opacity ?? 1}`, "stroke-dasharray": s.dash || null }));
    // A curve with few points shows them, and the last value of each curve is marked.
    const marked = s.points.length <= 12 && !s.opacity ? s.points : s.points.slice(-1);
    for (const p of marked) {
      picture.append(createSvg("circle", { cx: toX(p[0]), cy: toY(p[1]), r: 2.4, style: `fill: ${s.color}; opacity: ${s.opacity ?? 1}` }));
    }
  }
  figure.append(picture);
  addTooltip(figure, picture, { drawn, x, y, toX, toY, margin, width, height, nearest }, pointer);
}

function addTooltip(figure, picture, chart, pointer) {
  const marks = createSvg("g", {});
  const tip = create("div", { class: "tip", hidden: "" });
  picture.append(marks);
  figure.append(tip);
  const hide = () => {
    figure.pointer = null;
    marks.replaceChildren();
    tip.hidden = true;
  };
  const show = (at) => {
    figure.pointer = at;
    const found = pointsAt(chart, at);
    if (!found.length) return hide();
    const x = found.reduce((a, b) => (b.distance < a.distance ? b : a)).point[0];
    marks.replaceChildren(
      createSvg("line", { class: "cursor", x1: chart.toX(x), x2: chart.toX(x), y1: chart.margin.top, y2: chart.height - chart.margin.bottom }),
      ...found.map(({ series, point }) => createSvg("circle", { cx: chart.toX(point[0]), cy: chart.toY(point[1]), r: 4, style: `fill: ${series.color}` })),
    );
    const rows = found.slice(0, 12).map(({ series, point }) =>
      create("div", {},
        create("span", { class: series.dash ? "key dashed" : "key", style: `--series: ${series.color}` }),
        create("span", { class: "name" }, series.label),
        create("b", {}, chart.y.format(point[1]))));
    const more = found.length > 12 ? [create("div", {}, `and ${found.length - 12} more`)] : [];
    tip.replaceChildren(create("div", { class: "soft" }, chart.x.heading(x)), ...rows, ...more);
    tip.hidden = false;
    const outer = figure.getBoundingClientRect();
    const inner = picture.getBoundingClientRect();
    const offset = inner.left - outer.left + (chart.toX(x) * inner.width) / chart.width;
    const fits = offset + 16 + tip.offsetWidth <= figure.clientWidth;
    tip.style.left = `${fits ? offset + 12 : Math.max(4, offset - 12 - tip.offsetWidth)}px`;
    tip.style.top = `${inner.top - outer.top + chart.margin.top}px`;
  };
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const scale = chart.width / box.width;
    show([(event.clientX - box.left) * scale, (event.clientY - box.top) * scale]);
  });
  picture.addEventListener("pointerleave", hide);
  if (pointer) show(pointer);
}

/* Return the point of each series that is nearest to the pointer, the largest value first. */
function pointsAt({ drawn, toX, toY, nearest }, [px, py]) {
  const found = drawn.map((series) => {
    const point = series.points.reduce((a, b) => (Math.abs(toX(b[0]) - px) < Math.abs(toX(a[0]) - px) ? b : a));
    return { series, point, distance: Math.abs(toX(point[0]) - px) };
  });
  // Curves that end before the pointer have no value there.
  const here = found.filter(({ series, distance }) =>
    distance < 12 || (px > toX(series.points[0][0]) && px < toX(series.points.at(-1)[0])));
  if (nearest) {
    here.sort((a, b) => Math.abs(toY(a.point[1]) - py) - Math.abs(toY(b.point[1]) - py));
    return here.slice(0, 1);
  }
  return here.sort((a, b) => b.point[1] - a.point[1]);
}

// Page

function colorOf(key) {
  if (!colorIndex.has(key)) colorIndex.set(key, colorIndex.size);
  const index = colorIndex.get(key);
  return { color: `var(--c${index % NUM_COLORS})`, dash: index >= NUM_COLORS ? "6 4" : "" };
}

function metricTitle() {
  const metrics = content.metrics[content.test] ?? [];
  return metrics.find((m) => m.name === content.metric)?.title ?? "Metric";
}

function scoreAxis(isPercentage) {
  return { isPercentage, format: (v) => formatScore(v, isPercentage) };
}

function xAxis(name) {
  const found = X_AXES[name];
  const heading = name === "round" ? (v) => `Round ${v}` : (v) => found.format(v);
  return { ...found, heading, fromZero: name !== "round" };
}

function renderButtons(box, options, chosen, isAvailable, choose) {
  // The buttons are created once, so that they keep the focus.
  if (!box.children.length) {
    box.append(...Object.entries(options).map(([name, title]) => {
      const button = create("button", { type: "button", value: name }, title);
      button.addEventListener("click", () => choose(name));
      return button;
    }));
  }
  for (const button of box.children) {
    button.setAttribute("aria-pressed", String(button.value === chosen));
    button.disabled = !isAvailable(button.value);
  }
}

function renderOptions(box, options, chosen) {
  // New options would close an open list.
  const signature = JSON.stringify(options);
  if (box.dataset.signature !== signature) {
    box.dataset.signature = signature;
    box.replaceChildren(...options.map(([value, title]) => create("option", { value }, title)));
  }
  box.value = chosen;
}

function renderControls() {
  renderButtons(byId("test"), TESTS, content.test, (name) => name in content.metrics, (name) => update({ test: name }));
  const titles = Object.fromEntries(Object.entries(X_AXES).map(([name, x]) => [name, x.title]));
  renderButtons(byId("x"), titles, view.x, () => true, (name) => update({ x: name }));
  const metrics = content.metrics[content.test] ?? [];
  renderOptions(byId("metric"), metrics.map((m) => [m.name, m.title]), content.metric);
  byId("band").checked = view.band;
  byId("band-label").hidden = content.test === "server";
  renderOptions(byId("client-run"), content.runs.map((run) => [run.key, run.label]), view.run);
}

function renderStatus() {
  const counts = ["running", "finished", "interrupted", "failed"]
    .map((name) => [content.runs.filter((run) => run.state === name).length, name])
    .filter(([count]) => count);
  byId("status").textContent = counts.map(([count, name]) => `${count} ${name}`).join(", ");
  const running = content.runs.filter((run) => run.state === "running").length;
  document.title = running ? `${running} running · hetero_fl` : "Runs · hetero_fl";
  byId("omitted").hidden = !content.omitted;
  byId("omitted").textContent = `The first ${content.runs.length} runs are shown, ${content.omitted} more are not.`;
  byId("no-runs").hidden = content.runs.length > 0;
}

function renderRuns() {
  const title = metricTitle();
  const hasEpsilon = content.runs.some((run) => run.epsilon !== null);
  const hasWorst = content.runs.some((run) => run.worst_client !== null);
  const columns = ["Run", title, "Best round", hasWorst ? "Worst client" : null, "Method", "Seed", "State", "Rounds",
    "Up", "Down", hasEpsilon ? "ε" : null, "Time"].filter(Boolean);
  const isText = (name) => ["Run", "Worst client", "Method", "State", "Rounds"].includes(name);
  // What the numbers of a column are, below its name.
  const test = TESTS[content.test].toLowerCase();
  const details = {
    [title]: [test],
    "Best round": [test, "by validation"],
    "Worst client": [test],
  };
  byId("runs-head").replaceChildren(create("tr", {}, ...columns.map((name) =>
    create("th", { scope: "col", class: isText(name) ? "text" : null }, name,
      ...(details[name] ?? []).map((text) => create("small", {}, text))))));
  const focused = document.activeElement?.dataset.key;
  byId("runs").replaceChildren(...content.runs.flatMap((run) => runRows(run, hasWorst, hasEpsilon, columns.length)));
  if (focused) byId("runs").querySelector(`[data-key="${focused}"]`)?.focus();
}

function runRows(run, hasWorst, hasEpsilon, numColumns) {
  const { color, dash } = colorOf(run.key);
  const score = (value) => formatScore(value, content.is_percentage);
  const box = create("input", { type: "checkbox", "data-key": run.key });
  box.checked = !hiddenRuns.has(run.key);
  box.addEventListener("change", () => {
    hiddenRuns[box.checked ? "delete" : "add"](run.key);
    renderCharts();
  });
  const rounds = run.rounds === null ? String(run.completed) : `${run.completed} / ${run.rounds}`;
  const bar = run.rounds === null ? null : create("progress", { max: run.rounds, value: run.completed, "aria-label": rounds });
  const worst = run.worst_client;
  const best = run.best;
  const cells = [
    create("td", {}, score(run.last)),
    create("td", {}, score(best?.score), best ? create("small", {}, `round ${best.round}`) : null),
    hasWorst ? create("td", { class: "text" }, worst ? score(worst.last) : MISSING, worst ? create("small", {}, worst.id) : null) : null,
    create("td", { class: "text" }, run.algorithm),
    create("td", {}, run.seed),
    create("td", { class: "text" }, create("span", { class: `state ${run.state}` }, run.state)),
    create("td", { class: "text" }, rounds, bar),
    create("td", {}, formatBytes(run.up)),
    create("td", {}, formatBytes(run.down)),
    hasEpsilon ? create("td", {}, run.epsilon === null ? MISSING : formatSignificant(run.epsilon)) : null,
    create("td", {}, formatDuration(run.seconds ?? 0)),
  ].filter(Boolean);
  const name = create("label", { title: `${run.folder} (${run.name})` }, box,
    create("span", { class: dash ? "key dashed" : "key" }), create("span", { class: "name" }, run.label));
  const row = create("tr", { style: `--series: ${color}`, class: run.problem ? "described" : null },
    create("th", { scope: "row" }, name), ...cells);
  if (!run.problem) return [row];
  return [row, create("tr", { class: "problem" }, create("td", { colspan: numColumns }, run.problem))];
}

function renderCharts() {
  const runs = content.runs.filter((run) => !hiddenRuns.has(run.key));
  const x = xAxis(view.x);
  const isPercentage = content.is_percentage;
  const title = metricTitle();
  const test = TESTS[content.test].toLowerCase();
  const banded = view.band && content.test !== "server";
  const series = (points) => runs.map((run) => ({ label: run.label, ...colorOf(run.key), points: points(run) }));
  const scorePoints = (run, column) => run.scores
    .filter((row) => row[column] !== null)
    .map((row) => [row[SCORE[view.x]], row[column]]);
  const meanPoints = (run) => banded
    ? run.scores.filter((row) => row[SCORE.mean] !== null).map((row) => {
      const [mean, deviation] = [row[SCORE.mean], row[SCORE.std] ?? 0];
      return [row[SCORE[view.x]], mean, mean - deviation, mean + deviation];
    })
    : scorePoints(run, SCORE.mean);
  const curveX = (row) => (view.x === "bytes" ? row[CURVE.up] + row[CURVE.down] : row[CURVE[view.x]]);
  const curvePoints = (column) => (run) => run.curves
    .filter((row) => row[column] !== null)
    .map((row) => [curveX(row), row[column]]);

  const isPrivate = runs.some((run) => run.epsilon !== null);
  const isServer = content.test === "server";
  // The layout depends on the number of small charts.
  byId("worst").hidden = isServer;
  byId("epsilon").hidden = !isPrivate;
  byId("charts").dataset.count = 2 + !isServer + isPrivate;

  const mean = isServer ? "server's model, global test" : `${test}, mean over clients`;
  drawChart(byId("mean"), { title, detail: mean, series: series(meanPoints), x, y: scoreAxis(isPercentage), height: 320 });
  if (!isServer) {
    drawChart(byId("worst"), { title: "Worst client", detail: `${title}, ${test}`, series: series((run) => scorePoints(run, SCORE.worst)), x, y: scoreAxis(isPercentage) });
  }
  drawChart(byId("loss"), { title: "Training loss", detail: "mean over clients", series: series(curvePoints(CURVE.loss)), x, y: { format: formatSignificant } });
  // Bytes over bytes would be a diagonal.
  const trafficX = view.x === "bytes" ? xAxis("round") : x;
  const traffic = runs.flatMap((run) => ["up", "down"].map((name) => ({
    label: `${run.label}, ${name}`,
    color: colorOf(run.key).color,
    dash: name === "down" ? "5 4" : "",
    points: run.curves.map((row) => [view.x === "seconds" ? row[CURVE.seconds] : row[CURVE.round], row[CURVE[name]]]),
  })));
  drawChart(byId("traffic"), { title: "Bytes", detail: "up solid, down dashed; total", series: traffic, x: trafficX, y: { format: formatBytes, unit: byteUnit, fromZero: true } });
  if (isPrivate) {
    drawChart(byId("epsilon"), { title: "Privacy cost ε", detail: "largest over clients", series: series(curvePoints(CURVE.epsilon)), x, y: { format: formatSignificant, fromZero: true } });
  }
}

function renderClients() {
  const rows = clientContent?.clients ?? [];
  const isServer = content.test === "server";
  byId("clients-section").hidden = !rows.length;
  byId("no-clients").hidden = rows.length > 0;
  byId("no-clients").textContent = isServer
    ? "The server's model has no scores by client. Choose the local or the global test."
    : "No scores by client yet.";
  if (!rows.length) return;
  const isPercentage = clientContent.is_percentage;
  const score = (value) => formatScore(value, isPercentage);
  const hasModels = rows.some((row) => row.model);
  const chosen = rows.some((row) => row.id === view.client) ? view.client : rows[0].id;
  // Clients that share one model have equal scores on the global test.
  const hasWorst = rows[0].last !== rows[rows.length - 1].last;
  const columns = ["Client", hasModels ? "Model" : null, "Last", "Since first", "Trend", "Failed"].filter(Boolean);
  byId("clients-head").replaceChildren(create("tr", {}, ...columns.map((name) =>
    create("th", { scope: "col", class: ["Client", "Model"].includes(name) ? "text" : null, title: name === "Failed" ? "rounds in which the upload was not used" : null }, name))));
  const table = rows.map((row, index) => {
    const change = row.last - row.first;
    const sign = change > 0 ? "+" : change < 0 ? "−" : "±";
    const tag = index === 0 && hasWorst ? create("span", { class: "tag" }, "worst") : null;
    const line = create("tr", { class: row.id === chosen ? "chosen" : null },
      create("th", { scope: "row" }, row.id, tag),
      ...(hasModels ? [create("td", { class: "text" }, row.model || MISSING)] : []),
      create("td", {}, score(row.last)),
      create("td", {}, row.points.length > 1 ? sign + formatChange(Math.abs(change), isPercentage) : MISSING),
      create("td", {}, sparkline(row.points)),
      create("td", {}, row.failures ? String(row.failures) : MISSING));
    line.addEventListener("click", () => {
      view.client = row.id;
      renderClients();
    });
    return line;
  });
  if (clientContent.omitted) {
    table.push(create("tr", {}, create("td", { colspan: columns.length, class: "text soft" }, `and ${clientContent.omitted} more clients with better scores`)));
  }
  byId("clients").replaceChildren(...table);
  // The worst client and the chosen one are drawn last, above the others.
  const order = rows.slice(0, 60).filter((row) => row.id !== chosen && row !== rows[0]);
  const series = order.map((row) => ({ label: row.id, color: "var(--soft)", width: 1.1, opacity: 0.45, points: row.points }));
  series.push({ label: rows[0].id, color: hasWorst ? "var(--c1)" : "var(--soft)", width: 2.2, points: rows[0].points });
  if (chosen !== rows[0].id) {
    series.push({ label: chosen, color: "var(--c0)", width: 2.2, points: rows.find((row) => row.id === chosen).points });
  }
  const marks = [hasWorst ? "worst in orange" : "", chosen === rows[0].id ? "" : `${chosen} in blue`].filter(Boolean);
  const detail = [`${TESTS[content.test].toLowerCase()}, by client`, marks.join(", ")].filter(Boolean).join("; ");
  drawChart(byId("clients-chart"), { title: metricTitle(), detail, series, x: xAxis("round"), y: scoreAxis(isPercentage), height: 320, nearest: true });
}

function sparkline(points) {
  const [width, height] = [72, 18];
  const [low, high] = extent(points.map((p) => p[1]));
  const [left, right] = extent(points.map((p) => p[0]));
  const toX = (value) => 1 + ((value - left) / (right - left || 1)) * (width - 2);
  const toY = (value) => height - 2 - ((value - low) / (high - low || 1)) * (height - 4);
  const path = points.map((p) => `${toX(p[0]).toFixed(1)},${toY(p[1]).toFixed(1)}`).join(" ");
  return createSvg("svg", { width, height, "aria-hidden": "true" },
    createSvg("polyline", { class: "line", points: path, style: "stroke: var(--accent); stroke-width: 1.3" }));
}

function render() {
  renderStatus();
  renderControls();
  renderRuns();
  renderCharts();
  renderClients();
}

// Data

function readAddress() {
  const values = new URLSearchParams(location.hash.slice(1));
  for (const name of ["test", "metric", "x", "run", "client"]) {
    if (values.has(name)) view[name] = values.get(name);
  }
  view.band = values.get("band") === "1";
  if (!(view.x in X_AXES)) view.x = "round";
}

function writeAddress() {
  const values = new URLSearchParams();
  for (const name of ["test", "metric", "x", "run", "client"]) {
    if (view[name]) values.set(name, view[name]);
  }
  if (view.band) values.set("band", "1");
  history.replaceState(null, "", `#${values}`);
}

async function fetchText(page, parameters) {
  const answer = await fetch(`${page}?${new URLSearchParams(parameters)}`, { cache: "no-store" });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.text();
}

async function load() {
  const { test, metric } = view;
  const runs = await fetchText("runs.json", { test, metric });
  const parsed = JSON.parse(runs);
  const keys = parsed.runs.map((run) => run.key);
  if (!keys.includes(view.run)) view.run = keys[0] ?? "";
  const clients = await fetchText("clients.json", { run: view.run, test: parsed.test, metric: parsed.metric });
  // The user may have chosen another metric in the meantime.
  if (test !== view.test || metric !== view.metric) return;
  byId("lost").hidden = true;
  if (shown.runs === runs && shown.clients === clients) return;
  shown = { runs, clients };
  content = parsed;
  clientContent = JSON.parse(clients);
  render();
}

async function update(changes) {
  Object.assign(view, changes);
  writeAddress();
  if (content) render();
  await tryLoad();
}

async function tryLoad() {
  try {
    await load();
  } catch (error) {
    console.error(error);
    byId("lost").hidden = false;
  }
}

async function poll() {
  if (!document.hidden) await tryLoad();
  setTimeout(poll, POLL_MS);
}

byId("metric").addEventListener("change", (event) => update({ metric: event.target.value }));
byId("band").addEventListener("change", (event) => update({ band: event.target.checked }));
byId("client-run").addEventListener("change", (event) => update({ run: event.target.value, client: "" }));
document.addEventListener("visibilitychange", () => { if (!document.hidden) tryLoad(); });
let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (content && innerWidth !== lastWidth) render();
  lastWidth = innerWidth;
});
readAddress();
poll();
