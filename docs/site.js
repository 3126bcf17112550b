"use strict";
// Names and keyboard access for what the theme draws: its search, its copy buttons, and tables that scroll.
const named = () => {
  document.querySelector(".md-search")?.setAttribute("aria-label", "Search");
  document.querySelectorAll(".md-code__nav").forEach((nav, i) => nav.setAttribute("aria-label", `Code ${i + 1}`));
  document.querySelectorAll(".md-typeset__scrollwrap").forEach((frame, i) => {
    frame.tabIndex = 0;
    frame.setAttribute("role", "region");
    frame.setAttribute("aria-label", `Table ${i + 1}`);
  });
};
const watch = new MutationObserver(named);
document.addEventListener("DOMContentLoaded", () => {
  named();
  watch.observe(document.querySelector(".md-content"), {childList: true, subtree: true});
});
