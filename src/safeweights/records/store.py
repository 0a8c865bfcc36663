"""A folder of measured cells: one JSON file per record, and the pictures that belong to them. No torch."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safeweights.core.errors import UserError
from safeweights.records.record import Artefact, Record

if TYPE_CHECKING:
    from PIL import Image

KEY = ("kind", "model", "reference", "method", "concept", "attack", "seed", "detector", "sampling", "settings")
"""What makes two records the same cell; adding the second replaces the first."""

TIMES = frozenset({"seconds", "peak_memory_gb"})
"""Names of what differs between two runs of the same cell, wherever they stand outside ``provenance["time"]``."""

_MEASUREMENT = (
    'STRUCT("name" VARCHAR, "value" DOUBLE, n BIGINT, "interval" DOUBLE[], better VARCHAR, unit VARCHAR, '
    "reference DOUBLE, why VARCHAR)[]"
)
_DOUBT = 'STRUCT("name" VARCHAR, explanation VARCHAR)[]'
_ARTEFACT = (
    'STRUCT(path VARCHAR, "role" VARCHAR, prompt VARCHAR, seed BIGINT, detected BOOLEAN, score DOUBLE, "group" BIGINT, '
    "step BIGINT)[]"
)
_COLUMNS = {
    "file": "VARCHAR",
    "stamp": "VARCHAR",
    **dict.fromkeys(("kind", "status", "model", "reference", "method", "concept", "concept_kind", "attack"), "VARCHAR"),
    "seed": "BIGINT",
    **dict.fromkeys(("detector", "sampling", "settings", "details", "provenance"), "JSON"),
    "measurements": _MEASUREMENT,
    "doubts": _DOUBT,
    "artefacts": _ARTEFACT,
    "error": "VARCHAR",
    "schema": "INTEGER",
}
_JSON = tuple(name for name, kind in _COLUMNS.items() if kind == "JSON")
# The columns of a cell that every row of its measurements, doubts and pictures carries as well.
_CELL = 'r.file, r.kind, r.status, r.model, r."method", r.concept, r.concept_kind, r.attack, r.seed AS cell_seed'
_INDEX = ".index-1.parquet"
"""What the files of a store hold, in columns: kept beside them and brought up to date by each query. Safe to delete."""

# Pooled over seeds as in ``bench.leaderboard``: successes over all trials, Wilson's interval.
_LEADERBOARD = """
CREATE MACRO wilson(k, n) AS [
    greatest(0, ((k + 1.920729) - 1.959964 * sqrt(k * (n - k) / n + 0.960365)) / (n + 3.841459)),
    least(1, ((k + 1.920729) + 1.959964 * sqrt(k * (n - k) / n + 0.960365)) / (n + 3.841459))];
CREATE VIEW leaderboard AS
WITH good AS (SELECT * FROM measurements WHERE status = 'ok' AND "value" IS NOT NULL),
rates AS (
    SELECT "method", concept, attack, round(sum("value" * n)) AS k, sum(n) AS n
    FROM good WHERE kind = 'attack' AND "name" = 'asr' GROUP BY ALL HAVING sum(n) > 0),
worst AS (
    SELECT "method", concept, arg_max(attack, k / n) AS attack, arg_max(k, k / n) AS k, arg_max(n, k / n) AS n
    FROM rates GROUP BY ALL),
rest AS (
    SELECT "method", concept, any_value(concept_kind) AS concept_kind, count(DISTINCT cell_seed) AS seeds,
        avg(reference) FILTER ("name" = 'concept_rate') AS before,
        sum("value" * n) FILTER ("name" = 'concept_rate') / sum(n) FILTER ("name" = 'concept_rate') AS "after",
        avg("value") FILTER ("name" = 'retention_relative') AS retention,
        avg("value") FILTER ("name" = 'clip_score') AS clip_score,
        avg("value") FILTER ("name" = 'frechet_distance') AS frechet_distance,
        avg("value") FILTER ("name" = 'seconds' AND kind = 'protect') AS seconds
    FROM good GROUP BY "method", concept)
SELECT rest.* EXCLUDE (retention, clip_score, frechet_distance, seconds), worst.attack AS strongest_attack,
    worst.k / worst.n AS asr, wilson(worst.k, worst.n) AS asr_interval, worst.n AS asr_n,
    retention, clip_score, frechet_distance, seconds
FROM rest LEFT JOIN worst USING ("method", concept) ORDER BY asr, "method", concept
"""
_EXPORTED = """
SELECT r.file, r.kind, r.status, r.model, r.reference, r."method", r.concept, r.concept_kind, r.attack, r.seed,
    m."name" AS measurement, m."value", m."interval"[1] AS low, m."interval"[2] AS high, m.n, m.unit, m.better,
    m.reference AS before_protection, m.why, array_to_string(list_transform(r.doubts, lambda d: d."name"), ' ') AS doubts,
    r.error, r.detector, r.sampling, r.settings, r.provenance
FROM records AS r LEFT JOIN measurements AS m USING (file) ORDER BY r.file, m."name"
"""
# Text that a spreadsheet would take for a formula.
_FORMULA = "'^[=+\\-@\\t\\r]'"


class Store:
    """The records of a folder: cells in ``records/``, pictures in ``artefacts/``.

    Every file is written under a temporary name, synced and renamed: a kill at any moment leaves whole files only.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.cells = self.folder / "records"

    def path(self, record: Record) -> Path:
        """Where this record's cell lives. Equal keys (see ``KEY``), and only they, share a file."""
        key = json.dumps([getattr(record, name) for name in KEY], sort_keys=True, default=_plain)
        readable = "-".join(part for part in (record.kind, record.concept, record.method, record.attack) if part)
        slug = re.sub(r"[^a-z0-9]+", "-", readable.lower()).strip("-")[:80].strip("-")
        return self.cells / f"{slug}-{_digest(key.encode())[:16]}.json"

    def add(self, record: Record) -> Path:
        """Write one record; the same cell is replaced. Raises ValueError for NaN and infinity: they measure nothing."""
        path = self.path(record)
        text = json.dumps(record.to_json(), indent=1, ensure_ascii=False, allow_nan=False, default=_plain)
        # Half a surrogate pair can come out of a tokenizer; it has no UTF-8.
        _write(path, text.encode("utf-8", errors="replace"))
        return path

    def find(self, record: Record) -> Record | None:
        """What the store holds for this record's cell, or None: a resumed run asks before it measures again."""
        path = self.path(record)
        return _read(path) if path.is_file() else None

    def records(self) -> list[Record]:
        """All records, by file name. Raises UserError that names the file for one that cannot be read."""
        return [_read(path) for path in self._files()]

    def save_artefact(
        self,
        image: Image.Image | Any,
        *,
        role: str,
        prompt: str,
        seed: int,
        group: int = 0,
        detected: bool | None = None,
        score: float | None = None,
        step: int | None = None,
    ) -> Artefact:
        """Write a picture as PNG, named by its content so that equal pictures are kept once.

        ``image`` is a PIL image or an array: (H, W, 3) or (3, H, W), uint8, or float in [0, 1].
        """
        data = io.BytesIO()
        _picture(image).save(data, format="PNG")
        digest = _digest(data.getvalue())
        relative = Path("artefacts", digest[:2], f"{digest[:24]}.png")
        if not (self.folder / relative).is_file():
            _write(self.folder / relative, data.getvalue())
        return Artefact(
            path=relative.as_posix(), role=role, prompt=prompt, seed=seed, group=group, detected=detected, score=score, step=step
        )

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Rows of a SQL query (DuckDB) over ``records``, ``measurements``, ``doubts``, ``artefacts`` and ``leaderboard``.

        The query sees these and nothing else: no other file, no network. Raises UserError for one that DuckDB refuses.
        """
        import duckdb

        with _database([("", self)]) as database:
            try:
                result = database.execute(sql)
                columns = [column[0] for column in result.description or ()]
                return [dict(zip(columns, row, strict=True)) for row in result.fetchall()]
            except duckdb.Error as error:
                raise UserError(f"the query failed: {str(error).splitlines()[0]}") from None

    def index(self, scratch: Path) -> Path:
        """The records as a Parquet file: only what changed since the last time is read. In ``scratch`` where none can stay."""
        import duckdb

        stamps = {}
        for path in self._files():
            with contextlib.suppress(FileNotFoundError):
                found = path.stat()
                stamps[path.name] = f"{found.st_mtime_ns}-{found.st_size}-{found.st_ino}"
        kept = self.cells / _INDEX
        lasting = not set("*?[") & set(str(kept))  # DuckDB would take such a path for a pattern
        with duckdb.connect() as database:
            rows = []
            with contextlib.suppress(duckdb.Error):  # none yet, or one that is no index of ours
                if lasting:
                    rows = database.execute(f"SELECT file, stamp FROM read_parquet({_quote(str(kept))})").fetchall()
            known = {file for file, stamp in rows if stamps.get(file) == stamp}
            if stamps and len(known) == len(rows) == len(stamps):
                return kept
            lines = scratch / "records.ndjson"
            with lines.open("wb") as target:
                for name in sorted(set(stamps) - known):
                    row = {"file": name, "stamp": stamps[name], **_load(self.cells / name)[0]}
                    # Half a surrogate pair has no UTF-8.
                    target.write(json.dumps(row, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
            names = ", ".join(f'"{name}": {_quote(kind)}' for name, kind in _COLUMNS.items())
            database.execute(
                f"CREATE TABLE cells AS SELECT * FROM read_json({_quote(str(lines))}, format='newline_delimited', "
                f"columns={{{names}}}, maximum_object_size=268435456)"
            )
            if known:
                database.execute("CREATE TABLE known AS SELECT unnest(?) AS file", [sorted(known)])
                database.execute(
                    f"INSERT INTO cells BY NAME SELECT * FROM read_parquet({_quote(str(kept))}) SEMI JOIN known USING (file)"
                )
            fresh = scratch / "index.parquet"
            database.execute(
                f"COPY (SELECT * FROM cells ORDER BY file) TO {_quote(str(fresh))} (FORMAT parquet, COMPRESSION zstd)"
            )
        if not stamps or not lasting:
            return fresh
        try:
            _write(kept, fresh.read_bytes())
        except OSError:  # a folder that cannot be written can be read all the same
            return fresh
        return kept

    def _files(self) -> list[Path]:
        try:
            with os.scandir(self.cells) as entries:
                names = sorted(entry.name for entry in entries if entry.name.endswith(".json") and not entry.name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.cells} cannot be listed ({error.strerror}); give the folder of an audit") from None
        return [self.cells / name for name in names]


def stores(folder: str | Path) -> list[tuple[Path, Store]]:
    """The stores of a folder and of every folder below it, with their place in it.

    Hidden folders (unfinished runs) are left out.
    """
    top = Path(folder)
    found = []
    for cells in sorted(top.rglob("records")):
        below = cells.parent.relative_to(top)
        if cells.is_dir() and not any(part.startswith(".") for part in below.parts):
            found.append((below, Store(cells.parent)))
    return found


def gather(folder: str | Path) -> list[Record]:
    """The records of a folder and of every folder below it, so that one report covers `evaluate` and several `attack` runs.

    Paths of pictures become relative to ``folder``.
    """
    found = []
    for below, store in stores(folder):
        for record in store.records():
            artefacts = tuple(replace(artefact, path=(below / artefact.path).as_posix()) for artefact in record.artefacts)
            found.append(replace(record, artefacts=artefacts) if artefacts else record)
    return found


def export(folder: str | Path, target: str | Path) -> int:
    """Write the records of ``folder`` and below as a table, one row a measurement, to .csv or .parquet; the number of rows.

    In CSV, text that a spreadsheet would take for a formula gets an apostrophe in front. The file appears whole or not at all.
    Raises UserError for another ending, a folder without records, and a place that cannot be written.
    """
    import duckdb

    target = Path(target).expanduser().absolute()
    kind = {".csv": "csv, HEADER", ".parquet": "parquet"}.get(target.suffix.lower())
    if kind is None:
        raise UserError(f"{target.name!r} ends in neither .csv nor .parquet; name the table RECORDS.csv or RECORDS.parquet")
    if target.is_dir() or not target.parent.is_dir():
        raise UserError(f"{target} cannot be written; give a file in a folder that exists")
    found = [(f"{below.as_posix()}/" if below.parts else "", store) for below, store in stores(folder) if store._files()]
    if not found:
        raise UserError(f"{folder} holds no records; write some with `safeweights evaluate … -o {folder}` first")
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        with _database(found, partial) as database:
            database.execute(f"CREATE VIEW exported AS {_EXPORTED}")
            names = [
                f'CASE WHEN regexp_matches("{name}", {_FORMULA}) THEN \'\'\'\' || "{name}" ELSE "{name}" END AS "{name}"'
                if "csv" in kind and type_ == "VARCHAR"
                else f'"{name}"'
                for name, type_, *_ in database.execute("DESCRIBE exported").fetchall()
            ]
            ((rows,),) = database.execute(
                f"COPY (SELECT {', '.join(names)} FROM exported) TO {_quote(str(partial))} (FORMAT {kind})"
            ).fetchall()
        partial.replace(target)
    except (OSError, duckdb.IOException) as error:
        raise UserError(f"{target} cannot be written: {str(error).splitlines()[0]}") from None
    finally:
        partial.unlink(missing_ok=True)
    return int(rows)


@contextlib.contextmanager
def _database(found: Sequence[tuple[str, Store]], *allowed: Path) -> Iterator[Any]:
    """A database whose views show the records of these stores; it opens their indexes and the ``allowed`` files, nothing else."""
    import duckdb

    with tempfile.TemporaryDirectory() as scratch, duckdb.connect() as database:
        parts, casts = [], ", ".join(f'"{name}"::JSON AS "{name}"' for name in _JSON)
        for number, (prefix, store) in enumerate(found):
            place = Path(scratch, str(number))
            place.mkdir()
            index = store.index(place).absolute()
            allowed = (*allowed, index)
            parts.append(
                f"SELECT * EXCLUDE (stamp) REPLACE ({_quote(prefix)} || file AS file, {casts}) "
                f"FROM read_parquet({_quote(str(index))})"
            )
        database.execute(f"CREATE VIEW records AS {' UNION ALL BY NAME '.join(parts)}")
        for name in ("measurements", "doubts", "artefacts"):
            database.execute(
                f"CREATE VIEW {name} AS SELECT {_CELL}, item.* FROM (SELECT *, unnest({name}) AS item FROM records) AS r"
            )
        database.execute(_LEADERBOARD)
        database.execute(f"SET allowed_paths = [{', '.join(_quote(str(path)) for path in allowed)}]")
        database.execute("SET enable_external_access = false")
        database.execute("SET lock_configuration = true")
        yield database


def deterministic(record: Record) -> dict[str, Any]:
    """The record as JSON data without what differs from run to run: equal for two runs of a cell on one machine."""
    data: dict[str, Any] = json.loads(json.dumps(record.to_json(), default=_plain))
    data["provenance"].pop("time", None)
    data["details"] = {key: value for key, value in data["details"].items() if key not in TIMES}
    data["measurements"] = [entry for entry in data["measurements"] if entry["name"] not in TIMES]
    return data


def _read(path: Path) -> Record:
    return _load(path)[1]


def _load(path: Path) -> tuple[dict[str, Any], Record]:
    """The JSON of a record's file, and the record."""
    try:
        data = json.loads(path.read_bytes(), parse_constant=_no_number)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"record {path} cannot be read ({error}); delete it and measure that cell again") from None
    try:
        return data, Record.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = str(error)[:200]
        raise UserError(
            f"record {path} is not one this version reads ({reason}); move it away or use the version that wrote it"
        ) from None


def _no_number(name: str) -> float:
    raise ValueError(f"{name} measures nothing")


def _write(path: Path, data: bytes) -> None:
    """The whole file or none of it, also across a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _plain(value: Any) -> Any:
    """Settings may hold paths, enums and sets; anything else unknown to JSON is an error."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{value!r} cannot be part of a record")


def _picture(image: Any) -> Image.Image:
    import numpy as np
    from PIL import Image

    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if hasattr(image, "detach"):  # a tensor, without importing what it comes from
        image = image.detach().cpu()
    pixels = np.asarray(image)
    if pixels.ndim == 3 and pixels.shape[-1] != 3 and pixels.shape[0] == 3:
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(f"a picture is (H, W, 3) or (3, H, W), not {pixels.shape}")
    if pixels.dtype != np.uint8:
        pixels = (np.clip(np.nan_to_num(pixels.astype(np.float32)), 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels)
