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

const nameOf = (index) => element("bdi", data.classes[index]);

function numberOf(shown, all) {
  const text = all.toLocaleString("en");
  return element("small", shown < all ? ` ${shown.toLocaleString("en")} of ${text} shown` : ` ${text}`);
}

function figureOf([image, probability], ...words) {
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
  const below = words.length ? [element("span", "", ...words)] : [];
  figure.append(element("figcaption", "", name, ...below, element("span", `${(100 * probability).toFixed(1)}\u00a0%`)));
  return figure;
}

function galleryOf(figures) {
  const gallery = element("div", "", ...figures);
  gallery.className = "gallery small";
  return gallery;
}

function showDialog(title, ...body) {
  document.getElementById("dialog-title").replaceChildren(...title);
  document.getElementById("dialog-body").replaceChildren(...body);
  dialog.showModal();
  dialog.scrollTop = 0;
}

function showGroup([label, guess, count, images]) {
  const title = ["labelled ", nameOf(label), ", predicted ", nameOf(guess), numberOf(images.length, count)];
  showDialog(title, galleryOf(images.map((image) => figureOf(image))));
}

function showClass(number) {
  const mistakes = data.groups.filter(([label, guess]) => label !== guess);
  const parts = [];
  for (const [side, other, what, word] of [[0, 1, " not predicted", "predicted "], [1, 0, " wrongly predicted", "labelled "]]) {
    const groups = mistakes.filter((group) => group[side] === number);
    const figures = groups.flatMap((group) => {
      const named = () => (group[other] === null ? [] : [word, nameOf(group[other])]); // null with several labels
      return group[3].map((image) => figureOf(image, ...named()));
    });
    const all = groups.reduce((sum, group) => sum + group[2], 0);
    if (all) parts.push(element("h3", "", nameOf(number), what, numberOf(figures.length, all)), galleryOf(figures));
  }
  showDialog(["Mistakes with ", nameOf(number)], ...parts);
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
  else if (button?.dataset.group) showGroup(data.groups[Number(button.dataset.group)]);
  else if (button?.dataset.class) showClass(Number(button.dataset.class));
  else if (button?.closest(".sortable thead")) sortBy(button.closest("th"));
});

document.addEventListener("input", (event) => {
  const table = document.getElementById(event.target.dataset.filter);
  const wanted = event.target.value.toLowerCase();
  for (const row of table?.tBodies[0].rows ?? []) row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
});
