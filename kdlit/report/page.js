"use strict";
const dark = document.getElementById("dark");
const button = document.getElementById("theme");
let isDark = matchMedia("(prefers-color-scheme: dark)").matches;
button.hidden = false;
button.addEventListener("click", () => {
  isDark = !isDark;
  dark.media = isDark ? "screen" : "not all";
});
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((one) => { one.open = true; }));
