// Files of texts: plain lines, CSV (RFC 4180) and TSV.

const TEXT_COLUMNS = ["text", "sentence", "review", "input", "content", "comment", "message"];

// {rows, isTable, hasHeader, column}: cells by row, and which column probably holds the texts.
export function readFile(name, content) {
  const extension = name.toLowerCase().split(".").pop();
  if (extension !== "csv" && extension !== "tsv") {
    const rows = content.split(/\r?\n/).map(line => [line]);
    return {rows, isTable: false, hasHeader: false, column: 0};
  }
  const delimiter = extension === "tsv" ? "\t" : likelyDelimiter(content);
  const rows = parseTable(content, delimiter).filter(cells => cells.some(cell => cell.trim()));
  const first = (rows[0] ?? []).map(cell => cell.trim().toLowerCase());
  const named = TEXT_COLUMNS.map(title => first.indexOf(title)).find(index => index >= 0);
  return {rows, isTable: true, hasHeader: named !== undefined, column: named ?? longestColumn(rows)};
}

function likelyDelimiter(content) {
  const line = content.split(/\r?\n/, 1)[0];
  const count = delimiter => line.split(delimiter).length;
  return [",", ";", "\t"].reduce((best, each) => count(each) > count(best) ? each : best);
}

function longestColumn(rows) {
  const lengths = [];
  for (const cells of rows.slice(0, 100)) {
    cells.forEach((cell, i) => { lengths[i] = (lengths[i] ?? 0) + cell.length; });
  }
  return Math.max(0, lengths.indexOf(Math.max(...lengths)));
}

// Cells may be quoted, and then hold delimiters, line ends and doubled quotes.
export function parseTable(content, delimiter) {
  const rows = [[]];
  let cell = "", isQuoted = false;
  const source = content.replace(/^\uFEFF/, "");
  for (let i = 0; i < source.length; i++) {
    const letter = source[i];
    if (isQuoted) {
      if (letter !== '"') cell += letter;
      else if (source[i + 1] === '"') { cell += '"'; i++; }
      else isQuoted = false;
    } else if (letter === '"' && cell === "") isQuoted = true;
    else if (letter === delimiter) { rows.at(-1).push(cell); cell = ""; }
    else if (letter === "\n") { rows.at(-1).push(cell.replace(/\r$/, "")); cell = ""; rows.push([]); }
    else cell += letter;
  }
  rows.at(-1).push(cell);
  return rows;
}

export function toCsv(rows) {
  // Spreadsheets take a cell that begins like this for a formula, and read UTF-8 by its mark.
  const safe = cell => typeof cell === "string" && /^[=+@\t-]/.test(cell) ? `'${cell}` : String(cell);
  const quoted = cell => /[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell;
  return "\uFEFF" + rows.map(cells => cells.map(cell => quoted(safe(cell))).join(",")).join("\r\n") + "\r\n";
}
