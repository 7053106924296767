"use strict";
// Draws what the page's JSON holds, for the chosen ranks, layer, and two simulations. Text goes into text nodes, or
// through plain() where Plotly would read markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const sims = data.simulations;
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const $ = (id) => document.getElementById(id);
  const shown = { layer: data.layer, before: data.before, after: data.after, follow: 0, placement: -1, expert: null };

  const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const times = (x) => `${x.toFixed(3)}×`;
  const unpacked = new Map();
  const unpack = (text) => {
    if (!unpacked.has(text)) {
      const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
      const view = new DataView(bytes.buffer);
      unpacked.set(text, Array.from({ length: bytes.length / 2 }, (_, i) => view.getUint16(2 * i, true)));
    }
    return unpacked.get(text);
  };

  // ---- colours of the page, light or dark

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const faint = (name, part) => {
    const n = parseInt(colour(name).slice(1), 16);
    return `rgba(${n >> 16}, ${(n >> 8) & 255}, ${n & 255}, ${part})`;
  };
  const axis = (more) => ({
    gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, tickfont: { color: colour("faded"), size: 11 },
    title: { font: { color: colour("faded"), size: 12 }, standoff: 6 }, automargin: false, fixedrange: true, ...more,
  });
  const titled = (text, more) => axis({ ...more, title: { text, font: { color: colour("faded"), size: 12 }, standoff: 6 } });
  const layout = (more) => ({
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", showlegend: false,
    font: { family: getComputedStyle(document.body).fontFamily, color: colour("ink"), size: 12 },
    margin: { l: 52, r: 12, t: 8, b: 36 },
    hoverlabel: { bgcolor: colour("panel"), bordercolor: colour("line"), font: { color: colour("ink"), size: 12 } }, ...more,
  });
  const config = { displayModeBar: false, responsive: true };
  const draw = (id, traces, more) => Plotly.react($(id), traces, layout(more), config);

  // ---- phases: where what the batches are made of changes

  const named = data.phases.length > 1 && data.phases.length <= 24;
  const phaseLines = (spans) => !named ? [] : data.phases.slice(1).flatMap(([from]) => spans.map(([y0, y1]) => ({
    type: "line", xref: "x", yref: "paper", x0: from - 0.5, x1: from - 0.5, y0, y1,
    line: { color: colour("faded"), width: 1, dash: "dot" },
  })));
  const phaseNames = (y) => {
    const wide = data.ends[1] - data.ends[0] + 1;
    return !named ? [] : data.phases.filter(([a, b]) => (b - a + 1) / wide > 0.07).map(([a, b, name]) => ({
      x: (a + b) / 2, y, xref: "x", yref: "paper", text: plain(name.length > 18 ? `${name.slice(0, 17)}…` : name),
      showarrow: false, yanchor: "bottom", font: { size: 11, color: colour("faded") },
    }));
  };
  const batches = (more) => titled("batch", { range: [data.ends[0] - 0.5, data.ends[1] + 0.5], ...more });

  // ---- heat maps before and after, and the busiest rank of both

  const rows = (sim) => {
    const n = sim.setting.n_ranks, cells = unpack(sim.heat[shown.layer]);
    return Array.from({ length: n }, (_, r) => data.columns.map((_, c) => cells[c * n + r] / data.scale));
  };
  const scale = (top) => [
    [0, colour("less")], [1 / top, colour("even")], [1 / top + (1 - 1 / top) * 0.45, colour("more")], [1, colour("most")],
  ];
  const heat = (sim, top, y, bar) => ({
    type: "heatmap", z: rows(sim), x: data.columns, yaxis: y, xaxis: "x", zmin: 0, zmax: top, colorscale: scale(top),
    showscale: bar, hovertemplate: `rank %{y}, batch %{x}: %{z:.3f} × mean<extra>${plain(sim.name)}</extra>`,
    colorbar: {
      len: 0.63, y: 1, yanchor: "top", thickness: 10, x: 1.01, xpad: 2, outlinewidth: 0,
      tickfont: { color: colour("faded"), size: 11 }, tickvals: [0, 0.5, 1, 1.5, 2, 2.5, 3, 4].filter((v) => v <= top),
      title: { text: "× mean", font: { color: colour("faded"), size: 11 } },
    },
  });
  const drawn = data.columns.length < 3 ? "lines+markers" : "lines"; // a line through one point is none
  const busiest = (sim, name) => {
    const line = {
      x: data.columns, y: sim.mean[shown.layer], mode: drawn, yaxis: "y3", line: { color: colour(name), width: 2 },
      name: plain(sim.name), hovertemplate: `%{y:.3f} × mean<extra>${plain(sim.name)}</extra>`,
    };
    if (data.step === 1) return [line];
    const edge = { x: data.columns, mode: "lines", yaxis: "y3", line: { width: 0 }, hoverinfo: "skip" };
    return [
      { ...edge, y: sim.mean[shown.layer] },
      { ...edge, y: sim.worst[shown.layer], fill: "tonexty", fillcolor: faint(name, 0.18) }, line,
    ];
  };
  const caption = (text, y, name) => ({
    text, x: 0, y, xref: "paper", yref: "paper", showarrow: false, xanchor: "left", yanchor: "bottom",
    font: { size: 12.5, color: colour(name) },
  });
  const drawHeat = () => {
    const before = sims[shown.before], after = sims[shown.after], i = shown.layer;
    const top = Math.min(4, Math.max(1.5, Math.ceil(2 * Math.max(before.of_layer[i].p99, after.of_layer[i].p99)) / 2));
    const says = (word, sim) =>
      `<b>${word}: ${plain(sim.name)}</b>, busiest rank ${times(sim.of_layer[i].imbalance)} the mean`;
    const bound = {
      x: data.columns, y: after.bound[i], mode: "lines", yaxis: "y3", name: "bound",
      line: { color: colour("bound"), width: 1.2, dash: "dot" },
      hovertemplate: "%{y:.3f} × mean<extra>certified lower bound, after</extra>",
    };
    const spans = [[0.71, 1], [0.36, 0.65], [0, 0.29]];
    draw("heat", [
      heat(before, top, "y", true), heat(after, top, "y2", false),
      ...busiest(before, "before"), ...busiest(after, "after"), bound,
    ], {
      margin: { l: 46, r: 58, t: named ? 38 : 22, b: 36 },
      xaxis: batches({ anchor: "y3" }),
      yaxis: titled("rank", { domain: spans[0] }), yaxis2: titled("rank", { domain: spans[1] }),
      yaxis3: titled("busiest / mean", { domain: spans[2], autorange: "max", range: [0.95, null] }),
      shapes: phaseLines(spans),
      annotations: [
        caption(says("before", before), 1.002, "before"), caption(says("after", after), 0.652, "after"),
        caption("busiest rank: <b>before</b>, after, and the certified lower bound (dotted)", 0.292, "faded"),
        ...phaseNames(1.04),
      ],
    });
    $("heat").dataset.layer = data.layers[i];
  };

  // ---- the ranks of "after" over time

  const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.round(q * (sorted.length - 1)))];
  const drawRanks = () => {
    const sim = sims[shown.after], all = rows(sim), n = all.length, follow = Math.min(shown.follow, n - 1);
    const line = (y, name, width, more) => ({
      x: data.columns, y, mode: drawn, line: { color: colour(name), width }, hovertemplate: "%{y:.3f} × mean", ...more,
    });
    const traces = [];
    if (n <= 16) {
      all.forEach((y, r) => traces.push(line(y, "faded", 0.8, { name: `rank ${r}`, opacity: 0.7 })));
    } else {
      const sorted = data.columns.map((_, c) => all.map((row) => row[c]).sort((a, b) => a - b));
      const at = (q) => sorted.map((column) => quantile(column, q));
      const band = (low, high, part, name) => traces.push(
        line(at(low), "after", 0, { hoverinfo: "skip", hovertemplate: null }),
        line(at(high), "after", 0, { fill: "tonexty", fillcolor: faint("after", part), name }),
      );
      band(0, 1, 0.15, "busiest");
      band(0.1, 0.9, 0.3, "90 % of ranks below");
      traces.push(line(at(0.5), "after", 1.5, { name: "median" }));
    }
    traces.push(line(all[follow], "before", 1.6, { name: `rank ${follow}` }));
    const words = n <= 16 ? `each of ${n} ranks` : "shade: all ranks, and 10 % to 90 % of them; line: median";
    draw("rank-lines", traces, {
      margin: { l: 46, r: 12, t: 22, b: 36 }, xaxis: batches(), yaxis: titled("load / mean"), hovermode: "x unified",
      shapes: phaseLines([[0, 1]]), annotations: [caption(`${words}; <b>rank ${follow}</b> in orange`, 1.0, "faded")],
    });
    $("follow").max = n - 1;
  };

  // ---- the placement of "after"

  const drawPlacement = () => {
    const sim = sims[shown.after], last = sim.placements.length - 1;
    const which = shown.placement < 0 ? last : Math.min(shown.placement, last);
    const slots = unpack(sim.placements[which][shown.layer]), n = sim.setting.n_ranks, per = slots.length / n;
    const ranksOf = new Map();
    slots.forEach((e, p) => ranksOf.set(e, [...(ranksOf.get(e) || []), Math.floor(p / per)]));
    const cell = (r, k) => slots[r * per + k];
    // a rank's copies on top, those of most copies last
    const order = Array.from({ length: n }, (_, r) => Array.from({ length: per }, (_, k) => k).sort(
      (a, b) => ranksOf.get(cell(r, a)).length - ranksOf.get(cell(r, b)).length || cell(r, a) - cell(r, b)));
    const table = (value) => Array.from({ length: per }, (_, k) => Array.from({ length: n }, (_, r) => value(cell(r, order[r][k]))));
    const most = Math.max(2, ...[...ranksOf.values()].map((ranks) => ranks.length));
    const words = (e) => {
      const ranks = ranksOf.get(e), some = ranks.slice(0, 12).join(", ") + (ranks.length > 12 ? ", …" : "");
      return ranks.length === 1 ? `expert ${e}<br>no copy` : `expert ${e}<br>${ranks.length} copies, on ranks ${some}`;
    };
    const room = $("placement").clientWidth / n > 26 && 230 / per > 11;
    const traces = [{
      type: "heatmap", z: table((e) => Math.min(ranksOf.get(e).length, 8)), text: table((e) => room ? String(e) : ""),
      customdata: table(words), texttemplate: room ? "%{text}" : "", textfont: { size: 10 }, xgap: n > 100 ? 0 : 1, ygap: 1,
      zmin: 1, zmax: Math.min(most, 8), hovertemplate: "rank %{x}: %{customdata}<extra></extra>",
      colorscale: [[0, colour("pale")], [0.001, faint("after", 0.3)], [1, colour("after")]],
      colorbar: {
        thickness: 10, outlinewidth: 0, x: 1.01, xpad: 2, tickfont: { color: colour("faded"), size: 11 }, tickmode: "array",
        tickvals: [1, 2, 3, 4, 5, 6, 7, 8].filter((v) => v <= most), title: { text: "slots", font: { size: 11, color: colour("faded") } },
      },
    }];
    const found = [];
    for (let r = 0; r < n; ++r) order[r].forEach((k, y) => cell(r, k) === shown.expert && found.push([r, y]));
    traces.push({
      x: found.map(([r]) => r), y: found.map(([, y]) => y), mode: "markers", hoverinfo: "skip",
      marker: { symbol: "square-open", size: Math.max(8, Math.min(22, 500 / n)), color: colour("before"), line: { width: 3 } },
    });
    const moved = sim.moved[which][shown.layer];
    const first = which === 0 && sim.placed_at[0] === data.ends[0];
    draw("placement", traces, {
      margin: { l: 46, r: 58, t: 22, b: 36 }, xaxis: titled("rank", { range: [-0.5, n - 0.5] }),
      yaxis: titled("slot (copies on top)", { range: [-0.5, per - 0.5] }),
      annotations: [caption(first ? "the first placement; hover for experts" :
        `${moved} of ${slots.length} slots held an expert new to their rank; hover for experts`, 1.0, "faded")],
    });
    Object.assign($("placement-at"), { max: last, value: which });
    $("placed-at").textContent = sim.placed_at[which];
    $("expert").max = sim.setting.n_logical - 1;
  };

  // ---- the solves

  const drawSolves = () => {
    const pair = [[sims[shown.before], "before"], [sims[shown.after], "after"]];
    const steps = pair.map(([sim, name]) => ({
      type: "bar", x: sim.iterations[shown.layer].map((_, k) => k), y: sim.iterations[shown.layer],
      marker: { color: colour(name) }, hovertemplate: `%{x}: %{y} batches<extra>${plain(sim.name)}</extra>`,
    }));
    const kind = sims[shown.after].setting.solver === "ipm" ? "interior point" : "cuts of the flow";
    $("steps-say").textContent = `${kind}; batches by how many it took`;
    draw("steps", steps, {
      xaxis: titled("steps", { dtick: 1 }), yaxis: titled("batches"), barmode: "group", bargap: 0.3,
    });
    const gaps = pair.map(([sim, name]) => ({
      x: data.columns, y: sim.gap[shown.layer].map((g) => g > 0 ? g : null), mode: "markers",
      marker: { color: colour(name), size: 4 }, hovertemplate: `%{y:.1e}<extra>${plain(sim.name)}</extra>`,
    }));
    draw("gaps", gaps, {
      xaxis: batches(), margin: { l: 60, r: 12, t: 8, b: 36 },
      yaxis: titled("largest gap", { type: "log", range: [-10, -3], dtick: 2, exponentformat: "power" }),
      shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 1e-4, y1: 1e-4, line: { color: colour("faded"), width: 1, dash: "dash" } }],
    });
  };

  // ---- text: cards, table, choices

  const element = (tag, words, className) => {
    const made = document.createElement(tag);
    made.textContent = words;
    if (className) made.className = className;
    return made;
  };
  const CARDS = [
    ["imbalance, mean", 0, "imbalance_mean"], ["imbalance, p99", 2, "imbalance_p99"],
    ["certified lower bound", 1, "bound_mean"], ["balancedness", 3, "balancedness"],
    ["cross-node tokens", 4, "cross_node_share"], ["moved at each refresh", 5, "moved_bytes"],
    ["layer time (model)", 6, "layer_seconds_mean"],
  ];
  // Whether "after" is worse, in the digits that are shown: all but balancedness are better if lower.
  const worse = (before, after, i, key) => {
    const was = before.summary[key], is = after.summary[key];
    if (was === null || is === null || before.cells[i] === after.cells[i]) return false;
    return key === "balancedness" ? is < was : is > was;
  };
  const drawCards = () => {
    const before = sims[shown.before], after = sims[shown.after];
    $("cards").replaceChildren(...CARDS.filter(([, i]) => before.cells[i] !== "-" || after.cells[i] !== "-").map(
      ([title, i, key]) => {
        const card = document.createElement("div"), value = document.createElement("dd");
        const was = element("span", before.cells[i], "was"), is = element("span", after.cells[i], "is");
        is.classList.toggle("worse", worse(before, after, i, key));
        was.dataset.value = before.summary[key];
        is.dataset.value = after.summary[key];
        is.dataset.key = was.dataset.key = key;
        value.append(was, element("span", "→", "arrow"), is);
        card.append(element("dt", title), value);
        return card;
      }));
    document.querySelectorAll("tr[data-row]").forEach((row) => {
      row.classList.toggle("before", Number(row.dataset.row) === shown.before);
      row.classList.toggle("after", Number(row.dataset.row) === shown.after);
    });
    $("layer-says").textContent = `layer ${data.layers[shown.layer]}`;
  };
  const options = (id, pairs, value) => {
    $(id).replaceChildren(...pairs.map(([key, words]) => Object.assign(element("option", words), { value: key })));
    $(id).value = value;
  };
  const sections = [...new Set(sims.map((sim) => sim.section))];
  const drawChoices = () => {
    const here = sims[shown.after].section;
    const same = sims.map((sim, i) => [i, sim.name]).filter(([i]) => sims[i].section === here);
    options("ranks", sections.map((name) => [name, name]), here);
    options("before", same, shown.before);
    options("after", same, shown.after);
    options("layer", data.layers.map((name, i) => [i, name]), shown.layer);
  };
  // Keeps the two simulations of one number of ranks: the same names where that number has them.
  const within = (section) => {
    const same = sims.map((_, i) => i).filter((i) => sims[i].section === section);
    const named = (i) => same.find((j) => sims[j].name === sims[i].name);
    const pick = (i, otherwise) => named(i) === undefined ? otherwise : named(i);
    shown.before = pick(shown.before, same[0]);
    shown.after = pick(shown.after, same[same.length - 1]);
  };
  const drawAll = () => {
    drawChoices(); drawCards(); drawHeat(); drawRanks(); drawPlacement(); drawSolves();
    Object.assign(document.body.dataset, { ready: "true", drawn: dark.matches ? "dark" : "light" });
  };

  $("ranks").onchange = (event) => { within(event.target.value); drawAll(); };
  for (const name of ["layer", "before", "after"]) {
    $(name).onchange = (event) => { shown[name] = Number(event.target.value); drawAll(); };
  }
  document.querySelectorAll("tr[data-row] button").forEach((button) => {
    button.onclick = () => {
      const i = Number(button.closest("tr").dataset.row);
      if (sims[i].section !== sims[shown.after].section) within(sims[i].section);
      shown.after = i;
      drawAll();
    };
  });
  $("follow").oninput = (event) => {
    shown.follow = Math.max(0, Math.floor(Number(event.target.value)) || 0);
    drawRanks();
  };
  $("placement-at").oninput = (event) => { shown.placement = Number(event.target.value); drawPlacement(); };
  $("expert").oninput = (event) => {
    shown.expert = event.target.value === "" ? null : Number(event.target.value);
    drawPlacement();
  };
  dark.addEventListener("change", drawAll);
  drawAll();
})();
