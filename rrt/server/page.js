'use strict';
// The page: a conversation that is kept in the browser, each answer with the loops of its
// tokens, and on request the answer of full depth beside it.

const at = id => document.getElementById(id);
const SETTINGS = ['chat', 'temperature', 'tokens', 'lossless', 'threshold', 'compare'];
let key = '', model = null, stopper = null;
// Turns: {asked, chat, answers: [{title, pieces: [[text, loops]], loops: [n], finish, figures}]}.
let turns = [];
let moved = false;  // Whether the threshold was set by hand.

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

const loopClass = loops => 'loop' + ((loops - 1) % 5 + 1);
const loopWords = loops => loops + (loops === 1 ? ' loop' : ' loops');

function headers() {
  const found = {'Content-Type': 'application/json'};
  if (key) found.Authorization = 'Bearer ' + key;
  return found;
}

// ------------------------------------------------------------------ what is kept

const place = () => 'rrt ' + model.id;

function keep() {
  const settings = {};
  for (const id of SETTINGS) settings[id] = at(id).type === 'checkbox' ? at(id).checked : at(id).value;
  const value = {turns, settings, moved, draft: at('prompt').value};
  try {
    localStorage.setItem(place(), JSON.stringify(value));
  } catch {
    // Private windows and full stores keep nothing; the page works without.
  }
}

function recall() {
  let value = null;
  try {
    value = JSON.parse(localStorage.getItem(place()));
  } catch {
    return;
  }
  if (!value || !Array.isArray(value.turns)) return;
  turns = value.turns;
  moved = value.moved;
  at('prompt').value = value.draft;
  for (const id of SETTINGS) {
    if (value.settings[id] === undefined) continue;
    if (at(id).type === 'checkbox') at(id).checked = value.settings[id];
    else at(id).value = value.settings[id];
  }
}

// ------------------------------------------------------------------ what is shown

// A chart of loops by position; `grow` adds the bars that it lacks.
function chart() {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('role', 'img');
  return svg;
}

function grow(svg, loops) {
  const mean = loops.reduce((a, b) => a + b, 0) / loops.length;
  svg.setAttribute('viewBox', `0 0 ${Math.max(loops.length, 16)} ${model.loops}`);
  svg.setAttribute('aria-label', `Loops by position, ${mean.toFixed(2)} of ${model.loops} on average`);
  for (let i = svg.childElementCount; i < loops.length; i++) {
    const depth = loops[i];
    const bar = document.createElementNS('http://www.w3.org/2000/svg', 'rect');
    bar.setAttribute('x', i + 0.05);
    bar.setAttribute('y', model.loops - depth);
    bar.setAttribute('width', 0.9);
    bar.setAttribute('height', depth);
    bar.setAttribute('class', loopClass(depth));
    svg.append(bar);
  }
}

function remark(answer, turn) {
  const most = turn.tokens;
  if (answer.finish === 'length') return `Cut off: the limit of ${most} tokens or of the context is reached.`;
  if (answer.finish && !answer.pieces.some(([text]) => text.trim()))
    return 'The answer is empty: the model ended it at once. Ask in another way, raise the temperature, ' +
      (turn.chat ? 'or switch chat off to have a text continued.' : 'or give it more text to continue.');
  if (answer.stopped) return 'Stopped.';
  return '';
}

// Draws an answer; returns a function that adds what is new.
function draw(answer, turn) {
  const box = make('section', 'answer');
  if (turn.answers.length > 1) box.append(make('h2', '', answer.title));
  const said = make('div', 'said');
  if (!turn.chat) said.append(make('span', 'given', turn.asked));
  const figures = make('p', 'figures'), note = make('p', 'remark');
  box.append(said, figures, note);
  let shown = 0, picture = null;
  const update = () => {
    for (; shown < answer.pieces.length; shown++) {
      const [text, depth] = answer.pieces[shown];
      const span = make('span', loopClass(depth), text);
      span.title = loopWords(depth);
      said.append(span);
    }
    if (answer.loops.length) {
      if (!picture) figures.before(picture = chart());
      grow(picture, answer.loops);
    }
    figures.textContent = answer.figures;
    note.textContent = remark(answer, turn);
  };
  update();
  return [box, update];
}

function show(turn) {
  const box = make('article');
  if (turn.chat) box.append(make('div', 'asked', turn.asked));
  const row = make('div', 'answers');
  const updates = turn.answers.map(answer => {
    const [element, update] = draw(answer, turn);
    row.append(element);
    return update;
  });
  box.append(row);
  at('turns').append(box);
  return updates;
}

function settings() {
  const chat = at('chat').checked;
  at('what').textContent = chat ? 'Message' : 'Text to continue';
  at('threshold').disabled = !at('exact').hidden && at('lossless').checked;
  at('shown').value = moved ? (+at('threshold').value).toFixed(2) :
    model.threshold > 1 ? 'never' : model.threshold.toFixed(3);
}

// ------------------------------------------------------------------ requests

// What leaves early or is lossless, and full depth: fields of the request.
function ways() {
  const own = {};
  if (model.lossless) own.lossless = at('lossless').checked;
  if (moved && !at('threshold').disabled && !at('gate').hidden)
    own.exit_threshold = +at('threshold').value;
  if (!at('compare').checked || at('both').hidden) return [['answer', own]];
  const full = {};
  if (model.gate !== 'none') full.exit_threshold = 2;
  if (model.lossless) full.lossless = false;
  return [[at('lossless').checked && model.lossless ? 'lossless' : 'with exits', own], ['full depth', full]];
}

function messages(turn) {
  const found = [];
  for (const one of turns) {
    if (!one.chat) continue;
    if (one !== turn && !one.answers[0].pieces.length) continue;
    found.push({role: 'user', content: one.asked});
    if (one !== turn)
      found.push({role: 'assistant', content: one.answers[0].pieces.map(p => p[0]).join('')});
  }
  return found;
}

async function write(turn, answer, body, update) {
  const reply = await fetch(turn.chat ? '/v1/chat/completions' : '/v1/completions', {
    method: 'POST', headers: headers(), body: JSON.stringify(body), signal: stopper.signal,
  });
  if (!reply.ok) throw new Error((await reply.json()).error.message);
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '', first = 0, begun = 0;
  for (;;) {
    const {value, done} = await reader.read();
    if (done) break;
    const lines = (rest + value).split('\n\n');
    rest = lines.pop();
    for (const line of lines) {
      const data = line.slice(6);
      if (data === '[DONE]') continue;
      const event = JSON.parse(data);
      if (event.error) throw new Error(event.error.message);
      if (!event.choices.length) continue;
      const choice = event.choices[0];
      answer.pieces.push(...(choice.loops || []));
      answer.loops.push(...(choice.token_loops || []));
      answer.finish = choice.finish_reason || answer.finish;
      // The clock starts with the first tokens, which count for the loops.
      const tokens = answer.loops.length;
      if (!first && tokens) { first = performance.now(); begun = tokens; }
      const seconds = (performance.now() - first) / 1000;
      if (tokens > begun && seconds > 0) answer.figures =
        `${((tokens - begun) / seconds).toFixed(1)} tokens/s, ` +
        `${(answer.loops.reduce((a, b) => a + b, 0) / tokens).toFixed(2)} loops a token`;
      update();
    }
  }
}

async function send() {
  const asked = at('prompt').value;
  if (stopper || !model || !asked.trim()) return;
  const turn = {asked, chat: at('chat').checked, tokens: +at('tokens').value, answers: []};
  const bodies = ways().map(([title, fields]) => {
    turn.answers.push({title, pieces: [], loops: [], finish: '', figures: '', stopped: false});
    return {
      stream: true, return_loops: true, max_tokens: turn.tokens,
      temperature: +at('temperature').value, ...fields,
    };
  });
  turns.push(turn);
  for (const body of bodies) {
    if (turn.chat) body.messages = messages(turn);
    else body.prompt = asked;
  }
  at('error').textContent = '';
  if (turn.chat) at('prompt').value = '';
  const updates = show(turn);
  at('form').scrollIntoView({block: 'end'});
  const box = at('turns').lastChild;
  at('turns').setAttribute('aria-busy', 'true');
  at('go').disabled = true; at('stop').disabled = false;
  stopper = new AbortController();
  try {
    await Promise.all(bodies.map((body, i) => write(turn, turn.answers[i], body, updates[i])));
  } catch (e) {
    stopper.abort();
    if (e.name !== 'AbortError') at('error').textContent = e.message;
    for (const answer of turn.answers) answer.stopped = e.name === 'AbortError' && !answer.finish;
    updates.forEach(update => update());
    if (!turn.answers.some(a => a.pieces.length)) {  // Nothing to keep: give the message back.
      turns.pop();
      if (e.name !== 'AbortError') box.remove();
      if (!at('prompt').value) at('prompt').value = asked;
    }
  }
  stopper = null;
  at('turns').removeAttribute('aria-busy');
  at('go').disabled = false; at('stop').disabled = true;
  keep();
}

// ------------------------------------------------------------------ events

at('form').onsubmit = event => { event.preventDefault(); send(); };
at('prompt').onkeydown = event => {
  // An input method's Enter chooses a word.
  if (event.key !== 'Enter' || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
at('stop').onclick = () => { if (stopper) stopper.abort(); };
at('new').onclick = () => {
  if (stopper) stopper.abort();
  turns = [];
  at('turns').replaceChildren();
  at('error').textContent = '';
  at('prompt').focus();
  keep();
};
at('threshold').addEventListener('input', () => { moved = true; settings(); });
for (const id of SETTINGS) at(id).addEventListener('change', () => { settings(); keep(); });
at('prompt').addEventListener('input', () => { if (model) keep(); });

async function start() {
  let reply = await fetch('/v1/models', {headers: headers()});
  if (reply.status === 401) {
    key = prompt('API key') || '';
    reply = await fetch('/v1/models', {headers: headers()});
  }
  if (!reply.ok) { at('error').textContent = (await reply.json()).error.message; return; }
  model = (await reply.json()).data[0];
  document.title = model.id;
  for (let i = 1; i <= model.loops; i++) at('legend').append(make('span', 'swatch ' + loopClass(i), loopWords(i)));
  at('gate').hidden = model.gate === 'none';
  at('exact').hidden = !model.lossless;
  at('both').hidden = model.gate === 'none' && !model.lossless;
  at('lossless').checked = model.lossless;
  at('threshold').value = Math.min(model.threshold, 1);
  at('chat').checked = model.chat;
  recall();
  if (!model.chat) { at('chat').checked = false; at('chat').disabled = true; }
  settings();
  turns.forEach(show);
  at('name').textContent = model.id;
}
start();
