// What every page does: colors, menu, copying, previews, messages, keys. Pages work without it.

const root = document.documentElement;
root.classList.add("js");
const find = (selector, within = document) => within.querySelector(selector);

// -- messages

/** Shows a message for a while; errors stay until they are closed. */
export function toast(text, kind = "") {
  const box = document.createElement("div");
  box.className = `toast ${kind}`;
  box.append(Object.assign(document.createElement("p"), { textContent: text }));
  const close = Object.assign(document.createElement("button"), { type: "button", textContent: "Close" });
  close.addEventListener("click", () => box.remove());
  box.append(close);
  find("#toasts").append(box);
  if (kind !== "error") setTimeout(() => box.remove(), 5000);
}

document.addEventListener("toast", (event) => toast(event.detail.value ?? String(event.detail)));
document.addEventListener("htmx:responseError", (event) => {
  const { status, responseText } = event.detail.xhr;
  const plain = event.detail.xhr.getResponseHeader("Content-Type")?.startsWith("text/plain");
  toast(plain && responseText ? responseText : `The dashboard answered with status ${status}.`, "error");
});
let silent = false; // a page that polls says once that nobody answers
for (const name of ["htmx:sendError", "htmx:timeout"]) {
  document.addEventListener(name, () => {
    if (!silent) toast("The dashboard does not answer. Is `lodeset inspect` still running?", "error");
    silent = true;
  });
}
document.addEventListener("htmx:afterOnLoad", () => { silent = false; });

// -- the line at the top while something loads; what polls asks for no attention

let pending = 0;
const count = (change) => (event) => {
  if (event.detail.elt.closest("[data-quiet]")) return;
  pending = Math.max(0, pending + change);
  root.classList.toggle("busy", pending > 0);
};
document.addEventListener("htmx:beforeRequest", count(1));
document.addEventListener("htmx:afterRequest", count(-1));

// -- colors: a cookie, so that the server sends the page in the right ones

const THEMES = ["system", "light", "dark"];
const themeButton = find("#theme");

function named(theme) {
  themeButton.setAttribute("aria-label", `Colors: ${theme}. Change them`);
  themeButton.title = `Colors: ${theme}`;
}

function changeTheme() {
  const theme = THEMES[(THEMES.indexOf(root.dataset.theme ?? "system") + 1) % THEMES.length];
  if (theme === "system") delete root.dataset.theme;
  else root.dataset.theme = theme;
  const age = theme === "system" ? 0 : 365 * 24 * 3600;
  document.cookie = `lodeset_theme=${theme}; Path=${root.dataset.base || "/"}; Max-Age=${age}; SameSite=Strict`;
  named(theme);
  document.dispatchEvent(new CustomEvent("themechange"));
}

themeButton.hidden = false;
themeButton.addEventListener("click", changeTheme);
named(root.dataset.theme ?? "system");

// -- the navigation on phones

const menu = find("#menu");
const side = find("#side");
menu.hidden = false;

function openMenu(open) {
  side.classList.toggle("open", open);
  menu.setAttribute("aria-expanded", String(open));
}
menu.addEventListener("click", () => openMenu(!side.classList.contains("open")));

// -- copying

document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  const text = find("pre, code", button.closest(".command")).textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  } catch {
    toast("The browser does not allow copying here. Select the text instead.", "error");
  }
});
for (const button of document.querySelectorAll("[data-copy]")) button.hidden = false;
document.addEventListener("htmx:load", (event) => {
  for (const button of event.detail.elt.querySelectorAll("[data-copy]")) button.hidden = false;
});

// -- previews

const preview = find("#preview");
let shown = null;

function show(link) {
  shown = link;
  const image = find("img", link);
  find("img", preview).src = link.dataset.preview;
  find("img", preview).alt = image?.alt ?? "";
  find("h2", preview).textContent = link.dataset.title ?? "";
  find("p", preview).textContent = find("figcaption", link.closest("figure"))?.innerText ?? "";
  find("a", preview).href = link.href;
  find("a", preview).hidden = !link.hasAttribute("href");
  if (!preview.open) preview.showModal();
}

function step(by) {
  const all = [...document.querySelectorAll("[data-preview]")];
  const next = all[all.indexOf(shown) + by];
  if (next) show(next);
}

document.addEventListener("click", (event) => {
  const link = event.target.closest("[data-preview]");
  if (!link || event.metaKey || event.ctrlKey || event.shiftKey || event.button) return;
  event.preventDefault();
  show(link);
});
find("#earlier", preview).addEventListener("click", () => step(-1));
find("#later", preview).addEventListener("click", () => step(1));
preview.addEventListener("close", () => { shown?.focus(); });

// -- dialogs and keys

const help = find("#help");
find("#keys").hidden = false;
find("#keys").addEventListener("click", () => help.showModal());
for (const dialog of document.querySelectorAll("dialog")) {
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog || event.target.closest("[data-close]")) dialog.close();
  });
}

const typing = (element) => element.closest("input:not([type=range]):not([type=checkbox]):not([type=radio]), select, textarea, [contenteditable]");

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  if (preview.open) {
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    return;
  }
  if (typing(event.target) || find("dialog[open]")) return;
  if (event.key === "?") help.showModal();
  else if (event.key === "t") changeTheme();
  else if (event.key === "/" && find("[data-search]")) {
    event.preventDefault();
    find("[data-search]").focus();
  } else if (event.key === "Escape") openMenu(false);
});
