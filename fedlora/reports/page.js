"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);

const rowsOf = (spec) => spec.datasets ? spec.datasets[spec.data.name] : spec.data.values;

const cell = (value) => {
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
};

const csv = (rows) => {
  const names = Object.keys(rows[0]);
  return [names, ...rows.map((row) => names.map((name) => row[name]))].map((line) => line.map(cell).join(",")).join("\n") + "\n";
};

const copy = async (text) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // not allowed: an old way that is
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
};

const table = (rows, caption) => {
  const names = Object.keys(rows[0]);
  const made = document.createElement("table");
  made.createCaption().textContent = caption;
  const head = made.createTHead().insertRow();
  for (const name of names) {
    const th = document.createElement("th");
    th.scope = "col";
    th.textContent = name;
    head.append(th);
  }
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const name of names) {
      const value = row[name];
      line.insertCell().textContent = typeof value === "number" && !Number.isInteger(value) ? value.toPrecision(5) : value ?? "";
    }
  }
  return made;
};

for (const [id, {spec, title}] of Object.entries(charts)) {
  const figure = document.getElementById(id);
  vegaEmbed(figure.querySelector(".plot"), spec, {renderer: "svg", actions: false}).then(
    () => { figure.dataset.drawn = "true"; },
    (error) => { figure.querySelector(".plot").textContent = `This chart could not be drawn: ${error.message}`; console.error(error); },
  );
  const button = figure.querySelector("button");
  button.addEventListener("click", async () => {
    await copy(csv(rowsOf(spec)));
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy as CSV"; }, 1600);
  });
  const details = figure.querySelector("details");
  details.addEventListener("toggle", () => {
    const place = details.querySelector(".scroll");
    if (details.open && !place.firstChild) place.append(table(rowsOf(spec), title));
  });
}
