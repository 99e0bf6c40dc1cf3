"use strict";
// The page on which a person labels the images of `dpt suggest`. Nothing is sent anywhere: labels stay in
// the browser's localStorage until they are saved as labels.csv.
//
// page: {key, classes, open, given: [[id, class]], images: [{id, src, small}]}; with `open` the classes
// are not known beforehand, and any name makes a new one.
// state: {labels: Map of id to class, skipped: Set of ids, history: [{id, label, skipped}] before each step}

const MOST_COMPLETIONS = 8;

// What needs no document -----------------------------------------------------------------------------------

function newState() {
  return { labels: new Map(), skipped: new Set(), history: [] };
}

/** Set the class of an image, or skip it with `null`. */
function assign(state, id, label) {
  state.history.push({ id, label: state.labels.get(id), skipped: state.skipped.has(id) });
  restore(state, { id, label: label ?? undefined, skipped: label === null });
}

/** Take back the last step; return its image's id, undefined where there is none. */
function undo(state) {
  const before = state.history.pop();
  if (before) restore(state, before);
  return before?.id;
}

function restore(state, { id, label, skipped }) {
  if (label === undefined) state.labels.delete(id);
  else state.labels.set(id, label); // an id that is there keeps its place
  state.skipped[skipped ? "add" : "delete"](id);
}

/** The classes: those that are known, then new ones in the order of their first use. */
function classesOf(page, state) {
  return [...new Set([...page.classes, ...state.labels.values()])];
}

/** How many labels each class has, the given ones included. */
function countsOf(page, state) {
  const counts = new Map(classesOf(page, state).map((name) => [name, 0]));
  for (const label of [...page.given.map(([, label]) => label), ...state.labels.values()]) {
    counts.set(label, (counts.get(label) ?? 0) + 1);
  }
  return counts;
}

function progressText(page, state) {
  const counts = [...countsOf(page, state).values()];
  const without = counts.filter((count) => count === 0).length;
  const parts = [`${state.labels.size} of ${page.images.length}`];
  if (page.open) parts.push(plural(counts.length, "class", "classes"));
  else parts.push(without ? `${plural(without, "class", "classes")} without a label` : "every class has a label");
  if (state.skipped.size) parts.push(`${state.skipped.size} skipped`);
  return parts.join(", ");
}

function plural(count, one, many) {
  return `${count} ${count === 1 ? one : many}`;
}

/** The place of the next image after `from` without a class, from the start again; -1 where none is left. */
function nextOpen(page, state, from) {
  const places = page.images.map((_, i) => (from + 1 + i) % page.images.length);
  return places.find((i) => !state.labels.has(page.images[i].id) && !state.skipped.has(page.images[i].id)) ?? -1;
}

/** What Enter can choose for a text, the best first: [{label, isNew}]. */
function completions(classes, text, open) {
  const typed = text.trim();
  const low = typed.toLowerCase();
  if (!typed) return [];
  const exact = classes.filter((name) => name.toLowerCase() === low).sort((a, b) => (b === typed) - (a === typed));
  const prefix = classes.filter((name) => name.toLowerCase().startsWith(low) && !exact.includes(name));
  const inside = classes.filter((name) => name.toLowerCase().indexOf(low) > 0);
  const fresh = open && !exact.length ? [{ label: typed, isNew: true }] : [];
  const old = (names) => names.map((label) => ({ label, isNew: false }));
  const known = [...old(exact), ...old(prefix)].slice(0, MOST_COMPLETIONS);
  return [...known, ...fresh, ...old(inside).slice(0, MOST_COMPLETIONS - known.length)];
}

/**
 * Map of a key to the class that it gives at once: a name of one character is its own, others have digits.
 * With open classes there are none: another one may come to begin with any character.
 */
function shortcuts(classes, open) {
  const low = classes.map((name) => name.toLowerCase());
  const keys = new Map();
  if (open) return keys;
  classes.forEach((name, i) => {
    const alone = low.every((other, j) => i === j || !other.startsWith(low[i]));
    if ([...name].length === 1 && alone) keys.set(low[i], name);
  });
  if (low.some((name) => /^\d/.test(name))) return keys; // there a digit begins a name
  const others = classes.filter((name) => ![...keys.values()].includes(name));
  others.slice(0, 10).forEach((name, i) => keys.set(String((i + 1) % 10), name));
  return keys;
}

/** labels.csv: the given labels, then those of the page; images without a class are left out. */
function labelsCsv(page, state) {
  const labelled = page.images.filter(({ id }) => state.labels.has(id));
  const rows = [["id", "label"], ...page.given, ...labelled.map(({ id }) => [id, state.labels.get(id)])];
  return rows.map((row) => `${row.map(csvField).join(",")}\n`).join("");
}

function csvField(text) {
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function pack(state) {
  return JSON.stringify({ labels: [...state.labels], skipped: [...state.skipped] });
}

/** The state in a text of `pack`, without images and classes that the page does not have. */
function unpack(page, text) {
  const state = newState();
  const ids = new Set(page.images.map(({ id }) => id));
  try {
    const { labels, skipped } = JSON.parse(text ?? "null") ?? { labels: [], skipped: [] };
    for (const [id, label] of labels) {
      if (ids.has(id) && (page.open ? typeof label === "string" : page.classes.includes(label))) state.labels.set(id, label);
    }
    for (const id of skipped) if (ids.has(id) && !state.labels.has(id)) state.skipped.add(id);
  } catch {
    return newState(); // written by something else
  }
  return state;
}

if (typeof module !== "undefined") {
  module.exports = {
    newState, assign, undo, classesOf, progressText, nextOpen, completions, shortcuts, labelsCsv, pack, unpack,
  };
}

// The document ---------------------------------------------------------------------------------------------

function start() {
  const get = (id) => document.getElementById(id);
  const page = JSON.parse(get("page").textContent);
  const [field, list] = [get("class"), get("completions")];
  const state = unpack(page, stored());
  let place = Math.max(0, nextOpen(page, state, -1));
  let active = 0; // of the completions
  let kept = true; // by the browser
  let saved = true; // nothing is new since labels.csv was saved

  function stored() {
    try {
      return localStorage.getItem(page.key);
    } catch {
      return null;
    }
  }

  function make(tag, text, properties = {}) {
    const element = Object.assign(document.createElement(tag), properties);
    if (text) element.textContent = text;
    return element;
  }

  const say = (text) => (get("status").textContent = text);

  const thumbnails = page.images.map(({ src, small }, i) => {
    const button = make("button", "", { type: "button", onclick: () => show(i) });
    button.append(make("img", "", { src, alt: "", className: small ? "small" : "" }), make("span", ""));
    const item = make("li", "");
    item.append(button);
    get("images").append(item);
    return button;
  });

  function render() {
    const [counts, keys] = [countsOf(page, state), shortcuts(classesOf(page, state), page.open)];
    const keyOf = new Map([...keys].map(([key, name]) => [name, key]));
    get("progress").textContent = progressText(page, state);
    get("bar").value = state.labels.size;
    get("undo").disabled = !state.history.length;
    const shown = page.images[place];
    Object.assign(get("image"), { src: shown.src, className: shown.small ? "small" : "" });
    get("image").alt = `Image ${place + 1}, to be labelled`;
    const label = state.labels.get(shown.id);
    get("what").textContent = label ?? (state.skipped.has(shown.id) ? "skipped" : "no class yet");
    get("what").className = label === undefined ? "soft" : "given";
    get("where").textContent = `${place + 1} of ${page.images.length}: ${shown.id}`;
    get("classes").replaceChildren(...[...counts].map(([name, count]) => {
      const button = make("button", "", { type: "button", onclick: () => choose(name) });
      if (keyOf.has(name)) button.append(make("kbd", keyOf.get(name)));
      button.append(make("span", name), make("small", String(count)));
      button.setAttribute("aria-pressed", String(name === label));
      button.setAttribute("aria-label", `${name}: ${plural(count, "label", "labels")}`);
      return button;
    }));
    thumbnails.forEach((button, i) => {
      const { id } = page.images[i];
      const text = state.labels.get(id) ?? (state.skipped.has(id) ? "skipped" : "");
      button.lastChild.textContent = text || "–";
      button.setAttribute("aria-label", `Image ${i + 1}: ${text || "no class yet"}`);
      if (i === place) button.setAttribute("aria-current", "true");
      else button.removeAttribute("aria-current");
      button.className = state.labels.has(id) ? "done" : "";
    });
  }

  function show(i) {
    place = (i + page.images.length) % page.images.length;
    field.value = "";
    complete();
    render();
    const tile = thumbnails[place];
    get("images").scrollTop = tile.offsetTop - tile.offsetHeight; // the page itself stays where it is
    // Elsewhere the focus would open a keyboard on the screen.
    if (matchMedia("(pointer: fine)").matches) field.focus({ preventScroll: true });
  }

  function keep() {
    saved = false;
    try {
      localStorage.setItem(page.key, pack(state));
    } catch {
      kept = false;
    }
  }

  function choose(label) {
    const known = classesOf(page, state).includes(label);
    assign(state, page.images[place].id, label);
    keep();
    const lost = kept ? "" : " This browser keeps nothing of this page: save before you close it.";
    const image = `Image ${place + 1}`;
    if (label === null) say(`${image} skipped.${lost}`);
    else say(`${image}: ${label}${known ? "" : ", a new class"}.${lost}`);
    const next = nextOpen(page, state, place);
    show(next < 0 ? place : next);
    if (next < 0) say(`No image is left without a class${state.skipped.size ? " but the skipped" : ""}: save labels.csv.`);
  }

  function takeBack() {
    const id = undo(state);
    if (id === undefined) return;
    keep();
    show(page.images.findIndex((image) => image.id === id));
    say(`Undone: image ${place + 1}.`);
  }

  const options = () => completions(classesOf(page, state), field.value, page.open);

  function complete() {
    const found = options();
    active = Math.min(active, Math.max(0, found.length - 1));
    list.replaceChildren(...found.map(({ label, isNew }, i) => {
      const option = make("li", isNew ? `new class: ${label}` : label, { id: `option-${i}` });
      option.setAttribute("role", "option");
      option.setAttribute("aria-selected", String(i === active));
      option.onmousedown = (event) => event.preventDefault(); // the field keeps the focus
      option.onclick = () => choose(label);
      return option;
    }));
    list.hidden = !found.length;
    field.setAttribute("aria-expanded", String(found.length > 0));
    if (found.length) field.setAttribute("aria-activedescendant", `option-${active}`);
    else field.removeAttribute("aria-activedescendant");
  }

  function enter() {
    const found = options();
    if (found.length) choose(found[active].label);
    else if (field.value.trim()) say(`There is no class “${field.value.trim()}”: choose one of the list.`);
  }

  function save() {
    const link = make("a", "", { download: "labels.csv" });
    link.href = URL.createObjectURL(new Blob([labelsCsv(page, state)], { type: "text/csv" }));
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    saved = true;
    const left = page.images.length - state.labels.size;
    const given = page.given.length ? `, after the ${page.given.length} that there were` : "";
    const half = left
      ? ` The other ${left} are not in it: it can be used as it is, and completed and saved again later.`
      : "";
    const names = JSON.stringify(classesOf(page, state));
    const classes = page.open ? ` Name the classes in the configuration, data.classes: ${names}` : "";
    say(`labels.csv with ${state.labels.size} of ${page.images.length} images${given} is in your downloads.${half}${classes}`);
  }

  function onKey(event) {
    if (event.isComposing || event.altKey) return;
    const inField = event.target === field;
    const typing = inField && field.value !== "";
    const key = event.key;
    const onButton = event.target.matches("button, summary");
    if (event.repeat && !typing && !["ArrowLeft", "ArrowRight"].includes(key)) {
      event.preventDefault(); // a key that is held down would label images that nobody has seen
      return;
    }
    const quick = shortcuts(classesOf(page, state), page.open).get(key.toLowerCase());
    let act;
    if (event.ctrlKey || event.metaKey) {
      if (key === "z" && !typing) act = takeBack;
    } else if (typing) {
      if (key === "ArrowDown" || key === "ArrowUp") act = () => {
        active = Math.max(0, active + (key === "ArrowDown" ? 1 : -1));
        complete();
      };
      else if (key === "Escape") act = () => show(place);
    } else if (key === "ArrowLeft") act = () => show(place - 1);
    else if (key === "ArrowRight") act = () => show(place + 1);
    else if (key === " " && !onButton) act = () => choose(null);
    else if (quick !== undefined) act = () => choose(quick);
    else if (key.length === 1 && key !== " " && !inField) field.focus(); // the character goes there
    if (act) {
      event.preventDefault();
      act();
    }
  }

  document.addEventListener("keydown", onKey);
  field.addEventListener("input", () => {
    active = 0;
    complete();
  });
  get("form").addEventListener("submit", (event) => {
    event.preventDefault();
    enter();
  });
  get("previous").onclick = () => show(place - 1);
  get("next").onclick = () => show(place + 1);
  get("skip").onclick = () => choose(null);
  get("undo").onclick = takeBack;
  get("save").onclick = save;
  addEventListener("beforeunload", (event) => {
    if (!kept && !saved) event.preventDefault();
  });
  addEventListener("storage", (event) => {
    if (event.key !== page.key) return;
    Object.assign(state, unpack(page, event.newValue)); // what another tab of this page has set
    render();
  });
  get("bar").max = page.images.length;
  get("work").hidden = false;
  show(place);
  if (state.labels.size) say(`${state.labels.size} labels of an earlier visit were kept by this browser.`);
}

if (typeof document !== "undefined") start();
