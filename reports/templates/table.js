// the result table: sort, filter rows, choose columns, fold groups, leave seeds out, and a popover with what is behind a number
const tableSection = document.getElementById("table");
function startTable() {
  const data = JSON.parse(document.getElementById("table-data").textContent);
  const table = tableSection.querySelector("table.paper"), box = document.getElementById("cell");
  const bodies = [...table.tBodies];
  const rows = [...table.querySelectorAll("tr[data-row]")].map((tr) => ({ tr, body: tr.parentNode, ...data.rows[tr.dataset.row] }));
  const cells = new Map(rows.map((row) => [row.name, [...row.tr.querySelectorAll("td[data-column]")]]));
  const byName = new Map(rows.map((row) => [row.name, row]));
  const left = new Set(); // seeds that are left out
  const text = (x, digits) => { const t = x.toFixed(digits); return Number(t) === 0 ? t.replace("-", "") : t.replace("-", "−"); };
  const signed = (x, digits) => { const t = text(x, digits); return Number(x.toFixed(digits)) === 0 ? `±${t}` : t.startsWith("−") ? t : `+${t}`; };
  const node = (tag, content, className) => {
    const made = document.createElement(tag);
    if (content !== undefined) made.textContent = content;
    if (className) made.className = className;
    return made;
  };
  const mean = (values) => values.reduce((sum, x) => sum + x, 0) / values.length;
  const deviation = (values) => Math.sqrt(values.reduce((sum, x) => sum + (x - mean(values)) ** 2, 0) / (values.length - 1));

  // ---- seeds: dots in the cells; a seed that is switched off leaves every mean
  function kept(row, k) { const cell = row.cells[k]; return cell.n ? cell.values.filter(([seed]) => !left.has(seed)) : []; }
  function value(row, k) { const values = kept(row, k); return values.length ? mean(values.map((v) => v[1])) : null; }
  function difference(row, k) {
    const base = byName.get(row.baseline);
    if (!base || base === row) return null;
    const theirs = new Map(kept(base, k)), pairs = kept(row, k).filter(([seed]) => theirs.has(seed));
    return pairs.length ? mean(pairs.map(([seed, x]) => x - theirs.get(seed))) : null;
  }
  function dots(td, row, k) {
    const values = row.cells[k].values, { low, high } = data.columns[k];
    if (!values.length || high <= low) return;
    const at = (x) => (3 + 94 * (x - low) / (high - low)).toFixed(1);
    const path = (which) => values.filter(([seed]) => left.has(seed) === which).map(([, x]) => `M${at(x)} 4h0`).join("");
    let svg = td.querySelector("svg.dots");
    if (!svg) { svg = document.createElementNS("http://www.w3.org/2000/svg", "svg"); svg.setAttribute("class", "dots"); svg.setAttribute("viewBox", "0 0 100 8"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("aria-hidden", "true"); td.append(svg); }
    svg.replaceChildren(...[["off", true], ["on", false]].map(([name, which]) => {
      const made = document.createElementNS("http://www.w3.org/2000/svg", "path");
      made.setAttribute("class", name); made.setAttribute("d", path(which));
      return made;
    }));
  }
  const printed = new Map(); // what the page says, to go back to
  function show(row, k) {
    const td = cells.get(row.name)[k], number = td.querySelector(".number"), cell = row.cells[k], column = data.columns[k];
    if (!printed.has(number)) printed.set(number, [number.className, [...number.childNodes]]);
    const values = kept(row, k).map((v) => v[1]);
    if (!left.size || !cell.n || values.length === cell.values.length) {
      const [className, children] = printed.get(number);
      number.className = className; number.replaceChildren(...children);
    } else {
      number.className = "number partial";
      number.replaceChildren(node("span", values.length ? text(mean(values), column.decimals) : "—", "num"));
      if (values.length > 2) number.append(node("span", `± ${text(deviation(values), column.decimals)}`, "pm"));
      const change = difference(row, k);
      if (change !== null) number.append(node("span", signed(change, column.decimals), "delta same"));
      number.append(node("span", `${values.length} of ${cell.values.length} seeds`, "why"));
    }
    if (document.getElementById("dots").checked) dots(td, row, k); else td.querySelector("svg.dots")?.remove();
  }
  function showAll() {
    for (const row of rows) row.cells.forEach((_, k) => show(row, k));
    const said = document.getElementById("table-said");
    said.textContent = left.size ? `Means without seed ${[...left].join(", ")}: a look at the data, not the table's numbers.` : "";
    if (sorted) sort(sorted.key, sorted.down);
  }

  // ---- sort, within each group; the baseline has no place of its own
  let sorted = null;
  const inOrder = rows.map((row) => row.tr);
  function keyOf(row, key) {
    if (key === "row") return row.label;
    if (key === "n") return Number(row.tr.lastElementChild.textContent.split(" ")[0]);
    return value(row, Number(key));
  }
  function sort(key, down) {
    sorted = key === null ? null : { key, down };
    for (const th of table.querySelectorAll("th[aria-sort]")) th.setAttribute("aria-sort", th.dataset.sort === String(key) ? (down ? "descending" : "ascending") : "none");
    for (const body of bodies) {
      const mine = rows.filter((row) => row.body === body);
      const by = (a, b) => {
        const x = keyOf(a, key), y = keyOf(b, key);
        if (x === null || y === null) return (x === null) - (y === null); // what has no result comes last
        return (down ? -1 : 1) * (typeof x === "string" ? x.localeCompare(y) : x - y);
      };
      const order = key === null ? (a, b) => inOrder.indexOf(a.tr) - inOrder.indexOf(b.tr) : by;
      body.append(...mine.sort(order).map((row) => row.tr));
    }
  }
  for (const button of table.querySelectorAll("th[data-sort] button")) {
    button.onclick = () => {
      const key = button.closest("th").dataset.sort, up = data.columns[key] && data.columns[key].direction < 0 || key === "row";
      const turns = up ? [false, true] : [true, false]; // the better end first
      if (!sorted || sorted.key !== key) sort(key, turns[0]);
      else if (sorted.down === turns[0]) sort(key, turns[1]);
      else sort(null, false);
    };
  }

  // ---- filter
  const filter = document.getElementById("table-filter"), count = document.getElementById("table-count");
  filter.oninput = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows) {
      const all = `${row.label} ${row.name} ${[...row.tr.querySelectorAll(".tick")].map((td) => td.textContent).join(" ")}`.toLowerCase();
      row.tr.hidden = !words.every((word) => all.includes(word));
      shown += !row.tr.hidden;
    }
    for (const body of bodies) body.hidden = rows.filter((row) => row.body === body).every((row) => row.tr.hidden);
    count.textContent = words.length ? `${shown} of ${rows.length} rows` : "";
  };

  // ---- columns and their groups
  const hidden = new Set(), folded = new Set();
  function columns() {
    const gone = (k) => hidden.has(k) || (folded.has(data.columns[k].group) && data.columns.findIndex((c, i) => c.group === data.columns[k].group && !hidden.has(i)) !== k);
    for (const at of table.querySelectorAll("[data-column]")) at.hidden = gone(Number(at.dataset.column));
    for (const th of table.querySelectorAll("th.group")) {
      const span = [...table.querySelectorAll("thead tr:last-child [data-column]")].filter((each) => each.dataset.group === th.dataset.group && !each.hidden).length;
      th.hidden = span === 0; th.colSpan = Math.max(1, span);
      const button = th.querySelector("button");
      if (button) button.setAttribute("aria-expanded", String(!folded.has(th.dataset.group)));
    }
  }
  for (const input of tableSection.querySelectorAll("input[data-choose]")) {
    input.onchange = () => { hidden[input.checked ? "delete" : "add"](Number(input.dataset.choose)); columns(); };
  }
  for (const button of table.querySelectorAll("th.group button")) {
    button.onclick = () => { const group = button.closest("th").dataset.group; folded[folded.has(group) ? "delete" : "add"](group); columns(); };
  }
  for (const button of table.querySelectorAll("tr.rows button")) {
    button.onclick = () => {
      const open = button.getAttribute("aria-expanded") !== "true";
      button.setAttribute("aria-expanded", String(open));
      button.closest("tbody").classList.toggle("folded", !open);
    };
  }
  for (const input of tableSection.querySelectorAll("input[data-seed]")) {
    input.onchange = () => { left[input.checked ? "delete" : "add"](Number(input.dataset.seed)); showAll(); };
  }
  document.getElementById("dots").onchange = showAll;

  // ---- the popover: by mouse (rests on a number), touch or keyboard (opens it)
  let opener = null, waiting = 0;
  function fill(row, k) {
    const cell = row.cells[k], column = data.columns[k];
    const heading = node("h3", `${row.label}: ${column.label}`);
    heading.id = "cell-title";
    const close = node("button", "close", "close");
    close.type = "button"; close.onclick = () => box.hidePopover();
    const facts = cell.facts.map((fact) => node("p", fact));
    const list = node("table", undefined, "plain");
    for (const [seed, x, file] of cell.values) {
      const line = node("tr"), link = node("a", `seed ${seed}`), first = node("td"), number = node("td", text(x, column.decimals + 1), "n");
      if (file) { link.href = file; first.append(link); } else first.append(`seed ${seed}`);
      if (!cell.n) number.append(node("span", ` ${cell.kind}`, "why"));
      line.append(first, number); list.append(line);
    }
    const all = node("a", "The row's runs");
    all.href = `#row-${row.anchor}`; all.onclick = () => box.hidePopover();
    box.replaceChildren(close, heading, ...facts, ...(cell.values.length ? [list] : []), all);
  }
  function place(td) {
    const at = td.getBoundingClientRect(), own = box.getBoundingClientRect();
    box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - own.width - 8))}px`;
    box.style.top = `${at.bottom + own.height + 6 < innerHeight || at.top < own.height ? Math.min(at.bottom + 4, innerHeight - own.height - 8) : at.top - own.height - 4}px`;
  }
  function open(td, focus) {
    const row = byName.get(data.rows[td.parentNode.dataset.row].name), k = Number(td.dataset.column);
    if (opener !== td || !box.matches(":popover-open")) { fill(row, k); opener = td; if (!box.matches(":popover-open")) box.showPopover(); place(td); }
    if (focus) box.querySelector(".close").focus();
  }
  table.addEventListener("click", (event) => {
    const td = event.target.closest("td.cell");
    if (!td || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    open(td, true);
  });
  table.addEventListener("pointerover", (event) => {
    const td = event.pointerType === "mouse" && event.target.closest("td.cell");
    clearTimeout(waiting);
    if (td) waiting = setTimeout(() => open(td, false), 350);
  });
  table.addEventListener("pointerleave", () => clearTimeout(waiting));
  box.addEventListener("toggle", (event) => {
    if (event.newState === "closed" && opener && (box.contains(document.activeElement) || document.activeElement === document.body)) opener.querySelector("a").focus();
  });
  addEventListener("scroll", () => { if (box.matches(":popover-open")) box.hidePopover(); }, { passive: true });

  tableSection.querySelector(".tools").hidden = false;
  for (const button of table.querySelectorAll("th button")) button.disabled = false;
  showAll();
  tableSection.dataset.ready = "yes";
}
if (tableSection && document.getElementById("table-data")) startTable();

// the rows of a large suite are made when they are opened
document.addEventListener("toggle", (event) => {
  const template = event.target.matches?.("details.row[open]") && event.target.querySelector(":scope > template");
  if (template) template.replaceWith(template.content.cloneNode(true));
}, true);
