// the picture that opens a page: drag through the layers; click a line of a barcode to load its strip
const jumpsPicture = document.getElementById("jumps");
async function inflateText(text) {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  return JSON.parse(await new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).text());
}
async function startJumps() {
  const all = (query, inside = jumpsPicture) => [...inside.querySelectorAll(query)];
  const slider = document.getElementById("jumps-layer"), said = document.getElementById("jumps-said");
  const main = document.getElementById("jumps-case");
  function layer(n) {
    slider.value = n;
    document.getElementById("jumps-name").textContent = all(".jumps-layer", main)[n].textContent;
    all(".jumps-large").forEach((large, run) => {
      const small = all(".jumps-film", main)[run].children[n];
      large.replaceChildren(...(small ? [small.querySelector("svg").cloneNode(true)] : []));
    });
    all(".jumps-step", main).forEach((step) => step.setAttribute("aria-current", String(Number(step.dataset.layer) === Number(n))));
  }
  if (slider) {
    slider.oninput = () => layer(slider.value);
    for (const step of all(".jumps-step", main)) {
      step.addEventListener("pointerenter", () => layer(step.dataset.layer));
      step.addEventListener("click", () => layer(step.dataset.layer));
    }
    const worst = all(".jumps-step.jump", main)[0];
    layer(worst ? worst.dataset.layer : 0);
  }

  const { lines, kept, hint } = await inflateText(document.getElementById("jumps-index").textContent);
  const strips = new Map(all("[data-strip]").map((node) => [Number(node.dataset.strip), node.textContent]));
  const explorer = typeof go === "function"; // the layer explorer's page: it shows the object itself
  const stored = explorer ? new Set(index.images.map((image) => image.id)) : strips;
  const known = lines[0].filter(([image]) => stored.has(image));
  let chosen = -1;
  function mark(image, object) {
    all(".jumps-bars").forEach((bars, run) => {
      const at = lines[run].findIndex((line) => line[0] === image && line[1] === object);
      const rule = bars.querySelector("i");
      rule.style.display = at < 0 ? "none" : "block";
      rule.style.top = `${(100 * (at + 0.5)) / lines[run].length}%`;
    });
  }
  function pattern(image, object) {
    return lines.map((run, which) => {
      const line = run.find((each) => each[0] === image && each[1] === object);
      const at = line ? [...line[2]].flatMap((jumped, i) => (jumped === "1" ? [`${i}→${i + 1}`] : [])) : [];
      return `${all(".jumps-run h3")[which].textContent} ${line ? (at.length ? `jumps at ${at.join(", ")}` : "never jumps") : "did not match it"}`;
    }).join("; ");
  }
  async function show(image, object) {
    mark(image, object);
    const what = `Image ${image}, object ${object}: ${pattern(image, object)}.`;
    if (!stored.has(image)) { said.textContent = `${what} Its masks are not stored: ${kept}. ${hint}`; return; }
    chosen = known.findIndex((line) => line[0] === image && line[1] === object);
    said.textContent = what;
    if (explorer) { go({ image, object }); document.querySelector("main").scrollIntoView(); return; }
    const { picture, objects } = await inflateText(strips.get(image));
    const strip = objects[object];
    if (strip && main) load(strip, picture, `${strip.name}, image ${image}`);
  }
  function load(strip, picture, name) {
    const image = document.getElementById("jump-picture-0");
    image.setAttribute("href", picture); image.setAttribute("width", strip.size[0]); image.setAttribute("height", strip.size[1]);
    main.querySelector("[data-name]").textContent = name;
    all(".jumps-line", main).forEach((line, run) => {
      const track = strip.runs[run];
      line.querySelector("[data-query]").textContent = track ? `query ${track.query}` : "no query matched";
      all(".jumps-step", line).forEach((step, n) => {
        const [mask, jumped, target] = track ? track.steps[n] : ["", 0, "–"];
        step.classList.toggle("jump", Boolean(jumped));
        step.querySelector("svg").setAttribute("viewBox", strip.box);
        step.querySelector(".mask").setAttribute("d", mask);
        for (const outline of all(".truth", step)) outline.setAttribute("d", strip.truth);
        step.querySelector(".jumps-target").textContent = target;
      });
    });
    layer(slider.value);
  }
  for (const bars of all(".jumps-bars")) {
    bars.onclick = (event) => {
      const mine = lines[Number(bars.dataset.run)], box = bars.getBoundingClientRect();
      const at = Math.max(0, Math.min(mine.length - 1, Math.floor(((event.clientY - box.top) / box.height) * mine.length)));
      const near = Math.floor((4 / box.height) * mine.length); // a line is thinner than a finger: one with masks is preferred
      const order = [...Array(2 * near + 1).keys()].map((i) => at + (i % 2 ? 1 : -1) * Math.ceil(i / 2)).filter((i) => mine[i]);
      const [image, object] = mine[order.find((i) => stored.has(mine[i][0])) ?? at];
      show(image, object);
    };
  }
  for (const button of all("[data-object]")) {
    button.onclick = () => {
      if (!known.length) return;
      chosen = (chosen + Number(button.dataset.object) + known.length) % known.length;
      show(known[chosen][0], known[chosen][1]);
    };
  }
  jumpsPicture.dataset.ready = "yes";
}
if (jumpsPicture) startJumps().catch((error) => { document.getElementById("jumps-said").textContent = error.message; });
