"use strict";

(() => {
  const list = document.getElementById("answer-list");
  if (!list) return;
  const controls = document.getElementById("controls");
  const search = document.getElementById("search");
  const order = document.getElementById("order");
  const mark = document.getElementById("mark");
  const count = document.getElementById("count");
  const rows = Array.from(list.children, (row) => ({
    row,
    part: row.dataset.part,
    change: Number(row.dataset.change),
  }));

  const folded = (text) => text.normalize("NFC").toLowerCase();

  // Read when the first search needs it: a report can have megabytes of text.
  const textOf = (one) => {
    one.text ??= folded(
      Array.from(one.row.querySelectorAll(".text"), (box) => box.textContent).join("\n"),
    );
    return one.text;
  };

  const filter = () => {
    const part = controls.querySelector("input[name=part]:checked").value;
    const wanted = folded(search.value.trim());
    let shown = 0;
    for (const one of rows) {
      const fits = (part === "all" || one.part === part) && (!wanted || textOf(one).includes(wanted));
      one.row.hidden = !fits;
      shown += fits;
    }
    count.textContent = `${shown} of ${rows.length} prompts shown`;
  };

  const sort = () => {
    const sign = { given: 0, gain: -1, loss: 1 }[order.value];
    // Array.sort is stable: rows that changed alike, and all as given, keep their order.
    const sorted = [...rows].sort((one, other) => sign * (one.change - other.change));
    list.append(...sorted.map((one) => one.row));
  };

  const markDifferences = () => list.classList.toggle("unmarked", !mark.checked);

  controls.addEventListener("change", (event) => {
    if (event.target.name === "part") filter();
  });
  search.addEventListener("input", filter);
  order.addEventListener("change", sort);
  mark.addEventListener("change", markDifferences);
  // A page that comes back from the browser's history brings its inputs along.
  window.addEventListener("pageshow", () => {
    filter();
    sort();
    markDifferences();
  });
  controls.hidden = false;
})();
