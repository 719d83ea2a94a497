// A submission's events as they come, until it is final.

const AGAIN_MS = 1500;
const WHY_FIRST_MS = 2000;
const WHY_MS = 5000;

export class Live {
  // `box` is the element of _live.html; `finished` is called once the submission is final.
  constructor(box, finished) {
    this.box = box;
    this.finished = finished;
    this.status = box.querySelector(".live-status");
    this.strip = box.querySelector(".strip");
    this.failures = box.querySelector(".live-failures");
    box.querySelector("[data-cancel]").addEventListener("click", () => this.cancel());
  }

  watch(id) {
    this.stop();
    this.id = id;
    this.last = 0;
    this.begun = false;
    this.clear();
    this.box.hidden = false;
    this.say("Waiting for a worker");
    this.open();
    this.asking = setTimeout(() => this.why(), WHY_FIRST_MS);
  }

  // Why it still waits: most do not for long, so nothing asks before.
  async why() {
    const { id } = this;
    try {
      const answer = await fetch(`/api/v1/submissions/${id}`);
      const { waiting } = answer.ok ? await answer.json() : {};
      if (id !== this.id || !this.source || this.begun) return;
      if (waiting && !this.lost) {
        const fit = waiting.needs ? `worker with ${waiting.needs}` : "worker";
        this.say(
          waiting.workers === 0 ? `No ${fit} is there. Your code is kept, and graded when one comes`
          : waiting.ahead > 0 ? `Waiting for a worker: ${waiting.ahead} before you`
          : "Waiting for a worker",
        );
      }
    } catch {
      // The stream says that the connection is lost.
    }
    if (id === this.id && this.source && !this.begun) this.asking = setTimeout(() => this.why(), WHY_MS);
  }

  open() {
    const source = new EventSource(`/api/v1/submissions/${this.id}/events`);
    this.source = source;
    const on = (kind, act) =>
      source.addEventListener(kind, (event) => {
        // A connection made anew may tell from the beginning again.
        const number = Number(event.lastEventId);
        if (source !== this.source || number <= this.last) return;
        this.last = number;
        act(JSON.parse(event.data));
      });
    on("queued", () => {
      this.begun = false;
      this.say("Waiting for a worker");
    });
    on("started", (data) => {
      this.begun = true;
      this.clear(); // an attempt that was cut off begins again
      this.say(data.attempt > 1 ? "Running again" : "Running");
    });
    on("test", (data) => this.test(data));
    on("graded", () => this.end());
    on("cancelled", () => this.end());
    source.onopen = () => this.lost && this.tell();
    source.onerror = () => {
      this.lost = true;
      this.say("The connection is lost; trying again");
      // The browser tries again by itself, unless the answer was an error.
      if (source.readyState === EventSource.CLOSED && source === this.source) {
        this.timer = setTimeout(() => this.open(), AGAIN_MS);
      }
    };
  }

  clear() {
    this.count = 0;
    this.failed = 0;
    this.lost = false;
    this.strip.replaceChildren();
    this.failures.replaceChildren();
  }

  test(data) {
    this.count += 1;
    const mark = document.createElement("i");
    mark.className = `is-${data.outcome}`;
    this.strip.append(mark);
    if (data.outcome === "failed" || data.outcome === "error") {
      this.failed += 1;
      const line = document.createElement("li");
      const name = document.createElement("code");
      name.textContent = data.test.split("::").at(-1);
      const sign = document.createElementNS("http://www.w3.org/2000/svg", "svg");
      sign.setAttribute("class", `icon is-${data.outcome}`);
      sign.setAttribute("aria-hidden", "true");
      const use = document.createElementNS("http://www.w3.org/2000/svg", "use");
      use.setAttribute("href", `#i-${data.outcome}`);
      sign.append(use);
      line.append(sign, name);
      this.failures.append(line);
    }
    this.tell();
  }

  // One sentence for the eye and for screen readers, at most once in a second.
  tell() {
    this.lost = false;
    if (this.telling) return;
    this.telling = setTimeout(() => {
      this.telling = null;
      if (this.source && !this.lost) {
        const tests = this.count === 1 ? "1 test" : `${this.count} tests`;
        this.say(this.count ? `Running: ${tests} so far${this.failed ? `, ${this.failed} failed` : ""}` : "Running");
      }
    }, 150);
  }

  say(words) {
    if (this.status.textContent !== words) this.status.textContent = words;
  }

  async cancel() {
    await fetch(`/api/v1/submissions/${this.id}/cancel`, { method: "POST" });
  }

  async end() {
    this.stop();
    await this.finished(this.id);
    this.box.hidden = true;
  }

  stop() {
    clearTimeout(this.timer);
    clearTimeout(this.asking);
    clearTimeout(this.telling);
    this.telling = null;
    this.source?.close();
    this.source = null;
  }
}
