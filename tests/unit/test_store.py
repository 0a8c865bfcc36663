"""A kill leaves whole files, a foreign file is named, and ten thousand records load at once."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
import factories as make
from safeweights.core.errors import UserError
from safeweights.records import store as store_module
from safeweights.records.record import Measurement
from safeweights.records.store import Store, deterministic, gather


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    store = Store(tmp_path)
    record = make.attack(store, "esd", "unlearndiffatk", 30)
    store.add(record)
    assert store.records() == [record]
    assert store.find(record) == record
    assert store.find(replace(record, seed=1)) is None


def test_the_same_cell_is_replaced_and_another_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    failed = make.base(status="error", error="out of memory")
    store.add(failed)
    store.add(make.base())
    store.add(make.base(seed=1))
    store.add(make.base(settings={"steps": 3}))
    assert len(store.records()) == 3
    assert all(record.status == "ok" for record in store.records())


@pytest.mark.parametrize("name", ["../../up", "/etc/passwd", "a/b\\c", "..", "", "CON", "x" * 500, "モザイク", "\x00\n"])
def test_no_name_leads_out_of_the_folder(tmp_path: Path, name: str) -> None:
    store = Store(tmp_path / "out")
    path = store.add(make.base(concept=name, method=name, attack=name))
    assert path.resolve().parent == (tmp_path / "out" / "records").resolve()
    assert len(path.name) < 128
    assert len(store.records()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_names_that_slug_alike_stay_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("stained glass", "stained-glass", "Stained Glass"):
        store.add(make.base(concept=name))
    assert len(store.records()) == 3


def test_a_kill_while_writing_leaves_the_previous_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    store.add(make.base())

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("safeweights.records.store.os.fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        store.add(make.base(status="error"))
    assert [record.status for record in store.records()] == ["ok"]
    assert [path.suffix for path in store.cells.iterdir()] == [".json"]


def test_leftovers_of_a_kill_are_not_records(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.add(make.base())
    path.with_name(f".{path.name}.17.partial").write_text("{")
    assert len(store.records()) == 1


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"schema": 9}', '{"schema": 1}', '{"schema": 1, "doubts": 3}', "\xff\xfe"]
)
def test_a_foreign_file_is_named(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    store.cells.mkdir(parents=True)
    (store.cells / "odd.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"odd\.json"):
        store.records()


def test_a_record_of_another_schema_is_named(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.add(make.base())
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 2}))
    with pytest.raises(UserError, match=path.name):
        store.records()


def test_no_silent_numbers(tmp_path: Path) -> None:
    broken = make.base(measurements=(Measurement(name="asr", value=float("nan"), n=1),))
    with pytest.raises(ValueError, match="Out of range"):
        Store(tmp_path).add(broken)
    assert Store(tmp_path).records() == []


def test_paths_in_settings_are_text_and_half_surrogates_do_not_stop_a_run(tmp_path: Path) -> None:
    store = Store(tmp_path)
    store.add(make.base(settings={"folder": Path("a/b"), "layers": {"b", "a"}, "prompt": "bad \ud800 half"}))
    assert store.records()[0].settings["folder"] == "a/b"
    assert store.records()[0].settings["layers"] == ["a", "b"]
    assert len(store.query("SELECT * FROM records")) == 1


def test_equal_pictures_are_kept_once_and_arrays_are_pictures(tmp_path: Path) -> None:
    store = Store(tmp_path)
    image = make.picture(1)
    pixels = np.asarray(image)
    paths = {
        store.save_artefact(value, role="reference", prompt="p", seed=0).path
        for value in (image, pixels, pixels.transpose(2, 0, 1).astype(np.float32) / 255)
    }
    assert len(paths) == 1
    assert np.array_equal(np.asarray(Image.open(tmp_path / paths.pop())), pixels)


def test_sql_over_the_four_views(tmp_path: Path) -> None:
    store = make.fill(tmp_path)
    assert store.query("SELECT count(*) AS n FROM records")[0]["n"] == len(store.records())
    rows = store.query("SELECT method, value FROM measurements WHERE name = 'asr' ORDER BY value")
    assert rows[-1] == {"method": "uce", "value": 37 / 40}
    assert store.query("SELECT DISTINCT name FROM doubts") == [{"name": "not_converged"}]
    assert store.query("SELECT count(*) AS n FROM artefacts WHERE role = 'attacked' AND detected")[0]["n"] > 0
    assert store.query("SELECT detector->>'label' AS label FROM records LIMIT 1") == [{"label": "mosaic"}]


def test_a_query_sees_what_changed_since_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = make.fill(tmp_path, pictured=False)
    count = "SELECT count(*) AS n, count(*) FILTER (status = 'error') AS failed FROM records"
    assert store.query(count) == [{"n": 16, "failed": 1}]
    read: list[str] = []
    real = store_module._load
    monkeypatch.setattr(store_module, "_load", lambda path: read.append(path.name) or real(path))
    assert store.query(count) == [{"n": 16, "failed": 1}]
    assert read == []
    first = store._files()[-1]  # the record of a protection
    first.unlink()
    store.add(make.base(seed=77, status="error"))
    assert store.query(count) == [{"n": 16, "failed": 2}]
    assert len(read) == 1
    store.add(make.base(seed=77))
    assert store.query(count) == [{"n": 16, "failed": 1}]
    (store.cells / store_module._INDEX).write_bytes(b"no index")
    assert store.query(count) == [{"n": 16, "failed": 1}]


def test_a_folder_that_cannot_be_written_can_be_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "odd [x] * name")
    store.add(make.base())
    assert len(store.query("SELECT * FROM records")) == 1

    def refused(*_: object) -> None:
        raise PermissionError(13, "no")

    plain = make.fill(tmp_path / "plain", pictured=False)
    monkeypatch.setattr(store_module, "_write", refused)
    assert len(plain.query("SELECT * FROM records")) == 16
    assert not list(plain.cells.glob(".*"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("concept", 3), ("details", []), ("seed", "0"), ("seed", 2**70), ("status", "fine"), ("error", 4),
        ("measurements", [{"name": "asr", "value": "half", "n": 1}]),
        ("measurements", [{"name": "asr", "value": 1, "n": 1, "interval": [1]}]),
        ("measurements", [{"name": 3, "value": 1, "n": 1}]), ("measurements", [{"name": "asr", "value": 10**400, "n": 1}]),
        ("doubts", [{"name": "x", "explanation": None}]), ("artefacts", [{"path": 3, "role": "", "prompt": "", "seed": 0}]),
        ("artefacts", [{"path": "", "role": "", "prompt": "", "seed": 0, "detected": "yes"}]),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_named(tmp_path: Path, field: str, value: object) -> None:
    store = Store(tmp_path)
    path = store.add(make.base())
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(UserError, match=path.name) as told:
        store.records()
    assert len(str(told.value)) < 600


@pytest.mark.parametrize("content", ["[" * 200_000, '{"schema": 1, "seed": NaN}', '{"schema": ' + "9" * 5000 + "}"])
def test_a_malicious_file_is_named(tmp_path: Path, content: str) -> None:
    store = Store(tmp_path)
    store.cells.mkdir(parents=True)
    (store.cells / "odd.json").write_text(content)
    with pytest.raises(UserError, match=r"odd\.json"):
        store.records()


def test_sql_over_nothing(tmp_path: Path) -> None:
    assert Store(tmp_path).query("SELECT count(*) AS n FROM measurements") == [{"n": 0}]


@pytest.mark.parametrize(
    "sql", ["SELEKT", "SELECT * FROM read_csv('/etc/passwd')", "COPY records TO '/tmp/x.csv'", "SET threads=1"]
)
def test_a_query_that_is_refused_is_the_users_error(tmp_path: Path, sql: str) -> None:
    store = Store(tmp_path)
    store.add(make.base())
    with pytest.raises(UserError, match="query failed"):
        store.query(sql)


def test_two_runs_differ_in_their_times_only() -> None:
    one = make.attack(None, "esd", "random", 5)
    two = replace(
        one,
        provenance={**one.provenance, "time": {"seconds": 99.0, "date": "later"}},
        details={**one.details, "seconds": 99.0},
        measurements=(*one.measurements, Measurement(name="seconds", value=3.0, n=1)),
    )
    assert deterministic(one) == deterministic(two)
    assert deterministic(one) != deterministic(replace(one, seed=1))
    assert one.provenance["time"]["seconds"] == 12.5


def test_ten_thousand_records_load_in_seconds(tmp_path: Path) -> None:
    store = Store(tmp_path)
    text = store.add(make.attack(store, "esd", "unlearndiffatk", 30)).read_text()
    for number in range(9_999):
        (store.cells / f"copy-{number}.json").write_text(text)
    start = time.process_time()
    assert len(store.records()) == 10_000
    assert time.process_time() - start < 6  # processor seconds: 1 to 2 on an idle core


def test_records_and_reports_need_no_torch() -> None:
    code = (
        "import sys, safeweights.records.store, safeweights.report.page, safeweights.report.tables;"
        "heavy = {'torch', 'duckdb', 'diffusers', 'transformers'} & set(sys.modules);"
        "sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_one_report_covers_the_folders_below(tmp_path: Path) -> None:
    plain, live = Store(tmp_path / "plain"), Store(tmp_path / "live")
    plain.add(make.evaluation(plain, "esd", 1))
    record = make.attack(live, "esd", "unlearndiffatk", 30)
    live.add(record)
    Store(tmp_path / ".live.partial").add(make.base())
    found = gather(tmp_path)
    assert sorted(record.kind for record in found) == ["attack", "evaluate"]
    assert all((tmp_path / artefact.path).is_file() for record in found for artefact in record.artefacts)
