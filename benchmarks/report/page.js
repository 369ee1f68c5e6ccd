"use strict";
// Tables that sort by a click on a head, rows that are filtered by words, and an address that says both:
//   #sort=cpu-intel-amx/layers:6:desc&sort=...&filter=gelu float32     (columns count from 1)
const tables = [...document.querySelectorAll("table.data")];
const input = document.querySelector("#filter");
const status = document.querySelector("#status");
const rows = tables.flatMap((table) => [...table.tBodies[0].rows].map((row) => ({
  row, table, text: `${table.id} ${row.textContent}`.toLowerCase(),
})));
const sorted = new Map(); // of each table: the column from 1, and whether it falls

function compare(numeric, falls) {
  const sign = falls ? -1 : 1;
  const absent = (text) => text === "" || (numeric && Number.isNaN(parseFloat(text)));
  return ([a], [b]) => {
    if (absent(a) || absent(b)) return absent(a) - absent(b); // what has no figure stays below
    return sign * (numeric ? parseFloat(a) - parseFloat(b) : a.localeCompare(b, "en", { numeric: true }));
  };
}

function sort(table, column, falls) {
  const heads = [...table.tHead.rows[0].cells];
  const head = heads[column - 1];
  for (const other of heads) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", falls ? "descending" : "ascending");
  const found = [...table.tBodies[0].rows].map((row) => [row.cells[column - 1].textContent, row]);
  found.sort(compare(head.classList.contains("n"), falls));
  table.tBodies[0].append(...found.map(([, row]) => row));
  sorted.set(table, [column, falls]);
}

function filter() {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = new Map(tables.map((table) => [table, 0]));
  for (const { row, table, text } of rows) {
    row.hidden = !words.every((word) => text.includes(word));
    if (!row.hidden) shown.set(table, shown.get(table) + 1);
  }
  for (const [table, count] of shown) table.closest("section").hidden = words.length > 0 && count === 0;
  const count = [...shown.values()].reduce((a, b) => a + b, 0);
  status.textContent = words.length ? `${count} of ${rows.length} rows` : `${rows.length} rows`;
}

function remember() {
  const parts = [...sorted].map(([table, [column, falls]]) => `sort=${table.id}:${column}${falls ? ":desc" : ""}`);
  if (input.value) parts.push(`filter=${encodeURIComponent(input.value)}`);
  history.replaceState(null, "", `#${parts.join("&")}`);
}

function obey() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const folded = target && target.closest("details");
  if (folded) {
    folded.open = true;
    target.scrollIntoView();
  }
  const asked = new URLSearchParams(location.hash.slice(1));
  if (asked.has("filter")) input.value = asked.get("filter");
  filter();
  for (const text of asked.getAll("sort")) {
    const [id, column, order] = text.split(":");
    const table = tables.find((one) => one.id === id);
    const head = table && table.tHead.rows[0].cells[Number(column) - 1];
    if (head) sort(table, Number(column), order === "desc");
    else status.textContent = `Nothing to sort by “${text}”; tables are ${tables.map((one) => one.id).join(", ")}`;
  }
}

for (const table of tables) {
  table.tHead.addEventListener("click", ({ target }) => {
    const head = target.closest("th");
    if (head) sort(table, head.cellIndex + 1, head.getAttribute("aria-sort") === "ascending");
    remember();
  });
}
input.addEventListener("input", () => { filter(); remember(); });
addEventListener("hashchange", obey);
obey();
