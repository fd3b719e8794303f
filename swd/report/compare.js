"use strict";
(() => {
  const page = JSON.parse(document.getElementById("data").textContent);
  const find = (id) => document.getElementById(id);
  const place = `swd-votes-${page.page}`;
  const total = page.pairs.length * page.criteria.length;

  const fresh = () => ({
    session: [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join(""),
    votes: [],
  });

  // Votes stay in the browser until they are saved, where it allows that: a reload loses none.
  let kept = true;
  function load() {
    try {
      const stored = JSON.parse(localStorage.getItem(place));
      if (stored && Array.isArray(stored.votes) && stored.votes.length <= total && stored.session) return stored;
    } catch {
      kept = false;
    }
    return fresh();
  }
  function store() {
    try {
      localStorage.setItem(place, JSON.stringify(state));
    } catch {
      kept = false;
    }
  }
  let state = load();
  let saved = 0;
  let since = performance.now();

  // The vote that is asked for: all criteria of a pair, then the next pair.
  const asked = () => ({
    pair: page.pairs[Math.floor(state.votes.length / page.criteria.length)],
    number: Math.floor(state.votes.length / page.criteria.length) + 1,
    criterion: page.criteria[state.votes.length % page.criteria.length],
  });

  function show() {
    const done = state.votes.length === total;
    find("vote").hidden = done;
    find("end").hidden = !done;
    find("undo").disabled = !state.votes.length;
    find("save").disabled = !state.votes.length;
    find("restart").disabled = !state.votes.length;
    find("bar").max = total;
    find("bar").value = state.votes.length;
    const unsaved = state.votes.length - saved;
    find("kept").textContent = !unsaved ? ""
      : kept ? "Your votes stay in this browser until you save them." : "Your votes are lost if you leave before you save them.";
    if (done) {
      find("place").textContent = `${total} of ${total} votes`;
      return;
    }
    find("result").hidden = true;
    const { pair, number, criterion } = asked();
    find("place").textContent = `pair ${number} of ${page.pairs.length}`;
    find("prompt").textContent = pair.prompt;
    if (find("left").src !== pair.left) find("left").src = pair.left;
    if (find("right").src !== pair.right) find("right").src = pair.right;
    const strong = document.createElement("b");
    strong.textContent = criterion;
    const several = page.criteria.length > 1 ? ` (${state.votes.length % page.criteria.length + 1} of ${page.criteria.length})` : "";
    find("question").replaceChildren("Which is better: ", strong, several);
    since = performance.now();
  }

  function vote(choice) {
    if (state.votes.length === total) return;
    const { pair, criterion } = asked();
    const seconds = Math.round((performance.now() - since) / 100) / 10;
    state.votes.push({ pair: pair.id, criterion, choice, seconds });
    store();
    show();
  }

  function undo() {
    if (!state.votes.length) return;
    state.votes.pop();
    saved = Math.min(saved, state.votes.length);
    store();
    show();
  }

  function save() {
    const { format, study, criteria, sealed } = page;
    const voter = find("voter").value.trim();
    const text = JSON.stringify({ format, study, session: state.session, voter, criteria, sealed, votes: state.votes }, null, 1);
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
    link.download = "votes.json";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
    saved = state.votes.length;
    show();
  }

  // Names and sides, which the page keeps scrambled.
  function unsealed() {
    const bytes = Uint8Array.from(atob(page.sealed), (c, i) => c.charCodeAt(0) ^ page.study.charCodeAt(i % page.study.length));
    return JSON.parse(new TextDecoder().decode(bytes));
  }

  function reveal() {
    const { names, pairs } = unsealed();
    find("nameA").textContent = names[0];
    find("nameB").textContent = names[1];
    find("counts").replaceChildren(...page.criteria.map((criterion) => {
      const counts = [0, 0, 0];
      for (const { pair, choice } of state.votes.filter((v) => v.criterion === criterion))
        counts[choice === "tie" ? 1 : (choice === "left") !== pairs[pair][2] ? 0 : 2] += 1;
      const row = document.createElement("tr");
      for (const [i, text] of [criterion, ...counts].entries()) {
        const cell = document.createElement(i ? "td" : "th");
        cell.textContent = text;
        row.append(cell);
      }
      return row;
    }));
    find("result").hidden = false;
  }

  const choices = { 1: "left", 2: "right", 0: "tie" };
  for (const [key, choice] of Object.entries(choices)) find(`choose${key}`).addEventListener("click", () => vote(choice));
  find("undo").addEventListener("click", undo);
  find("save").addEventListener("click", save);
  find("reveal").addEventListener("click", reveal);
  find("restart").addEventListener("click", () => {
    if (!confirm("Forget the votes on this page, for the next person?")) return;
    state = fresh();
    saved = 0;
    find("voter").value = "";
    store();
    show();
  });
  document.addEventListener("keydown", (event) => {
    if (event.repeat || event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input")) return;
    if (event.key in choices) vote(choices[event.key]);
    else if (event.key === "u" || event.key === "U" || event.key === "Backspace") undo();
    else return;
    event.preventDefault();
  });
  window.addEventListener("beforeunload", (event) => {
    if (!kept && state.votes.length > saved) event.preventDefault();
  });
  show();
})();
