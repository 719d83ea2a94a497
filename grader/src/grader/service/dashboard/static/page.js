// What every page does: times in the reader's own zone, and pages that renew themselves.

// Made when the first time is met: a formatter takes ten milliseconds, and the map has no times.
let formats;

function format(moment) {
  if (!formats) {
    const short = { month: "short", day: "numeric", hour: "numeric", minute: "2-digit" };
    formats = [new Intl.DateTimeFormat(undefined, short), new Intl.DateTimeFormat(undefined, { ...short, year: "numeric" })];
  }
  return formats[moment.getFullYear() === new Date().getFullYear() ? 0 : 1].format(moment);
}

export function localTimes(root) {
  for (const time of root.querySelectorAll("time[datetime]")) {
    time.textContent = format(new Date(time.dateTime));
  }
}

async function renew(part) {
  // Not while somebody is in it by keyboard, or has selected something to copy.
  if (part.contains(document.activeElement) || !document.getSelection().isCollapsed || document.hidden) return;
  const note = document.getElementById("refreshed");
  try {
    const answer = await fetch(location.href, { headers: { accept: "text/html" } });
    if (answer.redirected) return location.reload();
    if (!answer.ok) throw new Error(answer.statusText);
    const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").getElementById(part.id);
    localTimes(fresh);
    part.replaceChildren(...fresh.childNodes);
    note.textContent = "This page renews itself every few seconds.";
  } catch {
    note.textContent = "The server does not answer; this page goes on trying.";
  }
}

localTimes(document);
// After the first paint there is time for what the style sheet has left out of it.
new PerformanceObserver(() => document.documentElement.classList.add("painted")).observe({ type: "paint", buffered: true });
for (const part of document.querySelectorAll("[data-refresh]")) {
  setInterval(() => renew(part), 1000 * part.dataset.refresh);
}
