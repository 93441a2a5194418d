// Uses the server's page in a frame, and leaves what it saw as JSON in the page around the frame.
async function use(frame) {
  const d = frame.contentDocument,
    w = frame.contentWindow,
    box = e => e.getBoundingClientRect(),
    all = (what, from = d) => [...from.querySelectorAll(what)],
    // The browser's clock is a virtual one, which stands still while something is fetched.
    pause = () => fetch("/health"),
    key = (element, name) => element.dispatchEvent(new w.KeyboardEvent("keydown", { key: name, bubbles: true }));
  const until = async holds => {
    for (let i = 0; i < 5000 && !holds(); i++) await pause();
    if (!holds()) throw new Error(d.body.innerText);
  };
  const choose = (id, value) => {
    d.getElementById(id).value = value;
    d.getElementById(id).dispatchEvent(new w.Event("change"));
  };
  await until(() => all("#models input").length);
  const models = all("#models label").map(e => e.textContent.trim());
  d.getElementById("tokens").value = 8;
  const question = d.getElementById("question");
  question.value = QUESTION;
  key(question, "Enter");
  await until(() => d.getElementById("status").textContent.includes("complete"));
  const heads = answer => all(".text span", answer).filter(e => e.textContent).map(e => +(e.dataset.head ?? -1));
  const answers = all(".answer").map(answer => {
    const token = answer.querySelector(".token"),
      tip = answer.querySelector(".tip");
    const seen = {
      model: answer.querySelector("h2").textContent,
      text: answer.querySelector(".text").textContent,
      note: answer.querySelector("p").textContent,
      left: box(answer).left,
      right: box(answer).right,
      top: box(answer).top,
      heads: heads(answer),
    };
    if (token) {
      token.dispatchEvent(new w.PointerEvent("pointermove", { bubbles: true }));
      seen.hovered = tip.hidden ? "" : tip.innerText;
      seen.tip = { left: box(tip).left, right: box(tip).right };
      seen.colour = w.getComputedStyle(token).backgroundColor;
      answer.querySelector(".text").dispatchEvent(new w.PointerEvent("pointerleave"));
      seen.left_alone = tip.hidden;
      answer.focus();
      key(answer, "ArrowRight");
      seen.keyed = d.activeElement === answer && !tip.hidden ? tip.innerText : "";
      key(answer, "Escape");
    }
    return seen;
  });
  choose("layer", "1");
  choose("projection", "up_proj");
  const one_place = all(".answer").map(heads);
  choose("layer", "");
  choose("projection", "");
  question.value = "again";
  d.getElementById("send").click();
  await until(() => all(".answer").length === 2 * answers.length && d.getElementById("stop").hidden);
  const style = w.getComputedStyle(d.body);
  const unlabelled = all("input, select, textarea").filter(e => !e.labels.length).map(e => e.id);
  const seen = {
    models,
    answers,
    one_place,
    unlabelled,
    inner: w.innerWidth,
    scroll: d.documentElement.scrollWidth,
    ink: style.color,
    paper: style.backgroundColor,
    legend: all(".legend span").map(e => e.textContent),
    dots: all(".legend i").map(e => [box(e).width, box(e).top, w.getComputedStyle(e).backgroundColor]),
    asked: all(".asked").map(e => e.textContent),
  };
  d.getElementById("reset").click();
  seen.after_reset = all(".answer, .asked").length;
  return seen;
}

const show = seen => {
  const out = document.createElement("pre");
  out.id = "seen";
  out.textContent = JSON.stringify(seen).replace(
    /[<>&\u00a0]/g,
    c => "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"),
  );
  document.body.append(out);
};
