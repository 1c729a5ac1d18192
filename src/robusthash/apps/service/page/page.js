"use strict";
const $ = (id) => document.getElementById(id);
let file = null, chosen = null, limits = {};

function show(message) { $("message").textContent = message; $("message").hidden = !message; }

async function ask(address, options = {}) {
  const token = $("token").value;
  const headers = token ? { Authorization: "Bearer " + token } : {};
  let answer;
  try { answer = await fetch(address, { ...options, headers }); }
  catch { throw new Error("The service does not answer. Is it running?"); }
  if (answer.status === 401) $("token-field").hidden = false;
  const body = answer.headers.get("content-type")?.includes("json") ? await answer.json() : await answer.text();
  if (!answer.ok) throw new Error(body.error || "The service answered " + answer.status);
  return body;
}

function element(name, properties = {}, ...children) {
  const made = Object.assign(document.createElement(name), properties);
  made.append(...children);
  return made;
}

const pictures = new Map();
async function picture(id) { // a fetch, so that a token is sent along
  if (!pictures.has(id)) pictures.set(id, (async () => {
    const token = $("token").value;
    const answer = await fetch(`v1/items/${id}/image`, token ? { headers: { Authorization: "Bearer " + token } } : {});
    if (!answer.ok) return null;
    const blob = await answer.blob();
    return { blob, address: URL.createObjectURL(blob) };
  })().catch(() => null));
  return pictures.get(id);
}

function card(hit, choose) {
  const name = hit.payload.file || "item " + hit.id_text;
  const image = element("img", { alt: name, hidden: true });
  const none = element("div", { className: "none", textContent: "no picture" });
  picture(hit.id_text).then((found) => { if (found) { image.src = found.address; image.hidden = false; none.hidden = true; } });
  const inside = choose ? [element("button", { type: "button", title: "Search with this image", onclick: () => choose(hit) }, image, none)] : [image, none];
  const words = [name];
  if (hit.distance !== undefined) words.push("distance " + hit.distance);
  const made = element("li", {}, ...inside, element("p", { textContent: words.join(", ") }));
  if (hit.copy) {
    made.className = "relevant";
    made.append(element("p", { className: "mark", textContent: "✓ copy" }));
  }
  if (hit.relevant === true || hit.relevant === false) {
    made.className = hit.relevant ? "relevant" : "wrong";
    made.append(element("p", { className: "mark", textContent: hit.relevant ? "✓ same label" : "✗ other label" }));
  } else {
    for (const [field, value] of Object.entries(hit.payload)) {
      if (field !== "file") made.append(element("p", { textContent: `${field}: ${Array.isArray(value) ? value.join(", ") : value}` }));
    }
  }
  return made;
}

function choose(given) {
  if (limits.max_bytes && given.size > limits.max_bytes) {
    show(`${given.name} has ${given.size} bytes; the service takes ${limits.max_bytes}.`);
    return;
  }
  file = given; chosen = null; show("");
  $("preview").src = URL.createObjectURL(given);
  $("preview").alt = given.name; $("preview").hidden = false;
}

async function chooseItem(hit) {
  const found = await picture(hit.id_text);
  if (!found) return;
  file = new File([found.blob], hit.payload.file || "item");
  chosen = hit.id_text;
  $("preview").src = found.address; $("preview").alt = hit.payload.file || ""; $("preview").hidden = false;
  await search();
  window.scrollTo({ top: 0 });
}

async function samples() {
  const { items } = await ask("v1/samples");
  if (!items.length) return;
  $("found-title").hidden = false;
  $("found-title").textContent = "Or choose one of the indexed images";
  $("found").replaceChildren(...items.map((item) => card(item, chooseItem)));
}

async function search() {
  const form = new FormData();
  const text = $("text").value.trim();
  if (text) form.set("text", text);
  else if (file) form.set("image", file);
  else { show("Choose an image first."); return; }
  form.set("k", $("k").value);
  if ($("where").value.trim()) form.set("where", $("where").value);
  try {
    const { results, plain } = await ask("v1/search", { method: "POST", body: form });
    const copies = results.filter((hit) => hit.copy).length;
    const about = plain ? "; the image is of one colour or one fine texture, so none counts as its copy"
      : results.some((hit) => "copy" in hit) ? `, ${copies} ${copies === 1 ? "copy" : "copies"}` : "";
    show("");
    $("found-title").hidden = false;
    $("found-title").textContent = results.length ? `${results.length} results${about}` : "Nothing is in the index, or the filter allows nothing";
    $("found").replaceChildren(...results.map((hit) => card(hit, chooseItem)));
  } catch (error) { show(error.message); }
}

function half(title, part) {
  const ap = part.ap === null ? "" : `, average precision ${part.ap.toFixed(2)}`;
  return [element("h3", { textContent: title + ap }), element("ol", { className: "grid small" }, ...part.results.map((hit) => card(hit)))];
}

function figure(source, words) { return element("figure", {}, element("img", { src: source, alt: words }), element("figcaption", { textContent: words })); }

async function attack() {
  if (!file) { show("Choose an image in the tab Search first."); return; }
  const form = new FormData();
  if (chosen !== null) form.set("item", chosen); else form.set("image", file);
  form.set("eps", $("eps").value);
  const button = $("attack").querySelector("button");
  button.disabled = true; button.textContent = "Attacking";
  try {
    const { models } = await ask("v1/story", { method: "POST", body: form });
    show("");
    $("models").replaceChildren(...models.map((model) => element("section", { className: "model" },
      element("h2", { textContent: model.name }),
      element("p", { textContent: `${model.flipped_bits} of ${model.bits} bits flipped; largest change ${model.linf.toFixed(0)} of 255, length ${model.l2.toFixed(2)}` }),
      element("div", { className: "pair" }, figure(model.clean.image, "query"), figure(model.change, "change, amplified"), figure(model.attacked.image, "attacked query")),
      ...half("Found by the query", model.clean), ...half("Found by the attacked query", model.attacked))));
  } catch (error) { show(error.message); }
  button.disabled = false; button.textContent = "Attack";
}

function figuresOf(text) {
  let requests = 0, refused = 0, seconds = 0, count = 0, active = 0, items = 0;
  for (const line of text.split("\n")) {
    if (line.startsWith("#")) continue;
    const [name, value] = [line.split(/[ {]/)[0], Number(line.slice(line.lastIndexOf(" ")))];
    if (name === "robusthash_requests_total") requests += value;
    if (name === "robusthash_refused_total") refused += value;
    if (name === "robusthash_request_seconds_sum") seconds += value;
    if (name === "robusthash_request_seconds_count") count += value;
    if (name === "robusthash_active_requests") active = value;
    if (name === "robusthash_items") items = value;
  }
  return { "items": items, "requests": requests, "refused": refused, "in work": active, "mean time": count ? (1000 * seconds / count).toFixed(1) + " ms" : "-" };
}

async function state() {
  try {
    const [info, metrics] = await Promise.all([ask("v1/info"), ask("metrics")]);
    const figures = { ...figuresOf(metrics), "bits": info.bits, "model": info.origin, "version": info.version, "purified queries": info.purified ? "yes" : "no", ...(info.copy_radius === undefined ? {} : { "copies within": info.copy_radius + " bits" }), ...info.limits };
    $("figures").replaceChildren(...Object.entries(figures).flatMap(([name, value]) => [element("dt", { textContent: name }), element("dd", { textContent: value })]));
    show("");
  } catch (error) { show(error.message); }
}

const tabs = ["search", "story", "state"];
let timer = null;
function open(name, focus = false) {
  for (const each of tabs) {
    const on = each === name;
    $("tab-" + each).setAttribute("aria-selected", on);
    $("tab-" + each).tabIndex = on ? 0 : -1;
    $(each).hidden = !on;
    if (on && focus) $("tab-" + each).focus();
  }
  clearInterval(timer);
  if (name === "state") { state(); timer = setInterval(state, 2000); }
}
tabs.forEach((name, place) => {
  $("tab-" + name).onclick = () => open(name);
  $("tab-" + name).onkeydown = (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (step) open(tabs[(place + step + tabs.length) % tabs.length], true);
  };
});
$("query").onsubmit = (event) => { event.preventDefault(); search(); };
$("attack").onsubmit = (event) => { event.preventDefault(); attack(); };
$("file").onchange = () => { if ($("file").files[0]) choose($("file").files[0]); };
$("drop").ondragover = (event) => { event.preventDefault(); $("drop").classList.add("over"); };
$("drop").ondragleave = () => $("drop").classList.remove("over");
$("drop").ondrop = (event) => {
  event.preventDefault(); $("drop").classList.remove("over");
  if (event.dataTransfer.files[0]) choose(event.dataTransfer.files[0]);
};
$("token").onchange = () => connect();

async function connect() {
  try {
    const info = await ask("v1/info");
    limits = info.limits;
    $("facts").textContent = `${info.items} items, ${info.bits} bits, ${info.image_size} px` + (info.copy_radius === undefined ? "" : `, copies differ in at most ${info.copy_radius} bits`);
    $("k").max = limits.max_k;
    $("text").disabled = !info.modalities.includes("text");
    $("text").closest("label").hidden = $("text").disabled;
    $("attack").querySelector("button").disabled = !limits.attacks;
    if (!limits.attacks) $("models").textContent = "Attacks are not allowed here; the operator may start the service with --attacks.";
    show("");
    if (!file && limits.samples) await samples();
  } catch (error) { $("facts").textContent = "not connected"; show(error.message); }
}
connect();
