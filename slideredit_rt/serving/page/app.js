// The web page of the server: an image, sliders, and an edit that updates while a slider is dragged.
// A plain module without a build step. It uses the same HTTP API as every other client.

const NEUTRAL = 1; // strength of the base model's own edit
const STRIP_FRAMES = 7;
const PREVIEW_START = 0.5; // fraction of the steps of a preview before the sliders act: a drag makes them once
const TYPING_PAUSE = 300; // milliseconds without a keystroke before an instruction is sent
const SMALL = 64; // largest side in pixels of images that are enlarged without smoothing
const KEY = "slideredit-key";

const $ = (id) => document.getElementById(id);

let engine = null; // description of the engine from /v1/models
let model = "";
let chosen = 0, read = 0; // number of images chosen so far, and number of the last one read
let image = null; // {blob, bitmap}: the PNG to send, and its pixels to draw
let result = null; // Blob of the edit shown
let prompt = null; // composed by the server from the instructions; null until it has answered
let focused = 0; // the slider whose strip is exported

// ---------------------------------------------------------------- server

async function call(path, init = {}) {
  const headers = new Headers(init.headers);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let answer, text;
  try {
    answer = await fetch(path, { ...init, headers });
    text = await answer.text();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server cannot be reached. Check that it is running, then try again.");
  }
  let body = null;
  try {
    body = JSON.parse(text);
  } catch {
    // Not JSON, as from a proxy: the status is reported instead.
  }
  if (answer.ok && body) return body;
  if (answer.status === 401) {
    $("key-form").hidden = false;
    $("key").focus();
  }
  throw new Error(body?.error?.message ?? `The server answered with status ${answer.status} and gave no reason.`);
}

const png = (base64) => new Blob([Uint8Array.from(atob(base64), (c) => c.charCodeAt(0))], { type: "image/png" });

// ---------------------------------------------------------------- sliders

const rows = () => [...$("sliders").children];
const textOf = (row) => row.querySelector(".text").value.trim();
const rangeOf = (row) => row.querySelector("input[type=range]");
const filled = () => rows().filter(textOf);

// The sliders of a request. If the engine has several adapters, each slider names its own.
function sliders() {
  return filled().map((row) => ({
    instruction: textOf(row),
    strength: rangeOf(row).valueAsNumber,
    ...(engine.adapters.length && { adapter: row.querySelector(".adapter").value }),
  }));
}

// A GST adapter scales the whole prompt: one slider, or one for each adapter of a bank. ST adapters take any number.
function sliderLimit() {
  const limited = engine.kind === "gst" && !engine.adapter_kinds.includes("st");
  return limited ? Math.min(engine.max_sliders, engine.adapters.length || 1) : engine.max_sliders;
}

function addRow(text = "") {
  const row = $("slider-row").content.firstElementChild.cloneNode(true);
  const input = row.querySelector(".text");
  const range = rangeOf(row);
  const adapter = row.querySelector(".adapter");
  input.value = text;
  input.placeholder = engine.sample_instructions[0];
  adapter.append(...engine.adapters.map((name) => new Option(name)));
  adapter.selectedIndex = rows().length % engine.adapters.length;
  adapter.hidden = !engine.adapters.length;
  $("sliders").append(row);

  input.addEventListener("input", typed);
  input.addEventListener("change", settle);
  adapter.addEventListener("change", reread);
  row.querySelector(".remove").addEventListener("click", () => removeRow(row));

  range.addEventListener("input", () => {
    showStrength(row);
    moved();
  });
  // A drag that ends where it began fires no change event, so listen for the end of the pointer as well.
  for (const type of ["change", "pointerup", "pointercancel"]) range.addEventListener(type, settle);
  const reset = () => {
    range.value = NEUTRAL;
    showStrength(row);
    moved();
    settle();
  };
  range.addEventListener("dblclick", reset);
  range.addEventListener("keydown", (event) => {
    if (event.key !== "Home") return;
    event.preventDefault();
    reset();
  });
  row.addEventListener("focusin", () => {
    focused = rows().indexOf(row);
    renumber();
  });
  showStrength(row);
  renumber();
  return row;
}

function removeRow(row) {
  const index = rows().indexOf(row);
  row.remove();
  if (!rows().length) addRow();
  renumber();
  rows()[Math.min(index, rows().length - 1)].querySelector(".text").focus();
  reread();
}

function showStrength(row) {
  const range = rangeOf(row);
  row.querySelector("output").value = range.valueAsNumber.toFixed(2);
  row.style.setProperty("--share", range.valueAsNumber / range.max);
}

// Updates numbers, colours, labels and limits after rows were added, removed or edited.
function renumber() {
  const all = rows();
  focused = Math.min(focused, all.length - 1);
  all.forEach((row, index) => {
    const number = index + 1;
    row.className = `slider c${index % 8}`;
    row.classList.toggle("chosen", all.length > 1 && index === focused);
    row.querySelector(".badge").textContent = number;
    row.querySelector(".text").setAttribute("aria-label", `Instruction ${number}`);
    row.querySelector(".remove").setAttribute("aria-label", `Remove instruction ${number}`);
    row.querySelector(".adapter").setAttribute("aria-label", `Adapter ${number}`);
    rangeOf(row).setAttribute("aria-label", `Strength ${number}: ${textOf(row) || "no instruction yet"}`);
  });
  const limit = sliderLimit();
  $("add").hidden = limit === 1;
  $("add").disabled = all.length >= limit;
  $("add").textContent = all.length >= limit ? `This engine takes at most ${limit} sliders` : "Add an instruction";
  all.forEach((row) => (row.querySelector(".remove").hidden = limit === 1));
  showExports();
}

function showExports() {
  const row = rows()[focused];
  const text = textOf(row);
  $("prompt").classList.toggle("unread", prompt === null);
  $("strip").disabled = !text || prompt === null || stripping;
  $("strip-hint").textContent = text ? `The strip shows slider ${focused + 1}, “${text}”, from 0 to ${rangeOf(row).max}.` : "";
  $("copy").disabled = prompt === null;
  $("curl").textContent = prompt === null ? "" : curlCommand();
}

// Shows the prompt, with every token in the colour, number and underline of its slider.
function showPrompt(answer) {
  // Offsets count code points, while JavaScript strings are indexed in UTF-16 units.
  const letters = Array.from(answer.prompt);
  const owners = filled().map((row) => rows().indexOf(row));
  const tokens = answer.tokens.filter((token) => token.end > token.start);
  const parts = [];
  let position = 0, group = null, owner = null;
  for (const token of tokens) {
    let start = Math.max(token.start, position);
    while (letters[start] === " ") start++;
    if (start >= token.end) continue;
    if (token.slider !== owner) group = null;
    const gap = letters.slice(position, start).join("");
    if (group) group.append(gap);
    else parts.push(gap);
    const text = letters.slice(start, token.end).join("");
    position = token.end;
    owner = token.slider;
    if (owner === null) {
      parts.push(text);
      continue;
    }
    if (!group) {
      const index = owners[owner];
      group = document.createElement("mark");
      group.className = `c${index % 8}`;
      group.dataset.slider = owner;
      const number = document.createElement("sup");
      number.textContent = index + 1;
      group.append(number);
      parts.push(group);
    }
    const piece = document.createElement("span");
    piece.textContent = text;
    group.append(piece);
  }
  parts.push(letters.slice(position).join(""));
  $("prompt").replaceChildren(...parts);
}

// ---------------------------------------------------------------- live edit
//
// One request at a time. `wanted` is the version of the settings, and every request is for the newest one, so a drag
// skips versions that the server cannot keep up with. Each version gets a preview first and, once the slider is released,
// the full edit. A change aborts a full edit in flight, but not a preview, or a quick drag would show nothing.

let wanted = 0, since = 0; // version of the settings, and the time of the last change
let settled = true;
let previewed = -1, finished = -1, failed = -1; // newest versions shown as preview, shown in full, and rejected
let flight = null; // {abort, full} of the request in flight
let typing = 0;
let lastPreview = "";

function want() {
  // Instructions that the server rejected are not sent again until their text changes.
  if (failed === wanted && prompt === null) failed++;
  wanted++;
  since = performance.now();
  setBusy(true);
}

// Busy while the image shown does not match the settings.
function setBusy(busy) {
  $("edited").setAttribute("aria-busy", busy);
}

function moved() {
  want();
  settled = false;
  if (flight?.full) drop();
  pump();
}

function settle() {
  settled = true;
  clearTimeout(typing);
  typing = 0;
  pump();
}

// After a new image, seed or instruction the request in flight is out of date.
function restart() {
  want();
  settled = true;
  drop();
  pump();
}

function reread() {
  prompt = null;
  failed = -1;
  restart();
}

function typed() {
  prompt = null;
  renumber();
  failed = -1;
  want();
  settled = false;
  drop();
  clearTimeout(typing);
  typing = setTimeout(() => {
    typing = 0;
    pump();
  }, TYPING_PAUSE);
}

function drop() {
  flight?.abort.abort();
  flight = null;
}

function nextWork() {
  if (!engine || !image || typing || failed === wanted) return null;
  if (!filled().length) return finished < wanted ? showSource : null;
  if (prompt === null) return readPrompt;
  if (previewed < wanted && engine.preview_steps < engine.num_inference_steps) return previewEdit;
  if (settled && finished < wanted) return fullEdit;
  return null;
}

async function pump() {
  if (flight) return;
  const work = nextWork();
  if (!work) {
    setBusy(Boolean(typing) || read < chosen);
    return;
  }
  const mine = (flight = { abort: new AbortController(), full: work === fullEdit });
  const version = wanted;
  try {
    await work(version, mine.abort.signal);
    if (flight === mine) showError("");
  } catch (error) {
    if (flight === mine) {
      failed = version;
      showError(error.message, true);
    }
  }
  if (flight !== mine) return; // the code that dropped it has started the next one
  flight = null;
  pump();
}

async function readPrompt(version, signal) {
  const body = JSON.stringify({ sliders: sliders() });
  const headers = { "Content-Type": "application/json" };
  const answer = await call("v1/sliders/spans", { method: "POST", headers, body, signal });
  if (signal.aborted) return;
  prompt = answer.prompt;
  showPrompt(answer);
  showExports();
}

// Fields of a request, for the form and for the curl command.
function fields(extra = {}) {
  const adapter = $("adapter").value;
  const chosen = { model, prompt, sliders: JSON.stringify(sliders()), ...(adapter && { adapter }) };
  return { ...chosen, seed: $("seed").value || "0", ...extra };
}

function form(extra) {
  const data = new FormData();
  data.append("image", image.blob, "image.png");
  for (const [name, value] of Object.entries(fields(extra))) data.append(name, value);
  return data;
}

async function request(extra, version, signal) {
  const answer = await call("v1/images/edits", { method: "POST", body: form(extra), signal });
  const blob = png(answer.data[0].b64_json);
  const bitmap = await createImageBitmap(blob);
  if (signal.aborted) return false;
  result = blob;
  draw($("result"), bitmap);
  previewed = version;
  $("save").disabled = false;
  showExports();
  return true;
}

async function previewEdit(version, signal) {
  const start = since;
  const late = Math.max(PREVIEW_START, engine.slider_start);
  if (!(await request({ preview: "true", slider_start: late }, version, signal))) return;
  lastPreview = took(start);
  showStatus("preview", lastPreview);
}

async function fullEdit(version, signal) {
  const start = performance.now();
  if (!(await request({}, version, signal))) return;
  finished = version;
  showStatus("full", `${engine.num_inference_steps} steps, ${took(start)}${lastPreview && ` · preview ${lastPreview}`}`);
  $("announce").textContent = "Full edit shown.";
}

async function showSource(version) {
  draw($("result"), image.bitmap);
  $("prompt").textContent = "Type an instruction to begin.";
  $("save").disabled = true;
  showStatus("", "no instruction yet");
  previewed = finished = version;
}

function took(start) {
  const time = performance.now() - start;
  return time < 1000 ? `${Math.round(time)} ms` : `${(time / 1000).toFixed(1)} s`;
}

function showStatus(quality, detail) {
  $("status").className = quality;
  $("status").textContent = [quality, detail].filter(Boolean).join(" · ");
}

function showError(message, again = false) {
  $("error-text").textContent = message;
  $("retry").hidden = !again;
  if (!message) $("key-form").hidden = true;
  $("error").classList.toggle("shown", Boolean(message));
}

// ---------------------------------------------------------------- images

function draw(canvas, bitmap) {
  canvas.width = bitmap.width;
  canvas.height = bitmap.height;
  canvas.classList.toggle("pixels", Math.max(bitmap.width, bitmap.height) <= SMALL);
  canvas.getContext("2d").drawImage(bitmap, 0, 0);
}

const toBlob = (canvas) => new Promise((done) => canvas.toBlob(done, "image/png"));

// Converts an image to the PNG that is sent and shown: upright, transparency on white, and at most as many pixels as the
// engine edits, because every preview sends it again.
async function readImage(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file);
  } catch {
    throw new Error(`“${file.name ?? "This"}” is not an image that this browser can read. Choose a PNG, JPEG or WebP file.`);
  }
  const most = Math.max(engine?.side ?? 0, 512) ** 2;
  const scale = Math.min(1, Math.sqrt(most / (bitmap.width * bitmap.height)));
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  const blob = await toBlob(canvas);
  return { blob, bitmap: await createImageBitmap(blob) };
}

// Takes a file or a promise of one. If several are in progress, the one chosen last wins.
async function useImage(file) {
  const mine = ++chosen;
  setBusy(true);
  let next;
  try {
    next = await readImage(await file);
  } catch (error) {
    if (mine !== chosen) return;
    read = mine;
    pump();
    showError(error.message);
    return;
  }
  if (mine !== chosen) return;
  read = mine;
  image = next;
  draw($("source"), image.bitmap);
  draw($("under"), image.bitmap);
  if (!result) draw($("result"), image.bitmap);
  if (engine) showError(""); // without an engine, the message explains why
  restart();
}

function useSample() {
  const gone = () => {
    throw new Error("The sample image cannot be loaded. Check that the server is running.");
  };
  return useImage(fetch("sample.png").then((answer) => answer.blob(), gone));
}

function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  // By then the download has started and no longer needs the URL.
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// ---------------------------------------------------------------- strip

let stripping = false;

async function saveStrip() {
  const row = rows()[focused];
  const to = Number(rangeOf(row).max);
  const sweep = { slider: filled().indexOf(row), from: 0, to, count: STRIP_FRAMES };
  const title = textOf(row);
  stripping = true;
  showExports();
  try {
    const source = image.bitmap;
    const answer = await call("v1/images/edits", { method: "POST", body: form({ sweep: JSON.stringify(sweep) }) });
    const frames = await Promise.all(answer.data.map((item) => createImageBitmap(png(item.b64_json))));
    const labels = ["source", ...answer.data.map((item) => item.strengths[sweep.slider].toFixed(2))];
    save(await toBlob(drawStrip([source, ...frames], labels, title)), "strip.png");
    showError("");
  } catch (error) {
    showError(error.message);
  }
  stripping = false;
  showExports();
}

function drawStrip(frames, labels, title) {
  const { width: w, height: h } = frames.at(-1);
  // Small images are enlarged by an integer factor, so that their pixels stay square.
  const scale = w <= SMALL ? Math.max(1, Math.round(160 / w)) : Math.min(1, 320 / w);
  const [width, height] = [Math.round(w * scale), Math.round(h * scale)];
  const [gap, top, label] = [8, 36, 26];
  const canvas = document.createElement("canvas");
  canvas.width = gap + frames.length * (width + gap);
  canvas.height = top + height + label;
  const context = canvas.getContext("2d");
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.imageSmoothingEnabled = scale < 1;
  context.imageSmoothingQuality = "high";
  context.fillStyle = "#1b1b1b";
  context.font = "16px system-ui, sans-serif";
  context.fillText(title, gap, 24, canvas.width - 2 * gap);
  context.font = "14px system-ui, sans-serif";
  context.textAlign = "center";
  frames.forEach((frame, i) => {
    const x = gap + i * (width + gap);
    context.drawImage(frame, x, top, width, height);
    context.fillText(labels[i], x + width / 2, top + height + 18);
  });
  return canvas;
}

// ---------------------------------------------------------------- curl

const quoted = (text) => `'${text.replaceAll("'", `'\\''`)}'`;

// --form-string sends a value literally, while -F interprets @, < and ; in it. sed and base64 are as common as curl.
function curlCommand() {
  const url = (path) => quoted(new URL(path, document.baseURI).href);
  // Refer to the key by a variable to keep it out of the clipboard.
  const key = sessionStorage.getItem(KEY) ? [`-H "Authorization: Bearer $SLIDEREDIT_API_KEY"`] : [];
  const parts = [
    `curl --silent --show-error --fail ${url("v1/images/edits")}`,
    ...key,
    "-F image=@image.png",
    ...Object.entries(fields()).map(([name, value]) => `--form-string ${quoted(`${name}=${value}`)}`),
  ];
  return `${parts.join(" \\\n  ")} \\\n  | sed -n 's/.*"b64_json": *"\\([^"]*\\)".*/\\1/p' | base64 --decode > edited.png`;
}

async function copyCurl() {
  showExports();
  $("curl-details").open = true;
  let copied = true;
  try {
    await navigator.clipboard.writeText($("curl").textContent);
  } catch {
    // Without HTTPS, pages from another machine have no clipboard API, but copying a selection still works.
    getSelection().selectAllChildren($("curl"));
    copied = document.execCommand("copy");
  }
  const said = copied ? "Copied" : "Selected, ready to copy";
  $("copy").textContent = $("announce").textContent = said;
  setTimeout(() => ($("copy").textContent = "Copy curl"), 2000);
}

// ---------------------------------------------------------------- wiring

function compare() {
  $("stage").style.setProperty("--split", $("divider").value / 100);
}

function holdSource(on) {
  $("stage").classList.toggle("held", on);
  $("hold").setAttribute("aria-pressed", on);
}

function wire() {
  $("add").addEventListener("click", () => addRow().querySelector(".text").focus());
  $("adapter").addEventListener("change", restart);
  $("seed").addEventListener("input", restart);
  $("new-seed").addEventListener("click", () => {
    $("seed").value = crypto.getRandomValues(new Uint32Array(1))[0] >>> 1;
    restart();
  });

  $("divider").addEventListener("input", compare);
  const hold = $("hold");
  hold.addEventListener("pointerdown", () => holdSource(true));
  hold.addEventListener("keydown", (event) => {
    if (event.key === " " || event.key === "Enter") holdSource(true);
  });
  for (const type of ["pointerup", "pointerleave", "pointercancel", "keyup", "blur"]) {
    hold.addEventListener(type, () => holdSource(false));
  }
  hold.addEventListener("contextmenu", (event) => event.preventDefault()); // a long press must not open the menu

  $("file").addEventListener("change", () => {
    if ($("file").files.length) useImage($("file").files[0]);
    $("file").value = ""; // allows choosing the same file again
  });
  $("sample").addEventListener("click", useSample);
  addEventListener("dragover", (event) => {
    event.preventDefault(); // otherwise a missed drop navigates away from the page
    document.body.classList.add("dropping");
  });
  addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  addEventListener("drop", (event) => {
    event.preventDefault();
    document.body.classList.remove("dropping");
    if (event.dataTransfer.files.length) useImage(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) useImage(event.clipboardData.files[0]);
  });

  $("save").addEventListener("click", () => save(result, "edited.png"));
  $("save-source").addEventListener("click", () => save(image.blob, "image.png"));
  $("strip").addEventListener("click", saveStrip);
  $("copy").addEventListener("click", copyCurl);
  $("retry").addEventListener("click", retry);
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, $("key").value);
    $("key").value = "";
    retry();
  });
}

async function retry() {
  failed = -1;
  if (!engine) await start();
  pump();
}

// Offers the adapters of an engine that takes them as inputs; the empty value leaves the choice to the engine.
function showChoices() {
  const own = engine.own_adapter ? [new Option("the engine’s own", "")] : [];
  $("adapter").replaceChildren(...own, ...engine.choices.map((name) => new Option(name)));
  $("adapter-row").hidden = !engine.choices.length;
}

async function start() {
  try {
    const answer = await call("v1/models");
    ({ id: model, engine } = answer.data[0]);
    const parts = [model, `${engine.kind.toUpperCase()} sliders`, engine.backend, engine.precision];
    $("engine").textContent = parts.filter(Boolean).join(" · ");
    showChoices();
    showError("");
    for (const text of engine.sample_instructions.slice(0, sliderLimit())) addRow(text);
    if (image) restart();
    else await useSample();
  } catch (error) {
    showError(error.message, true);
  }
}

wire();
start();
