"""Searching token embeddings: where free tokens go in a prompt, and distributions over the vocabulary.

Shared by the attacks on prompts and by the erasers that train against them. Everything is batched over prompts; row b of a
batch uses generator b, so that a batch gives what one prompt at a time would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from safeweights.core.errors import UserError
from safeweights.core.model import DiffusionModel

Where = Literal["prefix", "suffix", "insert", "replace"]


def text_length(model: DiffusionModel, ids: Tensor) -> Tensor:
    """Tokens of text (B,) in padded rows (B, L): BOS, EOS and padding not counted.

    Padding may be an ordinary id (SD 2.x pads with "!"), so text ends at the first EOS, not at the first padding.
    """
    return _eos_at(model, ids) - 1


def find_term(model: DiffusionModel, ids: Tensor, term: str) -> list[range]:
    """Where the tokens of ``term`` stand in each row of ids (B, L): its first occurrence, an empty range where it is absent.

    Compared by BPE ids, so that a term of several tokens is found whole and never as the beginning or end of a longer word.
    """
    wanted = term_ids(model, term)
    return [_find(model, row[:end], wanted) for row, end in zip(ids.tolist(), _eos_at(model, ids).tolist(), strict=True)]


def _find(model: DiffusionModel, row: list[int], wanted: list[int]) -> range:
    """Where ``wanted`` stands in BOS and text."""
    n = len(wanted)
    for i in range(1, len(row) - n + 1):
        # A word's last token is marked as such, its first one is not: the text before must end where the term begins.
        if n and row[i : i + n] == wanted:
            before, both = (model.text_of(torch.tensor(part, dtype=torch.long)) for part in (row[1:i], row[1 : i + n]))
            if both == f"{before} {model.text_of(torch.tensor(wanted))}".strip():
                return range(i, i + n)
    return range(0)


def term_ids(model: DiffusionModel, term: str) -> list[int]:
    """The BPE ids of a term. Raises UserError for one without any."""
    row = model.tokenize([term])
    ids = row[0, 1 : 1 + int(text_length(model, row)[0])].tolist()
    if not ids:
        raise UserError(f"the term {term!r} has no tokens; name the words of the prompt that ask for the concept")
    return [int(i) for i in ids]


def insert_tokens(
    model: DiffusionModel, ids: Tensor, k: int, where: Where = "prefix", term_ids: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Make room for k free tokens in every prompt: (ids (B, L), positions (B, k) of the free tokens).

    prefix: before the text; suffix: after it; insert: before the first token of the term; replace: in place of the term.
    Without a term in the prompt, insert goes to the front and replace is an error. Free positions hold an ordinary id until
    something is put there; every other token is kept.

    Raises UserError for a prompt that has no room for k more tokens or lacks the term to replace.
    """
    rows, places = [], []
    padding = _padding(model)
    for row, end in zip(ids.tolist(), _eos_at(model, ids).tolist(), strict=True):
        text, cut = row[1:end], 0
        at = 0 if where in ("prefix", "insert", "replace") else len(text)
        if where in ("insert", "replace"):
            found = _find(model, row[:end], list(term_ids or ()))
            if found:
                at, cut = found.start - 1, len(found) if where == "replace" else 0
            elif where == "replace":
                raise UserError(f"the prompt {model.text_of(torch.tensor(text))!r} does not contain the term to replace")
        free = _placeholder(model)
        text = text[:at] + [free] * k + text[at + cut :]
        if len(text) + 2 > len(row):
            raise UserError(
                f"the prompt {model.text_of(torch.tensor(row[1:end]))!r} has no room for {k} more tokens; "
                f"the model reads {len(row) - 2}"
            )
        rows.append([row[0], *text, row[end]] + [padding] * (len(row) - len(text) - 2))
        places.append(list(range(1 + at, 1 + at + k)))
    positions = torch.tensor(places, dtype=torch.long, device=ids.device).view(len(rows), k)
    return torch.tensor(rows, dtype=torch.long, device=ids.device), positions


def insert_every(model: DiffusionModel, prompts: Sequence[str], every: int) -> tuple[Tensor, Tensor]:
    """Make room for one free token before every ``every`` words: (ids (B, L), which of them are free (B, L) bool).

    Words are what whitespace separates, so that no word is torn. Raises UserError for a prompt without room.
    """
    rows, marks = [], []
    free = _placeholder(model)
    for prompt in prompts:
        words = model.tokenize(prompt.split() or [""])
        row: list[int] = []
        mark: list[bool] = []
        for number, (ids, length) in enumerate(zip(words.tolist(), text_length(model, words).tolist(), strict=True)):
            if number % every == 0:
                row, mark = [*row, free], [*mark, True]
            row, mark = row + ids[1 : 1 + length], mark + [False] * length
        room = model.max_tokens - len(row) - 2
        if room < 0:
            raise UserError(f"the prompt {prompt!r} has no room for a free token before every {every} words")
        rows.append([int(words[0, 0]), *row, _eos(model), *[_padding(model)] * room])
        marks.append([False, *mark, *[False] * (room + 1)])
    return torch.tensor(rows, device=model.device), torch.tensor(marks, device=model.device)


def nearest(vectors: Tensor, vocabulary: Tensor) -> Tensor:
    """For vectors (…, d) the row of the vocabulary (M, d) of the highest cosine, (…)."""
    return (F.normalize(vectors, dim=-1) @ F.normalize(vocabulary, dim=-1).T).argmax(dim=-1)


def put_ids(ids: Tensor, positions: Tensor, free: Tensor) -> Tensor:
    """ids (B, L) with ``free`` (B, k) at ``positions`` (B, k)."""
    return ids.scatter(1, positions, free)


def put_embeddings(model: DiffusionModel, ids: Tensor, positions: Tensor, free: Tensor) -> Tensor:
    """Token embeddings (B, L, D) of ids with ``free`` (B, k, D) at ``positions`` (B, k); differentiable in ``free``."""
    fixed = model.vocabulary[ids]
    index = positions[..., None].expand(-1, -1, fixed.shape[-1])
    return fixed.to(free.dtype).scatter(1, index, free)


def descend_embeddings(
    model: DiffusionModel,
    batch_at: Callable[[int], tuple[Tensor, Tensor, Tensor]],
    ids: Tensor,
    positions: Tensor,
    free: Tensor,
    *,
    steps: int,
    lr: float,
    signed: bool = False,
    accumulate: bool = False,
) -> Iterator[tuple[Tensor, float]]:
    """Move free token embeddings (B, k, D) by Adam until the model predicts given targets; yields (embeddings, mean loss) a step.

    min_v  mean || eps_theta(x_t, t, tau(v in the prompt)) - target ||^2   with  (x_t, t, target) = ``batch_at(step)``, a row per
    prompt. What comes with a loss are the embeddings it was measured at; a last item holds the moved ones and loss NaN.
    ``signed`` takes the gradient's sign before Adam; ``accumulate`` never clears it, so that it gathers over the steps.
    """
    v = free.detach().clone().requires_grad_()
    optimizer = torch.optim.Adam([v], lr=lr)
    for step in range(steps):
        x_t, t, target = batch_at(step)
        c = model.embed_tokens(put_embeddings(model, ids, positions, v), ids)
        losses = (model.eps(x_t, t, c).float() - target.float()).square().flatten(1).mean(1)
        # Rows are independent: the sum gives every row the gradient it would have alone.
        (gradient,) = torch.autograd.grad(losses.sum(), v)
        v.grad = gradient if v.grad is None or not accumulate else v.grad + gradient
        if signed:
            v.grad = v.grad.sign()
        yield v.detach().clone(), float(losses.detach().mean())
        optimizer.step()
    yield v.detach().clone(), float("nan")


def text_ids(model: DiffusionModel) -> Tensor:
    """The vocabulary a search may use (M,): every id whose text reads back as that very id.

    Special ids, pieces of words and pieces of characters do not; a prompt found with them would be another one once typed in.
    """
    candidates = ordinary_ids(model).tolist()
    texts = [model.text_of(torch.tensor([i])) for i in candidates]
    readable = [(i, text) for i, text in zip(candidates, texts, strict=True) if text and text.isprintable()]
    rows = model.tokenize([text for _, text in readable])
    whole = (text_length(model, rows) == 1) & (rows[:, 1] == torch.tensor([i for i, _ in readable], device=rows.device))
    return torch.tensor([i for (i, _), same in zip(readable, whole.tolist(), strict=True) if same], device=model.device)


def project_to_simplex(x: Tensor) -> Tensor:
    """The nearest point of the probability simplex for every row (..., V), by sorting (Duchi et al., ICML 2008)."""
    ordered, _ = x.sort(dim=-1, descending=True)
    excess = ordered.cumsum(-1) - 1
    rank = torch.arange(1, x.shape[-1] + 1, device=x.device, dtype=x.dtype)
    support = (ordered - excess / rank > 0).sum(-1, keepdim=True)
    threshold = excess.gather(-1, support - 1) / support
    return (x - threshold).clamp(min=0)


def sample_one_hot(U: Tensor, rngs: Sequence[torch.Generator]) -> Tensor:
    """One-hot draws (B, k, V) from distributions U (B, k, V); gradients of the draw pass straight through to U, where wanted.

    Row b draws from ``rngs[b]`` (CPU generators), whatever else is in the batch.
    """
    uniform = torch.stack([torch.rand(U.shape[1], generator=rng) for rng in rngs]).to(U)
    # Inverse transform: the first id whose cumulative probability exceeds the draw. Scaling by the total absorbs rounding.
    total = U.detach().clamp(min=0).cumsum(-1)
    drawn = torch.searchsorted(total, (uniform * total[..., -1])[..., None], right=True).squeeze(-1)
    hard = F.one_hot(drawn.clamp(max=U.shape[-1] - 1), U.shape[-1]).to(U)
    return hard + (U - U.detach()) if U.requires_grad else hard


def random_ids(words: Tensor, k: int, rngs: Sequence[torch.Generator]) -> Tensor:
    """k random ids per row (B, k) out of ``words`` (M,), row b from ``rngs[b]``."""
    picks = torch.stack([torch.randint(len(words), (k,), generator=rng) for rng in rngs])
    return words[picks.to(words.device)]


def ordinary_ids(model: DiffusionModel) -> Tensor:
    """Every id of the vocabulary that is not special (M,); once for a whole search, since a real vocabulary has 49 000."""
    special = model.special_ids
    return torch.tensor([i for i in range(len(model.vocabulary)) if i not in special])


def random_embeddings(model: DiffusionModel, words: Tensor, k: int, rngs: Sequence[torch.Generator]) -> Tensor:
    """Embeddings (B, k, D) of k random ids per row out of ``words`` (M,), row b from ``rngs[b]``: where a search begins."""
    return model.vocabulary[random_ids(words, k, rngs).to(model.device)].float()


def _eos_at(model: DiffusionModel, ids: Tensor) -> Tensor:
    """Position (B,) of the first EOS of each row."""
    return (ids == _eos(model)).int().argmax(dim=1)


def _eos(model: DiffusionModel) -> int:
    # The empty prompt is BOS, EOS, padding in every tokenizer of this family.
    return int(model.tokenize([""])[0, 1])


def _padding(model: DiffusionModel) -> int:
    return int(model.tokenize([""])[0, -1])


def _placeholder(model: DiffusionModel) -> int:
    """An ordinary id for a position that holds no token yet: the first EOS of a row must stay the text's own."""
    return next(i for i in range(len(model.vocabulary)) if i not in model.special_ids)
