// Judging samples: one item at a time, by key. Verdicts stay in the tab (sessionStorage) until they are downloaded.

const form = document.querySelector("#audit");
const base = document.documentElement.dataset.base ?? "";
const prefix = (run) => `lodeset audit ${base} ${run} `;

function recall(key) {
  try {
    return JSON.parse(sessionStorage.getItem(key) ?? "null");
  } catch {
    return null; // kept by something else, or storage is off
  }
}

function remembered(run) {
  const found = [];
  try {
    for (const key of Object.keys(sessionStorage)) {
      const one = key.startsWith(prefix(run)) ? recall(key) : null;
      if (one && Object.keys(one.verdicts ?? {}).length) found.push(one);
    }
  } catch {
    // storage is off: there is nothing
  }
  return found;
}

if (form) judge();
else overview();

/** On the list of samples: how many of each were judged in this tab. */
function overview() {
  const places = new Map([...document.querySelectorAll("[data-remembered]")].map((one) => [one.dataset.remembered, one]));
  let keys = [];
  try {
    keys = Object.keys(sessionStorage).filter((key) => key.startsWith(`lodeset audit ${base} `));
  } catch {
    return;
  }
  for (const one of keys.map(recall)) {
    const place = places.get(one?.of);
    if (place && one.verdicts) place.textContent = `${Object.keys(one.verdicts).length} judged in this tab`;
  }
}

function judge() {
  const { of, run } = form.dataset;
  const key = prefix(run) + of;
  const items = [...form.querySelectorAll(".item")];
  const finished = form.querySelector("#finished");
  const kept = recall(key)?.verdicts ?? {};
  const verdicts = new Map();
  let at = 0;

  const radio = (item, verdict) => item.querySelector(`input[value="${verdict}"]`);
  for (const item of items) {
    const verdict = kept[item.dataset.id];
    const chosen = verdict && ["right", "wrong", "unsure"].includes(verdict) ? radio(item, verdict) : item.querySelector("input:checked");
    if (chosen) {
      chosen.checked = true;
      verdicts.set(item.dataset.id, chosen.value);
    }
  }

  function show(number) {
    at = Math.max(0, Math.min(items.length, number));
    items.forEach((item, n) => item.classList.toggle("current", n === at));
    finished.hidden = at < items.length;
    for (const item of items.slice(at + 1, at + 3)) for (const image of item.querySelectorAll("img")) image.loading = "eager";
    form.querySelector("#done").value = verdicts.size;
  }

  function keep() {
    const told = { of, count: Number(form.dataset.count), size: Number(form.dataset.size), verdicts: Object.fromEntries(verdicts) };
    try {
      sessionStorage.setItem(key, JSON.stringify(told));
    } catch {
      // without storage, verdicts last as long as the page
    }
    form.dispatchEvent(new CustomEvent("verdict"));
  }

  function decide(verdict) {
    if (at >= items.length) return;
    radio(items[at], verdict).checked = true;
    verdicts.set(items[at].dataset.id, verdict);
    keep();
    show(at + 1);
  }

  form.addEventListener("click", (event) => {
    if (event.target.closest(".back")) show(at - 1);
  });
  form.addEventListener("change", (event) => {
    if (event.target.matches("input[type=radio]")) decide(event.target.value);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
    const verdict = { r: "right", w: "wrong", u: "unsure" }[event.key];
    if (verdict) decide(verdict);
    else if (event.key === "b") show(at - 1);
    else return;
    event.preventDefault();
  });
  form.addEventListener("submit", () => {
    for (const old of form.querySelectorAll("input[name=earlier]")) old.remove();
    for (const one of remembered(run)) {
      if (one.of === of) continue;
      form.append(Object.assign(document.createElement("input"), { type: "hidden", name: "earlier", value: JSON.stringify(one) }));
    }
  });
  for (const back of form.querySelectorAll(".back")) back.hidden = false;
  const open = items.findIndex((item) => !verdicts.has(item.dataset.id));
  show(open < 0 ? items.length : open);
  if (verdicts.size) window.addEventListener("load", () => form.dispatchEvent(new CustomEvent("verdict")));
}
