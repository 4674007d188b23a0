// A little Markdown, first as plain data and then as elements. Text only ever becomes text: there is no way from an
// answer to markup, to an address, or to a script.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})\s+(.+?)\s*#*$/;
const ITEM = /^(\s*)(?:[-*+]|(\d{1,9})[.)])\s+(.*)$/;
const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|(\*\*|__)(?=\S)([\s\S]*?\S)\3|(\*|(?<!\w)_)(?=\S)([^*_]*?\S)\5(?!\w)/;

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

/** Pieces of a line: `{kind: "text" | "code" | "strong" | "em", text}`. */
export function parseInline(text) {
  const pieces = [];
  let rest = text;
  for (let match; (match = INLINE.exec(rest)) !== null; ) {
    if (match.index > 0) pieces.push({ kind: "text", text: rest.slice(0, match.index) });
    if (match[1]) pieces.push({ kind: "code", text: match[2].replace(/^ (.*) $/s, "$1") });
    else if (match[3]) pieces.push({ kind: "strong", text: match[4] });
    else pieces.push({ kind: "em", text: match[6] });
    rest = rest.slice(match.index + match[0].length);
  }
  if (rest !== "") pieces.push({ kind: "text", text: rest });
  return pieces;
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
