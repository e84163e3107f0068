"use strict";
(() => {
  const root = document.documentElement;
  const themed = window.matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : themed.matches);
  const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const cycle = () => ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", isDark() ? "#e4e8ec" : "#000000", isDark() ? "#F0E442" : "#a39a00"];
  const drawn = new Set();

  // ---- figures: drawn when their place is opened, in the colors of the theme
  const looks = () => {
    const axis = { gridcolor: css("--grid"), zerolinecolor: css("--grid"), linecolor: css("--muted"), color: css("--text"), automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: cycle(),
      font: { color: css("--text"), family: "system-ui, sans-serif", size: 12 }, axis,
      modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--text") },
      hoverlabel: { bgcolor: css("--raised"), font: { color: css("--text") } },
    };
  };
  const dressed = (layout) => {
    const { axis, ...rest } = looks();
    const merged = { ...layout, ...rest, autosize: true };
    if (!layout.margin) merged.margin = { t: 36, r: 16, b: 50, l: 60 };
    delete merged.width;
    for (const key of new Set([...Object.keys(layout), "xaxis", "yaxis"])) {
      if (/^[xy]axis\d*$/.test(key)) merged[key] = { ...(layout[key] || {}), ...axis };
      if (/^scene\d*$/.test(key)) {
        const scene = { ...layout[key] };
        const plain = { gridcolor: axis.gridcolor, zerolinecolor: axis.gridcolor, color: axis.color, showbackground: false };
        for (const side of ["xaxis", "yaxis", "zaxis"]) scene[side] = { ...(scene[side] || {}), ...plain };
        merged[key] = scene;
      }
    }
    if (layout.annotations) merged.annotations = layout.annotations.map((a) => ({ ...a, font: { ...(a.font || {}), color: rest.font.color } }));
    return merged;
  };
  const show = (place, data, layout) => {
    if (!window.Plotly) return;
    place.vitscope = { data, layout };
    drawn.add(place);
    Plotly.react(place, data, dressed(layout), { displaylogo: false, responsive: true, modeBarButtonsToRemove: ["sendChartToCloud"] });
  };
  const redress = () => drawn.forEach((place) => place.isConnected && show(place, place.vitscope.data, place.vitscope.layout));
  document.querySelectorAll("details.interactive").forEach((details) => {
    const opened = () => {
      const place = details.querySelector(".plot");
      if (!details.open || drawn.has(place)) return;
      const source = JSON.parse(document.getElementById(place.dataset.source).textContent);
      show(place, source.data, source.layout || {});
    };
    details.addEventListener("toggle", opened);
    opened();
  });

  // ---- theme
  try { if (localStorage.getItem("vitscope-theme")) root.dataset.theme = localStorage.getItem("vitscope-theme"); } catch { /* no storage for files here */ }
  document.getElementById("theme").addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    try { localStorage.setItem("vitscope-theme", root.dataset.theme); } catch { /* the choice lasts as long as the page */ }
    redress();
  });
  themed.addEventListener("change", redress);

  // ---- print: everything that is folded is opened, and folded again
  let folded = [];
  window.addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open]):not(.interactive)")];
    folded.forEach((details) => { details.open = true; });
  });
  window.addEventListener("afterprint", () => folded.forEach((details) => { details.open = false; }));

  // ---- links to something folded open it
  const reveal = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target && target.tagName === "DETAILS") target.open = true;
  };
  window.addEventListener("hashchange", reveal);
  reveal();

  // ---- runs: filter, sort, choose, compare
  const content = JSON.parse(document.getElementById("run-data").textContent);
  const byId = new Map(content.runs.map((run) => [run.id, run]));
  const table = document.getElementById("run-table");
  const rows = [...table.tBodies[0].rows];
  // ---- microscope: the pictures of the chosen image
  const imageChoice = document.getElementById("microscope-image");
  if (imageChoice) {
    const of = (id) => JSON.parse(document.getElementById(id).textContent);
    const cells = of("microscope-pictures"), images = of("microscope-images");
    const source = document.getElementById("microscope-source");
    const places = [...document.querySelectorAll("table.pictures tbody td")].map((cell) => cell.querySelector("img"));
    imageChoice.closest(".choice").hidden = false;
    imageChoice.addEventListener("change", () => {
      const i = Number(imageChoice.value);
      if (source) source.src = images[i];
      places.forEach((img, k) => { if (img) { img.hidden = !cells[k][i]; if (cells[k][i]) img.src = cells[k][i]; } });
    });
  }

  const chosen = new Set();
  const element = (tag, text, attributes = {}) => Object.assign(document.createElement(tag), { textContent: text, ...attributes });
  const said = (value) => {
    if (value === null || value === undefined) return "–";
    if (typeof value === "number" && !Number.isInteger(value)) return String(Number(value.toPrecision(5)));
    return typeof value === "object" ? JSON.stringify(value) : String(value);
  };
  const select = document.getElementById("curve");
  content.curves.forEach((name) => select.append(element("option", name, { value: name })));

  const compare = () => {
    const runs = [...chosen].map((id) => byId.get(id));
    document.getElementById("comparison").hidden = runs.length === 0;
    document.getElementById("chosen").textContent = runs.length ? `${runs.length} chosen` : "Tick runs to compare them";
    const grid = document.getElementById("compared");
    grid.replaceChildren();
    if (!runs.length) return;
    const head = grid.createTHead().insertRow();
    head.append(element("th", "", { scope: "col" }), ...runs.map((run) => element("th", `${run.label}, seed ${run.seed}`, { scope: "col" })));
    const body = grid.createTBody();
    const line = (name, values, always) => {
      const texts = values.map(said);
      const differs = new Set(texts).size > 1;
      if (!always && !differs) return;
      const row = body.insertRow();
      row.append(element("th", name, { scope: "row" }), ...texts.map((text) => element("td", text, { className: differs && !always ? "differs" : "" })));
    };
    content.metrics.filter((name) => runs.some((run) => name in run.metrics)).forEach((name) => line(name, runs.map((run) => run.metrics[name]), true));
    content.keys.forEach((key) => line(key, runs.map((run) => run.config[key]), false));
    const name = select.value;
    const curves = runs.filter((run) => run.curves[name]);
    const place = document.getElementById("curves");
    place.hidden = curves.length === 0;
    if (curves.length) {
      const data = curves.map((run) => ({ x: run.curves[name][0], y: run.curves[name][1], name: `${run.label}, seed ${run.seed}`, mode: run.curves[name][0].length > 1 ? "lines" : "markers" }));
      show(place, data, { xaxis: { title: { text: "step" } }, yaxis: { title: { text: name } }, showlegend: true, legend: { orientation: "h", y: -0.25 }, margin: { t: 10, r: 10, l: 55, b: 40 } });
    }
  };
  const choose = (row, on) => {
    row.classList.toggle("chosen", on);
    row.querySelector("input").checked = on;
    chosen[on ? "add" : "delete"](row.dataset.run);
  };
  rows.forEach((row) => {
    const cell = row.cells[0];
    const box = element("input", "", { type: "checkbox" });
    box.setAttribute("aria-label", `Compare ${row.dataset.run}`);
    box.addEventListener("change", () => { choose(row, box.checked); compare(); });
    cell.prepend(box, " ");
  });
  document.querySelector(".controls").hidden = false;
  select.addEventListener("change", compare);
  document.getElementById("clear").addEventListener("click", () => { rows.forEach((row) => choose(row, false)); compare(); });
  document.getElementById("filter").addEventListener("input", (event) => {
    const words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    rows.forEach((row) => { row.hidden = !words.every((word) => row.textContent.toLowerCase().includes(word)); });
  });
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      [...table.tHead.rows[0].cells].forEach((other) => other.setAttribute("aria-sort", "none"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => row.cells[column].textContent.trim();
      const ordered = [...rows].sort((a, b) => (up ? 1 : -1) * value(a).localeCompare(value(b), undefined, { numeric: true }));
      table.tBodies[0].append(...ordered);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
  compare();
})();
