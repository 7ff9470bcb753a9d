"use strict";
// Sort the table by a column: best first, then the other way round, then as it came.
for (const button of document.querySelectorAll("#methods th button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const body = heading.closest("table").tBodies[0];
    const column = [...heading.parentNode.children].indexOf(heading);
    const first = heading.dataset.best === "1" ? "descending" : "ascending";
    const next = { none: first, ascending: first === "ascending" ? "descending" : "none", descending: first === "descending" ? "ascending" : "none" };
    const order = next[heading.getAttribute("aria-sort")];
    for (const other of heading.parentNode.querySelectorAll("[aria-sort]")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", order);
    const sign = order === "descending" ? -1 : 1;
    const value = (row) => (order === "none" ? Number(row.dataset.place) : parseFloat(row.cells[column].dataset.value));
    const rows = [...body.rows].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y);
      return sign * (x - y) || a.dataset.place - b.dataset.place;
    });
    body.append(...rows);
  });
}
// Show the disagreements of one system, of one kind, a page at a time.
const filters = document.querySelectorAll("#disagreements select");
const more = document.querySelector("#more");
const page = 12;
let room = page;
const show = () => {
  const [system, kind] = [...filters].map((filter) => filter.value);
  let count = 0;
  for (const card of document.querySelectorAll(".example")) {
    const fits = JSON.parse(card.dataset.kinds).some(([of, what]) => (!system || of === system) && (!kind || what === kind));
    count += fits;
    card.hidden = !fits || count > room;
  }
  document.querySelector("#shown").textContent = Math.min(count, room);
  document.querySelector("#fitting").textContent = count;
  more.hidden = count <= room;
};
filters.forEach((filter) => filter.addEventListener("change", () => { room = page; show(); }));
if (more) {
  more.addEventListener("click", () => { room += page; show(); });
  show();
}
