"""Where free tokens go: BPE-exact, for tokenizers that pad with EOS and with "!"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeweights.core.errors import UserError
from safeweights.diffusion.search import (
    Where,
    find_term,
    insert_tokens,
    put_embeddings,
    put_ids,
    random_ids,
    term_ids,
    text_ids,
    text_length,
)
from safeweights.models.door import open_model


@pytest.fixture(params=["1.5", "2.1"])
def model(request: pytest.FixtureRequest, tiny_sd: Callable[..., Path]) -> Any:
    return open_model(tiny_sd(version=request.param), device="cpu")


def test_words_of_several_tokens(model: Any) -> None:
    assert len(term_ids(model, "nudity")) == 3
    assert len(term_ids(model, "tench")) == 2
    ids = model.tokenize(["a photo of nudity", "a tench", "", "nudity tench of a"])
    assert text_length(model, ids).tolist() == [6, 3, 0, 7]
    assert find_term(model, ids, "nudity") == [range(4, 7), range(0), range(0), range(1, 4)]
    assert find_term(model, ids, "tench") == [range(0), range(2, 4), range(0), range(4, 6)]


def test_a_term_is_not_found_inside_a_longer_word(model: Any) -> None:
    ids = model.tokenize(["a dogs house", "a dog house"])
    assert find_term(model, ids, "dog") == [range(0), range(2, 3)]
    # "xtench" ends in the very tokens of "tench".
    longer = model.tokenize(["a xtench", "a xtench tench"])
    assert longer[0, 3:5].tolist() == term_ids(model, "tench")
    assert find_term(model, longer, "tench") == [range(0), range(5, 7)]
    with pytest.raises(UserError, match="does not contain"):
        insert_tokens(model, longer[:1], 1, "replace", term_ids(model, "tench"))


def test_text_and_ids_round_trip(model: Any) -> None:
    ids = model.tokenize(["a photo of nudity by vincent van gogh"])
    assert model.text_of(ids[0]) == "a photo of nudity by vincent van gogh"
    assert torch.equal(model.tokenize([model.text_of(ids[0])]), ids)


def test_tokenizing_pads_like_the_pipelines(model: Any) -> None:
    prompts = ["a dog", "a photo of nudity"]
    theirs = model.tokenizer(prompts, padding="max_length", max_length=16, truncation=True, return_tensors="pt").input_ids
    assert torch.equal(model.tokenize(prompts), theirs)
    with pytest.raises(UserError, match="takes 15 tokens, the model reads 14"):
        model.tokenize(["dog " * 15])
    assert model.tokenize(["dog " * 14]).shape == (1, 16)


@pytest.mark.parametrize("where", ["prefix", "suffix", "insert", "replace"])
def test_insertion_keeps_every_other_token(model: Any, where: Where) -> None:
    prompts = ["a photo of nudity", "nudity and a dog"]
    ids = model.tokenize(prompts)
    term = term_ids(model, "nudity")
    wide, positions = insert_tokens(model, ids, 2, where, term)
    expected = {
        "prefix": ["{} a photo of nudity", "{} nudity and a dog"],
        "suffix": ["a photo of nudity {}", "nudity and a dog {}"],
        "insert": ["a photo of {} nudity", "{} nudity and a dog"],
        "replace": ["a photo of {}", "{} and a dog"],
    }[where]
    words = [("cat", "boat"), ("red", "house")]
    free = torch.tensor([[term_ids(model, word)[0] for word in pair] for pair in words])
    filled = put_ids(wide, positions, free)
    assert torch.equal(filled, model.tokenize([text.format(" ".join(pair)) for text, pair in zip(expected, words, strict=True)]))
    assert torch.equal(filled.gather(1, positions), free)
    # Embeddings of those very ids are the plain prompt's; only the free positions carry gradients.
    vectors = model.vocabulary[free].clone().requires_grad_()
    embeddings = put_embeddings(model, wide, positions, vectors)
    assert torch.equal(embeddings, model.vocabulary[filled])
    states = model.embed_tokens(embeddings, wide).states
    assert torch.allclose(states, model.text_encoder(filled).last_hidden_state, atol=1e-5)
    (gradient,) = torch.autograd.grad(states.square().sum(), vectors)
    assert gradient.abs().sum(-1).min() > 0


def test_no_room_and_no_term(model: Any) -> None:
    with pytest.raises(UserError, match="no room for 3 more tokens"):
        insert_tokens(model, model.tokenize(["dog " * 12]), 3)
    assert insert_tokens(model, model.tokenize(["dog " * 12]), 2)[0].shape == (1, 16)
    with pytest.raises(UserError, match="does not contain the term"):
        insert_tokens(model, model.tokenize(["a dog"]), 1, "replace", term_ids(model, "cat"))
    assert insert_tokens(model, model.tokenize(["a dog"]), 1, "insert", term_ids(model, "cat"))[1].tolist() == [[1]]
    with pytest.raises(UserError, match="no tokens"):
        term_ids(model, " ")


def test_random_tokens_are_text_and_belong_to_their_row(model: Any) -> None:
    words = text_ids(model)
    together = random_ids(words, 4, [torch.Generator().manual_seed(i) for i in range(3)])
    assert together.shape == (3, 4)
    assert set(together.flatten().tolist()) <= set(words.tolist())
    assert torch.equal(random_ids(words, 4, [torch.Generator().manual_seed(1)])[0], together[1])


def test_searched_words_read_back_as_themselves(model: Any) -> None:
    words = text_ids(model)
    assert len(words) > 20
    assert not set(words.tolist()) & model.special_ids
    rows = model.tokenize([model.text_of(words[i : i + 3]) for i in range(len(words) - 2)])
    for i, row in enumerate(rows):
        assert row[1:4].tolist() == words[i : i + 3].tolist()
