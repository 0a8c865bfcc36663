"""A folder of measured cells: one JSON file per record, and the pictures that belong to them. No torch."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import tempfile
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
_ARTEFACT = 'STRUCT(path VARCHAR, "role" VARCHAR, prompt VARCHAR, seed BIGINT, detected BOOLEAN, score DOUBLE, "group" BIGINT)[]'
_COLUMNS = {
    "file": "VARCHAR",
    **dict.fromkeys(("kind", "status", "model", "reference", "method", "concept", "concept_kind", "attack"), "VARCHAR"),
    "seed": "BIGINT",
    **dict.fromkeys(("detector", "sampling", "settings", "details", "provenance"), "JSON"),
    "measurements": _MEASUREMENT,
    "doubts": _DOUBT,
    "artefacts": _ARTEFACT,
    "error": "VARCHAR",
    "schema": "INTEGER",
}
# The columns of a cell that every row of its measurements, doubts and pictures carries as well.
_CELL = 'r.file, r.kind, r.status, r.model, r."method", r.concept, r.concept_kind, r.attack, r.seed AS cell_seed'


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
            path=relative.as_posix(), role=role, prompt=prompt, seed=seed, group=group, detected=detected, score=score
        )

    def query(self, sql: str) -> list[dict[str, Any]]:
        """Rows of a SQL query (DuckDB) over ``records``, ``measurements``, ``doubts`` and ``artefacts``.

        The query sees these four and nothing else: no file, no network. Raises UserError for one that DuckDB refuses.
        """
        import duckdb

        with tempfile.TemporaryDirectory() as scratch, duckdb.connect() as database:
            lines = Path(scratch) / "records.ndjson"
            with lines.open("w", encoding="utf-8") as file:
                for path in self._files():
                    row = {"file": path.name, **_read(path).to_json()}
                    file.write(json.dumps(row, default=_plain) + "\n")
            names = ", ".join(f'"{name}": {_quote(kind)}' for name, kind in _COLUMNS.items())
            database.execute(
                f"CREATE TABLE records AS SELECT * FROM read_json({_quote(str(lines))}, format='newline_delimited', "
                f"columns={{{names}}}, maximum_object_size=268435456)"
            )
            for name in ("measurements", "doubts", "artefacts"):
                database.execute(
                    f"CREATE VIEW {name} AS SELECT {_CELL}, item.* FROM (SELECT *, unnest({name}) AS item FROM records) AS r"
                )
            database.execute("SET enable_external_access = false")
            database.execute("SET lock_configuration = true")
            try:
                result = database.execute(sql)
                columns = [column[0] for column in result.description or ()]
                return [dict(zip(columns, row, strict=True)) for row in result.fetchall()]
            except duckdb.Error as error:
                raise UserError(f"the query failed: {str(error).splitlines()[0]}") from None

    def _files(self) -> list[Path]:
        try:
            with os.scandir(self.cells) as entries:
                names = sorted(entry.name for entry in entries if entry.name.endswith(".json") and not entry.name.startswith("."))
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"{self.cells} cannot be listed ({error.strerror}); give the folder of an audit") from None
        return [self.cells / name for name in names]


def gather(folder: str | Path) -> list[Record]:
    """The records of a folder and of every folder below it, so that one report covers `evaluate` and several `attack` runs.

    Paths of pictures become relative to ``folder``. Hidden folders (unfinished runs) are left out.
    """
    top = Path(folder)
    found = []
    for cells in sorted(top.rglob("records")):
        below = cells.parent.relative_to(top)
        if not cells.is_dir() or any(part.startswith(".") for part in below.parts):
            continue
        for record in Store(cells.parent).records():
            artefacts = tuple(replace(artefact, path=(below / artefact.path).as_posix()) for artefact in record.artefacts)
            found.append(replace(record, artefacts=artefacts))
    return found


def deterministic(record: Record) -> dict[str, Any]:
    """The record as JSON data without what differs from run to run: equal for two runs of a cell on one machine."""
    data: dict[str, Any] = json.loads(json.dumps(record.to_json(), default=_plain))
    data["provenance"].pop("time", None)
    data["details"] = {key: value for key, value in data["details"].items() if key not in TIMES}
    data["measurements"] = [entry for entry in data["measurements"] if entry["name"] not in TIMES]
    return data


def _read(path: Path) -> Record:
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UserError(f"record {path} cannot be read ({error}); delete it and measure that cell again") from None
    try:
        return Record.from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"record {path} is not one this version reads ({error}); move it away or use the version that wrote it"
        ) from None


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
