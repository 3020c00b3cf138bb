"use strict";
// Reads the page's own data blocks only; makes no request. Text goes into the page through textContent, never as markup.
const $ = (id) => document.getElementById(id);
const COLOURS = [[86, 180, 233], [240, 163, 48]];
const MANY = [[0, 114, 178], [213, 94, 0], [0, 158, 115], [204, 121, 167], [86, 180, 233], [230, 159, 0], [240, 228, 66]];
const index = JSON.parse($("index").textContent);
const state = { image: null, object: null, query: [null, null], layer: 0, entry: -1 };
let current = null; // {runs: [...], picture: Image}
let shown = index.entries;
const cache = new Map();

// ---- data
async function inflate(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  return JSON.parse(await new Response(stream).text());
}
function block(kind, id) {
  const node = document.querySelector(`script[data-${kind}="${id}"]`);
  return node ? node.textContent : "";
}
async function load(id) {
  if (!cache.has(id)) {
    const runs = await inflate(block("masks", id));
    for (const run of runs) if (run) run.decoded = new Map();
    const picture = new Image();
    const uri = block("picture", id);
    if (uri) { picture.src = uri; await picture.decode().catch(() => {}); }
    cache.set(id, { id, runs, picture });
    if (cache.size > 12) cache.delete(cache.keys().next().value);
  }
  return cache.get(id);
}
function counts(text) { // COCO's compressed run lengths
  const runs = [];
  let value = 0, shift = 0;
  for (let i = 0; i < text.length; i++) {
    const bits = text.charCodeAt(i) - 48;
    value |= (bits & 31) << shift; shift += 5;
    if (bits & 32) continue;
    if ((bits & 16) && shift < 32) value |= -1 << shift;
    runs.push(value + (runs.length > 2 ? runs[runs.length - 2] : 0));
    value = 0; shift = 0;
  }
  return runs;
}
function mask(run, text) { // row-major Uint8Array of run.h x run.w
  if (run.decoded.has(text)) return run.decoded.get(text);
  const out = new Uint8Array(run.h * run.w);
  let at = 0, on = false;
  for (const n of counts(text)) {
    if (on) for (let k = at; k < at + n; k++) out[(k % run.h) * run.w + Math.floor(k / run.h)] = 1;
    at += n; on = !on;
  }
  run.decoded.set(text, out);
  return out;
}
const [QUERY, NAME, SCORE, OBJECT, PREVIOUS, RLE] = [0, 1, 2, 3, 4, 5];
const at = (run, layer, query) => run.layers[layer].find((q) => q[QUERY] === query);
const layersOf = (item) => Math.max(...item.runs.map((run) => (run ? run.layers.length : 0)));
function finalQuery(run, object) {
  const found = run && run.layers[run.layers.length - 1].find((q) => q[OBJECT] === object);
  return found ? found[QUERY] : null;
}

// ---- drawing
function paint(canvas, run, masks, truths, side) {
  const ratio = run.h / run.w;
  canvas.width = side; canvas.height = Math.round(side * ratio);
  canvas.style.aspectRatio = `${run.w} / ${run.h}`;
  const pen = canvas.getContext("2d");
  pen.fillStyle = "#888"; pen.fillRect(0, 0, canvas.width, canvas.height);
  pen.filter = $("grey").checked ? "grayscale(1) contrast(.75) brightness(1.12)" : "none";
  if (current.picture.naturalWidth) pen.drawImage(current.picture, 0, 0, canvas.width, canvas.height);
  pen.filter = "none";
  pen.imageSmoothingEnabled = false;
  const sheet = document.createElement("canvas");
  sheet.width = run.w; sheet.height = run.h;
  const inner = sheet.getContext("2d");
  const pixels = inner.createImageData(run.w, run.h);
  for (const [cells, colour] of masks) for (let i = 0; i < cells.length; i++) if (cells[i]) pixels.data.set([...colour, 150], 4 * i);
  inner.putImageData(pixels, 0, 0);
  pen.drawImage(sheet, 0, 0, canvas.width, canvas.height);
  for (const cells of truths) outline(pen, run, cells, canvas.width / run.w, canvas.height / run.h);
}
function outline(pen, run, cells, sx, sy) {
  const inside = (x, y) => x >= 0 && y >= 0 && x < run.w && y < run.h && cells[y * run.w + x] === 1;
  const path = new Path2D();
  for (let y = 0; y <= run.h; y++) for (let x = 0; x <= run.w; x++) {
    if (inside(x, y) !== inside(x, y - 1)) { path.moveTo(x * sx, y * sy); path.lineTo((x + 1) * sx, y * sy); }
    if (inside(x, y) !== inside(x - 1, y)) { path.moveTo(x * sx, y * sy); path.lineTo(x * sx, (y + 1) * sy); }
  }
  pen.lineCap = "square";
  for (const [colour, width] of [["#000", 3], ["#fff", 1.2]]) { pen.strokeStyle = colour; pen.lineWidth = Math.max(width * pen.canvas.width / 400, width * .6); pen.stroke(path); }
}
function masksAt(run, which, layer) {
  if ($("all").checked) {
    const last = run.layers[run.layers.length - 1].filter((q) => q[OBJECT] >= 0); // an object has one colour in both runs
    return last.map((q) => [mask(run, at(run, layer, q[QUERY])[RLE]), MANY[q[OBJECT] % MANY.length]]);
  }
  const entry = state.query[which] === null ? null : at(run, layer, state.query[which]);
  return entry ? [[mask(run, entry[RLE]), COLOURS[which]]] : [];
}
function truthsAt(run) {
  if (!$("truth").checked) return [];
  const wanted = $("all").checked || state.object === null ? run.objects : run.objects.filter((o) => o[0] === state.object);
  return wanted.map((o) => mask(run, o[2]));
}
const two = (x) => (x === null || x === undefined ? "–" : x.toFixed(2));
function iou(first, second) {
  let both = 0, either = 0;
  for (let i = 0; i < first.length; i++) { both += first[i] & second[i]; either += first[i] | second[i]; }
  return either ? both / either : null;
}
function node(tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}
function drawPanes() {
  $("panes").replaceChildren(...index.runs.map((name, which) => pane(name, which)));
  $("films").replaceChildren(...index.runs.map((_, which) => film(which)).filter(Boolean));
  const last = layersOf(current) - 1;
  $("layer").max = last; $("layer").value = state.layer;
  $("layer-name").textContent = `${state.layer} of ${last}`;
}
function pane(name, which) {
  const run = current.runs[which];
  const box = node("div", undefined, "pane");
  box.append(node("h2", name, `run r${which}`));
  const canvas = node("canvas");
  canvas.setAttribute("role", "img");
  box.append(canvas);
  const facts = node("p", undefined, "facts");
  box.append(facts);
  if (!run) { facts.textContent = "This run kept no masks of this image."; return box; }
  const layer = Math.min(state.layer, run.layers.length - 1);
  paint(canvas, run, masksAt(run, which, layer), truthsAt(run), 480);
  describe(facts, run, which, layer);
  canvas.setAttribute("aria-label", `${name}, layer ${layer}: ${facts.textContent}`);
  return box;
}
function describe(facts, run, which, layer) {
  const entry = state.query[which] === null ? null : at(run, layer, state.query[which]);
  if (!entry) { facts.textContent = state.object === null ? "No query chosen." : "No query of this run is matched to the object at the last layer."; return; }
  const object = run.objects.find((o) => o[0] === entry[OBJECT]);
  const matched = object ? `object ${entry[OBJECT]} (${run.names[object[1]]})` : "no object";
  const line = (label, value, bad) => facts.append(node("span", `${label} `), node("b", value, bad ? "bad" : ""), node("br"));
  line("query", String(entry[QUERY]));
  line("class", `${run.names[entry[NAME]]}, score ${two(entry[SCORE])}`);
  line("matched here to", matched, state.object !== null && entry[OBJECT] !== state.object);
  line("IoU to the layer before", two(entry[PREVIOUS]), entry[PREVIOUS] !== null && entry[PREVIOUS] < 0.5);
  const outlined = run.objects.find((o) => o[0] === state.object);
  if (outlined) line(`IoU to object ${state.object}`, two(iou(mask(run, entry[RLE]), mask(run, outlined[2]))));
}
function film(which) {
  const run = current.runs[which];
  if (!run) return null;
  const strip = node("div", undefined, "film");
  const ious = run.layers.map((_, i) => { const e = state.query[which] === null ? null : at(run, i, state.query[which]); return e ? e[PREVIOUS] : null; });
  const known = ious.filter((x) => x !== null);
  const least = known.length ? Math.min(...known) : null;
  run.layers.forEach((_, layer) => {
    const button = node("button");
    button.type = "button";
    button.setAttribute("aria-current", String(layer === state.layer));
    button.setAttribute("aria-label", `${index.runs[which]}, layer ${layer}: ${two(ious[layer])}`);
    const canvas = node("canvas");
    paint(canvas, run, masksAt(run, which, layer), truthsAt(run), 96);
    button.append(canvas, node("span", `${layer}: ${two(ious[layer])}`, least !== null && ious[layer] === least ? "worst" : ""));
    button.onclick = () => go({ layer });
    strip.append(button);
  });
  return strip;
}

// ---- choosing
async function go(change) {
  const before = state.image;
  Object.assign(state, change);
  if (state.image !== before || !current) {
    current = await load(state.image);
    if (current.id !== state.image) return; // a later choice has won
    fillObjects(); fillQueries();
  }
  if ("object" in change || "image" in change) {
    const objects = new Map(current.runs.filter(Boolean).flatMap((run) => run.objects.map((o) => [o[0], o])));
    if (!objects.has(state.object)) state.object = objects.size ? objects.keys().next().value : null;
    state.query = current.runs.map((run) => finalQuery(run, state.object));
  }
  state.layer = Math.max(0, Math.min(state.layer, layersOf(current) - 1));
  state.entry = shown.findIndex((e) => e.image === state.image && e.object === state.object);
  $("image").value = String(state.image); $("object").value = String(state.object);
  drawPanes(); markList(); remember();
}
function fillObjects() {
  const found = new Map();
  for (const run of current.runs) if (run) for (const o of run.objects) found.set(o[0], run.names[o[1]]);
  $("object").replaceChildren(...[...found].map(([id, name]) => option(String(id), `${id} (${name})`)));
}
function fillQueries() {
  $("queries").replaceChildren(...current.runs.map((run, which) => (run ? queryTable(run, which) : node("p", ""))));
}
function queryTable(run, which) {
  const table = node("table");
  const head = node("tr");
  for (const text of [index.runs[which], "last class", "score", "object", "least IoU"]) head.append(node("th", text));
  table.append(head);
  for (const entry of run.layers[run.layers.length - 1]) {
    const ious = run.layers.map((_, i) => at(run, i, entry[QUERY])).filter((e) => e && e[PREVIOUS] !== null).map((e) => e[PREVIOUS]);
    const line = node("tr");
    const pick = node("button", `query ${entry[QUERY]}`);
    pick.type = "button";
    pick.onclick = () => { state.query[which] = entry[QUERY]; $("all").checked = false; go({}); };
    const cell = node("td"); cell.append(pick); line.append(cell);
    const rest = [run.names[entry[NAME]], two(entry[SCORE]), entry[OBJECT] < 0 ? "none" : String(entry[OBJECT]), ious.length ? two(Math.min(...ious)) : "–"];
    for (const text of rest) line.append(node("td", text));
    table.append(line);
  }
  return table;
}
function option(value, text) { const made = node("option", text); made.value = value; return made; }
const worst = (e) => Math.max(...e.drop.map((d) => (d === null ? -1 : d)));
const orders = [["inconsistency", worst], ...index.runs.map((name, i) => [`drop of ${name}`, (e) => (e.drop[i] === null ? -1 : e.drop[i])])];
if (index.runs.length > 1) orders.push([`difference of the two`, (e) => (e.drop.includes(null) ? -2 : e.drop[0] - e.drop[1])]);
orders.push(["image", (e) => -e.image * 1e4 - e.object]);
function fillList() {
  const key = orders[Number($("sort").value)][1];
  const wanted = $("class").value;
  shown = index.entries.filter((e) => !wanted || e.name === wanted).map((e, i) => [key(e), i, e]).sort((a, b) => b[0] - a[0] || a[1] - b[1]).map((x) => x[2]);
  $("count").textContent = `${shown.length} objects, ${index.images.length} images`;
  $("list").replaceChildren();
  state.entry = shown.findIndex((e) => e.image === state.image && e.object === state.object);
  markList();
}
const MORE = 100; // a long list is made so many lines at a time, as it is scrolled
function addLines(upTo) {
  $("list").append(...shown.slice($("list").childElementCount, upTo).map(listLine));
}
function listLine(entry) {
  const item = node("li"), button = node("button", `image ${entry.image}, ${entry.name} ${entry.object}`);
  const drops = node("span", undefined, "drops");
  entry.drop.forEach((drop, i) => drops.append(node("i", drop === null ? "not matched" : `drop ${two(drop)} at layer ${entry.layer[i]}, score ${two(entry.score[i])}`, `c${i}`), node("br")));
  button.type = "button";
  button.append(drops);
  button.onclick = () => choose(entry);
  item.append(button);
  return item;
}
function choose(entry) {
  const layers = entry.layer.filter((x) => x !== null);
  const which = entry.drop.indexOf(worst(entry));
  return go({ image: entry.image, object: entry.object, layer: which >= 0 && entry.layer[which] !== null ? entry.layer[which] : layers[0] || 0 });
}
function markList() {
  addLines(state.entry + MORE);
  const buttons = $("list").querySelectorAll("button");
  buttons.forEach((b, i) => b.setAttribute("aria-current", String(i === state.entry)));
  const chosen = buttons[state.entry], list = $("list");
  if (chosen && list.scrollHeight > list.clientHeight) { // scroll the list, never the page
    const top = chosen.offsetTop - list.offsetTop;
    if (top < list.scrollTop || top + chosen.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - list.clientHeight / 3;
  }
}
function remember() {
  try { history.replaceState(null, "", `#image=${state.image}&object=${state.object}&layer=${state.layer}`); } catch { /* some viewers forbid it: the page works without */ }
}
function stepImage(by) {
  const ids = index.images.map((i) => i.id);
  go({ image: ids[(ids.indexOf(state.image) + by + ids.length) % ids.length], object: null });
}
let timer = 0;
function play() {
  if (timer) { clearInterval(timer); timer = 0; $("play").textContent = "▶"; return; }
  $("play").textContent = "❚❚";
  timer = setInterval(() => go({ layer: (state.layer + 1) % layersOf(current) }), 600);
}
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select")) return;
  const onSlider = event.target === $("layer");
  const keys = {
    ArrowLeft: () => go({ layer: state.layer - 1 }), ArrowRight: () => go({ layer: state.layer + 1 }),
    ArrowUp: () => shown[state.entry - 1] && choose(shown[state.entry - 1]), ArrowDown: () => shown[state.entry + 1] && choose(shown[state.entry + 1]),
    "[": () => stepImage(-1), "]": () => stepImage(1), " ": play,
    g: () => { $("truth").click(); }, a: () => { $("all").click(); }, Home: () => go({ layer: 0 }), End: () => go({ layer: layersOf(current) - 1 }),
  };
  if (!keys[event.key] || !current || (event.key === " " && event.target.closest("button, summary, input[type=checkbox]"))) return;
  if (onSlider && !["ArrowUp", "ArrowDown", "[", "]", "g", "a", " "].includes(event.key)) return; // the slider moves by itself
  event.preventDefault();
  keys[event.key]();
});
async function start() {
  if (!("DecompressionStream" in window)) throw new Error("This browser is too old to unpack the masks (it lacks DecompressionStream): use one from 2023 or later.");
  if (!index.images.length) throw new Error("There is no image to show.");
  $("image").replaceChildren(...index.images.map((i) => option(String(i.id), i.file ? `${i.id} (${i.file.split("/").pop()})` : String(i.id))));
  $("sort").replaceChildren(...orders.map(([name], i) => option(String(i), name)));
  $("class").replaceChildren(option("", "all"), ...[...new Set(index.entries.map((e) => e.name))].sort().map((name) => option(name, name)));
  $("image").onchange = () => go({ image: Number($("image").value), object: null });
  $("object").onchange = () => go({ object: Number($("object").value) });
  $("layer").oninput = () => go({ layer: Number($("layer").value) });
  $("sort").onchange = fillList; $("class").onchange = fillList;
  $("list").onscroll = () => { const list = $("list"); if (list.scrollTop + 2 * list.clientHeight > list.scrollHeight) addLines(list.childElementCount + MORE); };
  for (const id of ["truth", "all", "grey"]) $(id).onchange = drawPanes;
  $("play").onclick = play; $("image-before").onclick = () => stepImage(-1); $("image-after").onclick = () => stepImage(1);
  fillList();
  const asked = new URLSearchParams(location.hash.slice(1));
  const image = Number(asked.get("image"));
  if (asked.has("image") && index.images.some((i) => i.id === image)) await go({ image, object: Number(asked.get("object")), layer: Number(asked.get("layer")) || 0 });
  else if (shown.length) await choose(index.entries[index.first] || shown[0]);
  else await go({ image: index.images[0].id, object: null });
  document.body.dataset.ready = "yes";
}
start().catch((error) => { $("message").hidden = false; $("message").textContent = error.message; });
