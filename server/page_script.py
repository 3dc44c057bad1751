"""The page's script: it keeps what is shown up to date, and writes times as the viewer reads them.

Every two seconds it asks for the page that is open; the server answers 304 while nothing changed.
What did change is replaced part by part (``data-live``), so that what is being read, typed or
scrolled stays. Without it the page is whole, and loads itself again now and then.
"""

SCRIPT = """
"use strict";
(() => {
  const EVERY = 2000, SLOWEST = 30000;
  const page = document.body.dataset.page;
  const seen = new Map();  // what the server last wrote of each part
  let tag = document.body.dataset.tag || null, wait = EVERY;

  // --- times ---------------------------------------------------------------------------------

  const clock = new Intl.DateTimeFormat(undefined,
    {day: "numeric", month: "short", hour: "2-digit", minute: "2-digit"});
  function length(seconds) {
    const whole = Math.max(0, Math.round(seconds));
    if (whole < 60) return `${whole} s`;
    if (whole < 3600) return `${Math.floor(whole / 60)} min`;
    if (whole < 48 * 3600) {
      const minutes = Math.floor(whole % 3600 / 60);
      return `${Math.floor(whole / 3600)} h` + (minutes && whole < 36000 ? ` ${minutes} min` : "");
    }
    return `${Math.floor(whole / 86400)} days`;
  }
  function told(time) {
    const at = new Date(time.dateTime), gone = (Date.now() - at) / 1000;
    if (time.dataset.form === "left") {
      return gone < 0 ? `in ${length(-gone)}` : `${length(gone)} ago`;
    }
    if (time.dataset.form === "clock" || gone > 86400 || gone < -60) return clock.format(at);
    return gone < 5 ? "now" : `${length(gone)} ago`;
  }
  function times() {
    for (const time of document.querySelectorAll("time[data-form]")) {
      const words = told(time);
      if (time.textContent !== words) time.textContent = words;
    }
  }

  // --- news ----------------------------------------------------------------------------------

  const parts = (root) => [...root.querySelectorAll("[data-live]")].filter((part) => part.id);
  function remember(root) {
    for (const part of parts(root)) seen.set(part.id, part.outerHTML);
  }
  function busy(part) {
    const active = document.activeElement;
    const types = active && part.contains(active) && active.matches("input, select, textarea");
    return types || part.querySelector("details[data-hold][open]");
  }
  function put(old, fresh) {
    const active = document.activeElement;
    const focus = active && old.contains(active) ? active.id || active.closest("[id]").id : null;
    const named = focus && active.id === "" && active.matches("a");
    const link = named ? active.getAttribute("href") : null;
    const open = [...old.querySelectorAll("details[open]")].map((one) => one.id);
    const scrolled = [...old.querySelectorAll(".scroll")].map((one) => [one.id, one.scrollLeft]);
    const made = document.importNode(fresh, true);
    old.replaceWith(made);
    for (const id of open) {
      const again = document.getElementById(id);
      if (again) again.open = true;
    }
    for (const [id, left] of scrolled) {
      const again = document.getElementById(id);
      if (again) again.scrollLeft = left;
    }
    if (focus) {
      const near = document.getElementById(focus);
      const same = near && link !== null
        ? [...near.querySelectorAll("a")].find((one) => one.getAttribute("href") === link) : near;
      if (same) same.focus({preventScroll: true});
    }
  }
  function show(text) {
    const fresh = new DOMParser().parseFromString(text, "text/html");
    const now = parts(document).map((part) => part.id).join(" ");
    const next = parts(fresh).map((part) => part.id).join(" ");
    if (now !== next) {
      const main = document.querySelector("main");
      if (busy(main)) return false;
      remember(fresh);
      put(main, fresh.querySelector("main"));
    }
    let whole = true;
    for (const part of parts(fresh)) {
      const old = document.getElementById(part.id);
      if (!old || seen.get(part.id) === part.outerHTML) continue;
      if (busy(old)) { whole = false; continue; }
      seen.set(part.id, part.outerHTML);
      if (part.id === "told") { old.textContent = part.textContent; continue; }
      put(old, part);
    }
    document.title = fresh.title;
    times();
    dress();
    return whole;
  }
  function live(state, words) {
    const sign = document.getElementById("live");
    if (!sign || sign.dataset.state === state) return;
    sign.dataset.state = state;
    sign.lastElementChild.textContent = words;
  }
  async function look() {
    if (!document.hidden) {
      try {
        const headers = tag ? {"If-None-Match": tag} : {};
        const asked = {headers, cache: "no-store", signal: AbortSignal.timeout(20000)};
        const answer = await fetch(page, asked);
        if (answer.status !== 304) {
          const fresh = answer.headers.get("ETag");
          if (show(await answer.text())) tag = fresh;
        }
        live("on", "Live");
        wait = EVERY;
      } catch (error) {
        live("off", "No answer; trying again");
        wait = Math.min(2 * wait, SLOWEST);
      }
    }
    setTimeout(look, wait);
  }

  // --- the head map --------------------------------------------------------------------------

  const cells = () => [...document.querySelectorAll("#head-map .cell")];
  function tell(cell) {
    document.getElementById("told-name").textContent = cell.dataset.name;
    document.getElementById("told-words").textContent = cell.dataset.words;
    for (const one of cells()) one.classList.toggle("chosen", one === cell);
  }
  function dress() {  // one stop of the tab key for the whole map; arrows move inside
    const all = cells(), chosen = document.activeElement;
    for (const [at, cell] of all.entries()) {
      const stop = all.includes(chosen) ? cell === chosen : at === 0;
      cell.setAttribute("tabindex", stop ? "0" : "-1");
      const title = cell.querySelector("title");
      if (title) title.remove();  // the panel says it, at once
    }
  }
  const STEPS = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]};
  document.addEventListener("keydown", (event) => {
    const cell = event.target.closest && event.target.closest("#head-map .cell");
    const step = STEPS[event.key];
    if (!cell || !step) return;
    const [block, head] = cell.dataset.at.split(" ").map(Number);
    const next = document.getElementById(`head-${block + step[0]}-${head + step[1]}`);
    event.preventDefault();
    if (next) next.focus();
  });
  for (const kind of ["focusin", "pointerover"]) {
    document.addEventListener(kind, (event) => {
      const cell = event.target.closest && event.target.closest("#head-map .cell");
      if (!cell) return;
      tell(cell);
      if (kind === "focusin") dress();
    });
  }

  // --- begin ---------------------------------------------------------------------------------

  const here = document.querySelector("nav [aria-current=page]");
  if (here) here.parentElement.parentElement.scrollLeft = here.offsetLeft - 24;
  remember(document);
  times();
  dress();
  setInterval(times, 1000);
  if (page) { live("on", "Live"); setTimeout(look, EVERY); }
  else document.getElementById("live").remove();
  document.addEventListener("visibilitychange", () => { if (!document.hidden) wait = EVERY; });
})();
"""
