"""A diffusion model with known answers: every prompt is a Gaussian, and the noise prediction is a formula. For tests."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.model import Calls, Conditioning, Grid
from safeweights.diffusion.parameters import select

BOS, EOS = "<s>", "</s>"


class _Text(nn.Module):
    """Every token to its row of a table, then a linear layer."""

    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(width, width)])})

    def forward(self, token_embeddings: Tensor) -> Tensor:
        states: Tensor = self.encoder["layers"][0](token_embeddings)  # type: ignore[index]
        return states


class _Attention(nn.Module):
    """Adds values up, weighted by keys: key and value of a state are both linear in it, as in cross-attention."""

    def __init__(self, width: int, pixels: int) -> None:
        super().__init__()
        self.to_k = nn.Linear(width, 1, bias=False)
        self.to_v = nn.Linear(width, pixels, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        mean: Tensor = (self.to_k(states) * self.to_v(states)).sum(dim=1)
        return mean


class _Denoiser(nn.Module):
    def __init__(self, width: int, pixels: int, deviation: float) -> None:
        super().__init__()
        self.attn2 = _Attention(width, pixels)
        self.log_variance = nn.Parameter(torch.full((pixels,), 2 * torch.tensor(deviation).log().item()))

    def forward(self, x_t: Tensor, alpha: Tensor, sigma: Tensor, states: Tensor) -> Tensor:
        mean = self.attn2(states).view_as(x_t)
        variance = self.log_variance.exp().view(1, *x_t.shape[1:])
        eps: Tensor = sigma * (x_t - alpha * mean) / (alpha**2 * variance + sigma**2)
        return eps


class GaussianModel:
    """x_0 | c ~ N(mu_c, diag(s^2)), hence eps(x_t, t, c) = sigma_t (x_t - alpha_t mu_c) / (alpha_t^2 s^2 + sigma_t^2), exactly.

    mu_c adds up one vector per word of the prompt; the empty prompt has mean zero. The autoencoder is the identity on pictures
    of 3 channels. Parameters carry the names of their counterparts in Stable Diffusion: ``unet.attn2.to_k/to_v`` and
    ``text_encoder.encoder.layers.0``. Satisfies `DiffusionModel`.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        size: int = 2,
        deviation: float = 0.1,
        max_tokens: int = 8,
        timesteps: int = 1000,
        seed: int = 0,
    ) -> None:
        self.name, self.prediction = "gaussian", "epsilon"
        self.words = (BOS, EOS, *words)
        self.latent_shape = (3, size, size)
        self.latent_stride = 1
        self.grid = Grid(offset=1, final_alpha=1.0)
        self.calls = Calls()
        self._max_tokens = max_tokens
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64) ** 2 * (1000 / timesteps)
        products = (1 - betas).cumprod(0)
        self.alpha, self.sigma = products.sqrt().float(), (1 - products).sqrt().float()
        width, pixels = len(self.words), 3 * size * size
        rng = torch.Generator().manual_seed(seed)
        self.text_encoder: nn.Module = (text := _Text(width, width))
        self.denoiser: nn.Module = (denoiser := _Denoiser(width, pixels, deviation))
        with torch.no_grad():
            # One-hot tokens through the identity: state k of a prompt is the one-hot vector of its word k.
            text.embedding.weight.copy_(torch.eye(width))
            layer: Any = text.encoder["layers"][0]  # type: ignore[index]
            layer.weight.copy_(torch.eye(width))
            layer.bias.zero_()
            denoiser.attn2.to_k.weight.fill_(1.0)
            denoiser.attn2.to_v.weight.copy_(0.5 * torch.randn(pixels, width, generator=rng))
            denoiser.attn2.to_v.weight[:, :2] = 0
        for module in (text, denoiser):
            module.eval().requires_grad_(False)

    @property
    def device(self) -> torch.device:
        return self.alpha.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    @property
    def max_tokens(self) -> int:
        return self._max_tokens

    @property
    def vocabulary(self) -> Tensor:
        weight: Tensor = self.text_encoder.embedding.weight.detach()  # type: ignore[union-attr,operator]
        return weight

    @property
    def special_ids(self) -> frozenset[int]:
        return frozenset({0, 1})

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        rows = []
        for prompt in prompts:
            unknown = [word for word in prompt.split() if word not in self.words]
            if unknown:
                raise UserError(f"the Gaussian model does not know the word {unknown[0]!r}")
            row = [0, *(self.words.index(word) for word in prompt.split()), 1]
            if len(row) > self._max_tokens:
                raise UserError(f"the prompt {prompt!r} is longer than {self._max_tokens - 2} words")
            rows.append(row + [1] * (self._max_tokens - len(row)))
        return torch.tensor(rows, dtype=torch.long).view(len(rows), self._max_tokens)

    def text_of(self, ids: Tensor) -> str:
        return " ".join(self.words[int(i)] for i in ids.flatten() if int(i) > 1)

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        ids = self.tokenize(prompts)
        return self.embed_tokens(self.text_encoder.embedding(ids), ids)  # type: ignore[operator]

    def embed_tokens(self, token_embeddings: Tensor, ids: Tensor) -> Conditioning:
        return Conditioning(self.text_encoder(token_embeddings))

    def encode(self, images: Tensor) -> Tensor:
        return images * 2 - 1

    def decode(self, x_0: Tensor) -> Tensor:
        return (x_0 / 2 + 0.5).clamp(0, 1)

    def mean(self, prompt: str) -> Tensor:
        """mu_c (C, h, w)."""
        mean: Tensor = self.denoiser.attn2(self.embed([prompt]).states)  # type: ignore[operator]
        return mean.view(self.latent_shape)

    def eps(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        self.calls.eps += len(x_t)
        alpha, sigma = (level[t.long()].view(-1, 1, 1, 1) for level in (self.alpha, self.sigma))
        out: Tensor = self.denoiser(x_t, alpha, sigma, c.states.expand(len(x_t), -1, -1))
        return out

    def sampler(self, name: str) -> Any:
        raise UserError(f"the Gaussian model is sampled with ddim, not {name}")

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part, module in (("unet", self.denoiser), ("text_encoder", self.text_encoder)):
            for name, parameter in module.named_parameters():
                yield f"{part}.{name}", parameter

    def fork(self, parameters: str | Sequence[str]) -> Self:
        names = select(self.named_parameters(), parameters)
        twin = self.with_tensors({})
        for name, parameter in twin.named_parameters():
            parameter.requires_grad_(name in names)
        return twin

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def edited(self) -> dict[str, Tensor]:
        return {name: parameter.detach().clone() for name, parameter in self.trainable().items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        twin = copy.copy(self)
        twin.denoiser, twin.text_encoder = copy.deepcopy((self.denoiser, self.text_encoder))
        known = dict(twin.named_parameters())
        for name, parameter in known.items():
            parameter.requires_grad_(False)
            parameter.grad = None
            if name in tensors:
                if tensors[name].shape != parameter.shape:
                    raise UserError(f"{name} is {tuple(parameter.shape)} but {tuple(tensors[name].shape)} in the edit")
                parameter.data.copy_(tensors[name])
        if unknown := sorted(set(tensors) - set(known)):
            raise UserError(f"the Gaussian model has no parameter {unknown[0]!r}")
        return twin

    def save(self, folder: Any) -> None:
        """Write the parameters; there is no diffusers folder of this model."""
        from safetensors.torch import save_file

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file({name: p.detach().contiguous() for name, p in self.named_parameters()}, Path(folder) / "gaussian.safetensors")
