"use strict";
// Sorts, searches and opens the table of slices. Each slice is two rows: itself, and where it is active.
(() => {
  const table = document.getElementById("slice-table"), body = table.tBodies[0];
  const count = document.getElementById("count");
  const slices = [...body.querySelectorAll("tr.slice")].map((row) => ({
    row,
    places: row.nextElementSibling,
    opener: row.querySelector("button"),
    text: (row.textContent + row.nextElementSibling.textContent).toLowerCase(),
  }));

  const show = () => {
    const words = document.getElementById("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const { row, places, opener, text } of slices) {
      const found = words.every((word) => text.includes(word));
      row.hidden = !found;
      places.hidden = !found || opener.getAttribute("aria-expanded") === "false";
      shown += found;
    }
    count.textContent = `${shown} of ${slices.length} slices`;
  };

  const sortBy = (head, column) => {
    const down = head.getAttribute("aria-sort") !== "descending";
    const numbers = head.firstElementChild.dataset.key === "number";
    for (const other of head.parentElement.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = ({ row }) => (numbers ? Number(row.cells[column].textContent) : row.cells[column].textContent);
    const order = (a, b) => (numbers ? value(a) - value(b) : value(a).localeCompare(value(b), "en", { numeric: true }));
    slices.sort((a, b) => (down ? order(b, a) : order(a, b)));
    body.append(...slices.flatMap(({ row, places }) => [row, places]));
  };

  document.getElementById("search").addEventListener("input", show);
  [...table.tHead.rows[0].cells].forEach((head, column) => {
    head.firstElementChild.addEventListener("click", () => sortBy(head, column));
  });
  for (const { opener } of slices) {
    opener.addEventListener("click", () => {
      opener.setAttribute("aria-expanded", String(opener.getAttribute("aria-expanded") === "false"));
      show();
    });
  }
  show();
})();
