// Asks several adapters the same, and colours each token by its router's strongest head. Talks to this server alone.
"use strict";

const $ = id => document.getElementById(id);
const make = (tag, name = "", text = "") =>
  Object.assign(document.createElement(tag), { className: name, textContent: text });

/** There are eight colours of heads. */
const COLOURS = 8;

/** The server's answers; asks for a key when it wants one. */
const api = {
  async fetch(path, options = {}) {
    const headers = { "Content-Type": "application/json" };
    if ($("api-key").value) headers.Authorization = `Bearer ${$("api-key").value}`;
    const response = await fetch(path, { ...options, headers });
    if (response.status === 401) $("key").hidden = false;
    if (!response.ok) throw new Error((await response.json()).error.message);
    return response;
  },

  /** The events of a stream. */
  async *stream(path, body, signal) {
    const response = await this.fetch(path, { method: "POST", body: JSON.stringify(body), signal });
    const reader = response.body.getReader(),
      decoder = new TextDecoder();
    let text = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      text += decoder.decode(value, { stream: true });
      const events = text.split("\n\n");
      text = events.pop();
      for (const event of events) {
        const data = event.replace(/^data: /, "");
        if (data === "[DONE]") return;
        const piece = JSON.parse(data);
        if (piece.error) throw new Error(piece.error.message);
        yield piece;
      }
    }
  },
};

/** Which layer and projection the colours show. */
const view = {
  /** Names what may be chosen, once it is known. */
  offer(places) {
    for (const [id, key] of [["layer", "layer"], ["projection", "projection"]]) {
      const known = new Set([...$(id).options].map(option => option.value));
      for (const value of new Set(places.map(place => String(place[key]))))
        if (!known.has(value)) $(id).append(new Option(value, value));
    }
  },

  /** A token's weights: the mean over the chosen places; `null` where there is no choice between heads. */
  weights(gates, places, heads) {
    if (!gates || heads < 2) return null;
    const [layer, projection] = [$("layer").value, $("projection").value];
    const sums = new Array(heads).fill(0);
    let count = 0;
    places.forEach((place, row) => {
      if ((layer && layer !== String(place.layer)) || (projection && projection !== place.projection)) return;
      count++;
      sums.forEach((_, head) => (sums[head] += gates[row * heads + head]));
    });
    return count ? sums.map(sum => sum / count) : null;
  },
};

/** One model's answer to one question. */
class Answer {
  static all = [];

  constructor(model, place) {
    this.model = model;
    this.box = make("article", "answer");
    this.box.tabIndex = 0;
    this.box.setAttribute("aria-label", `Answer of ${model}; arrow keys go through its tokens`);
    this.text = make("div", "text");
    this.note = make("p", "soft");
    this.tip = make("div", "tip");
    this.tip.setAttribute("role", "status");
    this.tip.hidden = true;
    this.box.append(make("h2", "", model), this.text, this.note, this.tip);
    place.append(this.box);
    Object.assign(this, { chars: [], tokens: [], spans: [], places: [], heads: 0, at: -1, count: 0 });
    this.text.addEventListener("pointermove", event => this.over(event.target));
    this.text.addEventListener("pointerdown", event => this.over(event.target));
    this.text.addEventListener("pointerleave", () => this.clear());
    this.box.addEventListener("blur", () => this.clear());
    this.box.addEventListener("keydown", event => this.press(event));
    Answer.all.push(this);
  }

  /** Takes a piece of a stream. */
  take(choice) {
    this.chars.push(...(choice.text ?? choice.delta?.content ?? ""));
    const { tokens = [], places, heads } = choice.hydra ?? {};
    if (places) {
      Object.assign(this, { places, heads });
      view.offer(places);
      legend();
    }
    this.tokens.push(...tokens);
    this.finish = choice.finish_reason ?? this.finish;
    this.draw();
  }

  /** A span for each token that has text; the last one grows. */
  draw() {
    if (!this.tokens.length) this.text.textContent = this.chars.join("");
    for (let i = Math.max(0, this.spans.length - 1); i < this.tokens.length; i++) {
      const span = (this.spans[i] ??= this.text.appendChild(make("span")));
      const end = this.tokens[i + 1]?.offset ?? this.chars.length;
      span.textContent = this.chars.slice(this.tokens[i].offset, end).join("");
      this.colour(i);
    }
  }

  colour(i) {
    const span = this.spans[i],
      weights = view.weights(this.tokens[i].gates, this.places, this.heads);
    span.className = "";
    if (!weights || !span.textContent) return;
    const strongest = weights.indexOf(Math.max(...weights)),
      even = 1 / weights.length;
    span.className = `token s${strongest % COLOURS}`;
    span.dataset.head = strongest;
    span.style.setProperty("--share", Math.min(1, (weights[strongest] - even) / (1 - even)).toFixed(3));
    span.classList.toggle("at", i === this.at);
  }

  recolour() {
    this.spans.forEach((_, i) => this.colour(i));
    if (this.at >= 0) this.see(this.at);
  }

  over(element) {
    const i = this.spans.indexOf(element);
    if (i >= 0) this.see(i);
    else this.clear();
  }

  clear() {
    this.spans[this.at]?.classList.remove("at");
    this.at = -1;
    this.tip.hidden = true;
  }

  /** Shows a token's weights beside it. */
  see(i) {
    this.clear();
    const weights = view.weights(this.tokens[i].gates, this.places, this.heads);
    if (!weights) return;
    this.at = i;
    const span = this.spans[i];
    span.classList.add("at");
    const rows = weights.map((weight, head) => {
      const row = make("div", `s${head % COLOURS}`),
        bar = make("i");
      bar.style.width = `${(100 * weight).toFixed(1)}%`;
      row.append(make("span", "", `head ${head}`), make("span", "", weight.toFixed(3)), bar);
      return row;
    });
    this.tip.replaceChildren(make("b", "", JSON.stringify(span.textContent)), ...rows);
    this.tip.hidden = false;
    const box = span.getBoundingClientRect(),
      around = this.box.getBoundingClientRect();
    const right = around.width - this.tip.offsetWidth - 2;
    this.tip.style.left = `${Math.max(0, Math.min(box.left - around.left, right))}px`;
    this.tip.style.top = `${box.bottom - around.top + 4}px`;
  }

  press(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === "Escape") this.clear();
    if (!step) return;
    event.preventDefault();
    let i = this.at;
    do i += step;
    while (i >= 0 && i < this.spans.length && !this.spans[i].classList.contains("token"));
    if (i >= 0 && i < this.spans.length) this.see(i);
  }

  end(seconds, error) {
    this.box.removeAttribute("aria-busy");
    const speed = `${this.tokens.length} tokens, ${(this.tokens.length / seconds).toFixed(1)}/s`;
    const why = { length: "cut at the limit of tokens", stop: "" }[this.finish] ?? "stopped";
    this.note.textContent = error ?? [speed, why].filter(Boolean).join("; ");
    this.note.classList.toggle("wrong", Boolean(error));
  }
}

/** The colours' meaning. */
function legend() {
  const heads = Math.max(0, ...Answer.all.map(answer => answer.heads));
  const entries = heads < 2 ? [] : Array.from({ length: heads }, (_, head) => {
    const entry = make("span", `s${head % COLOURS}`, `head ${head}`);
    entry.prepend(make("i"));
    return entry;
  });
  $("legend").replaceChildren(...entries);
}

/** The conversation with each model: what was asked, and what it said. */
let histories = new Map(),
  chats = true,
  running = null;

function request(model, history) {
  const common = {
    model,
    stream: true,
    hydra_gates: true,
    temperature: +$("temperature").value,
    max_tokens: +$("tokens").value,
  };
  // A model without a chat template continues the text so far.
  if (!chats) return ["/v1/completions", { ...common, prompt: history.map(turn => turn.content).join("") }];
  const system = $("system").value ? [{ role: "system", content: $("system").value }] : [];
  return ["/v1/chat/completions", { ...common, messages: [...system, ...history] }];
}

async function answer(model, question, place, signal) {
  const conversation = histories,
    history = conversation.get(model) ?? [],
    asked = [...history, { role: "user", content: question }],
    shown = new Answer(model, place),
    started = performance.now();
  shown.box.setAttribute("aria-busy", "true");
  let error;
  try {
    for await (const piece of api.stream(...request(model, asked), signal))
      if (piece.choices.length) shown.take(piece.choices[0]);
  } catch (reason) {
    if (reason.name !== "AbortError") error = reason.message;
  }
  shown.end((performance.now() - started) / 1000, error);
  // What failed is not part of the conversation.
  if (!error) conversation.set(model, [...asked, { role: "assistant", content: shown.chars.join("") }]);
}

async function ask(question) {
  const models = [...document.querySelectorAll("#models input:checked")].map(box => box.value);
  if (!question || !models.length || running) return;
  running = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  const answers = make("div", "answers");
  $("turns").append(make("div", "asked", question), answers);
  answers.scrollIntoView({ block: "end" });
  $("status").textContent = "";
  await Promise.all(models.map(model => answer(model, question, answers, running.signal)));
  running = null;
  $("send").disabled = false;
  $("stop").hidden = true;
  $("status").textContent = `${models.length} ${models.length === 1 ? "answer is" : "answers are"} complete.`;
}

function reset() {
  running?.abort();
  histories = new Map();
  Answer.all.length = 0;
  $("turns").replaceChildren();
  legend();
  $("question").focus();
}

async function load() {
  try {
    const { data } = await (await api.fetch("/v1/models")).json();
    $("key").hidden = true;
    chats = data[0].hydra.chat;
    $("system-label").hidden = !chats;
    if (!chats) $("lead").textContent += " This model has no chat template: it continues your text.";
    const boxes = data.map(({ id }) => {
      const label = make("label"),
        box = Object.assign(make("input"), { type: "checkbox", value: id, checked: true });
      label.append(box, ` ${id}`);
      return label;
    });
    $("models").replaceChildren($("models").firstElementChild, ...boxes);
    $("status").textContent = "";
  } catch (error) {
    $("status").textContent = error.message;
  }
}

$("ask").addEventListener("submit", event => {
  event.preventDefault();
  const question = $("question").value;
  if (running || !question.trim()) return;
  $("question").value = "";
  ask(question);
});
$("question").addEventListener("keydown", event => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
});
$("key").addEventListener("submit", event => {
  event.preventDefault();
  load();
});
$("stop").addEventListener("click", () => running?.abort());
$("reset").addEventListener("click", reset);
for (const id of ["layer", "projection"])
  $(id).addEventListener("change", () => Answer.all.forEach(answer => answer.recolour()));
load();
