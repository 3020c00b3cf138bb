"use strict";
// several pages and their files in one: a link to a page shows it, a link to a file saves it
const frame = document.getElementById("page");
let files = null, current = "";
async function unpack() {
  const bytes = Uint8Array.from(atob(document.getElementById("packed").textContent), (c) => c.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).text());
}
function asked() { // #page, or #page#place
  const [path, place] = decodeURIComponent(location.hash.slice(1)).split("#");
  return [path in files.texts ? path : "index.html", place || ""];
}
function show() {
  const [path, place] = asked();
  const arrive = () => { if (place) frame.contentWindow.location.hash = place; };
  if (path === current) { arrive(); return; }
  current = path;
  frame.onload = () => {
    document.title = frame.contentDocument.title;
    frame.contentDocument.addEventListener("click", follow);
    arrive();
    document.body.dataset.ready = path;
  };
  frame.srcdoc = files.texts[path];
}
function save(path) {
  const content = path in files.texts ? files.texts[path] : Uint8Array.from(atob(files.others[path]), (c) => c.charCodeAt(0));
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([content]));
  link.download = path.split("/").pop();
  link.click();
}
function follow(event) {
  const link = event.target.closest("a[href]");
  if (!link || event.defaultPrevented) return;
  event.preventDefault();
  const href = link.getAttribute("href");
  if (href.startsWith("#")) { frame.contentWindow.location.hash = href; return; }
  if (/^[a-z]+:/i.test(href)) { open(href, "_blank", "noopener,noreferrer"); return; }
  const [, path, place] = /^([^#]*)#?(.*)$/.exec(href);
  const full = decodeURIComponent(new URL(path, `http://pack/${current}`).pathname.slice(1));
  if (full.endsWith(".html") && full in files.texts) location.hash = encodeURIComponent(full + (place ? `#${place}` : ""));
  else if (full in files.texts || full in files.others) save(full);
}
unpack().then((found) => {
  files = found;
  frame.hidden = false;
  addEventListener("hashchange", show);
  show();
}).catch((error) => { const said = document.getElementById("message"); said.hidden = false; said.textContent = error.message; });
