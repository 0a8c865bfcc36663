"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];
  const make = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // Pictures that not everyone wants to see.
  const show = (button, on) => {
    button.setAttribute("aria-pressed", String(on));
    button.setAttribute("aria-label", (on ? "Hide: " : "Show: ") + button.dataset.alt);
  };
  for (const button of all("button.veil")) {
    button.disabled = false;
    button.addEventListener("click", () => show(button, button.getAttribute("aria-pressed") !== "true"));
  }
  for (const button of all("button.unveil")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const on = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(on));
      button.textContent = on ? "Blur all pictures" : "Show all pictures";
      all("button.veil", button.closest("section")).forEach((veil) => show(veil, on));
    });
  }

  // One checkpoint at a time.
  for (const film of all(".film")) {
    const slider = film.querySelector("input"), output = film.querySelector("output"), frames = all(".frame", film);
    const steps = slider.dataset.steps.split(" ");
    const move = () => {
      const at = Number(slider.value);
      const said = steps[at] === "0" ? "before the attack" : `after ${steps[at]} step${steps[at] === "1" ? "" : "s"}`;
      frames.forEach((frame, number) => frame.classList.toggle("current", number === at));
      output.textContent = said;
      slider.setAttribute("aria-valuetext", said);
    };
    film.classList.add("live");
    film.querySelector(".control").hidden = false;
    slider.addEventListener("input", move);
    move();
  }

  // The list of records: read when it comes near, drawn a page at a time, each record when it is opened.
  const section = document.getElementById("records"), browser = section.querySelector(".browser");
  const list = browser.querySelector(".list"), filter = document.getElementById("filter"), found = document.getElementById("found");
  const previous = browser.querySelector(".previous"), next = browser.querySelector(".next"), place = browser.querySelector(".place");
  const SIZE = 50;
  let pool = [], rows = [], texts = [], shown = [], page = 0, read = false;

  const facts = (row) => {
    const table = make("table", undefined, "facts");
    for (const [title, pairs] of row.slice(7).map((number) => pool[number])) {
      if (!pairs.length) continue;
      const body = table.appendChild(make("tbody"));
      const heading = body.appendChild(make("tr")).appendChild(make("th", title));
      heading.colSpan = 2;
      heading.scope = "colgroup";
      for (const [name, text] of pairs) {
        const line = body.appendChild(make("tr"));
        const head = line.appendChild(make("th"));
        head.scope = "row";
        head.appendChild(make("bdi", name));
        line.appendChild(make("td")).appendChild(make("bdi", text, "value"));
      }
    }
    return table;
  };
  const entry = (row) => {
    const [kind, concept, method, attack, seed, status, result] = row;
    const item = make("li"), box = item.appendChild(make("details")), summary = box.appendChild(make("summary"));
    summary.appendChild(make("span", kind, "kind"));
    const what = summary.appendChild(make("span", undefined, "subject"));
    const parts = [concept, kind === "evaluate" || kind === "attack" || kind === "protect" ? method : "", attack];
    what.appendChild(make("bdi", parts.filter(Boolean).join(" · ") || method));
    what.appendChild(make("span", ` seed ${seed}`, "note"));
    summary.appendChild(make("bdi", result, status === "error" ? "outcome failed" : "outcome"));
    box.addEventListener("toggle", () => { if (box.open && box.childElementCount === 1) box.appendChild(facts(row)); });
    return item;
  };
  const draw = () => {
    const pages = Math.max(1, Math.ceil(shown.length / SIZE));
    page = Math.min(Math.max(page, 0), pages - 1);
    list.start = page * SIZE + 1;
    list.replaceChildren(...shown.slice(page * SIZE, (page + 1) * SIZE).map((number) => entry(rows[number])));
    found.textContent = `${shown.length} of ${rows.length} record${rows.length === 1 ? "" : "s"}`;
    place.textContent = `page ${page + 1} of ${pages}`;
    previous.disabled = page === 0;
    next.disabled = page === pages - 1;
    browser.querySelector(".pager").hidden = pages === 1;
  };
  const search = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    shown = rows.map((_, number) => number).filter((number) => words.every((word) => texts[number].includes(word)));
    page = 0;
    draw();
  };
  const open = () => {
    if (read) return;
    read = true;
    ({ pool, rows } = JSON.parse(document.getElementById("listing").textContent));
    texts = rows.map((row) => row.slice(0, 7).join(" ").toLowerCase());
    search();
  };
  browser.hidden = false;
  filter.addEventListener("input", search);
  filter.addEventListener("focus", open);
  previous.addEventListener("click", () => { page -= 1; draw(); });
  next.addEventListener("click", () => { page += 1; draw(); });
  for (const link of all("a[data-filter]")) {
    link.addEventListener("click", () => { open(); filter.value = link.dataset.filter; search(); });
  }
  if ("IntersectionObserver" in window) {
    const watcher = new IntersectionObserver((seen) => {
      if (seen.some((one) => one.isIntersecting)) { watcher.disconnect(); open(); }
    }, { rootMargin: "1200px" });
    watcher.observe(section);
  } else open();
  addEventListener("beforeprint", open);
})();
