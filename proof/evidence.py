"""
Rows of evidence: appended as they come, sealed once, refused if a byte has changed.

    evidence/<run>/  plan.toml texts.txt run.json identity.json environment.json   written at the start
                     rows/<restart>.csv  starts.csv                        appended while it runs
                     requests.parquet restarts.csv verdict.json report.html MANIFEST.sha256   at the end

Appending needs the standard library alone; the load generator does nothing else here.
"""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command import CommandError

if TYPE_CHECKING:
    import pyarrow as pa

INVALID = 3
MANIFEST = "MANIFEST.sha256"
REQUESTS = "requests.parquet"
REQUIRED = (
    "plan.toml", "texts.txt", "run.json", "environment.json", "identity.json", "starts.csv", REQUESTS, "restarts.csv",
    "verdict.json", "report.html",
)


class Refused(CommandError):
    """The evidence cannot be judged; the message names the thing."""

    exit_code = INVALID


@dataclass(frozen=True, slots=True)
class Row:
    """One request. Times are integers of one monotonic clock, or microseconds as the server gave them."""

    run: str
    level: str
    restart: int
    instance: str
    slice: int
    tuple: int
    place: int
    request_id: str
    arm: str
    load_position: int
    text_id: int
    chars: int
    tokens: int
    scheduled_ns: int
    sent_ns: int
    done_ns: int
    status: int
    tokenize_us: float
    queue_us: float
    inference_us: float
    total_us: float
    batch_size: int
    batch_tokens: int
    bytes: int


@dataclass(frozen=True)
class Start:
    """One start of the server and what was seen around it."""

    restart: int
    slot: int
    """Its row of the load-order square."""
    load_order: str
    """Arm names, first loaded first, joined by spaces."""
    instance: str
    seconds: float
    generator_cpu_share: float
    throttled_us: int
    """By how much the cgroup was throttled meanwhile; 0 where none is readable."""
    dropped: str
    """Why the whole restart does not count; empty if it does."""


ROW_FIELDS = tuple(f.name for f in fields(Row))
_KINDS = {f.name: str(f.type) for f in fields(Row)}


class RowFile:
    """Appends rows to a CSV file; what was written survives whatever happens next."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("x", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(ROW_FIELDS)

    def append(self, row: Row) -> None:
        self._writer.writerow([getattr(row, name) for name in ROW_FIELDS])
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_columns(path: Path) -> dict[str, Any]:
    """The whole rows of one CSV file, a numpy array a column; a last line cut short is left out."""
    import numpy as np

    rows: list[list[str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in list(csv.reader(file))[1:] if len(row) == len(ROW_FIELDS)]
    kinds = {"int": np.int64, "float": np.float64, "str": np.str_}
    return {name: np.array([row[i] for row in rows], dtype=np.str_).astype(kinds[_KINDS[name]]) for i, name in enumerate(ROW_FIELDS)}


def append_start(folder: Path, start: Start) -> None:
    path = folder / "starts.csv"
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Start)], lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(asdict(start))


def read_starts(folder: Path) -> list[Start]:
    casts = {"int": int, "float": float, "str": str}
    kinds = {f.name: str(f.type) for f in fields(Start)}
    try:
        with (folder / "starts.csv").open(newline="", encoding="utf-8") as file:
            return [Start(**{name: casts[kinds[name]](value) for name, value in row.items()}) for row in csv.DictReader(file)]
    except FileNotFoundError:
        raise Refused(f"{folder} has no starts.csv.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise Refused(f"{folder / 'starts.csv'} cannot be read: {error}.") from None


def seal(folder: Path) -> None:
    """Turns the appended CSV files into one parquet file, and only then removes them."""
    import pyarrow as pa
    import pyarrow.csv as pa_csv
    import pyarrow.parquet as pq

    parts = sorted((folder / "rows").glob("*.csv"))
    if not parts:
        raise Refused(f"{folder} holds no rows; nothing was measured.")
    # A line that an interruption cut short is no row.
    reading = pa_csv.ParseOptions(invalid_row_handler=lambda row: "skip")
    options = pa_csv.ConvertOptions(column_types=_arrow_types(pa))
    tables = [pa_csv.read_csv(part, parse_options=reading, convert_options=options) for part in parts]
    pq.write_table(pa.concat_tables(tables), folder / f".{REQUESTS}", compression="zstd")
    (folder / f".{REQUESTS}").rename(folder / REQUESTS)
    shutil.rmtree(folder / "rows")


def read_requests(folder: Path) -> pa.Table:
    """All rows as an Arrow table; Refused if columns are missing or of another type."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = folder / REQUESTS
    if not path.is_file():
        raise Refused(f"{folder} has no {REQUESTS}; the run was not sealed.")
    try:
        table = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise Refused(f"{path} cannot be read: {error}.") from None
    wanted = pa.schema(list(_arrow_types(pa).items()))
    for column in wanted:
        if column.name not in table.column_names:
            raise Refused(f"{path} has no column {column.name!r}: unknown schema.")
        if table.schema.field(column.name).type != column.type:
            raise Refused(f"{path}: column {column.name!r} is {table.schema.field(column.name).type}, not {column.type}.")
        if table[column.name].null_count:
            raise Refused(f"{path}: column {column.name!r} has empty cells.")
    return table


def _arrow_types(pa: Any) -> dict[str, Any]:
    kinds = {"int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    return {name: kinds[_KINDS[name]] for name in ROW_FIELDS}


def write_manifest(folder: Path) -> None:
    """MANIFEST.sha256 over every file of the run, in the form `sha256sum -c` reads."""
    lines = [f"{_sha256(path)}  {path.name}" for path in sorted(folder.iterdir()) if path.is_file() and path.name != MANIFEST]
    (folder / MANIFEST).write_text("\n".join(lines) + "\n")


def check_manifest(folder: Path) -> None:
    """Refused if a file is missing, changed or not accounted for."""
    path = folder / MANIFEST
    if not path.is_file():
        raise Refused(f"{folder} has no {MANIFEST}; it is no sealed run.")
    listed = {}
    for line in path.read_text().splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    for name, digest in listed.items():
        if not (folder / name).is_file():
            raise Refused(f"{folder} lacks {name}, which {MANIFEST} lists.")
        if _sha256(folder / name) != digest:
            raise Refused(f"{folder / name} has changed since the run was sealed.")
    for name in REQUIRED:
        if name not in listed:
            raise Refused(f"{folder}: {MANIFEST} does not list {name}, which every run has.")
    for found in folder.iterdir():
        if found.name not in listed and found.name != MANIFEST:
            raise Refused(f"{found} is not listed in {MANIFEST}.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
