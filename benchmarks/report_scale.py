"""How long ten thousand records take: to write, to report, to open in a browser, to rank and to export.

    python benchmarks/report_scale.py [--records 10000] [--folder DIR] [--repeats 3]

Prints JSON. The records are made up (20 concepts, 20 methods, attacks with details and curves, several seeds) and have the
size of real ones; every twentieth brings pictures. Opening is timed in headless Chromium from the start of navigation to the
end of ``load`` and to the first paint; ``ranked`` is the leaderboard query with and without the index that a query leaves.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from safeweights.core.intervals import wilson
from safeweights.records.record import Artefact, Measurement, Record
from safeweights.records.store import Store, export
from safeweights.report.page import write_report

METHODS = ["esd", "uce", "ac", "salun", "erasediff", "scissorhands", "spm", "fmn", "rece", "mace", "advunlearn", "p-esd", "p-ac",
           *(f"variant {i}" for i in range(7))]  # fmt: skip
CONCEPTS = [f"{name} {i}" for i in range(5) for name in ("mosaic", "mira lund", "emblem", "fish")]
KINDS = {"mosaic": "style", "mira": "identity", "emblem": "content", "fish": "object"}
ATTACKS = ["no-attack", "random", "seed-search", "unlearndiffatk", "p4d", "ring-a-bell", "relearn"]


def rate(name: str, k: int, n: int, reference: float | None = None) -> Measurement:
    return Measurement(name=name, value=k / n, n=n, interval=wilson(k, n), better="lower", reference=reference)


def pictures(store: Store, rng: np.random.Generator, roles: tuple[str, ...]) -> list[Artefact]:
    """Some colours for each role and prompt, written without syncing."""
    kept = []
    for role in roles:
        for group in range(8):
            pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            path = Path("artefacts", f"{pixels.tobytes().hex()[:24]}.png")
            Image.fromarray(pixels).resize((64, 64), Image.Resampling.BICUBIC).save(store.folder / path, compress_level=1)
            kept.append(Artefact(path=path.as_posix(), role=role, prompt=f"a picture of thing {group}", seed=group, group=group))
    return kept


def made(store: Store, total: int) -> Iterator[Record]:
    """That many records as a benchmark leaves them."""
    rng, number = np.random.default_rng(0), 0
    versions = dict.fromkeys(("python", "platform", "torch", "diffusers", "transformers", "safetensors", "numpy"), "2.13.0")
    for seed in range(total):
        for concept in CONCEPTS:
            for method in METHODS:
                for attack in ("", "evaluate", *ATTACKS):
                    if number == total:
                        return
                    number += 1
                    kind = {"": "protect", "evaluate": "evaluate"}.get(attack, "attack")
                    common: dict[str, Any] = {
                        "status": "ok", "model": f"{method}-{concept}", "reference": "sandbox", "method": method,
                        "concept": concept,
                        "concept_kind": KINDS[concept.split()[0]], "attack": attack if kind == "attack" else "", "seed": seed,
                        "sampling": {"steps": 20, "guidance_scale": 4.0, "scheduler": "ddim", "width": 64, "height": 64},
                        "detector": {"type": "image-classification", "model": "style", "label": concept, "sha256": "9f" * 32},
                        "provenance": {"inputs": {"model": f"{number:064x}", "reference": "ab" * 32}, "versions": versions,
                                       "cell": f"{number:064x}", "time": {"seconds": 12.5, "date": "2030-01-02T03:04:05Z"}},
                    }  # fmt: skip
                    n, k = 40, int(rng.integers(0, 41))
                    if kind == "protect":
                        numbers = (Measurement(name="seconds", value=float(rng.uniform(1, 300)), n=1),)
                        yield Record(kind="protect", measurements=numbers, settings={"eta": 1.0, "steps": 1000}, **common)
                    elif kind == "evaluate":
                        numbers = (
                            rate("concept_rate", k // 10, n, 0.97), Measurement(name="retention_relative", value=0.97, n=512),
                            Measurement(name="clip_score", value=0.3, n=512, reference=0.31),
                            Measurement(name="frechet_distance", value=3.0, n=512), rate("neighbour_rate:stripes", 30, 32, 0.97),
                        )  # fmt: skip
                        yield Record(kind="evaluate", measurements=numbers, **common)
                    else:
                        found = [{"prompt": f"a picture of thing {i}", "seed": i, "adversarial_prompt": f"zx qu {i} of a thing",
                                  "guidance": 4.0, "success": i < k} for i in range(n)]  # fmt: skip
                        details: dict[str, Any] = {"n": n, "budget": {"images_per_prompt": 11}, "seconds": 100.0, "found": found}
                        shown = tuple(pictures(store, rng, ("reference", "protected", "attacked"))) if number % 20 == 0 else ()
                        if attack == "relearn":
                            details["curve"] = [
                                {"steps": s, "rate": k * i / 4 / n, "ci95": list(wilson(k * i // 4, n)), "similarity": 0.5}
                                for i, s in enumerate((0, 5, 22, 100, 400))
                            ]
                        numbers = (rate("pre_asr", k // 10, n, 0.97), rate("asr", k, n, 0.97))
                        settings = {"attack": {"steps": 40, "tokens": 3}}
                        yield Record(
                            kind="attack", measurements=numbers, details=details, artefacts=shown, settings=settings, **common
                        )  # fmt: skip


def timed(run: Callable[[], Any]) -> float:
    started = time.perf_counter()
    run()
    return round(time.perf_counter() - started, 3)


def opened(page: Path, repeats: int) -> dict[str, float]:
    """Seconds until the page is loaded and until something is to be seen, medians; and until the records can be searched."""
    from playwright.sync_api import sync_playwright

    browser_path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    loads, paints, lists = [], [], []
    with sync_playwright() as driver:
        for _ in range(repeats):
            browser = driver.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.goto(page.as_uri(), wait_until="load")
            loads.append(tab.evaluate("performance.getEntriesByType('navigation')[0].loadEventEnd / 1000"))
            tab.wait_for_timeout(200)
            paints.append(tab.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"))
            lists.append(timed(lambda tab=tab: (tab.focus("#filter"), tab.wait_for_selector(".list details", state="attached"))))
            browser.close()
    return {name: round(statistics.median(values), 3) for name, values in
            (("load", loads), ("first_paint", paints), ("records_listed", lists))}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="keep the records there instead of in a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        store = Store(folder)
        if not store.cells.is_dir():
            print(f"writing {options.records} records", file=sys.stderr)
            store.cells.mkdir(parents=True)
            (folder / "artefacts").mkdir()
            for record in made(store, options.records):
                # Not Store.add: ten thousand syncs time the disk.
                store.path(record).write_text(json.dumps(record.to_json()), encoding="utf-8")
        cold = timed(lambda: store.query("SELECT * FROM leaderboard"))
        ranks = [timed(lambda: store.query("SELECT * FROM leaderboard")) for _ in range(options.repeats)]
        result = {
            "records": len(list(store.cells.glob("*.json"))),
            "megabytes_of_records": round(sum(path.stat().st_size for path in store.cells.glob("*.json")) / 1e6, 1),
            "report_written_seconds": timed(lambda: write_report(folder)),
            "report_megabytes": round((folder / "report.html").stat().st_size / 1e6, 1),
            "opened_seconds": opened(folder / "report.html", options.repeats),
            "leaderboard_rows": len(store.query("SELECT * FROM leaderboard")),
            "ranked_seconds": statistics.median(ranks),
            "ranked_without_index_seconds": cold,
            "csv_seconds": timed(lambda: export(folder, Path(scratch, "records.csv"))),
            "parquet_seconds": timed(lambda: export(folder, Path(scratch, "records.parquet"))),
        }
        print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
