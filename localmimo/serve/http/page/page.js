// The page at /: keeps one conversation, streams answers from /v1/chat/completions, shows figures from /metrics.
// Everything that comes from the model is set as text, never as markup.

const $ = (id) => document.getElementById(id);
const POLL_MS = 1000;

let messages = []; // in the server's format, with the thinking
let running = null; // AbortController of the answer being read
let results = []; // input fields for the results of open tool calls

// ---- small pieces of the page ----

function element(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function say(text) {
  $("state").textContent = text;
}

function turn(role, name) {
  const article = element("article", { className: role }, element("h2", { textContent: name }));
  $("talk").append(article);
  $("hint").hidden = true;
  return article;
}

function follow(change) {
  const talk = $("talk");
  const atEnd = talk.scrollHeight - talk.scrollTop - talk.clientHeight < 60;
  change();
  if (atEnd) talk.scrollTop = talk.scrollHeight;
}

// Text with ``` fences becomes paragraphs and code blocks.
function write(box, text) {
  const parts = text.split(/^```[^\n]*\n?/m);
  box.replaceChildren(
    ...parts.map((part, n) =>
      n % 2 ? element("pre", { textContent: part.trimEnd() }) : element("div", { className: "text", textContent: part.trim() })
    )
  );
}

// ---- one answer ----

class Answer {
  constructor() {
    this.message = { role: "assistant", content: "" };
    this.article = turn("assistant", "Model");
    this.began = performance.now();
  }

  take(chunk) {
    if (chunk.error) throw new Error(chunk.error.message);
    if (chunk.timings) this.timings = chunk.timings;
    if (chunk.usage) this.usage = chunk.usage;
    const choice = chunk.choices && chunk.choices[0];
    if (!choice) return;
    this.reason = choice.finish_reason || this.reason;
    const { reasoning_content: thought, content, tool_calls: calls } = choice.delta;
    if (thought) this.think(thought);
    if (content) this.write(content);
    for (const call of calls || []) this.call(call);
  }

  think(text) {
    if (!this.thinking) {
      this.label = element("summary", { textContent: "Thinking …" });
      this.thought = element("div", { className: "text" });
      this.thinking = element("details", { className: "thinking", open: true }, this.label, this.thought);
      this.article.append(this.thinking);
    }
    this.message.reasoning_content = (this.message.reasoning_content || "") + text;
    this.thought.textContent = this.message.reasoning_content.trim();
  }

  endThinking() {
    if (!this.thinking || this.thoughtFor) return;
    this.thoughtFor = (performance.now() - this.began) / 1000;
    this.label.textContent = `Thought for ${this.thoughtFor.toFixed(1)} s`;
    this.thinking.open = false;
  }

  write(text) {
    this.endThinking();
    this.message.content += text;
    if (!this.message.content.trim()) return;
    if (!this.body) this.article.append((this.body = element("div")));
    write(this.body, this.message.content);
  }

  call(piece) {
    this.endThinking();
    const calls = (this.message.tool_calls ??= []);
    if (piece.id) calls[piece.index] = { id: piece.id, type: "function", function: { name: piece.function.name, arguments: "" } };
    const call = calls[piece.index];
    call.function.arguments += piece.function.arguments || "";
    this.boxes ??= [];
    if (!this.boxes[piece.index]) {
      const code = element("code", { textContent: call.function.name });
      this.boxes[piece.index] = element("pre");
      this.article.append(element("div", { className: "call" }, "calls ", code, this.boxes[piece.index]));
    }
    this.boxes[piece.index].textContent = call.function.arguments;
  }

  // Removes calls whose arguments are incomplete: they were cut off, or were text.
  dropUnfinished() {
    const calls = this.message.tool_calls?.filter((call, n) => {
      const whole = isJson(call.function.arguments);
      if (!whole) this.boxes[n].parentElement.remove();
      return whole;
    });
    if (calls?.length) this.message.tool_calls = calls;
    else delete this.message.tool_calls;
  }

  end() {
    this.endThinking();
    if (this.timings) show(this.timings);
    for (const call of this.message.tool_calls || []) addResultField(call, this.article);
  }
}

function isJson(text) {
  try {
    return Boolean(JSON.parse(text));
  } catch {
    return false;
  }
}

// Adds a field for the result of a call: the page runs no function itself.
function addResultField(call, article) {
  const input = element("textarea", { rows: 2 });
  const label = element("label", { textContent: `Result of ${call.function.name} ` });
  label.append(input);
  article.append(label);
  results.push({ id: call.id, input });
  if (results.length === 1) input.focus();
}

// ---- requests ----

function headers() {
  const key = $("key").value.trim();
  return key ? { authorization: `Bearer ${key}` } : {};
}

function request() {
  const system = $("system").value.trim();
  const body = {
    messages: system ? [{ role: "system", content: system }, ...messages] : messages,
    stream: true,
    stream_options: { include_usage: true },
  };
  if ($("think").value) body.chat_template_kwargs = { enable_thinking: $("think").value === "on" };
  if ($("temperature").value) body.temperature = Number($("temperature").value);
  if ($("tokens").value) body.max_tokens = Number($("tokens").value);
  if ($("tools").value.trim()) body.tools = tools();
  return body;
}

// The functions in the settings, with or without the "function" around each.
function tools() {
  const listed = JSON.parse($("tools").value);
  return [listed].flat().map((tool) => (tool.function ? tool : { type: "function", function: tool }));
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (held + value).split("\n");
    held = lines.pop();
    for (const line of lines) {
      if (line.startsWith(": ")) say(line.slice(2));
      if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
    }
  }
}

async function answer() {
  const answer = new Answer();
  const conversation = messages; // `messages` may be another conversation when this answer ends
  running = new AbortController();
  busy(true);
  say("waiting for the first token");
  try {
    const response = await fetch("v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json", ...headers() },
      body: JSON.stringify(request()),
      signal: running.signal,
    });
    if (!response.ok) throw new Error((await response.json()).error.message);
    for await (const chunk of events(response)) {
      follow(() => answer.take(chunk));
      if (chunk.choices?.[0]?.delta.content) say("writing");
      if (chunk.choices?.[0]?.delta.tool_calls) say("writing a call");
      if (chunk.choices?.[0]?.delta.reasoning_content) say("thinking");
    }
    say({ length: "Stopped at the limit of tokens.", tool_calls: "The model waits for results." }[answer.reason] || "Answer complete.");
  } catch (error) {
    if (error.name === "AbortError") say("Stopped.");
    else {
      say("");
      answer.article.append(element("p", { className: "wrong", role: "alert", textContent: error.message }));
    }
  }
  running = null;
  busy(false);
  answer.dropUnfinished();
  if (answer.message.content || answer.message.reasoning_content || answer.message.tool_calls) conversation.push(answer.message);
  follow(() => answer.end());
  figures();
}

function busy(is) {
  $("stop").hidden = !is;
  $("send").disabled = is;
  $("talk").setAttribute("aria-busy", is);
}

function submit(event) {
  event?.preventDefault();
  const text = $("prompt").value.trim();
  if (running || (!text && !results.length) || !toolsAreFine()) return;
  for (const { id, input } of results) {
    messages.push({ role: "tool", tool_call_id: id, content: input.value });
    input.readOnly = true;
  }
  results = [];
  if (text) {
    messages.push({ role: "user", content: text });
    turn("user", "You").append(element("div", { className: "text", textContent: text }));
    $("talk").scrollTop = $("talk").scrollHeight;
  }
  $("prompt").value = "";
  answer();
}

function toolsAreFine() {
  try {
    if ($("tools").value.trim()) tools();
    $("tools-wrong").textContent = "";
    return true;
  } catch (error) {
    $("settings").open = true;
    $("tools-wrong").textContent = `The tools are no JSON: ${error.message}`;
    return false;
  }
}

// ---- figures ----

let earlier = {};

async function figures() {
  const response = await fetch("metrics", { headers: headers() }).catch(() => null);
  if (!response?.ok) return;
  const found = {};
  for (const line of (await response.text()).split("\n")) {
    const cut = line.lastIndexOf(" ");
    if (line && line[0] !== "#") found[line.slice(0, cut)] = Number(line.slice(cut + 1));
  }
  const increase = (name) => (found[name] || 0) - (earlier[name] || 0);
  const pages = {};
  for (const name of Object.keys(found)) {
    const tier = name.match(/^localmimo_expert_pages_total\{tier="(\w+)"\}$/);
    if (tier) pages[tier[1]] = increase(name);
  }
  if (Object.values(pages).some((count) => count > 0)) tiers(pages);
  const seconds = increase("localmimo_decode_seconds_total");
  if (running && seconds > 0) $("speed").textContent = `${(increase("localmimo_generated_tokens_total") / seconds).toFixed(1)} tokens/s`;
  earlier = found;
}

function tiers(pages) {
  const total = Object.values(pages).reduce((sum, count) => sum + count, 0);
  const shares = ["gpu", "ram", "disk"].filter((tier) => tier in pages).map((tier) => [tier, pages[tier] / total]);
  $("tiers").textContent = shares.map(([tier, share]) => `${tier} ${Math.round(100 * share)} %`).join(" · ");
  $("bar").replaceChildren(...shares.map(([tier, share]) => {
    const part = element("span", { className: tier });
    part.style.flex = String(share);
    return part;
  }));
}

function show(timings) {
  $("speed").textContent = timings.decode_tps ? `${timings.decode_tps.toFixed(1)} tokens/s` : "–";
  $("reading").textContent = `${timings.prompt_tokens} tokens, ${timings.reused_tokens} kept`;
  $("context").textContent = `${timings.prompt_tokens + timings.generated_tokens} of ${limit}`;
}

let limit = "–";

async function introduce() {
  const response = await fetch("v1/models", { headers: headers() }).catch(() => null);
  if (!response?.ok) {
    const error = response ? (await response.json()).error.message : "The server does not answer.";
    $("model").textContent = error;
    if (response?.status === 401) {
      $("settings").open = true;
      $("key").focus();
    } else setTimeout(introduce, 3 * POLL_MS);
    return;
  }
  const [model] = (await response.json()).data;
  limit = model.context_length.toLocaleString("en");
  $("model").textContent = `${model.id} · context ${limit}`;
  figures();
}

// ---- keys and buttons ----

$("composer").addEventListener("submit", submit);
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running?.abort();
});
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  results = [];
  $("talk").replaceChildren();
  $("hint").hidden = false;
  say("");
  $("prompt").focus();
});
$("tools").addEventListener("change", toolsAreFine);
$("key").value = sessionStorage.getItem("key") || "";
$("key").addEventListener("change", () => {
  sessionStorage.setItem("key", $("key").value);
  introduce();
});
setInterval(() => running && figures(), POLL_MS);
introduce();
