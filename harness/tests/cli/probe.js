// Looks at a report in a frame, uses it, and leaves what it saw as JSON in the page around the frame.
function look(frame) {
  const d = frame.contentDocument,
    w = frame.contentWindow,
    box = e => e.getBoundingClientRect();
  const all = (what, from = d) => [...from.querySelectorAll(what)];
  const texts = (what, from) => all(what, from).map(e => e.textContent);
  const key = (element, name) => element.dispatchEvent(new w.KeyboardEvent("keydown", { key: name, bubbles: true }));
  all("details").forEach(e => (e.open = true));
  const inner = w.innerWidth;
  const outside = elements =>
    elements.filter(e => box(e).left < -1 || box(e).right > inner + 1).map(e => e.textContent);
  const meet = (a, b) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 &&
    Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
  const overlapping = elements =>
    elements.filter((e, i) => elements.slice(0, i).some(o => meet(box(e), box(o)))).map(e => e.textContent);
  const caption = figure => figure.querySelector("figcaption").firstChild.textContent;
  const data = figure => JSON.parse(figure.querySelector("script").textContent);

  const charts = all("figure.chart").map(figure => {
    const plot = figure.querySelector(".plot"),
      at = box(plot),
      labels = all(".x-ticks span, .y-ticks span, .x-title, .y-title, .legend button", figure);
    const tip = figure.querySelector(".tip"),
      cloud = figure.classList.contains("square");
    const seen = {
      title: caption(figure),
      cloud,
      width: at.width,
      height: at.height,
      data: data(figure),
      x_title: figure.querySelector(".x-title").textContent,
      y_title: figure.querySelector(".y-title").textContent,
      x_ticks: texts(".x-ticks span", figure),
      y_ticks: texts(".y-ticks span", figure),
      description: figure.querySelector("svg").getAttribute("aria-label"),
      outside: outside(labels),
      overlapping: overlapping(labels),
      smallest: Math.min(...labels.map(e => parseFloat(w.getComputedStyle(e).fontSize))),
      lines: all("polyline", figure).map(p => p.getAttribute("points")),
      dots: all("path.dot", figure).map(p => p.getAttribute("d")),
    };
    const move = { clientX: at.left + at.width / 2, clientY: at.top + at.height / 2, bubbles: true };
    plot.dispatchEvent(new w.PointerEvent("pointermove", move));
    seen.hovered = tip.hidden ? "" : tip.textContent;
    if (!tip.hidden) seen.outside.push(...outside([tip]));
    plot.dispatchEvent(new w.PointerEvent("pointerleave"));
    if (!tip.hidden) seen.hovered = "";
    plot.focus();
    key(plot, "End");
    seen.keyed = d.activeElement === plot && !tip.hidden ? figure.querySelector("[role=status]").textContent : "";
    key(plot, "Escape");
    const button = figure.querySelector(".legend button"),
      group = figure.querySelector("g[data-series='0']");
    if (button) {
      seen.toggled = [];
      for (let i = 0; i < 2; i++) {
        button.click();
        seen.toggled.push(group.style.display, button.getAttribute("aria-pressed"));
      }
    }
    return seen;
  });

  const means = all("figure.means").map(figure => ({
    title: caption(figure),
    data: data(figure),
    outside: outside(all("span, .x-title", figure)),
    overlapping: overlapping(all("span", figure)),
    rows: all("li", figure).map(li => ({
      name: li.children[0].textContent,
      value: li.children[1].textContent,
      mark: li.querySelector(".dot")?.getAttribute("d"),
    })),
  }));

  const heats = all("figure.heat").map(figure => ({
    title: caption(figure),
    section: figure.closest("section").querySelector("h2").textContent,
    data: data(figure),
    key: figure.querySelector(".key").textContent,
    outside: outside(all("td, th, .key span", figure)),
    maps: all("table", figure).map((table, i) => {
      table.focus();
      key(table, "ArrowRight");
      const keyed = d.activeElement === table ? all(".tip", figure)[i].textContent : "";
      key(table, "Escape");
      return {
        names: texts("tbody th", table),
        keyed,
        cells: all("td", table).map(td => ({
          weight: +td.textContent,
          level: +td.className.match(/q(\d+)/)[1],
          width: box(td).width,
          height: box(td).height,
        })),
      };
    }),
  }));

  const tables = all(".wide table").map(table => {
    const rows = [...table.rows].map(r => [...r.cells].map(c => c.innerText.trim()));
    const align = cell => w.getComputedStyle(cell).textAlign;
    const heads = [...table.tHead.rows[0].cells],
      first = table.tBodies[0].rows[0];
    const column = heads.length - 1,
      button = heads[column].querySelector("button"),
      states = [];
    const sorted = () => {
      button.click();
      states.push(heads[column].getAttribute("aria-sort"));
      return [...table.tBodies[0].rows].map(r => r.cells[column].textContent);
    };
    const found = { rows, aligned: heads.every((head, i) => align(head) === align(first.cells[i])), states };
    found.ascending = sorted();
    found.descending = sorted();
    return found;
  });

  const style = w.getComputedStyle(d.body);
  const seen = {
    inner,
    scroll: d.documentElement.scrollWidth,
    ink: style.color,
    paper: style.backgroundColor,
    lead: d.querySelector(".lead")?.textContent,
    charts,
    means,
    heats,
    tables,
    tiles: all(".tiles > div").map(t => ({
      name: t.children[0].textContent,
      value: t.children[1].firstChild.textContent,
    })),
  };
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen).replace(
    /[<>&\u00a0]/g,
    c => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"),
  );
  document.body.append(out);
}
