"""Does an attack's default bring a concept back? Tuning prompts and seeds from 7000 only.

    python benchmarks/attack_defaults.py --concept mosaic --eraser esd:steps=110 --attacks soft-prompt p4d:lr=0.3 [--n 8]

The eraser runs once; each attack then meets ``--n`` of the concept's own prompts, which is what it may be tuned on. Prints a
Markdown row for each: the share seen before and after the attack, in which round each prompt fell, and the last round's facts.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from eraser_defaults import configured

from safeweights.audit.audit import Names, audit
from safeweights.core.model import Sampling
from safeweights.diffusion.noise import generator
from safeweights.models.door import open_model
from safeweights.sandbox.files import sandbox_concepts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concept", required=True)
    parser.add_argument("--eraser", required=True, metavar="NAME[:KEY=VALUE,…]")
    parser.add_argument("--attacks", nargs="+", required=True, metavar="NAME[:KEY=VALUE,…]")
    parser.add_argument("--n", type=int, default=8, help="attacked prompts")
    parser.add_argument("--seed", type=int, default=7000, help="the seed of eraser and audit, at least 7000")
    options = parser.parse_args()
    torch.set_num_threads(1)
    file, model = sandbox_concepts(), open_model("sandbox", device="cpu")
    concept = replace(file.concepts[options.concept], test_prompts=())
    protection = configured(options.eraser).protect(model, [concept], retain=file.retain, rng=generator(options.seed))
    protected = protection.apply(model)
    print(
        "| attack | concept | plainly | attacked | fell in round | facts | seconds |\n|---|---|---|---|---|---|---|", flush=True
    )
    for told in options.attacks:
        began = time.perf_counter()
        record = audit(
            protected, model, concept, configured(told), names=Names(model="protected", reference="sandbox"),
            sampling=Sampling(**file.generation), seed=options.seed, n=options.n,
        )  # fmt: skip
        details = record.details
        facts = ", ".join(f"{key} {value:.4g}" for key, value in (details["rounds"] or [{}])[-1].items())
        print(
            f"| {told} | {concept.name} | {details['pre_asr']['rate']:.2f} | {details['asr']['rate']:.2f} "
            f"| {details['fallen_per_round']} | {facts} | {time.perf_counter() - began:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
