// Draws charts, changes the page without loading it anew, and moves in the grid by arrow keys.
// Everything on the page works as plain links too; its address is always that of what is shown.
"use strict";

const FRAGMENT = { headers: { "X-Fragment": "1" }, credentials: "same-origin" };
const THEMES = ["system", "light", "dark"];
const content = () => document.getElementById("content");
let newest = 0; // number of the newest change; answers to earlier ones are dropped

// Charts

function themed(text) {
  // "var(--name, #abc)@0.2" or "#aabbcc" as the page's theme has it.
  const [color, alpha] = text.split("@");
  const found = /^var\((--[\w-]+),\s*(#[0-9a-f]+)\)$/i.exec(color);
  const style = getComputedStyle(document.documentElement);
  const hex = found ? style.getPropertyValue(found[1]).trim() || found[2] : color;
  if (alpha === undefined) return hex;
  const long = hex.length === 4 ? hex.replace(/[0-9a-f]/gi, "$&$&") : hex;
  const parts = [1, 3, 5].map((at) => parseInt(long.slice(at, at + 2), 16));
  return `rgba(${parts.join(",")},${alpha})`;
}

function colored(value) {
  if (typeof value === "string") return /^(var\(--|#[0-9a-f]{3,6}(@|$))/i.test(value) ? themed(value) : value;
  if (Array.isArray(value)) return value.map(colored);
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([name, inner]) => [name, colored(inner)]));
  }
  return value;
}

async function draw(plot) {
  const figure = colored(JSON.parse(plot.nextElementSibling.textContent));
  const ink = themed("var(--ink, #1b1f24)");
  const page = themed("var(--page, #ffffff)");
  Object.assign(figure.layout, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: ink },
    hoverlabel: { bgcolor: page, bordercolor: ink, font: { color: ink } },
    width: plot.clientWidth,
  });
  await Plotly.react(plot, figure.data, figure.layout, { displayModeBar: false, responsive: false });
  if ("picksTime" in plot.dataset && !plot.dataset.heeds) {
    plot.dataset.heeds = "1";
    plot.addEventListener("click", (event) => pickTime(plot, event));
  }
  plot.dataset.drawn = plot.nextElementSibling.textContent;
}

function pickTime(plot, event) {
  // The hour under the pointer, from the chart's own axis.
  const axis = plot._fullLayout.xaxis;
  const hour = axis.p2d(event.clientX - plot.getBoundingClientRect().left - axis._offset);
  const slider = document.getElementById("step");
  const step = Math.round(hour / Number(slider.dataset.hours));
  goToStep(Math.min(Math.max(step, Number(slider.min)), Number(slider.max)));
}

async function drawAll() {
  const mine = newest;
  const plots = [...document.querySelectorAll(".plot")];
  // What is seen first is drawn first.
  const away = (plot) => Math.abs(plot.getBoundingClientRect().top - innerHeight / 2);
  plots.sort((one, other) => away(one) - away(other));
  for (const plot of plots) {
    if (mine !== newest) return;
    if (plot.dataset.drawn !== plot.nextElementSibling.textContent) {
      await draw(plot);
      await new Promise((done) => setTimeout(done));
    }
  }
  document.body.dataset.drawn = location.href;
}

function redraw() {
  for (const plot of document.querySelectorAll(".plot")) delete plot.dataset.drawn;
  drawAll();
}

// Changes of the page

async function go(address, { push = true } = {}) {
  const mine = ++newest;
  let text;
  try {
    const answer = await fetch(address, FRAGMENT);
    if (answer.status === 403) return location.assign(address);
    text = await answer.text();
  } catch {
    document.getElementById("live").textContent = "The server does not answer.";
    return undefined;
  }
  if (mine !== newest) return undefined;
  const incoming = new DOMParser().parseFromString(text, "text/html").getElementById("content");
  if (!incoming) return location.assign(address);
  if (push) history.pushState(null, "", address);
  replaceContent(incoming);
  await drawAll();
  return undefined;
}

function replaceContent(incoming) {
  const focused = document.activeElement && document.activeElement.id;
  const open = [...document.querySelectorAll("details[id]")].map((one) => [one.id, one.open]);
  for (const place of incoming.querySelectorAll(".plot")) {
    // Charts that are there already keep their drawing.
    const before = document.getElementById(place.id);
    if (before) {
      before.setAttribute("aria-label", place.getAttribute("aria-label"));
      place.replaceWith(before);
    }
  }
  content().replaceWith(incoming);
  for (const [id, was] of open) {
    const details = document.getElementById(id);
    if (details) details.open = was;
  }
  document.title = incoming.dataset.title;
  const again = focused && document.getElementById(focused);
  if (again) again.focus({ preventScroll: true });
  else if (focused) document.getElementById("main").focus({ preventScroll: true });
  prepare();
  const summary = document.getElementById("summary");
  document.getElementById("live").textContent = summary ? summary.textContent : document.title;
}

function goToStep(step) {
  const address = new URL(location.href);
  address.searchParams.set("step", step);
  go(address.pathname + address.search.replaceAll("%2C", ",").replaceAll("%3B", ";"));
}

// The grid of treatments: one stop of the Tab key, arrows within.

function prepare() {
  const cells = [...document.querySelectorAll("[data-cell]")];
  const chosen = document.querySelector('[aria-selected="true"] [data-cell]') || cells[0];
  const focused = cells.includes(document.activeElement) ? document.activeElement : chosen;
  for (const cell of cells) cell.tabIndex = cell === focused ? 0 : -1;
}

function moveInGrid(event) {
  const cell = event.target.closest("[data-cell]");
  const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1],
    Home: [0, -4], End: [0, 4], PageUp: [-4, 0], PageDown: [4, 0] }[event.key];
  if (!cell || event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key === " ") {
    event.preventDefault();
    cell.click();
    return;
  }
  if (!move) return;
  event.preventDefault();
  const at = Number(cell.dataset.cell);
  const within = (level) => Math.min(Math.max(level, 0), 4);
  const row = within(Math.floor(at / 5) + move[0]);
  const next = document.getElementById(`cell-${5 * row + within((at % 5) + move[1])}`);
  cell.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

// Everything that is clicked or changed

async function copy(text, button) {
  await navigator.clipboard.writeText(text);
  document.getElementById("live").textContent = "Copied.";
  const before = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = before; }, 1500);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("a[data-update]");
  if (link && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
    event.preventDefault();
    go(link.getAttribute("href"));
    return;
  }
  const button = event.target.closest("button");
  if (!button) return;
  if (button.dataset.opens) document.getElementById(button.dataset.opens).showModal();
  if (button.dataset.copies) copy(document.getElementById(button.dataset.copies).textContent, button);
  if ("copiesAddress" in button.dataset) copy(location.href, button);
  if (button.id === "theme") nextTheme();
});
document.addEventListener("keydown", moveInGrid);
document.addEventListener("input", (event) => {
  if (event.target.id !== "step") return;
  const hour = `${Number(event.target.value) * Number(event.target.dataset.hours)}`;
  document.querySelector('output[for="step"]').textContent = hour;
  event.target.setAttribute("aria-valuetext", `hour ${hour}`);
});
document.addEventListener("change", (event) => {
  if (event.target.id === "step") goToStep(event.target.value);
});
document.addEventListener("submit", (event) => {
  if ("stepForm" in event.target.dataset) event.preventDefault();
});
addEventListener("popstate", () => go(location.pathname + location.search, { push: false }));

// Theme and size

function shownTheme() {
  return document.documentElement.dataset.theme || "system";
}

function nextTheme() {
  const next = THEMES[(THEMES.indexOf(shownTheme()) + 1) % THEMES.length];
  if (next === "system") {
    delete document.documentElement.dataset.theme;
    localStorage.removeItem("theme");
  } else {
    document.documentElement.dataset.theme = next;
    localStorage.setItem("theme", next);
  }
  document.getElementById("theme").textContent = `Theme: ${next}`;
  redraw();
}

let width = innerWidth;
let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (innerWidth !== width) redraw();
    width = innerWidth;
  }, 150);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);

document.getElementById("theme").textContent = `Theme: ${shownTheme()}`;
prepare();
drawAll();
