"""The verdict follows from the figures, and nothing in a record becomes markup."""

from __future__ import annotations

import csv
import errno
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
import factories as make
from safeweights.cli.main import run
from safeweights.core.errors import UserError
from safeweights.records.record import Artefact, Doubt, Measurement, Record
from safeweights.records.store import Store, export, gather
from safeweights.report import tables
from safeweights.report.curves import curve_plots
from safeweights.report.page import headline, write_report


class Tags(HTMLParser):
    """Every start tag with its attributes, and the text between."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def case(plain: int | None, attacked: int | None, *, n: int = 40, **evaluation: Any) -> tables.Case:
    records: list[Record] = []
    if plain is not None:
        records.append(make.evaluation(None, "esd", plain, n=n, **evaluation))
    if attacked is not None:
        records.append(make.attack(None, "esd", "unlearndiffatk", attacked, n=n))
    return tables.cases(records)[0]


@pytest.mark.parametrize(
    ("plain", "attacked", "n", "state"),
    [
        (1, 30, 40, "comes back"),
        (1, 1, 40, "holds"),
        (1, 5, 40, "comes back"),
        (30, 35, 40, "still there"),
        (10, 12, 40, "comes back"),
        (8, 3, 40, "comes back"),
        (0, 0, 5, "not measured"),  # nothing of five is no evidence
        (0, None, 40, "not measured"),
    ],
)
def test_verdict(plain: int, attacked: int | None, n: int, state: str) -> None:
    assert case(plain, attacked, n=n).state == state


def test_the_sentence_says_it_with_figures() -> None:
    assert case(1, 30).sentence == (
        "erased when asked plainly (97 % → 2 %), comes back under attack (UnlearnDiffAtk: ASR 75 % [60, 86])"
    )
    assert "never attacked" in case(0, None).sentence
    assert "too few prompts" in case(0, 0, n=5).sentence


def test_the_strongest_attack_decides_whatever_its_name() -> None:
    records = [
        make.evaluation(None, "esd", 1),
        make.attack(None, "esd", "unlearndiffatk", 1),
        make.attack(None, "esd", "seed_search", 20),
    ]
    found = tables.cases(records)[0]
    assert found.strongest is not None
    assert found.strongest.label == "Seed search"
    assert found.state == "comes back"


def test_asking_plainly_is_no_attack() -> None:
    for spelling in ("no-attack", "no_attack"):
        assert tables.cases([make.attack(None, "esd", spelling, 1)])[0].state == "not measured"


def test_what_was_never_there_cannot_hold() -> None:
    doubt = (Doubt(name="not_there_before", explanation="seen in 3 of 40"),)
    assert case(0, 0, doubts=doubt).state == "not measured"
    unseen = Measurement(name="concept_rate", value=0.0, n=40, interval=(0.0, 0.09), reference=0.1)
    assert tables.cases([make.base(kind="evaluate", measurements=(unseen,))])[0].state == "not measured"


def test_an_attack_that_failed_is_not_an_attack_that_found_nothing() -> None:
    failed = make.base(attack="unlearndiffatk", status="error", error="boom")
    found = tables.cases([make.evaluation(None, "esd", 0), failed])[0]
    assert found.state == "not measured"
    assert "failed" in found.sentence
    assert found.errors == (failed,)


def test_seeds_are_averaged_under_the_widest_interval() -> None:
    found = tables.cases([make.attack(None, "esd", "random", 10), replace(make.attack(None, "esd", "random", 20), seed=1)])[
        0
    ].attacks
    assert len(found) == 1
    assert found[0].seeds == (0, 1)
    assert found[0].asr is not None
    assert found[0].asr.rate == pytest.approx(15 / 40)
    assert found[0].asr.interval == (make.wilson(10, 40)[0], make.wilson(20, 40)[1])


def test_two_methods_stand_side_by_side_and_the_worst_comes_first(tmp_path: Path) -> None:
    found = tables.cases(make.fill(tmp_path, pictured=False).records())
    assert [(entry.concept, entry.method) for entry in found] == [
        ("mosaic", "esd"), ("mosaic", "uce"), ("mira lund", "esd"), ("warning emblem", "esd"),
    ]  # fmt: skip
    assert headline(found) == "2 of 4 come back under attack. 1 holds. 1 is not settled."


def test_a_doubt_stands_beside_what_holds() -> None:
    sound, shaken = case(0, 0), case(0, 0, doubts=(Doubt(name="collapsed", explanation="neon is gone"),))
    assert headline([sound, sound]) == "All 2 hold under every attack tried."
    assert headline([sound, shaken]) == "All 2 hold under every attack tried, with doubts."
    assert headline([case(0, None), shaken]) == "1 of 2 holds, with doubts. 1 is not settled."


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0 %"), (0.004, "<1 %"), (0.974, "97 %"), (0.996, ">99 %"), (1.0, "100 %"), (None, "–")]
)
def test_percent(value: float | None, text: str) -> None:
    assert tables.percent(value) == text


def test_text_for_a_terminal_cannot_steer_it() -> None:
    record = replace(make.attack(None, "esd", "random", 20), concept="evil\x1b[2J\u202e\nname")
    text = tables.summary([record])
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert len(text.splitlines()) == 1


def test_markdown_cells_stay_cells() -> None:
    record = replace(make.attack(None, "esd", "random", 20), concept="a|b <i>`c`\n|")
    table = tables.markdown(tables.rows([record]))
    lines = table.splitlines()
    assert len(lines) == 3
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1
    assert "<i>" not in table


def test_nothing_in_a_record_becomes_markup(tmp_path: Path) -> None:
    make.fill(tmp_path)
    evil = "'\"><script>alert(1)</script><img src=x onerror=alert(1)>{{7*7}}"
    Store(tmp_path).add(
        make.base(
            **dict.fromkeys(("model", "reference", "method", "concept", "concept_kind", "attack"), evil),
            settings={evil: evil},
            details={evil: {evil: [evil]}},
            provenance={evil: evil},
            measurements=(
                Measurement(name="asr", value=None, n=0, why=evil),
                Measurement(name=f"neighbour_rate:{evil}", value=None, n=0, why=evil),
            ),
            doubts=(Doubt(name=evil, explanation=evil),),
        )
    )
    page = write_report(tmp_path).read_text()
    found = Tags(page)
    names = [tag for tag, _ in found.tags]
    scripts = [attributes for tag, attributes in found.tags if tag == "script"]
    assert scripts == [{"type": "application/json", "id": "listing"}, {}]
    assert not {"iframe", "object", "embed", "form", "b", "i"} & set(names)
    for tag, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name == "style"], tag
        for name in ("src", "href"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("#", "data:image/png;base64,")) or value == "data:,"
    assert "49" not in [text.strip() for text in found.text]
    assert make.HOSTILE[0] in "".join(found.text)
    assert "\u202e" not in page


def test_every_picture_has_words_and_every_id_is_one(tmp_path: Path) -> None:
    make.fill(tmp_path)
    tags = Tags(write_report(tmp_path).read_text()).tags
    buttons = [attributes for tag, attributes in tags if tag == "button" and attributes.get("class") == "veil"]
    plain = [attributes for tag, attributes in tags if tag == "img" and attributes.get("alt")]
    assert plain
    assert len(buttons) + len(plain) == sum(tag == "img" for tag, _ in tags)
    assert all(attributes["aria-label"] for attributes in buttons)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(attributes.get("href") or "")[1:] for tag, attributes in tags if tag == "a"}
    assert targets <= set(ids)


def test_pictures_outside_the_folder_stay_outside(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    store = Store(folder)
    make.picture(5).save(tmp_path / "secret.png")
    (folder / "artefacts").mkdir(parents=True)
    (folder / "artefacts" / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "artefacts" / "text.png").write_text("<svg onload='alert(1)'>")
    paths = ("../secret.png", str(tmp_path / "secret.png"), "artefacts/link.png", "artefacts/text.png", "artefacts/gone.png")
    shown = tuple(Artefact(path=path, role="protected", prompt=path, seed=0, group=number) for number, path in enumerate(paths))
    store.add(replace(make.attack(None, "esd", "random", 3), artefacts=shown))
    page = write_report(folder).read_text()
    assert "data:image/png" not in page
    assert page.count("picture missing") == len(paths)


def test_pictures_line_up_by_group_and_without_one_by_order(tmp_path: Path) -> None:
    from safeweights.report.pictures import _columns

    store = Store(tmp_path)
    record = make.attack(store, "esd", "unlearndiffatk", 20)
    ungrouped = replace(record, artefacts=tuple(replace(entry, group=0) for entry in record.artefacts))
    shuffled = replace(record, artefacts=tuple(reversed(record.artefacts)))
    columns = _columns(record)
    assert list(columns) == [(prompt, seed) for seed, prompt in enumerate(make.HOSTILE)]
    assert all(set(column) == {"reference", "protected", "attacked"} for column in columns.values())
    assert _columns(shuffled) == columns
    assert [[entry.path for entry in column.values()] for column in _columns(ungrouped).values()] == [
        [entry.path for entry in column.values()] for column in columns.values()
    ]


def test_large_pictures_do_not_make_a_large_page(tmp_path: Path) -> None:
    store = Store(tmp_path)
    shown = make.pictures(store, "protected", make.HOSTILE, 1, 1, size=1024)
    store.add(replace(make.attack(None, "esd", "random", 3), artefacts=tuple(shown)))
    assert write_report(tmp_path).stat().st_size < 1_500_000


@pytest.mark.parametrize("kind", ["content", "", "something new"])
def test_content_and_what_is_unknown_is_veiled(tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path)
    store.add(make.attack(store, "esd", "random", 3, concept_kind=kind))
    assert 'class="veil"' in write_report(tmp_path).read_text()


def test_a_full_disk_is_one_line_and_keeps_the_old_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make.fill(tmp_path, pictured=False)
    page = tmp_path / "report.html"
    page.write_text("old")

    def full(self: Path, text: str, **_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert run(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error: the disk is full while writing")
    monkeypatch.undo()
    assert page.read_text() == "old"
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".html"]


def test_a_doubt_ends_before_what_it_means_begins(tmp_path: Path) -> None:
    make.fill_all(tmp_path)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    found = re.findall(r"<bdi>([^<]+)</bdi>(.?) <span class=\"soft\">", page)
    assert found
    assert all((text + end)[-1] in ".!?" for text, end in found)


def test_a_folder_without_records_is_the_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no records"):
        write_report(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_same_records_give_the_same_page(tmp_path: Path) -> None:
    make.fill(tmp_path)
    assert write_report(tmp_path).read_bytes() == write_report(tmp_path).read_bytes()


@pytest.mark.parametrize("kind", ["protect", "evaluate", "attack"])
def test_a_lone_record_is_a_page(tmp_path: Path, kind: str) -> None:
    Store(tmp_path).add(make.base(kind=kind))
    assert "not measured" in write_report(tmp_path).read_text()


@pytest.mark.parametrize("kind", ["freeze", "leakage", "prune", "event", "something new"])
def test_a_record_of_any_kind_is_shown_as_it_stands(tmp_path: Path, kind: str) -> None:
    store = Store(tmp_path)
    store.add(replace(make.mask(store), kind=kind))
    page = write_report(tmp_path).read_text()
    text = "".join(Tags(page).text)
    assert "illegal rate" in text
    assert "not measured: not timed" in text
    assert page.count('class="drawing"') == 4
    assert tables.cases(store.records()) == []


def test_a_mixed_store_keeps_its_verdicts(tmp_path: Path) -> None:
    store = make.fill_all(tmp_path)
    found = tables.cases(store.records())
    assert headline(found) == "2 of 4 come back under attack. 1 holds. 1 is not settled."
    assert [entry.verdict for entry in found] == ["not safe", "not safe", "not shown", "safe"]


def test_curves_have_methods_as_series_and_the_rate_before_as_level(tmp_path: Path) -> None:
    cases = tables.by_concept(tables.cases(make.fill_all(tmp_path).records()))["mosaic"]
    rates, likeness = curve_plots(cases)
    assert rates["title"].startswith("Re-learning (lora)")
    assert [entry["name"] for entry in rates["series"]] == ["ESD", "UCE"]
    assert rates["series"][1]["points"] == [[0, 0.1], [5, 0.4], [22, 0.8], [100, 0.9], [400, 0.9]]
    assert rates["levels"] == [{"name": "before protection", "y": 0.97}]
    assert likeness["series"][0]["points"][0] == [0, pytest.approx(0.425)]
    broken = make.base(attack="relearn", details={"curve": [3, {"steps": "x"}, {"steps": 1, "rate": None}]})
    assert curve_plots(tables.cases([broken])) == []


def test_attacks_of_one_name_are_told_apart_by_their_settings() -> None:
    records = [
        replace(make.attack(None, "esd", "relearn", 20), settings={"attack": {"adaptation": kind, "rank": rank, "steps": 400}})
        for kind, rank in (("lora", 4), ("lora", 16), ("full", 4))
    ]
    found = tables.cases(records)[0].attacks
    assert {row.title for row in found} == {
        "Re-learning (lora, rank 4)", "Re-learning (lora, rank 16)", "Re-learning (full, rank 4)",
    }  # fmt: skip


def test_films_show_every_checkpoint_once(tmp_path: Path) -> None:
    make.fill_all(tmp_path)
    page = write_report(tmp_path).read_text()
    assert page.count('class="frame"') == 5
    assert 'data-steps="0 5 22 100 400"' in page
    assert "Before the attack" in page


def test_the_policy_stands_on_top(tmp_path: Path) -> None:
    make.fill(tmp_path, pictured=False)
    assert 'id="policy"' not in write_report(tmp_path).read_text()
    make.policy(tmp_path)
    text = " ".join("".join(Tags(write_report(tmp_path).read_text()).text).split())
    assert text.index("Policy: failed") < text.index("Not safe")
    assert text.index("asr <= 0.2") < text.index("2 rules passed")
    make.policy(tmp_path, passed=True)
    assert "Policy: passed" in " ".join("".join(Tags(write_report(tmp_path).read_text()).text).split())


@pytest.mark.parametrize("content", ["", "[]", '{"passed": 1, "rules": []}', '{"passed": true}', "[" * 100_000, '{"rules": 3}'])
def test_what_is_no_policy_is_left_out(tmp_path: Path, content: str) -> None:
    make.fill(tmp_path, pictured=False)
    (tmp_path / "policy.json").write_text(content)
    assert 'id="policy"' not in write_report(tmp_path).read_text()


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    store, long = Store(tmp_path), "long " * 2_000_000
    store.add(
        make.base(
            concept=long, model=long, attack="random", settings={"prompt": long, long: 1}, error=long, status="error",
            details={"found": [long], "plots": [{"title": long}]}, doubts=(Doubt(name="collapsed", explanation=long),),
            measurements=(Measurement(name=long, value=1.0, n=1),),
        )
    )  # fmt: skip
    store.add(make.base(kind="event", concept=long, measurements=(Measurement(name=long, value=None, n=0, why=long),)))
    page = write_report(tmp_path)
    assert page.stat().st_size < 500_000
    assert "… (10\u202f000\u202f000 characters)" in page.read_text()
    assert len(store.query("SELECT * FROM records")) == 2


def test_surrogates_and_control_characters_are_marks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    evil = "a\x00b\x1b]0;c\x07\ud800\u202e\u2028d"
    path = store.add(make.base(concept=evil, attack="random", details={evil: evil}, measurements=(make.rate("asr", 1, 4),)))
    # As someone else's program may have written it.
    path.write_text(json.dumps({**json.loads(path.read_text()), "method": "x\ud800y\x00"}))
    page = write_report(tmp_path).read_text()
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e\u2028]", page)
    export(tmp_path, tmp_path / "out.csv")
    export(tmp_path, tmp_path / "out.parquet")
    assert store.query("SELECT count(*) AS n FROM records")[0]["n"] == 1


def test_many_cases_are_a_table_with_the_sentences_below(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for number in range(5):
        for method in (*make.METHODS, "ac"):
            store.add(replace(make.evaluation(None, "esd", 1), method=method, concept=f"thing {number}"))
            store.add(replace(make.attack(None, "esd", "random", 1 + number), method=method, concept=f"thing {number}"))
    page = write_report(tmp_path).read_text()
    assert page.count('class="matrix"') == 1
    assert page.count('class="verdict ') == 15
    assert page.index('class="matrix"') < page.index('class="verdict ')


def test_a_heavy_page_leaves_pictures_out_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make.fill(tmp_path)
    whole = write_report(tmp_path).stat().st_size
    monkeypatch.setattr("safeweights.report.pictures.WEIGHT", 200_000)
    path = write_report(tmp_path)
    assert path.stat().st_size < whole - 200_000
    assert "left out to keep the page light" in path.read_text()


def test_the_list_of_records_holds_all_of_each(tmp_path: Path) -> None:
    records = make.fill_all(tmp_path).records()
    page = write_report(tmp_path).read_text()
    data = json.loads(page.split('id="listing">')[1].split("</script>")[0])
    assert len(data["rows"]) == len(records)
    first = dict(data["pool"][place][0:2] for place in data["rows"][0][7:])
    assert dict(first["Provenance"])["model_sha256"] == "ab" * 32
    assert dict(first["Cell"])["status"] == data["rows"][0][5]
    assert any("after 100 steps" in name for place in range(len(data["pool"])) for name, _ in data["pool"][place][1])


def test_export_is_a_row_for_each_measurement(tmp_path: Path) -> None:
    store = make.fill(tmp_path / "a", pictured=False)
    Store(tmp_path / "b").add(make.base(concept='=HYPERLINK("http://x.invalid")', measurements=(make.rate("asr", 1, 4),)))
    records = gather(tmp_path)
    rows = sum(max(1, len(record.measurements)) for record in records)
    assert export(tmp_path, tmp_path / "t.csv") == rows
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == rows
    assert {row["concept"] for row in table if row["file"].startswith("b/")} == {'\'=HYPERLINK("http://x.invalid")'}
    worst = max((row for row in table if row["measurement"] == "asr"), key=lambda row: float(row["value"]))
    assert (worst["method"], worst["concept"], worst["n"]) == ("uce", "mosaic", "40")
    assert [float(worst["low"]), float(worst["high"])] == pytest.approx(make.wilson(37, 40))
    assert export(tmp_path, tmp_path / "t.parquet") == rows
    import duckdb

    read = duckdb.execute(f"SELECT count(*), count(DISTINCT file), max(concept) FROM '{tmp_path / 't.parquet'}'").fetchone()
    assert read == (rows, len(store.records()) + 1, "warning emblem")


@pytest.mark.parametrize("name", ["t.txt", "t", "none/t.csv", "."])
def test_a_table_that_cannot_be_is_told(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    from safeweights.cli.main import run

    make.fill(tmp_path, pictured=False)
    assert run(["report", str(tmp_path), "--export", str(tmp_path / name)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not (tmp_path / "report.html").exists()


def test_report_and_table_in_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safeweights.cli.main import run

    make.fill(tmp_path, pictured=False)
    assert run(["report", str(tmp_path), "--export", str(tmp_path / "t.parquet"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["rows"] > 30
    assert Path(told["export"]).is_file()
    assert Path(told["report"]).is_file()
