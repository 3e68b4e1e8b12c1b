// The points of the map: drawn by WebGL over the density that the server drew. Selecting works without points, too.

import { pointsOn } from "./points.js";
import { toast } from "./shell.js";

const map = document.querySelector("#map");
if (map) start();

function start() {
  const find = (selector, within = document) => within.querySelector(selector);
  const canvas = find("#points"), density = find("#density"), drawn = find("#drawn"), shape = find("polygon", drawn);
  const hover = find("#hover"), told = find("#map-told"), by = find("#by"), tools = find("#tools");
  const number = (text) => text.split(",").map(Number);
  const whole = number(map.dataset.whole);
  let box = number(map.dataset.box); // left, bottom, right, top: what is shown
  let drawing = null, rows = null, places = null, count = 0, tool = "pan", latest = 0;
  const columns = new Map();

  // -- the address: what is selected, and which part is shown

  const asked = () => new URLSearchParams(location.search);
  const written = (values) => values.map((value) => value.toPrecision(6)).join(",");

  function address(base, parameters) {
    const text = parameters.toString();
    return text ? `${base}?${text}` : base;
  }

  function go(parameters) {
    history.pushState(null, "", address(map.dataset.here, parameters));
    refresh();
  }

  async function refresh() {
    const turn = ++latest;
    const parameters = asked();
    if (by.value !== (parameters.get("by") ?? "outcome")) await recolored(parameters.get("by") ?? "outcome");
    show(parameters.get("lasso"));
    const listed = window.htmx.ajax("GET", address(map.dataset.selected, parameters), { target: "#selected", swap: "outerHTML" });
    redraw();
    await highlight(turn, parameters, listed);
  }

  window.addEventListener("popstate", () => {
    const given = asked().get("box");
    look(given ? number(given) : whole);
    refresh();
  });

  // -- points

  async function bytes(url) {
    const answer = await fetch(url, { headers: { Accept: "application/octet-stream" } });
    if (!answer.ok) throw new Error(await answer.text());
    return answer.arrayBuffer();
  }

  function column(name) {
    const run = map.dataset.run ? `?run=${map.dataset.run}` : "";
    if (!columns.has(name)) columns.set(name, bytes(`${map.dataset.columns}${name}.bin${run}`));
    return columns.get(name);
  }

  /** The values of the points, in their order; in a loop, since a million calls take half a second. */
  function gathered(values, made = new values.constructor(count)) {
    for (let point = 0; point < count; point += 1) made[point] = values[rows[point]];
    return made;
  }

  async function colors(name) {
    const codes = new Uint8Array(await column(name));
    return gathered(codes);
  }

  /** The colors of the legend, as the style sheet has them for this theme. */
  function palette() {
    const probe = document.createElement("i");
    map.append(probe);
    const found = [];
    for (let n = 0; n <= 12; n += 1) {
      probe.className = `k${n}`;
      found.push(getComputedStyle(probe).color.match(/[\d.]+/g).slice(0, 3).map(Number));
    }
    probe.remove();
    return found;
  }

  async function points() {
    const made = pointsOn(canvas, lost);
    if (!made) {
      told.textContent = "This browser has no WebGL, so the map stays a picture. Selecting works.";
      return;
    }
    told.textContent = "Loading the points";
    const [x, y] = (await Promise.all([column("x"), column("y")])).map((read) => new Float32Array(read));
    rows = new Uint32Array(x.length);
    for (let row = 0; row < x.length; row += 1) {
      if (Number.isFinite(x[row])) rows[count++] = row;
    }
    places = [gathered(x), gathered(y)];
    made.places(...places);
    made.codes(await colors(by.value));
    made.palette(palette());
    drawing = made;
    canvas.hidden = false;
    made.size(map.clientWidth, map.clientHeight);
    look(box);
    await highlight(latest, asked());
    await made.drawn();
    density.hidden = true;
    told.textContent = "";
    map.dataset.points = String(count);
  }

  function lost() {
    drawing = null;
    canvas.hidden = true;
    density.hidden = false;
    told.textContent = "The browser has given up drawing the points, so the map stays a picture. Selecting works.";
    redraw();
  }

  async function recolored(name) {
    by.value = name;
    if (drawing) drawing.codes(await colors(name));
  }

  /** Points outside of the selection fade. */
  async function highlight(turn, parameters, listed = null) {
    if (!drawing) return;
    for (const name of ["by", "box", "run"]) parameters.delete(name);
    if (![...parameters].length) {
      drawing.chosen(null);
      delete map.dataset.chosen;
      return;
    }
    if (map.dataset.run) parameters.set("run", map.dataset.run);
    try {
      const mask = new Uint8Array(await bytes(address(map.dataset.mask, parameters)));
      await listed; // drawing many points without a GPU takes a second, which the gallery need not wait for
      if (turn !== latest) return;
      const chosen = new Uint8Array(count);
      let some = 0;
      for (let point = 0; point < count; point += 1) {
        some += chosen[point] = (mask[rows[point] >> 3] >> (rows[point] & 7)) & 1;
      }
      drawing?.chosen(chosen);
      map.dataset.chosen = String(some);
    } catch (error) {
      toast(error.message, "error");
    }
  }

  // -- the part that is shown

  const aspect = () => map.clientWidth / map.clientHeight;

  let settling = 0;
  function settle() {
    clearTimeout(settling);
    settling = setTimeout(() => {
      const parameters = asked();
      if (box.every((value, n) => Math.abs(value - whole[n]) < 0.01 * (whole[3] - whole[1]))) parameters.delete("box");
      else parameters.set("box", written(box));
      if (parameters.toString() !== asked().toString()) history.replaceState(history.state, "", address(map.dataset.here, parameters));
      redraw();
    }, 250);
  }

  /** Shows a part of the map: as high as asked for, and as wide as fits. */
  function look(part) {
    const [a, b] = [(part[0] + part[2]) / 2, (part[1] + part[3]) / 2];
    const high = Math.max(1e-4, Math.min(50, (part[3] - part[1]) / 2)), wide = high * aspect();
    box = [a - wide, b - high, a + wide, b + high];
    if (drawing) drawing.look(box);
    hover.hidden = true;
    settle();
    outline();
  }

  /** Asks the server for the picture of this part, where it is what is shown. */
  function redraw() {
    if (drawing) return;
    const parameters = asked();
    for (const name of ["by", "box"]) parameters.delete(name);
    parameters.set("box", written(box));
    const wanted = address(map.dataset.density, parameters);
    if (density.getAttribute("src") !== wanted) density.src = wanted;
  }

  /** Around a place, which stays where it is; by default the middle. */
  function zoom(factor, [x, y] = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]) {
    look([x + (box[0] - x) * factor, y + (box[1] - y) * factor, x + (box[2] - x) * factor, y + (box[3] - y) * factor]);
  }

  function shift(x, y) {
    const [wide, high] = [(box[2] - box[0]) * x, (box[3] - box[1]) * y];
    look([box[0] + wide, box[1] + high, box[2] + wide, box[3] + high]);
  }

  const MOVES = {
    in: () => zoom(0.5), out: () => zoom(2), whole: () => look(whole),
    west: () => shift(-0.25, 0), east: () => shift(0.25, 0), north: () => shift(0, 0.25), south: () => shift(0, -0.25),
  };
  const KEYS = { "+": "in", "=": "in", "-": "out", 0: "whole", ArrowLeft: "west", ArrowRight: "east", ArrowUp: "north", ArrowDown: "south" };
  for (const link of document.querySelectorAll("[data-move]")) {
    link.addEventListener("click", (event) => {
      event.preventDefault();
      MOVES[link.dataset.move]();
    });
  }
  map.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "v") select([[box[0], box[1]], [box[2], box[1]], [box[2], box[3]], [box[0], box[3]]]);
    else if (KEYS[event.key]) MOVES[KEYS[event.key]]();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  map.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(Math.max(-60, Math.min(60, event.deltaY)) / 200), on_map(event));
  }, { passive: false });

  // One pointer moves the map; two, on a touch screen, zoom it.
  const held = new Map();
  map.addEventListener("pointerdown", (event) => {
    if (tool !== "pan" || event.button) return;
    map.setPointerCapture(event.pointerId);
    held.set(event.pointerId, [event.clientX, event.clientY]);
  });
  map.addEventListener("pointermove", (event) => {
    const before = held.get(event.pointerId);
    if (!before) return;
    const others = [...held].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
    if (others.length) {
      const apart = ([x, y]) => Math.hypot(x - others[0][0], y - others[0][1]);
      const middle = { clientX: (event.clientX + others[0][0]) / 2, clientY: (event.clientY + others[0][1]) / 2 };
      zoom(Math.max(10, apart(before)) / Math.max(10, apart([event.clientX, event.clientY])), on_map(middle));
    } else shift(-(event.clientX - before[0]) / map.clientWidth, (event.clientY - before[1]) / map.clientHeight);
    held.set(event.pointerId, [event.clientX, event.clientY]);
  });
  for (const name of ["pointerup", "pointercancel"]) map.addEventListener(name, (event) => held.delete(event.pointerId));

  // -- selecting: the same with and without points

  function on_map(event) {
    const size = map.getBoundingClientRect();
    return [
      box[0] + ((event.clientX - size.left) / size.width) * (box[2] - box[0]),
      box[3] - ((event.clientY - size.top) / size.height) * (box[3] - box[1]),
    ];
  }

  let lasso = null; // the corners that are being drawn
  let corners = []; // those that are selected

  function outline() {
    const [w, h] = [map.clientWidth, map.clientHeight];
    drawn.setAttribute("viewBox", `0 0 ${w} ${h}`);
    const pixels = (lasso ?? corners).map(([x, y]) => `${(((x - box[0]) / (box[2] - box[0])) * w).toFixed(1)},${(((box[3] - y) / (box[3] - box[1])) * h).toFixed(1)}`);
    shape.setAttribute("points", pixels.join(" "));
  }

  function show(text) {
    corners = text ? text.split(";").map(number) : [];
    outline();
  }

  function select(polygon) {
    const step = Math.ceil(polygon.length / 300); // more corners change no selection that a hand can draw
    const parameters = asked();
    parameters.set("lasso", polygon.filter((_, n) => n % step === 0).map(([x, y]) => `${x.toFixed(5)},${y.toFixed(5)}`).join(";"));
    parameters.delete("page");
    go(parameters);
  }

  drawn.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    drawn.setPointerCapture(event.pointerId);
    lasso = [on_map(event)];
    event.preventDefault();
    event.stopPropagation();
  });
  drawn.addEventListener("pointermove", (event) => {
    if (!lasso) return;
    lasso.push(on_map(event));
    outline();
  });
  drawn.addEventListener("pointerup", () => {
    const polygon = lasso;
    lasso = null;
    if (polygon && polygon.length > 3) select(polygon);
    else outline();
  });
  drawn.addEventListener("pointercancel", () => { lasso = null; outline(); });

  tools.hidden = false;
  for (const button of tools.querySelectorAll("[data-tool]")) {
    button.addEventListener("click", () => {
      tool = button.dataset.tool;
      for (const one of tools.querySelectorAll("[data-tool]")) one.setAttribute("aria-pressed", String(one === button));
      map.classList.toggle("lasso", tool === "lasso");
      hover.hidden = true;
    });
  }

  // -- filters and colors: links and a form, which work without scripts, too

  document.addEventListener("click", (event) => {
    const link = event.target.closest("#selected a[data-filter], #selected .condition, #selected .conditions a");
    if (!link || event.metaKey || event.ctrlKey || event.shiftKey) return;
    event.preventDefault();
    const parameters = new URL(link.href).searchParams;
    const here = asked().get("box");
    if (here) parameters.set("box", here);
    go(parameters);
  });
  by.addEventListener("change", async () => {
    const parameters = asked();
    const name = by.value;
    if (name === "outcome") parameters.delete("by");
    else parameters.set("by", name);
    await recolored(name);
    go(parameters);
  });

  // -- what lies under the pointer

  const NEAR = 8; // pixels
  let wanted = null, looking = 0;
  map.addEventListener("pointermove", (event) => {
    if (!drawing || held.size || lasso || tool !== "pan") return;
    clearTimeout(looking);
    looking = setTimeout(() => under(event), 60);
  });
  map.addEventListener("pointerleave", () => { clearTimeout(looking); left(); });

  /** The point that is nearest to a place, and near enough; -1 if none is. A million takes a few milliseconds. */
  function nearest([x, y]) {
    const [xs, ys] = places, reach = (NEAR / map.clientHeight) * (box[3] - box[1]);
    let best = -1, least = reach * reach;
    for (let point = 0; point < count; point += 1) {
      const a = xs[point] - x, b = ys[point] - y, far = a * a + b * b;
      if (far < least) [best, least] = [point, far];
    }
    return best;
  }

  async function under(event) {
    const point = nearest(on_map(event));
    if (point < 0) {
      left();
      return;
    }
    const row = rows[point];
    if (wanted === row) return;
    wanted = row;
    const run = map.dataset.run ? `?run=${map.dataset.run}` : "";
    const answer = await fetch(`${map.dataset.point}${row}${run}`);
    if (!answer.ok || wanted !== row) return;
    hover.innerHTML = await answer.text();
    hover.hidden = false;
    const size = map.getBoundingClientRect();
    const [x, y] = [event.clientX - size.left, event.clientY - size.top];
    hover.style.left = `${Math.max(0, Math.min(size.width - 150, x > size.width / 2 ? x - 160 : x + 14))}px`;
    hover.style.top = `${Math.max(0, Math.min(size.height - 190, y - 90))}px`;
  }

  function left() {
    wanted = null;
    hover.hidden = true;
  }

  // -- size and theme

  new ResizeObserver(() => {
    if (drawing) drawing.size(map.clientWidth, map.clientHeight);
    outline();
  }).observe(map);
  const retheme = () => { if (drawing) drawing.palette(palette()); };
  document.addEventListener("themechange", retheme);
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", retheme);

  show(asked().get("lasso"));
  points().catch((error) => {
    told.textContent = "The points could not be drawn, so the map stays a picture. Selecting works.";
    console.warn(error);
  });
}
