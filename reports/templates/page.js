"use strict";
// opens the run that a link points to, together with everything around it
function openTarget() {
  let node = null;
  try { node = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1))); } catch { return; }
  if (!node) return;
  for (let n = node; n; n = n.parentElement) if (n.tagName === "DETAILS") n.open = true;
  node.scrollIntoView({ block: "start" });
}
addEventListener("hashchange", openTarget);
addEventListener("DOMContentLoaded", openTarget);
function sayAge() {
  for (const node of document.querySelectorAll("[data-at]")) {
    const s = Math.max(0, Math.round(Date.now() / 1000 - Number(node.dataset.at)));
    node.textContent = `updated ${s < 120 ? `${s} s` : s < 7200 ? `${Math.round(s / 60)} min` : s < 172800 ? `${Math.round(s / 3600)} h` : `${Math.round(s / 86400)} days`} ago`;
  }
}
addEventListener("DOMContentLoaded", () => { sayAge(); setInterval(sayAge, 1000); });
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const text = button.parentElement.querySelector("pre").textContent;
  try { await navigator.clipboard.writeText(text); button.textContent = "copied"; }
  catch {
    const range = document.createRange();
    range.selectNodeContents(button.parentElement.querySelector("pre"));
    getSelection().removeAllRanges(); getSelection().addRange(range);
    button.textContent = "selected: press Ctrl-C";
  }
});
