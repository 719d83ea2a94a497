// A lab's page and a submission's page: hand in, watch, show the result.

import { Live } from "./live.js";
import { localTimes } from "./page.js";

const byId = (id) => document.getElementById(id);
const box = byId("live");
const result = byId("result");
const history = byId("history");
const form = byId("submit");

function complain(words) {
  const place = byId("problem");
  place.textContent = words;
  place.hidden = !words;
}

async function request(address, options) {
  let answer;
  try {
    answer = await fetch(address, options);
  } catch {
    throw new Error("The server does not answer. Is `topeka serve` still running?");
  }
  if (answer.ok) return answer;
  if (answer.status === 401) throw new Error("You are signed out: load this page again.");
  const problem = await answer.json().catch(() => ({}));
  throw new Error(problem.detail ?? answer.statusText);
}

async function part(address, place) {
  const answer = await request(address, { headers: { accept: "text/html" } });
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html");
  place.replaceChildren(...fresh.body.childNodes);
  localTimes(place);
}

const live = new Live(box, async (id) => {
  try {
    await part(`/submissions/${id}/result`, result);
    if (history) await part(history.dataset.source, history);
    const verdict = result.querySelector(".verdict");
    byId("said").textContent = `Graded: ${verdict.textContent.trim()}. ${verdict.nextElementSibling?.textContent ?? ""}`;
    const status = byId("lab-status");
    // Once verified, a lab stays so; a cancelled attempt says nothing about it.
    if (status && result.querySelector("[data-status]") && !status.querySelector(".is-verified")) {
      status.replaceChildren(...verdict.cloneNode(true).childNodes);
    }
  } catch (error) {
    complain(error.message);
  }
  busy(false);
});

function busy(is) {
  for (const button of document.querySelectorAll("#grade-mine, [data-regrade]")) button.disabled = is;
  if (form) byId("send").disabled = is || chosen.size === 0;
}

async function handIn(body) {
  complain("");
  busy(true);
  try {
    const answer = await request("/api/v1/submissions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify(body),
    });
    watch((await answer.json()).id);
  } catch (error) {
    busy(false);
    complain(error.message);
  }
}

function watch(id) {
  result.replaceChildren();
  busy(true);
  live.watch(id);
  box.scrollIntoView({ block: "nearest" });
}

// --- files ----------------------------------------------------------------------------------

const chosen = new Map();

function base64(bytes) {
  let text = "";
  for (let at = 0; at < bytes.length; at += 0x8000) text += String.fromCharCode(...bytes.subarray(at, at + 0x8000));
  return btoa(text);
}

async function choose(files) {
  complain("");
  chosen.clear();
  const wanted = form.dataset.files.split(" ");
  for (const file of files) {
    if (!wanted.includes(file.name)) {
      complain(`This lab takes ${wanted.join(", ")}, and no ${file.name}.`);
      chosen.clear();
      break;
    }
    chosen.set(file.name, base64(new Uint8Array(await file.arrayBuffer())));
  }
  byId("send").disabled = chosen.size === 0;
}

if (form) {
  const drop = byId("drop");
  const picker = byId("files");
  picker.addEventListener("change", () => choose(picker.files));
  for (const kind of ["dragenter", "dragover"]) {
    drop.addEventListener(kind, (event) => {
      event.preventDefault();
      drop.classList.add("is-over");
    });
  }
  for (const kind of ["dragleave", "drop"]) drop.addEventListener(kind, () => drop.classList.remove("is-over"));
  drop.addEventListener("drop", (event) => {
    event.preventDefault();
    picker.files = event.dataTransfer.files;
    choose(event.dataTransfer.files);
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    handIn({ lab: form.dataset.lab, files: Object.fromEntries(chosen), slow: byId("slow").checked });
  });
  byId("grade-mine")?.addEventListener("click", async () => {
    complain("");
    try {
      const mine = await (await request(`/labs/${form.dataset.lab}/files`)).json();
      await handIn({ ...mine, slow: byId("slow").checked });
    } catch (error) {
      complain(error.message);
    }
  });
}

for (const button of document.querySelectorAll("[data-regrade]")) {
  button.addEventListener("click", async () => {
    try {
      const answer = await request(`/api/v1/submissions/${button.dataset.regrade}/regrade`, { method: "POST" });
      location.assign(`/submissions/${(await answer.json()).id}`);
    } catch (error) {
      complain(error.message);
    }
  });
}

if (box.dataset.submission) watch(box.dataset.submission);
