// Pages about a selection: a link that reproduces the view, and menus that close.

import { toast } from "./shell.js";

const ready = (within) => { for (const button of within.querySelectorAll("[data-link]")) button.hidden = false; };
ready(document);
document.addEventListener("htmx:load", (event) => ready(event.detail.elt));

document.addEventListener("click", async (event) => {
  for (const menu of document.querySelectorAll("details.drop[open]")) {
    if (!menu.contains(event.target) || event.target.closest(".menu a")) menu.open = false;
  }
  if (!event.target.closest("[data-link]")) return;
  try {
    await navigator.clipboard.writeText(location.href);
    toast("The link to this view is copied. It works while this dashboard runs.");
  } catch {
    toast("The browser does not allow copying here. Copy the address instead.", "error");
  }
});

document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const menu of document.querySelectorAll("details.drop[open]")) {
    menu.open = false;
    menu.querySelector("summary").focus();
  }
});
