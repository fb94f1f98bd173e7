// Filters of the report: what carries a model, bits or a method is shown if these are the chosen ones.
"use strict";

const KEYS = ["model", "bits", "method"];
const selects = Object.fromEntries(KEYS.map((key) => [key, document.getElementById(`by-${key}`)]));
const tagged = [...document.querySelectorAll("[data-model]")];

function fillChoices(key) {
  const values = new Set(tagged.map((element) => element.dataset[key]).filter(Boolean));
  for (const value of values) {
    selects[key].append(new Option(value, value));
  }
}

// Full precision has no bits of its own to choose, and stays beside the chosen ones.
function isChosen(element, key) {
  const chosen = selects[key].value;
  const own = element.dataset[key];
  return !chosen || own === chosen || (key === "bits" && own === "32/32");
}

function applyFilters() {
  const isFiltered = KEYS.some((key) => selects[key].value);
  for (const element of tagged) {
    element.classList.toggle("off", !KEYS.every((key) => isChosen(element, key)));
  }
  // a chart or table goes with its last method; full precision alone does not keep it
  for (const panel of document.querySelectorAll("[data-panel], .filtered")) {
    const members = [...panel.querySelectorAll('[data-model]:not([data-bits="32/32"])')];
    const isEmpty = members.length > 0 && members.every((member) => member.classList.contains("off"));
    panel.classList.toggle("off", isEmpty);
  }
  for (const details of document.querySelectorAll("details")) {
    // only what this script opened is closed again
    const isWanted = isFiltered && details.querySelector("[data-model]:not(.off)") !== null;
    if (isWanted && !details.open) {
      details.open = true;
      details.dataset.opened = "";
    } else if (!isWanted && "opened" in details.dataset) {
      details.open = false;
      delete details.dataset.opened;
    }
  }
}

for (const key of KEYS) {
  fillChoices(key);
  selects[key].addEventListener("change", applyFilters);
}
document.getElementById("reset").addEventListener("click", () => {
  for (const key of KEYS) {
    selects[key].value = "";
  }
  applyFilters();
});
document.getElementById("filters").hidden = false;

// A name below the chart, for who has no pointer to rest on a point.
for (const chart of document.querySelectorAll("svg")) {
  for (const event of ["click", "pointerover"]) {
    chart.addEventListener(event, ({ target }) => {
      const title = target.querySelector ? target.querySelector(":scope > title") : null;
      if (title) {
        chart.parentElement.querySelector(".picked").textContent = title.textContent;
      }
    });
  }
}
