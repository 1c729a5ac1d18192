"use strict";
// The part that decides, apart from the page, so that it can be tested alone.

function read(hash) {
  const state = {};
  for (const part of hash.replace(/^#/, "").split("&")) {
    const at = part.indexOf("=");
    if (at > 0) state[part.slice(0, at)] = decodeURIComponent(part.slice(at + 1));
  }
  return state;
}

function write(state) {
  return Object.keys(state).filter((key) => state[key]).map((key) => `${key}=${encodeURIComponent(state[key])}`).join("&");
}

// A row that has no value comes last, whichever way the others are ordered.
function order(values, falling) {
  const place = values.map((_, index) => index);
  const sign = falling ? -1 : 1;
  return place.sort((a, b) => {
    const [x, y] = [values[a], values[b]];
    if (x === "" || y === "") return (x === "") - (y === "") || a - b;
    const [p, q] = [Number(x), Number(y)];
    const numeric = !Number.isNaN(p) && !Number.isNaN(q);
    return sign * (numeric ? p - q : x.localeCompare(y)) || a - b;
  });
}

function fits(facts, state) {
  const equal = ["data", "threat", "bits"].every((key) => !state[key] || facts[key] === state[key]);
  return equal && (!state.find || facts.name.toLowerCase().includes(state.find.toLowerCase()));
}

function start(page) {
  const controls = [...page.querySelectorAll("[data-filter]")];
  const tables = [...page.querySelectorAll("table.board")];
  let state = read(page.location.hash);

  function show() {
    let seen = 0, all = 0;
    for (const table of tables) {
      const board = table.closest("section");
      let here = 0;
      for (const row of table.tBodies[0].rows) {
        const facts = { ...board.dataset, bits: row.dataset.bits, name: row.dataset.name };
        row.hidden = !fits(facts, state);
        for (const mark of board.querySelectorAll(`[data-of="${row.id}"]`)) mark.classList.toggle("gone", row.hidden);
        here += row.hidden ? 0 : 1;
        all += 1;
      }
      board.hidden = here === 0;
      seen += here;
    }
    page.getElementById("count").textContent = seen ? `${seen} of ${all} rows` : "No row fits; loosen a filter.";
    for (const control of controls) control.value = state[control.dataset.filter] || "";
    if (state.sort) sort();
  }

  function sort() {
    const [key, way] = state.sort.split(".");
    for (const table of tables) {
      const heads = [...table.tHead.rows[0].cells];
      const column = heads.findIndex((head) => head.dataset.key === key);
      if (column < 0) continue;
      const rows = [...table.tBodies[0].rows];
      const values = rows.map((row) => row.cells[column].dataset.v);
      table.tBodies[0].append(...order(values, way !== "up").map((index) => rows[index]));
      for (const head of heads) head.removeAttribute("aria-sort");
      heads[column].setAttribute("aria-sort", way === "up" ? "ascending" : "descending");
    }
  }

  function change(key, value) {
    state[key] = value;
    page.defaultView.history.replaceState(null, "", "#" + write(state));
    show();
  }

  for (const control of controls) {
    control.addEventListener("input", () => change(control.dataset.filter, control.value));
  }
  for (const table of tables) {
    for (const head of table.tHead.rows[0].cells) {
      head.querySelector("button").addEventListener("click", () => {
        const falling = head.getAttribute("aria-sort") !== "descending";
        change("sort", `${head.dataset.key}.${falling ? "down" : "up"}`);
      });
    }
  }
  for (const mark of page.querySelectorAll("[data-of]")) {
    const row = page.getElementById(mark.dataset.of);
    mark.addEventListener("mouseenter", () => row.classList.add("pointed"));
    mark.addEventListener("mouseleave", () => row.classList.remove("pointed"));
  }
  page.defaultView.addEventListener("hashchange", () => { state = read(page.location.hash); show(); });
  page.querySelector(".filters").hidden = false;
  show();
}

if (typeof document === "undefined") module.exports = { read, write, order, fits };
else start(document);
