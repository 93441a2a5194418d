// Heat maps that say what a cell is, tables that sort, data to take away.

class HeatMap {
  constructor(table) {
    this.table = table;
    this.body = table.tBodies[0];
    this.tip = make("div", "tip");
    this.tip.setAttribute("role", "status");
    this.around = table.parentElement;
    this.around.append(this.tip);
    this.at = null;
    const over = event => this.over(event.target.closest("td"));
    table.addEventListener("pointermove", over);
    table.addEventListener("pointerdown", over);
    table.addEventListener("pointerleave", () => this.clear());
    table.addEventListener("blur", () => this.clear());
    table.addEventListener("keydown", event => this.press(event));
    this.clear();
  }

  clear() {
    this.tip.hidden = true;
    this.at?.classList.remove("at");
    this.at = null;
  }

  over(cell) {
    if (cell && this.body.contains(cell)) this.see(cell);
    else this.clear();
  }

  see(cell) {
    if (cell === this.at) return;
    this.clear();
    this.at = cell;
    cell.classList.add("at");
    const weight = +cell.textContent,
      away = weight - this.table.dataset.even;
    const place = `layer ${cell.cellIndex - 1}, head ${this.table.dataset.head}`;
    const value = `${weight.toFixed(3)} (${away < 0 ? "" : "+"}${away.toFixed(3)})`;
    const name = cell.parentElement.cells[0].textContent;
    this.tip.replaceChildren(make("b", "", name), make("div", "", `${place}: ${value}`));
    this.tip.hidden = false;
    const box = cell.getBoundingClientRect(),
      around = this.around.getBoundingClientRect();
    const right = around.width - this.tip.offsetWidth;
    this.tip.style.left = `${Math.max(0, Math.min(box.left - around.left, right))}px`;
    this.tip.style.top = `${box.bottom - around.top + 6}px`;
  }

  press(event) {
    const step = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    if (event.key === "Escape") this.clear();
    if (!step) return;
    event.preventDefault();
    const row = this.at ? this.at.parentElement.sectionRowIndex + step[0] : 0;
    const cell = this.body.rows[row]?.cells[this.at ? this.at.cellIndex + step[1] : 1];
    if (cell?.tagName === "TD") this.see(cell);
  }
}

all(".heat table").forEach(table => new HeatMap(table));

/** Numbers by value, before texts by the alphabet. */
function compare(a, b) {
  const [x, y] = [a, b].map(text => parseFloat(text.replace(/,(?=\d{3})/g, "")));
  if (isNaN(x) && isNaN(y)) return a.localeCompare(b, "en", { numeric: true });
  return isNaN(x) ? 1 : isNaN(y) ? -1 : x - y;
}

/** Sorts by a heading's column; upwards first, then the other way round. What is missing stays below. */
function sort(heading) {
  const body = heading.closest("table").tBodies[0],
    down = heading.getAttribute("aria-sort") === "ascending";
  all("th", heading.parentElement).forEach(other => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const text = row => row.cells[heading.cellIndex].textContent;
  const missing = row => ["–", "", "diverged"].includes(text(row));
  const order = (a, b) => missing(a) - missing(b) || (down ? -1 : 1) * compare(text(a), text(b));
  body.append(...[...body.rows].sort(order));
}

all("thead th button").forEach(button => button.addEventListener("click", () => sort(button.closest("th"))));

/** Tables that are wider than the page can be moved with the keyboard, too. */
function reachable(wide) {
  if (wide.scrollWidth <= wide.clientWidth) return;
  wide.tabIndex = 0;
  wide.setAttribute("role", "region");
  wide.setAttribute("aria-label", wide.closest("section").querySelector("h2").textContent);
}

all(".wide").forEach(reachable);

function save(script) {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([script.textContent], { type: "application/json" }));
  link.download =
    JSON.parse(script.textContent)
      .title.toLowerCase()
      .replace(/[^a-z0-9]+/g, "-") + ".json";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href));
}

for (const script of all("figure script")) {
  const button = make("button", "save", "JSON");
  button.type = "button";
  button.title = "Save the values of this figure as JSON";
  button.addEventListener("click", () => save(script));
  script.closest("figure").querySelector("figcaption").append(button);
}

// On paper everything is open.
let closed = [];
addEventListener("beforeprint", () => {
  closed = all("details:not([open])");
  closed.forEach(details => (details.open = true));
});
addEventListener("afterprint", () => closed.forEach(details => (details.open = false)));
