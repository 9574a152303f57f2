// The page of a served deployment: ask, correct, undo.
// Questions, answers and facts are other people's text: they come onto the page by textContent, never as markup.
"use strict";

const POLL = 3000; // milliseconds
const ROWS = 100; // edits shown at first, and more at a time
const $ = (id) => document.getElementById(id);

function make(tag, given = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(given)) {
    if (name === "text") made.textContent = value;
    else if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null) made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

const said = (text) => (text ? make("span", { class: "said", text }) : make("span", { class: "hint", text: "(nothing)" }));
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
const lines = (id) => $(id).value.split("\n").map((line) => line.trim()).filter(Boolean);
// Writing the same text again would have it read aloud again.
const tell = (element, text) => { if (element.textContent !== text) element.textContent = text; };

function moment(iso) {
  const local = new Date(iso);
  const two = (n) => String(n).padStart(2, "0");
  const day = `${local.getFullYear()}-${two(local.getMonth() + 1)}-${two(local.getDate())}`;
  return make("time", { datetime: iso, title: iso, text: `${day} ${two(local.getHours())}:${two(local.getMinutes())}` });
}

// A button that is busy keeps the focus, which one that is disabled would lose.
const off = (button) => button.getAttribute("aria-disabled") === "true";
const turn = (button, on) => button.setAttribute("aria-disabled", String(!on));

// -- the service ----------------------------------------------------------------------------------------------------

class Refusal extends Error {}

const service = { model: null, editor: "", events: -1, edits: 0, trouble: "", locked: false, kind: null };

async function request(path, { post, signal } = {}) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.Authorization = `Bearer ${token}`;
  if (post) headers["Content-Type"] = "application/json";
  let answer;
  try {
    const body = post ? JSON.stringify(post) : undefined;
    answer = await fetch(path, { method: post === undefined ? "GET" : "POST", headers, body, signal, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("the service cannot be reached; is it running?");
  }
  if (answer.ok) return answer;
  let message = `the service answered ${answer.status}`;
  try {
    message = (await answer.json()).error.message;
  } catch { /* no JSON: something between here and the service spoke */ }
  if (answer.status === 401) {
    service.locked = true;
    askForToken(token ? "This token is not one of the service’s." : "The service asks for a token.");
    message = "the service asks for a token; give one at the top, then try again";
  } else if (answer.status === 403 && token) askForToken("The token in use may only read. One that may edit?");
  const refusal = new Refusal(message);
  refusal.status = answer.status;
  throw refusal;
}

const json = async (path, given) => (await request(path, given)).json();
const line = (error) => (error instanceof Refusal ? error.message : `the page failed: ${error.message}`);

function askForToken(why) {
  tell($("token-why"), `${why} It is kept in this tab only.`);
  $("token-form").hidden = false;
}

async function useToken(event) {
  event.preventDefault();
  const token = $("token").value.trim();
  if (!/^[\x21-\x7e]+$/.test(token)) {
    tell($("token-why"), "A token is letters, digits and signs, without space.");
    return;
  }
  sessionStorage.setItem("token", token);
  service.locked = false;
  $("token-form").hidden = true;
  $("token-change").hidden = false;
  service.model = null;
  await refresh(true);
  if (service.locked) $("token").select();
  else {
    $("token").value = "";
    $("question").focus();
  }
}

async function about() {
  const { id, cl_lab } = (await json("/v1/models")).data[0];
  Object.assign(service, { model: id, editor: cl_lab.editor, edits: cl_lab.edits });
  tell($("model"), id);
  document.title = `${id} · cl-lab`;
}

// Follow the service: a small question every few seconds, the list only when the journal has moved.
async function refresh(all = false) {
  let trouble = "";
  try {
    const health = await json("/healthz");
    trouble = health.trouble && `The service does not follow the journal: ${health.trouble}`;
    if (!service.locked && (all || health.events !== service.events || !service.model)) {
      await about();
      await list();
    }
  } catch (error) {
    if (error.status !== 401) trouble = `Not up to date: ${line(error)}`;
  }
  tell($("trouble"), trouble);
}

function position() {
  if (service.model) tell($("position"), `edited by ${service.editor} · ${plural(service.edits, "edit")} in force · journal at event ${service.events}`);
}

// -- ask ------------------------------------------------------------------------------------------------------------

let asking = null;

async function* chunks(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      if (error.name === "AbortError") throw error;
      return { done: true };
    });
    if (done) throw new Refusal("the answer broke off; ask again");
    const parts = (held + value).split("\n\n");
    held = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      if (part.startsWith("data: ")) yield JSON.parse(part.slice(6));
    }
  }
}

async function ask(event) {
  event?.preventDefault();
  const prompt = $("question").value.trim();
  tell($("ask-error"), "");
  if (!prompt || !$("as-of").validity.valid) {
    tell($("ask-error"), prompt ? "as of event: a whole number, or nothing for now" : "type a question first");
    (prompt ? $("as-of") : $("question")).focus();
    return;
  }
  asking?.abort();
  const mine = (asking = new AbortController());
  const chat = $("chat").checked;
  tell($("asked"), chat ? `${prompt}\n` : prompt);
  tell($("answered"), "");
  tell($("fired"), "…");
  $("answer").setAttribute("aria-busy", "true"); // read aloud when it is whole
  takeQuestion(prompt);
  try {
    if (!service.model) await about();
    const post = { model: service.model, temperature: 0, stream: true };
    Object.assign(post, chat ? { messages: [{ role: "user", content: prompt }] } : { prompt, stop: ["\n"], max_tokens: 24 });
    if ($("as-of").value) post.edits_as_of = Number($("as-of").value);
    const answer = await request(chat ? "/v1/chat/completions" : "/v1/completions", { post, signal: mine.signal });
    let end = null;
    for await (const chunk of chunks(answer)) {
      if (chunk.error) throw new Refusal(chunk.error.message);
      const choice = chunk.choices[0];
      const text = choice?.text ?? choice?.delta?.content;
      if (text) $("answered").append(text);
      end = chunk.cl_lab ?? end;
    }
    if (!$("answered").textContent) tell($("answered"), " (nothing)");
    await showFired(end, post.edits_as_of);
  } catch (error) {
    if (asking !== mine) return; // another question took its place
    tell($("fired"), error.name === "AbortError" ? "Stopped." : "");
    if (error.name !== "AbortError") tell($("ask-error"), line(error));
  } finally {
    if (asking === mine) {
      asking = null;
      $("answer").removeAttribute("aria-busy");
    }
  }
}

async function showFired(end, asOf) {
  const behind = `as of event ${end.edits_as_of}`;
  const before = asOf === undefined ? "" : `, ${asOf === service.events ? "the last" : "of the past"}`;
  if (end.fired.length) {
    const links = end.fired.flatMap((id, i) => [i ? ", " : "", linkTo(id)]);
    $("fired").replaceChildren(...links, ` fired, ${behind}${before}`);
    return;
  }
  let why = "No edit fired";
  if ((await inForce(end.edits_as_of)) && (await kind()) === "weights") {
    why = "Its edits change weights and act on all prompts; which of them spoke is not known";
  }
  tell($("fired"), `${why}, ${behind}${before}`);
}

async function inForce(position) {
  if (position === service.events) return service.edits > 0;
  const found = new Set();
  for (const event of (await json("/v1/events")).data.slice(0, position)) {
    if (event.kind === "undo") found.delete(event.id);
    else found.add(event.id);
  }
  return found.size > 0;
}

async function kind() { // one editor made all edits of a deployment, so one of them tells
  service.kind ??= (await json("/v1/edits/1")).patch.kind;
  return service.kind;
}

const linkTo = (id) => make("a", {
  href: `#edit-${id}`,
  text: `Edit ${id}`,
  onclick: (event) => {
    event.preventDefault();
    reveal(id);
  },
});

// -- correct --------------------------------------------------------------------------------------------------------

let shown = null; // the preview on the page: its name, what was asked for, and its button
let touched = false; // the question of the form was typed, not taken from above
let ticking = 0;

function takeQuestion(prompt) {
  if (!touched && !$("new-answer").value) $("prompt").value = prompt;
  $("take").hidden = $("prompt").value.trim() === prompt;
  compare();
}

function asked() {
  const fact = { prompt: $("prompt").value.trim(), answer: $("new-answer").value.trim() };
  if ($("subject").value.trim()) fact.subject = $("subject").value.trim();
  if (lines("aliases").length) fact.aliases = lines("aliases");
  if (lines("paraphrases").length) fact.paraphrases = lines("paraphrases");
  if (lines("unrelated").length) fact.unrelated = lines("unrelated").map((prompt) => ({ prompt }));
  return { facts: [fact], chat: $("chat").checked };
}

// What is applied is what was seen: a preview counts only while the form says what it was made from.
function compare() {
  if (!shown) return;
  const same = JSON.stringify(asked()) === shown.asked;
  turn(shown.apply, same && !ticking);
  tell(shown.note, same ? "" : "The form has changed since; preview again.");
}

function busy(what) {
  const begin = performance.now();
  clearInterval(ticking);
  ticking = what && setInterval(() => tell($("elapsed"), `${Math.floor((performance.now() - begin) / 1000)} s`), 250);
  tell($("busy"), what);
  tell($("elapsed"), "");
  turn($("preview"), !what);
  compare();
}

async function preview(event) {
  event.preventDefault();
  if (off($("preview"))) return;
  tell($("correct-error"), "");
  for (const id of ["prompt", "new-answer"]) {
    if (!$(id).value.trim()) {
      tell($("correct-error"), `${id === "prompt" ? "the question" : "the new answer"} is empty`);
      $(id).focus();
      return;
    }
  }
  const post = asked();
  busy("Making the edit, asking before and after …");
  try {
    showPreview(await json("/v1/edits/preview", { post }), post);
  } catch (error) {
    tell($("correct-error"), line(error));
  } finally {
    busy("");
  }
}

function table(head, rows) {
  const cell = (content, i) => make("td", { role: "cell", "data-label": head[i] }, make("div", {}, ...content));
  return make("table", { role: "table" },
    make("thead", { role: "rowgroup" }, make("tr", { role: "row" }, ...head.map((text) => make("th", { scope: "col", role: "columnheader", text })))),
    make("tbody", { role: "rowgroup" }, ...rows.map((row) => make("tr", { role: "row" }, ...row.map(cell)))));
}

function showPreview(seen, post) {
  const others = seen.answers.filter((row) => row.paraphrase);
  const sums = {
    "In other words": `${others.filter((row) => row.right).length} of ${others.length} right`,
    "Other questions": `${seen.moved.length} of ${seen.asked_aside} moved`,
    "Perplexity": `× ${seen.perplexity.toFixed(3)}`,
    "Made in": `${seen.seconds.toFixed(1)} s`,
    "Fires": seen.fires,
  };
  const answers = seen.answers.map((row) => [
    [said(row.prompt), ...(row.paraphrase ? [make("span", { class: "hint", text: "in other words" })] : [])],
    [said(row.before)],
    [said(row.after), make("span", { class: `verdict ${row.right ? "right" : "wrong"}`, text: row.right ? "✓ right" : "✗ wrong" })],
  ]);
  const head = ["Question", "Before", "After"];
  const parts = [
    make("h3", { text: `What the edit would do, asked ${post.chat ? "as a chat’s turn" : "plain"}` }),
    make("dl", { class: "sums" }, ...Object.entries(sums).map(([name, text]) => make("div", {}, make("dt", { text: name }), make("dd", { text })))),
    table(head, answers),
  ];
  if (seen.moved.length) {
    parts.push(make("h3", { text: "What else moved" }));
    parts.push(table(head, seen.moved.map((row) => [[said(row.prompt)], [said(row.before)], [said(row.after)]])));
  }
  if (seen.broken.length) {
    const gates = make("ul", {}, ...seen.broken.map((text) => make("li", { text })));
    parts.push(make("div", { class: "gates" }, make("strong", { text: `Breaks ${plural(seen.broken.length, "gate")}` }), gates));
  }
  const apply = make("button", { type: "button", id: "apply", class: seen.broken.length ? "warn" : "main", text: seen.broken.length ? "Apply nevertheless" : "Apply", onclick: applyShown });
  const note = make("span", { class: "hint", role: "status" });
  const error = make("p", { class: "error", role: "alert", id: "apply-error" });
  parts.push(make("div", { class: "actions" }, apply, note), error);
  shown = { name: seen.preview, asked: JSON.stringify(post), force: seen.broken.length > 0, apply, note, error };
  $("seen").replaceChildren(...parts);
}

async function applyShown() {
  if (off(shown.apply)) return;
  tell(shown.error, "");
  const { facts, chat } = JSON.parse(shown.asked);
  busy("Applying …");
  try {
    const made = await json("/v1/edits", { post: { preview: shown.name, force: shown.force } });
    shown = null;
    $("correct-form").reset();
    $("take").hidden = true;
    touched = false;
    const again = make("button", { type: "button", id: "again", text: "Ask again", onclick: () => {
      $("question").value = facts[0].prompt;
      $("as-of").value = "";
      $(chat ? "chat" : "plain").checked = true;
      $("question").focus();
      ask();
    } });
    $("seen").replaceChildren(make("p", {}, linkTo(made.id), ` is in force, event ${made.events} of the journal.`), again);
    again.focus();
    await refresh(true);
  } catch (error) {
    tell(shown.error, line(error));
  } finally {
    busy("");
  }
}

// -- edits ----------------------------------------------------------------------------------------------------------

const rows = new Map(); // by id; rows stay what they are when the list is read again, so focus and scroll stay too
let found = [];
let limit = ROWS;
let listing = 0;

async function list() {
  const mine = ++listing;
  const search = $("search").value.trim();
  let answer;
  try {
    answer = await json(`/v1/edits?search=${encodeURIComponent(search)}`);
    while (answer.has_more && mine === listing) {
      const more = await json(`/v1/edits?search=${encodeURIComponent(search)}&after=${answer.data.at(-1).id}`);
      answer = { ...more, data: [...answer.data, ...more.data] };
    }
  } catch (error) {
    if (mine === listing && error.status !== 401) tell($("edits-error"), line(error));
    throw error;
  }
  if (mine !== listing) return; // another search took its place
  tell($("edits-error"), "");
  service.events = answer.events;
  found = answer.data.reverse();
  tell($("count"), search ? `${plural(found.length, "edit")} found` : found.length ? plural(found.length, "edit") + ", newest first" : "No edit was made yet.");
  draw();
  position();
}

function draw() {
  const wanted = found.slice(0, limit);
  const ids = new Set(wanted.map((edit) => edit.id));
  for (const [id, row] of rows) {
    if (!ids.has(id)) {
      row.item.remove();
      rows.delete(id);
    }
  }
  let place = $("edits").firstChild;
  for (const edit of wanted) {
    if (!rows.has(edit.id)) rows.set(edit.id, makeRow(edit));
    const row = rows.get(edit.id);
    if (row.item === place) place = place.nextSibling;
    else $("edits").insertBefore(row.item, place);
    row.update(edit);
  }
  $("more").hidden = found.length <= limit;
}

function makeRow(edit) {
  const { id, facts: [first, ...others] } = edit;
  const open = make("button", { type: "button", class: "open", "aria-expanded": "false", "aria-controls": `details-${id}` },
    make("span", { class: "number", text: `${id} ` }), said(first.prompt), " → ", make("span", { class: "said new", text: first.answer }),
    ...(others.length ? [make("span", { class: "hint", text: ` and ${plural(others.length, "other fact")}` })] : []));
  const act = make("button", { type: "button", class: "quiet" });
  const state = make("span");
  const error = make("p", { class: "error", role: "alert" });
  const details = make("div", { class: "details", id: `details-${id}`, hidden: "" });
  const item = make("li", { class: "edit", id: `edit-${id}` },
    make("div", { class: "line" }, open, act),
    make("p", { class: "about" }, state, ...(edit.forced ? [make("span", { class: "forced", text: "! forced" })] : []), moment(edit.time)),
    error, details);
  const row = { item, open: () => show(true) };
  let drawn = null; // the state that the row shows

  async function show(on) {
    open.setAttribute("aria-expanded", String(on));
    details.hidden = !on;
    if (!on) return;
    try {
      details.replaceChildren(...detailsOf(await json(`/v1/edits/${id}`)));
      tell(error, "");
    } catch (refusal) {
      tell(error, line(refusal));
    }
  }

  row.update = (now) => {
    if (drawn === now.in_force) return;
    drawn = now.in_force;
    item.classList.toggle("undone", !drawn);
    state.className = drawn ? "right" : "";
    tell(state, drawn ? "● in force" : "○ undone");
    tell(act, drawn ? "Undo" : "Redo");
    act.setAttribute("aria-label", `${drawn ? "Undo" : "Redo"} edit ${id}`);
    if (!details.hidden) show(true);
  };
  open.addEventListener("click", () => show(details.hidden));
  item.addEventListener("keydown", (event) => {
    if (event.key !== "Escape" || details.hidden) return;
    show(false);
    open.focus();
  });
  act.addEventListener("click", async () => {
    if (off(act)) return;
    turn(act, false);
    tell(error, "");
    try {
      await json(`/v1/edits/${id}/${drawn ? "undo" : "redo"}`, { post: null });
      await refresh(true);
    } catch (refusal) {
      tell(error, line(refusal));
    } finally {
      turn(act, true);
    }
  });
  return row;
}

function detailsOf({ facts, patch, events }) {
  const pair = (name, ...content) => [make("dt", { text: name }), make("dd", {}, ...content)];
  const value = (v) => (Array.isArray(v) ? v.map((one) => make("div", {}, ...value(one))) : [said(typeof v === "object" ? v.prompt + (v.answer ? ` → ${v.answer}` : "") : v)]);
  const names = { prompt: "question", answer: "new answer", aliases: "also called", paraphrases: "in other words", unrelated: "must not change" };
  const size = patch.bytes < 1e5 ? `${(patch.bytes / 1e3).toFixed(1)} kB` : `${(patch.bytes / 1e6).toFixed(1)} MB`;
  const about = [pair("patch", `${patch.kind} by ${patch.editor}, ${size}, `, make("code", { title: events[0].digest, text: events[0].digest.slice(0, 12) }))];
  for (const [name, note] of Object.entries(patch.notes ?? {})) about.push(pair(name, typeof note === "number" ? String(+note.toPrecision(4)) : said(typeof note === "string" ? note : JSON.stringify(note))));
  for (const event of events) about.push(pair(`event ${event.n}`, `${event.kind}${event.forced ? " (forced)" : ""}, `, moment(event.time)));
  return [
    ...facts.map((fact) => make("dl", {}, ...Object.entries(fact).flatMap(([name, v]) => pair(names[name] ?? name.replace("_", " "), ...value(v))))),
    make("dl", {}, ...about.flat()),
  ];
}

async function reveal(id) {
  const place = () => found.findIndex((edit) => edit.id === id);
  if (place() < 0) {
    $("search").value = "";
    await refresh(true);
  }
  if (place() < 0) return;
  limit = Math.max(limit, place() + 1);
  draw();
  const { item, open } = rows.get(id);
  open();
  item.querySelector(".open").focus();
}

// -- begin ----------------------------------------------------------------------------------------------------------

let searching = 0;
$("ask-form").addEventListener("submit", ask);
$("question").addEventListener("keydown", (event) => { if (event.key === "Escape") asking?.abort(); });
$("correct-form").addEventListener("submit", preview);
$("correct-form").addEventListener("input", compare);
$("prompt").addEventListener("input", () => { touched = $("prompt").value !== ""; });
for (const id of ["plain", "chat"]) $(id).addEventListener("change", compare);
$("take").addEventListener("click", () => {
  $("prompt").value = $("question").value.trim();
  $("take").hidden = true;
  compare();
  $("new-answer").focus();
});
$("search").addEventListener("input", () => {
  clearTimeout(searching);
  searching = setTimeout(() => { limit = ROWS; list().catch(() => {}); }, 200);
});
$("more").addEventListener("click", () => { limit += ROWS; draw(); });
$("token-form").addEventListener("submit", useToken);
$("token-change").addEventListener("click", () => {
  askForToken("Another token than the one in use.");
  $("token").focus();
});
$("token-change").hidden = !sessionStorage.getItem("token");
document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
(async function follow() {
  if (!document.hidden) await refresh();
  setTimeout(follow, POLL);
})();
