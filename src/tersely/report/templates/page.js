"use strict";
// Theme, tables, plots.  All data comes from the page itself; every text becomes a text node, never markup.
const root = document.documentElement;
const all = (selector, place = document) => [...place.querySelectorAll(selector)];
const make = (tag, properties = {}, ...children) => { const it = Object.assign(document.createElement(tag), properties); it.append(...children); return it; };

// --- light and dark --------------------------------------------------------------------------------------------------
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const isDark = () => root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches;
const toggle = document.getElementById("theme");
function themed() {
  toggle.textContent = isDark() ? "Light" : "Dark";
  for (const figure of drawn) draw(figure);
}
toggle.addEventListener("click", () => {
  root.dataset.theme = isDark() ? "light" : "dark";
  try { localStorage.setItem("tersely-theme", root.dataset.theme); } catch { /* a page without a place to remember */ }
  themed();
});
prefersDark.addEventListener("change", themed);

// --- tables ----------------------------------------------------------------------------------------------------------
const words = new Intl.Collator(undefined, { numeric: true });
const sortable = cell => cell.dataset.v !== undefined ? Number(cell.dataset.v) : cell.textContent;
function sort(heading) {
  const table = heading.closest("table"), column = heading.cellIndex, body = table.tBodies[0];
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of all("th", table)) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const keyed = [...body.rows].map(row => [sortable(row.cells[column]), row]);
  keyed.sort(([a], [b]) => {
    if (a === "" || b === "") return (a === "") - (b === "");  // what is not there stands last, either way
    const order = typeof a === "number" && typeof b === "number" ? a - b : words.compare(String(a), String(b));
    return down ? -order : order;
  });
  body.append(...keyed.map(([, row]) => row));
}
function copied(table, how) {
  const lines = [...table.rows].map(row => [...row.cells].map(cell => {
    const raw = how === "tsv" && cell.dataset.v !== undefined ? cell.dataset.v : cell.textContent;
    return raw.replace(/\s+/g, " ").trim().replace(/\|/g, how === "tsv" ? "|" : "\\|");
  }));
  if (how === "tsv") return lines.map(line => line.join("\t")).join("\n") + "\n";
  const right = [...table.rows[0].cells].map(cell => cell.classList.contains("n") ? "--:" : "---");
  return [lines[0], right, ...lines.slice(1)].map(line => `| ${line.join(" | ")} |`).join("\n") + "\n";
}
async function put(text) {
  try { await navigator.clipboard.writeText(text); } catch {
    const area = make("textarea", { value: text });  // browsers that keep the clipboard from pages of no server
    document.body.append(area); area.select(); document.execCommand("copy"); area.remove();
  }
}
document.addEventListener("click", event => {
  const button = event.target.closest("button");
  if (button?.parentElement.tagName === "TH") sort(button.parentElement);
  if (button?.dataset.copy) {
    const holder = button.closest(".table"), status = holder.querySelector("[role=status]"), table = holder.querySelector("table");
    put(copied(table, button.dataset.copy)).then(() => {
      status.textContent = `${table.tBodies[0].rows.length} rows copied`;
      setTimeout(() => { status.textContent = ""; }, 2000);
    });
  }
});
function tableOf(name, columns, rows) {
  const heads = columns.map(([title, number]) => { const th = make("th", { scope: "col", className: number ? "n" : "" }, make("button", { type: "button", textContent: title })); th.setAttribute("aria-sort", "none"); return th; });
  const lines = rows.map(row => make("tr", {}, ...row.map((value, n) => {
    const cell = make("td", { className: columns[n][1] ? "n" : "", textContent: value === null || value === undefined ? "" : String(value) });
    if (typeof value === "number") { cell.dataset.v = value; cell.textContent = short(value); }
    return cell;
  })));
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...heads)), make("tbody", {}, ...lines));
  table.setAttribute("aria-label", name);
  const scroll = make("div", { className: "scroll", tabIndex: 0 }, table);
  scroll.setAttribute("role", "region"); scroll.setAttribute("aria-label", name);
  const status = make("span"); status.setAttribute("role", "status");
  const copy = how => { const it = make("button", { type: "button", textContent: how === "tsv" ? "Copy TSV" : "Copy Markdown" }); it.dataset.copy = how; return it; };
  return make("div", { className: "table" }, make("div", { className: "tools" }, make("span", { textContent: name }), status, copy("tsv"), copy("markdown")), scroll);
}
const short = value => Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));

// --- plots -----------------------------------------------------------------------------------------------------------
const plots = Object.fromEntries(JSON.parse(document.getElementById("plots")?.textContent ?? "[]").map(plot => [plot.name, plot]));
const drawn = new Set();
const colour = name => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
// the library reads markup in labels; what is not markup to us must not be to it
const plain = text => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const bytes = value => { for (const [factor, name] of [[1e9, "GB"], [1e6, "MB"], [1e3, "kB"]]) if (value >= factor) return `${(value / factor).toFixed(2)} ${name}`; return `${value} B`; };
const quantity = (key, value) => key.endsWith("bytes") ? bytes(value) : short(value);
const narrow = figure => figure.clientWidth < 560;

const FINE = Array.from({ length: 72 }, (_, n) => 1 + n / 8);  // every eighth
/** Ticks of a logarithmic axis that people can read: 1, 2, 5 and powers of ten within reach. */
function ticks(values, write) {
  const low = Math.min(...values), high = Math.max(...values), found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const step of high / low > 500 ? [1] : high / low > 8 ? [1, 2, 5] : high / low > 1.6 ? [1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8] : FINE) found.push(step * 10 ** power);
  let within = found.filter(tick => tick >= low * 0.9 && tick <= high * 1.1);
  while (within.length > 8) within = within.filter((_, n) => n % 2 === 0);
  return { tickvals: within, ticktext: within.map(write) };
}
function reach(values) {
  const logs = values.map(Math.log10), low = Math.min(...logs), high = Math.max(...logs), pad = Math.max(0.04, (high - low) * 0.06);
  return [low - pad, high + pad];
}
function axis(title, more = {}) {
  return { title: { text: plain(title), standoff: 10, font: { size: 12, color: colour("soft") } }, gridcolor: colour("line"), linecolor: colour("line"), tickcolor: colour("line"), zeroline: false, automargin: true, ...more };
}
function layout(height, more) {
  return {
    height, autosize: true, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 12, r: 12, t: 8, b: 12 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: colour("ink") }, showlegend: false,
    hoverlabel: { bgcolor: colour("raised"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12 }, align: "left" },
    dragmode: matchMedia("(pointer: fine)").matches ? "zoom" : false, hovermode: "closest", ...more,
  };
}
const SYMBOLS = ["circle", "diamond", "square", "triangle-up", "cross", "star"];
const KINDS = {
  pareto: {
    draw(plot, view, figure) {
      const arena = plot.data[view.of], rows = view.points.map(n => [n, arena.rows[n]]), onFront = new Set(view.front);
      const methods = [...new Set([...view.front, ...view.points].map(n => arena.rows[n].method))];  // those on the front first
      const say = row => `<b>${plain(row.way)}</b>${row.size ? `, ${plain(row.size)}` : ""}<br>${plain(view.choice[3])}: ${quantity(view.x, row[view.x])}<br>${["kl", "perplexity"].filter(key => row[key] !== undefined).map(key => `${key === "kl" ? "KL" : "perplexity"} ${short(row[key])}`).join(", ")}`;
      const traces = methods.map((method, n) => {
        const own = rows.filter(([, row]) => row.method === method), tone = colour(`c${n % 8}`);
        return {
          type: "scatter", mode: "markers", name: plain(method), x: own.map(([, row]) => row[view.x]), y: own.map(([, row]) => row[view.y]),
          text: own.map(([, row]) => say(row)), hovertemplate: "%{text}<extra></extra>",
          marker: { symbol: SYMBOLS[Math.floor(n / 8) % SYMBOLS.length], color: tone, size: own.map(([i]) => onFront.has(i) ? 11 : 8), opacity: own.map(([i]) => onFront.has(i) ? 1 : 0.55), line: { width: own.map(([i]) => onFront.has(i) ? 1.5 : 0), color: colour("ink") } },
        };
      });
      const front = view.front.map(n => arena.rows[n]);
      traces.unshift({ type: "scatter", mode: "lines", x: front.map(row => row[view.x]), y: front.map(row => row[view.y]), line: { color: colour("soft"), width: 1.2, shape: "hv" }, hoverinfo: "skip", showlegend: false });
      const xs = rows.map(([, row]) => row[view.x]), ys = rows.map(([, row]) => row[view.y]);
      const dense = view.y === "perplexity" && arena.dense ? arena.dense : null;
      if (dense) ys.push(dense);
      return [traces, layout(narrow(figure) ? 470 : 460, {
        showlegend: methods.length > 1, legend: narrow(figure) ? { itemsizing: "constant", orientation: "h", y: -0.36, x: 0, yanchor: "top" } : { itemsizing: "constant", x: 1.01, y: 0.96, xanchor: "left" },
        xaxis: axis(view.choice[3], { type: "log", range: reach(xs), ...ticks(xs, value => quantity(view.x, value)) }),
        yaxis: axis(view.choice[2], { type: "log", range: reach(ys), ...ticks(ys, short) }),
        shapes: dense ? [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: dense, y1: dense, line: { color: colour("soft"), width: 1, dash: "dot" } }] : [],
        annotations: dense ? [{ xref: "paper", x: 0, xanchor: "left", y: Math.log10(dense), yanchor: "bottom", text: `dense ${short(dense)}`, showarrow: false, font: { color: colour("soft"), size: 11 } }] : [],
      })];
    },
    table: (plot, view) => [[["way"], ["size"], ["method"], [view.choice[3], true], [view.choice[2], true], ["on the front"]],
      view.points.map(n => plot.data[view.of].rows[n]).map((row, n) => [row.way, row.size ?? "", row.method, row[view.x], row[view.y], view.front.includes(view.points[n]) ? "yes" : "no"])],
  },
  heat: {
    draw(plot, view, figure) {
      const flat = view.z.flat().filter(value => value !== null), low = Math.min(...flat), high = Math.max(...flat);
      const diverging = view.scale === "diverging", log = diverging || view.what === "error" && low > 0 && high / low > 20;
      const change = value => value === null ? null : diverging ? Math.log2(value) : log ? Math.log10(value) : value;
      const far = diverging ? Math.max(0.1, ...flat.map(value => Math.abs(Math.log2(value)))) : 0;
      const marks = diverging ? [-far, -far / 2, 0, far / 2, far] : log ? ticks(flat, short).tickvals.map(Math.log10) : null;
      const written = view.z.map(line => line.map(value => value === null ? "" : String(Number(value.toPrecision(2)))));
      const room = (figure.clientWidth - 190) / view.x.length, few = room > 7 * Math.max(...written.flat().map(text => text.length)) + 6, tall = 30 * view.y.length + 70;
      const bar = { thickness: 8, outlinewidth: 0, tickfont: { color: colour("soft"), size: 11 }, len: 1, ...(marks ? { tickvals: marks, ticktext: marks.map(mark => short(diverging ? 2 ** mark : 10 ** mark)) } : {}) };
      return [[{
        type: "heatmap", x: view.x.map(String), y: view.y.map(plain), z: view.z.map(line => line.map(change)), hoverongaps: true, xgap: view.x.length > 60 ? 0 : 1, ygap: 1,
        customdata: view.z.map(line => line.map(value => value === null ? plain(view.empty) : short(value))), hovertemplate: `layer %{x}, %{y}<br>${plain(view.choice.at(-1))}: %{customdata}<extra></extra>`,
        ...(few ? { text: written, texttemplate: "%{text}", textfont: { size: 11 } } : {}),
        colorscale: diverging ? [[0, colour("below")], [0.5, colour("middle")], [1, colour("above")]] : [[0, colour("heat-0")], [0.5, colour("heat-1")], [1, colour("heat-2")]],
        ...(diverging ? { zmin: -far, zmax: far } : low === high ? { zmin: change(low) - 1, zmax: change(high) + 1 } : {}), colorbar: bar,
      }], layout(Math.max(tall, 130), {
        xaxis: axis("layer", { type: "category", showgrid: false, nticks: Math.max(2, Math.floor((figure.clientWidth - 190) / (8 * String(view.x.at(-1)).length + 16))), tickangle: 0 }),
        yaxis: axis("", { type: "category", autorange: "reversed", showgrid: false, ticksuffix: " " }),
      })];
    },
    table: (plot, view) => [[["projection"], ["layer", true], [view.choice.at(-1), true]], view.y.flatMap((line, i) => view.x.flatMap((layer, j) => view.z[i][j] === null ? [] : [[line, layer, view.z[i][j]]]))],
  },
  spectra: {
    draw(plot, view, figure) {
      const deepest = Math.max(1, view.lines.length - 1), from = colour("c0"), to = colour("c1");
      const traces = view.lines.map((line, n) => ({
        type: "scatter", mode: "lines", x: line.x, y: line.y.map(share => share > 0 ? share : null), line: { width: 1.4, color: mixed(from, to, n / deepest) }, opacity: 0.85,
        hovertemplate: `layer ${line.layer}<br>${plain(view.across)} %{x}: %{y:.3g} lost<extra></extra>`,
      }));
      const cut = view.lines.map((line, n) => [line, n]).filter(([line]) => line.cut && line.cut[1] > 0);
      traces.push({
        type: "scatter", mode: "markers", x: cut.map(([line]) => line.cut[0]), y: cut.map(([line]) => line.cut[1]), marker: { size: 9, color: cut.map(([, n]) => mixed(from, to, n / deepest)), line: { width: 1.5, color: colour("ink") } },
        text: cut.map(([line]) => `layer ${line.layer}, cut`), hovertemplate: `%{text}<br>${plain(view.across)} %{x}: %{y:.3g} lost<extra></extra>`,
      });
      const shares = view.lines.flatMap(line => line.y).filter(share => share > 0), floor = Math.max(1e-5, Math.min(...shares));
      return [traces, layout(400, {
        xaxis: axis(view.across), yaxis: axis("share of output energy lost", { type: "log", range: [Math.log10(floor) - 0.1, 0.08], ...ticks([floor, 1], short) }),
        annotations: view.lines.length > 1 ? [{ xref: "paper", yref: "paper", x: 1, y: 1, xanchor: "right", yanchor: "top", showarrow: false, text: `<span style="color:${from}">layer ${view.lines[0].layer}</span> → <span style="color:${to}">layer ${view.lines.at(-1).layer}</span>`, font: { size: 12 } }] : [],
      })];
    },
    table: (plot, view) => [[["layer", true], [view.across, true], ["share lost", true], ["cut here"]], view.lines.flatMap(line => {
      const rows = line.x.map((amount, n) => [line.layer, amount, line.y[n], line.cut?.[0] === amount ? "yes" : "no"]);
      return line.cut && !line.x.includes(line.cut[0]) ? [...rows, [line.layer, ...line.cut, "yes"]] : rows;
    })],
  },
  drift: {
    draw: (plot, view) => [[{ type: "scatter", mode: "lines+markers", x: view.x, y: view.y, line: { color: colour("c0"), width: 2 }, marker: { size: 6 }, hovertemplate: "block %{x}: %{y:.3g}<extra></extra>" }],
      layout(320, { xaxis: axis("block", { dtick: Math.max(1, Math.ceil(view.x.length / 16)) }), yaxis: axis(view.choice[1], { rangemode: view.choice[1] === "cosine" ? "normal" : "tozero" }) })],
    table: (plot, view) => [[["block", true], [view.choice[1], true]], view.y.map((value, n) => [view.x[n], value])],
  },
  bars: {
    draw(plot, view, figure) {
      const values = view.seconds ?? view.bytes, whole = values.reduce((sum, value) => sum + value, 0);
      const time = value => `${value < 0.01 ? "< 0.01" : short(Number(value.toPrecision(3)))} s, ${Math.round(100 * value / whole)} %`;
      const said = values.map(view.seconds ? time : bytes), [factor, unit] = view.seconds ? [1, "seconds"] : Math.max(...values) >= 1e9 ? [1e9, "GB"] : [1e6, "MB"];
      return [[{
        type: "bar", orientation: "h", y: view.names.map(plain), x: values.map(value => value / factor), marker: { color: colour("c0") }, text: said.map(text => ` ${text}`), textposition: "outside", cliponaxis: false,
        constraintext: "none", textfont: { color: colour("soft") }, hovertemplate: "%{y}: %{text}<extra></extra>",
      }], layout(34 * view.names.length + 60, { margin: { l: 12, r: narrow(figure) ? 90 : 110, t: 4, b: 12 }, xaxis: axis(unit), yaxis: axis("", { autorange: "reversed", ticksuffix: " ", showgrid: false }), bargap: 0.35 })];
    },
    table: (plot, view) => [[["stage"], [view.seconds ? "seconds" : "bytes", true]], view.names.map((name, n) => [name, (view.seconds ?? view.bytes)[n]])],
  },
};
function mixed(from, to, share) {
  const parts = text => [1, 3, 5].map(start => parseInt(text.slice(start, start + 2), 16)), [a, b] = [parts(from), parts(to)];
  return `rgb(${a.map((part, n) => Math.round(part + share * (b[n] - part))).join(",")})`;
}
function viewOf(figure) {
  const plot = plots[figure.dataset.plot], chosen = all("select", figure).map(select => select.value);
  return plot.views.find(view => chosen.every((value, n) => view.choice[n] === value)) ?? plot.views[0];
}
function draw(figure) {
  const plot = plots[figure.dataset.plot], view = viewOf(figure), place = figure.querySelector(".plot");
  if (plot.kind === "heat") place.style.maxWidth = `${Math.max(300, 190 + 84 * view.x.length)}px`;
  const [traces, looks] = KINDS[plot.kind].draw(plot, view, place);
  place.style.height = `${looks.height}px`;
  Plotly.react(place, traces, looks, { responsive: true, displayModeBar: false });
  place.setAttribute("aria-label", `${plot.title}. ${view.alt}`);
  figure.querySelector(".alt").textContent = view.alt;
  drawn.add(figure);
  const data = figure.querySelector("details.data");
  if (data.open) fill(data);
}
function fill(details) {
  const figure = details.closest("figure"), plot = plots[figure.dataset.plot], view = viewOf(figure);
  for (const old of all(".table", details)) old.remove();
  details.append(tableOf([plot.title, ...view.choice].join(", "), ...KINDS[plot.kind].table(plot, view)));
}
/** A select for each thing to choose; what goes with nothing else chosen moves to what does. */
function choosers(figure) {
  const plot = plots[figure.dataset.plot], place = figure.querySelector(".choose");
  if (!place) return;
  plot.selectors.forEach((name, n) => {
    const options = [...new Set(plot.views.map(view => view.choice[n]))];
    const select = make("select", {}, ...options.map(option => make("option", { value: option, textContent: option })));
    const label = make("label", { hidden: options.length < 2 }, name, select);
    select.addEventListener("change", () => {
      const chosen = all("select", place).map(one => one.value);
      const fitting = plot.views.filter(view => view.choice[n] === select.value);
      const near = view => view.choice.filter((value, i) => value === chosen[i]).length;
      const best = fitting.reduce((a, b) => near(b) > near(a) ? b : a);
      all("select", place).forEach((one, i) => { one.value = best.choice[i]; });
      draw(figure);
    });
    place.append(label);
  });
}
async function unpack() {
  const packed = document.getElementById("plotly");
  const stored = Uint8Array.from(atob(packed.textContent), character => character.charCodeAt(0));
  const source = await new Response(new Blob([stored]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  packed.remove();
  document.head.append(make("script", { textContent: source }));
}
async function start() {
  themed();
  const figures = all("figure[data-plot]");
  figures.forEach(choosers);
  for (const details of all("details.data")) details.addEventListener("toggle", () => { if (details.open) fill(details); });
  if (!figures.length) return;
  try { await unpack(); } catch (error) {
    for (const place of all(".plot")) place.replaceWith(make("p", { className: "soft", textContent: `This browser does not unpack plots (${error.message}); their data is below.` }));
    return;
  }
  const seen = new IntersectionObserver(entries => {
    for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }, { rootMargin: "600px" });
  figures.forEach(figure => seen.observe(figure));
  addEventListener("beforeprint", () => figures.filter(figure => !drawn.has(figure)).forEach(draw));
  root.dataset.ready = String(Math.round(performance.now()));
}
start();
