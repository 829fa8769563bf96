"use strict";

// {classes: [name], groups: [[label, guess, count, [[image, probability]]]], images: [[name, picture]]}
const data = JSON.parse(document.getElementById("data").textContent);
const dialog = document.querySelector("dialog");

function element(tag, text, ...children) {
  const made = document.createElement(tag);
  if (text) made.textContent = text; // text, never HTML: names may be anything
  made.append(...children);
  return made;
}

function titleOf([label, guess, count, shown]) {
  const name = (index) => element("bdi", data.classes[index]);
  const all = count.toLocaleString("en");
  const number = element("small", shown.length < count ? ` ${shown.length} of ${all} shown` : ` ${all}`);
  if (label === null) return [name(guess), " predicted, not labelled", number];
  if (guess === null) return [name(label), " labelled, not predicted", number];
  return ["labelled ", name(label), ", predicted ", name(guess), number];
}

function figureOf([image, probability]) {
  const [file, picture] = data.images[image];
  const figure = element("figure");
  if (picture) {
    const shown = element("img");
    shown.src = picture;
    shown.alt = "";
    figure.append(shown);
  }
  const name = element("bdi", file);
  name.className = "file";
  figure.append(element("figcaption", "", name, element("span", `${(100 * probability).toFixed(1)} %`)));
  return figure;
}

function show(groups, title) {
  document.getElementById("dialog-title").replaceChildren(...(title ?? titleOf(groups[0])));
  const parts = groups.map((group) => {
    const gallery = element("div", "", ...group[3].map(figureOf));
    gallery.className = "gallery small";
    return element("section", "", ...(title ? [element("h3", "", ...titleOf(group))] : []), gallery);
  });
  document.getElementById("dialog-body").replaceChildren(...parts);
  dialog.showModal();
  dialog.scrollTop = 0;
}

function sortBy(heading) {
  const row = heading.parentElement, column = [...row.children].indexOf(heading);
  const numbers = heading.classList.contains("n");
  const before = heading.getAttribute("aria-sort");
  // Names start at a, numbers at the largest; a second click turns the order round.
  const ascending = before ? before === "descending" : !numbers;
  for (const other of row.children) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const body = row.closest("table").tBodies[0], sign = ascending ? 1 : -1;
  const key = (line) => (numbers ? Number(line.children[column].dataset.value) : line.children[column].textContent);
  const compare = numbers ? (a, b) => a - b : new Intl.Collator(undefined, { numeric: true }).compare;
  const lines = [...body.rows].map((line) => [key(line), line]);
  lines.sort((a, b) => sign * compare(a[0], b[0]));
  body.append(...lines.map(([, line]) => line));
}

document.addEventListener("click", (event) => {
  const button = event.target.closest("button");
  if (event.target === dialog) dialog.close(); // beside it
  else if (button?.dataset.group) {
    show([data.groups[Number(button.dataset.group)]]);
  } else if (button?.dataset.class) {
    const number = Number(button.dataset.class);
    const mistakes = data.groups.filter(([label, guess]) => label !== guess && (label === number || guess === number));
    show(mistakes, ["Mistakes with ", element("bdi", data.classes[number])]);
  } else if (button?.closest(".sortable thead")) sortBy(button.closest("th"));
});

document.addEventListener("input", (event) => {
  const table = document.getElementById(event.target.dataset.filter);
  const wanted = event.target.value.toLowerCase();
  for (const row of table?.tBodies[0].rows ?? []) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
});
