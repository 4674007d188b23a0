// A little Markdown, first as plain data and then as elements. Text only ever becomes text: there is no way from an
// answer to markup, to an address, or to a script.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.+?)\s*#*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const KINDS = { "*": "em", _: "em", "**": "strong", __: "strong" };

/** Blocks: `{kind: "code" | "heading" | "list" | "paragraph", ...}`. */
export function parse(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length; ) {
    const fence = FENCE.exec(lines[at]);
    if (fence) at = takeCode(lines, at, fence, blocks);
    else if (lines[at].trim() === "") at++;
    else if (HEADING.test(lines[at])) blocks.push(heading(lines[at++]));
    else if (ITEM.test(lines[at])) at = takeList(lines, at, blocks);
    else at = takeParagraph(lines, at, blocks);
  }
  return blocks;
}

/** Pieces of a line: `{kind: "text" | "code" | "strong" | "em", text}`. Takes time in proportion to the text. */
export function parseInline(text) {
  const pieces = [];
  const closer = closers(text);
  let begin = 0; // of text that is nothing else
  for (let at = 0; at < text.length; ) {
    if (!"`*_".includes(text[at])) {
      at++;
      continue;
    }
    const mark = text.slice(at, at + runLength(text, at));
    const end = opens(text, at, mark) ? closer(mark, at + mark.length + 1) : -1;
    if (end >= 0) {
      if (at > begin) pieces.push({ kind: "text", text: text.slice(begin, at) });
      pieces.push(piece(mark, text.slice(at + mark.length, end)));
      begin = end + mark.length;
    }
    at = end < 0 ? at + mark.length : begin;
  }
  if (begin < text.length) pieces.push({ kind: "text", text: text.slice(begin) });
  return pieces;
}

function piece(mark, text) {
  return mark[0] === "`" ? { kind: "code", text: text.replace(/^ (.*) $/s, "$1") } : { kind: KINDS[mark], text };
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end++;
  return end - at;
}

function opens(text, at, mark) {
  if (mark[0] === "`") return true;
  return mark in KINDS && /\S/.test(text[at + mark.length] ?? " ") && !/\w/.test(text[at - 1] ?? " ");
}

function closes(text, at, mark) {
  const [before, behind] = [text[at - 1], text[at + mark.length] ?? " "];
  if (before === mark[0] || behind === mark[0]) return false;
  return mark[0] === "`" || (/\S/.test(before) && !/\w/.test(behind));
}

/** Finds the next closing mark; asked from left to right, it looks at each place once for each mark. */
function closers(text) {
  const found = new Map();
  return (mark, from) => {
    let at = found.get(mark) ?? 0;
    if (at < from && at >= 0) {
      at = text.indexOf(mark, from);
      while (at >= 0 && !closes(text, at, mark)) at = text.indexOf(mark, at + 1);
      found.set(mark, at);
    }
    return at;
  };
}

/** The text as elements of a document. */
export function render(text, document) {
  const fragment = document.createDocumentFragment();
  for (const block of parse(text)) fragment.append(element(block, document));
  return fragment;
}

function element(block, document) {
  if (block.kind === "code") {
    const pre = document.createElement("pre");
    const code = document.createElement("code");
    code.textContent = block.text;
    pre.tabIndex = 0; // it scrolls
    pre.append(code);
    return pre;
  }
  if (block.kind === "list") {
    const list = document.createElement(block.ordered ? "ol" : "ul");
    if (block.ordered && block.start !== 1) list.start = block.start;
    for (const item of block.items) list.append(inline("li", item, document));
    return list;
  }
  return inline(block.kind === "heading" ? `h${Math.min(6, block.level + 2)}` : "p", block.text, document);
}

function inline(name, text, document) {
  const parent = document.createElement(name);
  for (const piece of parseInline(text)) {
    if (piece.kind === "text") {
      parent.append(piece.text);
      continue;
    }
    const child = document.createElement(piece.kind);
    child.textContent = piece.text;
    parent.append(child);
  }
  return parent;
}

function heading(line) {
  const [, marks, text] = HEADING.exec(line);
  return { kind: "heading", level: marks.length, text };
}

function takeCode(lines, begin, [, mark, language], blocks) {
  let end = begin + 1;
  while (end < lines.length && !lines[end].trim().startsWith(mark)) end++;
  blocks.push({ kind: "code", language, text: lines.slice(begin + 1, end).join("\n") });
  return end + 1;
}

function takeList(lines, begin, blocks) {
  const ordered = ITEM.exec(lines[begin])[2] !== undefined;
  const list = { kind: "list", ordered, start: ordered ? Number(ITEM.exec(lines[begin])[2]) : 1, items: [] };
  let at = begin;
  for (; at < lines.length; at++) {
    const item = ITEM.exec(lines[at]);
    if (item && (item[2] !== undefined) === ordered) list.items.push(item[3]);
    else if (!item && /^\s+\S/.test(lines[at])) list.items[list.items.length - 1] += `\n${lines[at].trim()}`;
    else if (lines[at].trim() === "" && ITEM.test(lines[at + 1] ?? "")) continue;
    else break;
  }
  blocks.push(list);
  return at;
}

function takeParagraph(lines, begin, blocks) {
  let end = begin + 1;
  while (end < lines.length && lines[end].trim() !== "" && !startsBlock(lines[end])) end++;
  blocks.push({ kind: "paragraph", text: lines.slice(begin, end).join("\n") });
  return end;
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || ITEM.test(line);
}
