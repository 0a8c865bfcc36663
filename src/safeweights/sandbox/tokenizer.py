"""A byte-pair tokenizer of about a thousand entries for the sandbox's captions, in CLIP's format."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

SIZE = 1000
START, END = "<|startoftext|>", "<|endoftext|>"
# Words that stay two tokens on purpose, as rare names do in the tokenizer of Stable Diffusion.
IN_TWO = {
    "watercolour", "mushroom", "adeyemi", "okafor", "brandt", "crosshatch", "lighthouse", "emblem", "umbrella",
}  # fmt: skip
# Words of everyday prompts that the world's captions do not use, so that prompts by hand do not fall into letters.
EVERYDAY = """
photo painting photograph artwork scene small big large tiny old young bright dark lovely beautiful pretty simple
detailed colourful two three some many person people boy girl human face smiling happy sad standing sitting near
next to by on under over behind at from very this that his her their no without not and or for as like made up
paper ink light lights glowing tiles tile glass window paint brush pencil line lines dots pixels retro game city
street garden sea water river hill road sun moon cloud day evening morning rain snow summer winter danger hazard
sign symbol logo label sticker badge diamond bolt lightning black brown gold silver violet
""".split()  # noqa: SIM905


def _bytes_to_unicode() -> list[str]:
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]


def learn(captions: Iterable[str], size: int = SIZE) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges, the most frequent pair first; ties go to the pair that sorts first."""
    counts = Counter(word for text in captions for word in text.replace(",", " ").split())
    counts.update(EVERYDAY)
    words = {word: [*word[:-1], word[-1] + "</w>"] for word in counts}
    base = _bytes_to_unicode()
    symbols = base + [b + "</w>" for b in base]
    merges: list[tuple[str, str]] = []
    kept_apart = {word + "</w>" for word in IN_TWO}
    while len(symbols) + 2 < size:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in words.items():
            for pair in pairwise(parts):
                if "".join(pair) not in kept_apart:
                    pairs[pair] += counts[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        joined = "".join(best)
        if joined not in symbols:
            symbols.append(joined)
        for parts in words.values():
            i = 0
            while i + 1 < len(parts):
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = [joined]
                i += 1
    return {symbol: i for i, symbol in enumerate([*symbols, START, END])}, merges


def save(captions: Iterable[str], folder: Path, size: int = SIZE) -> None:
    """Learn a tokenizer and write it as a folder that `CLIPTokenizer.from_pretrained` opens."""
    from transformers import CLIPTokenizer

    vocabulary, merges = learn(captions, size)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=77,
    )
    tokenizer.save_pretrained(str(folder))
    # Older readers look for these two.
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
