// only where `mpformer report --watch` serves the page: load it again when it was written anew
let written = null;
setInterval(async () => {
  try {
    const now = await (await fetch(`/.changes${location.pathname}`, { cache: "no-store" })).text();
    if (written !== null && now !== written) location.reload();
    written = now;
  } catch { /* the server was stopped: the page stays as it is */ }
}, 1000);
