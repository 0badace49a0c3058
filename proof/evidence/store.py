"""
Rows of evidence: appended one by one, sealed once, rejected if a byte has changed.

    evidence/<run>/
        plan.toml pilot.json texts.txt run.json identity.json environment.json   from the start on
        rows/<restart>.csv starts.csv                                            while it runs
        requests.parquet restarts.csv verdict.json report.html MANIFEST.sha256   at the end

Appending needs the standard library alone; the load generator does nothing else here.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from atomic import atomic_file, write_text_atomic
from command import CommandError

if TYPE_CHECKING:
    import pyarrow as pa

INVALID = 3
"""Exit code of evidence that cannot be judged, the same as of an invalid run."""
MANIFEST = "MANIFEST.sha256"
REQUESTS = "requests.parquet"
REQUIRED = (
    "plan.toml",
    "texts.txt",
    "run.json",
    "environment.json",
    "identity.json",
    "starts.csv",
    REQUESTS,
    "restarts.csv",
    "verdict.json",
    "report.html",
)
"""Files that every sealed run has."""
ROWS_SCHEMA_VERSION = 4
"""Version of the columns, in the metadata of requests.parquet; versions 1 and 2 have none there."""
_OLD_NAMES = {"slice": "slice_id", "tuple": "block_id", "place": "position"}
"""Columns that were renamed in version 3, and their names since."""


class EvidenceRejected(CommandError):
    """The evidence cannot be judged; the message names the file and the contradiction."""

    exit_code = INVALID


UNKNOWN = -1.0
"""A number that was not observed."""


@dataclass(frozen=True, slots=True)
class Row:
    """One request. Times are integers of one monotonic clock, or microseconds from the server."""

    run: str
    level: str
    restart: int
    instance: str
    slice_id: int
    """At `unloaded` and `mixed` the kind of block: -1 warm-up, 0 plain, 1 control, 2 closing.
    Elsewhere the number of the slice.
    """
    block_id: int
    """Number of the block: one text that is sent once to every arm. In slices, the number of the
    request in its set.
    """
    position: int
    """Position of the request in its block, or of the slice in its set."""
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
    inference_cpu_us: float = UNKNOWN
    """CPU time of the inference of its batch; UNKNOWN if the server does not report it."""
    batch_id: int = -1
    """Number of its batch in the server's process; -1 if the server does not report it."""
    first_of_shape: int = -1
    """1 if its arm had not run a batch of that shape before, else 0; -1 if it is not reported."""
    label: str = ""
    """Label with the highest score; empty if the answer is no classification."""
    score: float = 0.0
    """Score of that label, with five digits."""
    score_count: int = -1
    """Number of labels that the answer scores; -1 if answers were not recorded."""
    score_checksum: float = 0.0
    """Weighted sum of all scores, with five digits (proof/plans/answers.py)."""


ADDED: Mapping[str, float | str] = {
    "inference_cpu_us": UNKNOWN,
    "batch_id": -1,
    "first_of_shape": -1,
    "label": "",
    "score": 0.0,
    "score_count": -1,
    "score_checksum": 0.0,
}
"""Columns that rows of earlier schemas do not have, and what they read as there."""
_ADDED_IN_4 = ("label", "score", "score_count", "score_checksum")
"""Those that schema 4 added; the others were added in schema 3."""


@dataclass(frozen=True)
class RestartRecord:
    """One start of the servers and what was observed around it: a line of starts.csv."""

    restart: int
    """Number of the start, dropped ones included."""
    slot: int
    """Number of restarts that counted before: the row of the load-order square."""
    load_order: str
    """Names of the arms in the order of loading, joined by spaces."""
    instance: str
    """X-Instance-Id of the server; several joined by spaces where each arm has its own server."""
    seconds: float
    """Duration from the start to the last answer."""
    generator_cpu_share: float
    """Share of a core that the load generator used at its busiest level; UNKNOWN if it failed."""
    throttled_us: int
    """Microseconds for which the cgroup was throttled meanwhile; 0 where that is not readable."""
    dropped: str
    """Reason why the restart does not count; empty if it does."""
    gpu_slowed: str = ""
    """Reasons why a GPU of the servers was slowed down, in NVML's words, joined by spaces.

    Empty in runs of versions that did not record it.
    """


ROW_FIELDS = tuple(f.name for f in fields(Row))
_TYPES = {f.name: str(f.type) for f in fields(Row)}


class RowFile:
    """A CSV file that rows are appended to; what was written survives a crash."""

    def __init__(self, path: Path) -> None:
        """Create the file with its header; FileExistsError if there is one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Unbuffered: a buffer would write at the end what a full disk refused before.
        self._file = path.open("xb", buffering=0)
        self._write(ROW_FIELDS)

    def append(self, row: Row) -> None:
        """Write the row; OSError, with half a line at most, where the disk is full."""
        self._write([getattr(row, name) for name in ROW_FIELDS])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, cells: Sequence[Any]) -> None:
        line = io.StringIO()
        csv.writer(line, lineterminator="\n").writerow(cells)
        content = line.getvalue().encode()
        if self._file.write(content) != len(content):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def read_columns(path: Path) -> dict[str, Any]:
    """Return the whole rows of one CSV file in the order of their schedule.

    Each column is an array, or a Categorical where few words occur often.
    """
    return _in_scheduled_order(_columns(_read_rows(path)))


def _in_scheduled_order(columns: dict[str, Any]) -> dict[str, Any]:
    """Sort rows, so that the first breach is the same in the CSV file and in the parquet file."""
    import numpy as np

    scheduled = columns["scheduled_ns"]
    if (scheduled[1:] >= scheduled[:-1]).all():
        return columns
    order = np.argsort(scheduled, kind="stable")
    return {name: values[order] for name, values in columns.items()}


def at_level(columns: dict[str, Any], level: str) -> dict[str, Any]:
    """Return the rows of one level; without a copy where they are contiguous, as in whole runs."""
    import numpy as np

    is_level = columns["level"] == level
    indices = np.flatnonzero(is_level)
    contiguous = len(indices) > 0 and indices[-1] - indices[0] + 1 == len(indices)
    chosen = slice(indices[0], indices[-1] + 1) if contiguous else is_level
    return {name: values[chosen] for name, values in columns.items()}


def _read_rows(path: Path) -> pa.Table:
    """Return the rows of one CSV file; a last line that was cut short is left out."""
    import pyarrow.csv as pa_csv

    content = path.read_bytes() if path.exists() else b""
    content = content[: content.rfind(b"\n") + 1]
    schema = row_schema()
    if content.count(b"\n") < 2:
        return schema.empty_table()
    old_types = {old: schema.field(new).type for old, new in _OLD_NAMES.items()}
    types = {field.name: field.type for field in schema} | old_types
    table = pa_csv.read_csv(
        io.BytesIO(content), convert_options=pa_csv.ConvertOptions(column_types=types)
    )
    return _with_new_names(table).cast(schema)


def _with_new_names(table: pa.Table) -> pa.Table:
    """Return a table with the columns of today's schema, whatever version wrote it."""
    import pyarrow as pa

    table = table.rename_columns([_OLD_NAMES.get(name, name) for name in table.column_names])
    schema = row_schema()
    for name, value in ADDED.items():
        if name not in table.column_names:
            column = pa.repeat(pa.scalar(value, schema.field(name).type), table.num_rows)
            table = table.append_column(schema.field(name), column)
    return table.select(schema.names)


def _columns(table: pa.Table) -> dict[str, Any]:
    """Return an array for each column; a Categorical where few words occur often."""
    import pyarrow as pa

    from proof.evidence.categorical import Categorical

    columns = {}
    for name in ROW_FIELDS:
        column = table[name].combine_chunks()
        if _TYPES[name] != "str" or name == "request_id":
            columns[name] = column.to_numpy(zero_copy_only=False)
            continue
        coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        columns[name] = Categorical(
            coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False)
        )
    return columns


def append_start(folder: Path, start: RestartRecord) -> None:
    """Append a line to starts.csv; a resumed run keeps the columns that it was begun with."""
    path = folder / "starts.csv"
    lines = io.StringIO()
    if path.exists():
        names = path.read_text(encoding="utf-8").partition("\n")[0].split(",")
    else:
        names = [f.name for f in fields(RestartRecord)]
    writer = csv.DictWriter(lines, names, extrasaction="ignore", lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    else:
        # A line that a full disk or a kill cut short is written again from the rows.
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    writer.writerow(asdict(start))
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(lines.getvalue())


def read_starts(folder: Path) -> list[RestartRecord]:
    """Return the lines of starts.csv.

    Raise EvidenceRejected if the file is missing, or holds a number that cannot be.
    """
    casts = {"int": int, "float": float, "str": str}
    types = {f.name: str(f.type) for f in fields(RestartRecord)}
    path = folder / "starts.csv"
    starts = []
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1].decode()
        for row in csv.DictReader(io.StringIO(whole)):
            values = {name: casts[types[name]](value) for name, value in row.items()}
            starts.append(RestartRecord(**values))
    except FileNotFoundError:
        raise EvidenceRejected(f"{folder} has no starts.csv.") from None
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None
    for start in starts:
        _check_numbers(path, start)
    return starts


def _check_numbers(path: Path, start: RestartRecord) -> None:
    for name in ("restart", "slot", "seconds", "generator_cpu_share", "throttled_us"):
        value = getattr(start, name)
        unknown = name == "generator_cpu_share" and value == UNKNOWN
        if not 0 <= value < math.inf and not unknown:
            raise EvidenceRejected(
                f"{path}: {name} = {value} of restart {start.restart} cannot be."
            )


def seal(folder: Path) -> None:
    """Turn the appended CSV files into one parquet file, with a row group for each restart.

    Rows that were sealed before stay in front, so that a run can be resumed. The CSV files are
    removed last: a seal that is interrupted is repeated and loses nothing.
    """
    import pyarrow.parquet as pq

    parts = sorted((folder / "rows").glob("*.csv"))
    sealed = folder / REQUESTS
    if not parts and not sealed.exists():
        raise EvidenceRejected(f"{folder} holds no rows; nothing was measured.")
    sealed_restarts = set(Requests(folder).restarts) if sealed.exists() else set()
    parts = [part for part in parts if int(part.stem) not in sealed_restarts]
    if parts:
        with (
            atomic_file(sealed) as draft,
            pq.ParquetWriter(draft, row_schema(), **parquet_options()) as writer,
        ):
            if sealed.exists():
                before = pq.ParquetFile(sealed)
                for group in range(before.num_row_groups):
                    table = _with_new_names(before.read_row_group(group))
                    writer.write_table(table.cast(row_schema()))
            for part in parts:
                table = _read_rows(part).sort_by("scheduled_ns")
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
    shutil.rmtree(folder / "rows", ignore_errors=True)


def parquet_options() -> dict[str, Any]:
    """Return the writer's options for the smallest lossless file.

    A row takes 35 bytes, where Parquet's defaults take 56.
    """
    rising = ("scheduled_ns", "sent_ns", "done_ns", "block_id")
    encodings = dict.fromkeys(rising, "DELTA_BINARY_PACKED") | {"request_id": "DELTA_BYTE_ARRAY"}
    return {
        "compression": "zstd",
        "compression_level": 9,
        "column_encoding": encodings,
        "use_dictionary": [name for name in ROW_FIELDS if name not in encodings],
    }


class Requests:
    """The rows of a sealed run, read one restart at a time: a long run does not fit into memory.

    Columns are those of the newest schema, whatever version wrote them.
    """

    def __init__(self, folder: Path) -> None:
        """Open the file; EvidenceRejected if it is missing, unreadable or of another schema."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = folder / REQUESTS
        if not self.path.is_file():
            raise EvidenceRejected(f"{folder} has no {REQUESTS}; the run was not sealed.")
        try:
            names = set(pq.read_schema(self.path).names)
            repeating = [
                name
                for name, kind in _TYPES.items()
                if kind == "str" and name != "request_id" and name in names
            ]
            self._file = pq.ParquetFile(self.path, read_dictionary=repeating)
            self._check_schema(pa)
            restarts_by_group = [
                self._file.read_row_group(i, columns=["restart"])["restart"]
                for i in range(self._file.num_row_groups)
            ]
        except (pa.ArrowInvalid, OSError) as error:
            raise EvidenceRejected(f"{self.path} cannot be read: {error}.") from None
        if any(restarts.null_count for restarts in restarts_by_group):
            raise EvidenceRejected(f"{self.path}: column 'restart' has empty cells.")
        self._groups: dict[int, list[int]] = {}
        for i, restarts in enumerate(restarts_by_group):
            for restart in restarts.unique().to_pylist():
                self._groups.setdefault(restart, []).append(i)

    @property
    def restarts(self) -> list[int]:
        """Numbers of the restarts that have rows, sorted."""
        return sorted(self._groups)

    def __len__(self) -> int:
        return int(self._file.metadata.num_rows)

    def of(self, restart: int) -> dict[str, Any]:
        """Return the rows of one restart in the order of their schedule.

        Each column is an array or a Categorical. Raise EvidenceRejected if a cell is empty.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        groups = self._groups.get(restart, [])
        try:
            table = self._file.read_row_groups(groups) if groups else row_schema().empty_table()
            if pc.unique(table["restart"]).to_pylist() not in ([], [restart]):
                table = table.filter(pc.field("restart") == restart)
            table = _with_new_names(table).unify_dictionaries()
        except (pa.ArrowInvalid, OSError) as error:
            raise EvidenceRejected(f"{self.path} cannot be read: {error}.") from None
        for name in ROW_FIELDS:
            if table[name].null_count:
                raise EvidenceRejected(f"{self.path}: column {name!r} has empty cells.")
        return _in_scheduled_order(_columns(table))

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for restart in self.restarts:
            yield restart, self.of(restart)

    def _check_schema(self, pa: Any) -> None:
        schema = self._file.schema_arrow
        version = (schema.metadata or {}).get(b"rows_schema_version", b"").decode()
        if version not in ("", "3", str(ROWS_SCHEMA_VERSION)):
            raise EvidenceRejected(
                f"{self.path}: its rows have schema {version}, this version reads up to"
                f" {ROWS_SCHEMA_VERSION}; judge it with the version that wrote it."
            )
        types = {_OLD_NAMES.get(field.name, field.name): field.type for field in schema}
        for column in row_schema():
            may_lack = {"": tuple(ADDED), "3": _ADDED_IN_4}.get(version, ())
            if column.name not in types and column.name in may_lack:
                continue
            if column.name not in types:
                raise EvidenceRejected(
                    f"{self.path} has no column {column.name!r}: unknown schema."
                )
            kind = types[column.name]
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if kind != column.type:
                raise EvidenceRejected(
                    f"{self.path}: column {column.name!r} is {kind}, not {column.type}."
                )


def row_schema() -> pa.Schema:
    """Return the columns of requests.parquet, their types, and the version in the metadata."""
    import pyarrow as pa

    types = {"int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    return pa.schema(
        [(name, types[_TYPES[name]]) for name in ROW_FIELDS],
        metadata={"rows_schema_version": str(ROWS_SCHEMA_VERSION)},
    )


def write_manifest(folder: Path) -> None:
    """Write MANIFEST.sha256 over every file of the run, in the form that `sha256sum -c` reads."""
    lines = [
        f"{_sha256(path)}  {path.name}"
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    ]
    # Written last and atomically: a folder with a manifest is complete.
    write_text_atomic(folder / MANIFEST, "\n".join(lines) + "\n")


def check_manifest(folder: Path) -> None:
    """Raise EvidenceRejected if a file of the run is missing, changed or not listed."""
    path = folder / MANIFEST
    if not path.is_file():
        raise EvidenceRejected(f"{folder} has no {MANIFEST}; it is no sealed run.")
    listed = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        listed[name] = digest
    for name, digest in listed.items():
        if not (folder / name).is_file():
            raise EvidenceRejected(f"{folder} lacks {name}, which {MANIFEST} lists.")
        if _sha256(folder / name) != digest:
            raise EvidenceRejected(f"{folder / name} has changed since the run was sealed.")
    for name in REQUIRED:
        if name not in listed:
            raise EvidenceRejected(
                f"{folder}: {MANIFEST} does not list {name}, which every run has."
            )
    for file in folder.iterdir():
        if file.name not in listed and file.name != MANIFEST:
            raise EvidenceRejected(f"{file} is not listed in {MANIFEST}.")


def read_manifest_digest(folder: Path) -> str:
    """Return the SHA-256 of a run's MANIFEST.sha256, which stands for the whole run."""
    path = folder / MANIFEST
    if not path.is_file():
        raise EvidenceRejected(f"{folder} has no {MANIFEST}; it is no sealed run.")
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a CSV file with a header and a line for each mapping."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
