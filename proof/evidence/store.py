"""
Rows of evidence: appended as they come, sealed once, refused if a byte has changed.

    evidence/<run>/  plan.toml pilot.json texts.txt run.json identity.json environment.json
        written at the start
                     rows/<restart>.csv  starts.csv                        appended while it runs
                     requests.parquet restarts.csv verdict.json report.html MANIFEST.sha256   at the
                         end

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


class EvidenceRejected(CommandError):
    """The evidence cannot be judged; the message names the thing."""

    exit_code = INVALID


@dataclass(frozen=True, slots=True)
class Row:
    """One request. Times are integers of one monotonic clock, or microseconds as the server gave
    them.
    """

    run: str
    level: str
    restart: int
    instance: str
    slice: int
    """`unloaded`, `mixed`: -1 warm-up, 0 plain tuples, 1 control tuples, 2 closing block. Elsewhere
    the slice's number.
    """
    tuple: int
    """Requests with one number are one text sent once to every arm, or, in slices, its place in the
    set.
    """
    place: int
    """When in its tuple, or its slice when in its set, had its turn."""
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


UNKNOWN = -1.0


@dataclass(frozen=True)
class RestartRecord:
    """One start of the server and what was seen around it."""

    restart: int
    slot: int
    """Its row of the load-order square."""
    load_order: str
    """Arm names, first loaded first, joined by spaces."""
    instance: str
    """Who answered: X-Instance-Id, several joined by spaces where arms are servers of their own."""
    seconds: float
    generator_cpu_share: float
    """Of a core, at the level where it was highest; UNKNOWN if the generator did not come to its
    end.
    """
    throttled_us: int
    """By how much the cgroup was throttled meanwhile; 0 where none is readable."""
    dropped: str
    """Why the whole restart does not count; empty if it does."""
    gpu_slowed: str = ""
    """Why a GPU of the servers was slowed down meanwhile, as NVML says it, joined by spaces; empty
    in runs that were begun before it was told.
    """


ROW_FIELDS = tuple(f.name for f in fields(Row))
_KINDS = {f.name: str(f.type) for f in fields(Row)}


class RowFile:
    """Appends rows to a CSV file; what was written survives whatever happens next."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        # Unbuffered: what was not written when the disk was full must not come up again at the end.
        self._file = path.open("xb", buffering=0)
        self._write(ROW_FIELDS)

    def append(self, row: Row) -> None:
        """Writes the row; OSError, with half a line at most, where the disk is full."""
        self._write([getattr(row, name) for name in ROW_FIELDS])

    def close(self) -> None:
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
    return _in_due_order(_columns(_read_rows(path)))


def _in_due_order(columns: dict[str, Any]) -> dict[str, Any]:
    """Whoever asks twice, of the CSV or of the parquet file, must find the same row first."""
    import numpy as np

    scheduled = columns["scheduled_ns"]
    if (scheduled[1:] >= scheduled[:-1]).all():
        return columns
    due = np.argsort(scheduled, kind="stable")
    return {name: values[due] for name, values in columns.items()}


def at_level(columns: dict[str, Any], level: str) -> dict[str, Any]:
    """The rows of one level; without a copy where, as in every whole run, they lie together."""
    import numpy as np

    here = columns["level"] == level
    places = np.flatnonzero(here)
    together = len(places) > 0 and places[-1] - places[0] + 1 == len(places)
    chosen = slice(places[0], places[-1] + 1) if together else here
    return {name: values[chosen] for name, values in columns.items()}


def _read_rows(path: Path) -> pa.Table:
    """The rows of one CSV file; a last line that an interruption cut short is no row."""
    import pyarrow.csv as pa_csv

    content = path.read_bytes() if path.exists() else b""
    content = content[: content.rfind(b"\n") + 1]
    schema = row_schema()
    if content.count(b"\n") < 2:
        return schema.empty_table()
    options = pa_csv.ConvertOptions(column_types=schema)
    return pa_csv.read_csv(io.BytesIO(content), convert_options=options)


def _columns(table: pa.Table) -> dict[str, Any]:
    """An array a column; Categorical where few words occur often."""
    import pyarrow as pa

    from proof.evidence.categorical import Categorical

    columns = {}
    for name in ROW_FIELDS:
        column = table[name].combine_chunks()
        if _KINDS[name] != "str" or name == "request_id":
            columns[name] = column.to_numpy(zero_copy_only=False)
            continue
        coded = column if pa.types.is_dictionary(column.type) else column.dictionary_encode()
        columns[name] = Categorical(
            coded.dictionary.to_pylist(), coded.indices.to_numpy(zero_copy_only=False)
        )
    return columns


def append_start(folder: Path, start: RestartRecord) -> None:
    path = folder / "starts.csv"
    lines = io.StringIO()
    # A run that goes on keeps the columns that it was begun with.
    names = (
        path.read_text(encoding="utf-8").partition("\n")[0].split(",")
        if path.exists()
        else [f.name for f in fields(RestartRecord)]
    )
    writer = csv.DictWriter(lines, names, extrasaction="ignore", lineterminator="\n")
    if not path.exists():
        writer.writeheader()
    else:
        # A line that a full disk or a kill cut short is told again from the rows.
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            os.truncate(path, content.rfind(b"\n") + 1)
    writer.writerow(asdict(start))
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(lines.getvalue())


def read_starts(folder: Path) -> list[RestartRecord]:
    """The lines of starts.csv; EvidenceRejected if it is missing or a number in it is none."""
    casts = {"int": int, "float": float, "str": str}
    kinds = {f.name: str(f.type) for f in fields(RestartRecord)}
    path = folder / "starts.csv"
    try:
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1].decode()
        starts = [
            RestartRecord(**{name: casts[kinds[name]](value) for name, value in row.items()})
            for row in csv.DictReader(io.StringIO(whole))
        ]
    except FileNotFoundError:
        raise EvidenceRejected(f"{folder} has no starts.csv.") from None
    except (KeyError, TypeError, ValueError) as error:
        raise EvidenceRejected(f"{path} cannot be read: {error}.") from None
    for start in starts:
        for name in ("restart", "slot", "seconds", "generator_cpu_share", "throttled_us"):
            value = getattr(start, name)
            if not (0 <= value < math.inf or (name == "generator_cpu_share" and value == UNKNOWN)):
                raise EvidenceRejected(
                    f"{path}: {name} = {value} of restart {start.restart} cannot be."
                )
    return starts


def seal(folder: Path) -> None:
    """Turns the appended CSV files into one parquet file, one row group a restart, and only then
    removes them.

    Rows that were sealed before stay in front: an interrupted run goes on. So does one that was
    interrupted in here, between the new file and the removal of the old ones.
    """
    import pyarrow.parquet as pq

    parts = sorted((folder / "rows").glob("*.csv"))
    sealed = folder / REQUESTS
    if not parts and not sealed.exists():
        raise EvidenceRejected(f"{folder} holds no rows; nothing was measured.")
    there = set(Requests(folder).restarts) if sealed.exists() else set()
    parts = [part for part in parts if int(part.stem) not in there]
    if parts:
        with (
            atomic_file(sealed) as draft,
            pq.ParquetWriter(draft, row_schema(), **parquet_options()) as writer,
        ):
            if sealed.exists():
                before = pq.ParquetFile(sealed)
                for group in range(before.num_row_groups):
                    writer.write_table(before.read_row_group(group).cast(row_schema()))
            for part in parts:
                table = _read_rows(part).sort_by("scheduled_ns")
                if table.num_rows:
                    writer.write_table(table, row_group_size=table.num_rows)
    shutil.rmtree(folder / "rows", ignore_errors=True)


def parquet_options() -> dict[str, Any]:
    """How rows take the least room without loss: 35 bytes each, where Parquet's defaults
    take 56.
    """
    rising = ("scheduled_ns", "sent_ns", "done_ns", "tuple")
    encodings = dict.fromkeys(rising, "DELTA_BINARY_PACKED") | {"request_id": "DELTA_BYTE_ARRAY"}
    return {
        "compression": "zstd",
        "compression_level": 9,
        "column_encoding": encodings,
        "use_dictionary": [name for name in ROW_FIELDS if name not in encodings],
    }


class Requests:
    """The rows of a sealed run, read a restart at a time: a long run does not fit into memory
    whole.
    """

    def __init__(self, folder: Path) -> None:
        """EvidenceRejected if the file is missing, cannot be read, or has other columns."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = folder / REQUESTS
        if not self.path.is_file():
            raise EvidenceRejected(f"{folder} has no {REQUESTS}; the run was not sealed.")
        try:
            repeating = [
                name for name, kind in _KINDS.items() if kind == "str" and name != "request_id"
            ]
            self._file = pq.ParquetFile(self.path, read_dictionary=repeating)
            self._check_schema(pa)
            groups = [
                self._file.read_row_group(i, columns=["restart"])["restart"]
                for i in range(self._file.num_row_groups)
            ]
        except (pa.ArrowInvalid, OSError) as error:
            raise EvidenceRejected(f"{self.path} cannot be read: {error}.") from None
        if any(restarts.null_count for restarts in groups):
            raise EvidenceRejected(f"{self.path}: column 'restart' has empty cells.")
        self._groups: dict[int, list[int]] = {}
        for i, restarts in enumerate(groups):
            for restart in restarts.unique().to_pylist():
                self._groups.setdefault(restart, []).append(i)

    @property
    def restarts(self) -> list[int]:
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
            table = table.unify_dictionaries()
        except (pa.ArrowInvalid, OSError) as error:
            raise EvidenceRejected(f"{self.path} cannot be read: {error}.") from None
        for name in ROW_FIELDS:
            if table[name].null_count:
                raise EvidenceRejected(f"{self.path}: column {name!r} has empty cells.")
        return _in_due_order(_columns(table))

    def __iter__(self) -> Iterator[tuple[int, dict[str, Any]]]:
        for restart in self.restarts:
            yield restart, self.of(restart)

    def _check_schema(self, pa: Any) -> None:
        found = self._file.schema_arrow
        for column in row_schema():
            if column.name not in found.names:
                raise EvidenceRejected(
                    f"{self.path} has no column {column.name!r}: unknown schema."
                )
            kind = found.field(column.name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if kind != column.type:
                raise EvidenceRejected(
                    f"{self.path}: column {column.name!r} is {kind}, not {column.type}."
                )


def row_schema() -> pa.Schema:
    """The columns of requests.parquet and their types."""
    import pyarrow as pa

    kinds = {"int": pa.int64(), "float": pa.float64(), "str": pa.string()}
    return pa.schema([(name, kinds[_KINDS[name]]) for name in ROW_FIELDS])


def write_manifest(folder: Path) -> None:
    """MANIFEST.sha256 over every file of the run, in the form `sha256sum -c` reads."""
    lines = [
        f"{_sha256(path)}  {path.name}"
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name != MANIFEST
    ]
    # Last and at once: a folder with a manifest is whole.
    write_text_atomic(folder / MANIFEST, "\n".join(lines) + "\n")


def check_manifest(folder: Path) -> None:
    """EvidenceRejected if a file is missing, changed or not accounted for."""
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
    for found in folder.iterdir():
        if found.name not in listed and found.name != MANIFEST:
            raise EvidenceRejected(f"{found} is not listed in {MANIFEST}.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
