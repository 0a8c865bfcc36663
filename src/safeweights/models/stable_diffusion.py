"""Stable Diffusion 1.x and 2.x: latent diffusion with one CLIP text encoder (Rombach et al., CVPR 2022, arXiv:2112.10752)."""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from safeweights.core.errors import UserError
from safeweights.core.model import Calls, Conditioning, Grid
from safeweights.diffusion.noise import v_to_eps
from safeweights.diffusion.parameters import select
from safeweights.models.quiet import quiet

PARTS = ("unet", "text_encoder")


class StableDiffusion:
    """A pipeline's parts in noise-prediction form; satisfies `DiffusionModel`.

    Takes ownership of the modules: they are frozen and put into evaluation mode. Parameters are called
    ``unet.<diffusers name>`` and ``text_encoder.<transformers name>``.
    """

    def __init__(
        self, *, name: str, unet: nn.Module, text_encoder: nn.Module, vae: nn.Module, tokenizer: Any, scheduler: Any
    ) -> None:
        self.name = name
        self.denoiser, self.text_encoder, self.vae = unet, text_encoder, vae
        self.tokenizer, self.scheduler = tokenizer, scheduler
        for module in (unet, text_encoder, vae):
            module.eval().requires_grad_(False)
        unet_config: Any = unet.config
        vae_config: Any = vae.config
        self.prediction: str = scheduler.config.prediction_type
        if self.prediction not in ("epsilon", "v_prediction"):
            raise UserError(f"{name}: prediction type {self.prediction!r} is not supported; epsilon and v_prediction are")
        products = scheduler.alphas_cumprod.double()
        # A zero terminal level would divide by zero in predict_x0; diffusers' own samplers use the same floor.
        self.alpha = products.clamp(min=2**-24).sqrt().float().to(self.device)
        self.sigma = (1 - products).sqrt().float().to(self.device)
        config = scheduler.config
        self.grid = Grid(
            spacing=config.get("timestep_spacing", "leading"),
            offset=int(config.get("steps_offset", 0)),
            final_alpha=1.0 if config.get("set_alpha_to_one", True) else float(self.alpha[0]),
        )
        size = unet_config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (int(unet_config.in_channels), int(height), int(width))
        self.latent_stride: int = 2 ** (len(vae_config.block_out_channels) - 1)
        self.calls = Calls()
        self._dtypes = {"unet": _dtype(unet), "text_encoder": _dtype(text_encoder)}

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the base weights."""
        return self._dtypes["unet"]

    # text

    @property
    def max_tokens(self) -> int:
        return min(int(self.tokenizer.model_max_length), int(self.text_encoder.config.max_position_embeddings))  # type: ignore[union-attr,arg-type]

    @property
    def vocabulary(self) -> Tensor:
        return self._token_embedding.weight.detach()

    @property
    def special_ids(self) -> frozenset[int]:
        tokenizer = self.tokenizer
        return frozenset({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None})

    def tokenize(self, prompts: Sequence[str]) -> Tensor:
        # Truncation would be silent, so the length is checked here and the tokenizer's own warning is not needed.
        rows: list[list[int]] = self.tokenizer(list(prompts), truncation=False, verbose=False)["input_ids"] if prompts else []
        for prompt, row in zip(prompts, rows, strict=True):
            if len(row) > self.max_tokens:
                raise UserError(
                    f"the prompt {prompt[:60]!r}… takes {len(row) - 2} tokens, the model reads {self.max_tokens - 2}; shorten it"
                )
        padding = self.tokenizer.pad_token_id
        return torch.tensor(
            [row + [padding] * (self.max_tokens - len(row)) for row in rows], dtype=torch.long, device=self.device
        )

    def text_of(self, ids: Tensor) -> str:
        kept = [int(i) for i in ids.flatten() if int(i) not in self.special_ids]
        return str(self.tokenizer.decode(kept)).strip()

    def embed(self, prompts: Sequence[str]) -> Conditioning:
        return Conditioning(self.text_encoder(self.tokenize(prompts)).last_hidden_state)

    def embed_tokens(self, token_embeddings: Tensor, ids: Tensor) -> Conditioning:
        # Replacing what the token embedding gives leaves the rest of the stock forward, causal mask included, as it is.
        hook = self._token_embedding.register_forward_hook(lambda _m, _i, out: token_embeddings.to(out.dtype))
        try:
            return Conditioning(self.text_encoder(ids.to(self.device)).last_hidden_state)
        finally:
            hook.remove()

    @property
    def _token_embedding(self) -> nn.Embedding:
        embedding: nn.Embedding = self.text_encoder.get_input_embeddings()  # type: ignore[operator]
        return embedding

    # pictures

    def encode(self, images: Tensor) -> Tensor:
        vae: Any = self.vae
        images = (images * 2 - 1).to(self.device, vae.dtype)
        x_0: Tensor = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        return x_0.float()

    def decode(self, x_0: Tensor) -> Tensor:
        vae: Any = self.vae
        images: Tensor = vae.decode((x_0 / vae.config.scaling_factor).to(self.device, vae.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    # noise

    def eps(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        self.calls.eps += len(x_t)
        states = c.states if len(c) == len(x_t) else c.states.expand(len(x_t), -1, -1)
        dtype = _dtype(self.denoiser)
        out: Tensor = self.denoiser(x_t.to(dtype), t, encoder_hidden_states=states.to(dtype)).sample
        out = out.to(x_t.dtype)
        return v_to_eps(self, out, x_t, t) if self.prediction == "v_prediction" else out

    def sampler(self, name: str) -> Any:
        import diffusers

        classes = {
            "ddim": diffusers.DDIMScheduler,
            "lms": diffusers.LMSDiscreteScheduler,
            "dpm": diffusers.DPMSolverMultistepScheduler,
            "euler": diffusers.EulerDiscreteScheduler,
            "pndm": diffusers.PNDMScheduler,
        }
        if name == "lms" and importlib.util.find_spec("scipy") is None:
            raise UserError("the lms scheduler needs scipy; run 'pip install scipy' or choose another scheduler")
        # `eps` always speaks noise, whatever the weights predict. Keys of the model's own scheduler that another class does
        # not know are dropped, so that its warnings stay out of the user's way.
        known = set(classes[name]._get_init_keys(classes[name]))
        config = {key: value for key, value in self.scheduler.config.items() if key in known and not key.startswith("_")}
        return classes[name].from_config({**config, "prediction_type": "epsilon"})

    # weights

    def _modules(self) -> dict[str, nn.Module]:
        return {"unet": self.denoiser, "text_encoder": self.text_encoder}

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for part, module in self._modules().items():
            for name, parameter in module.named_parameters():
                yield f"{part}.{name}", parameter

    def _copy(self, names: Iterable[str], *, float32: bool) -> Self:
        """A model whose named parameters are its own; a part without any is shared whole."""
        wanted = set(names)
        twin = copy.copy(self)
        modules = {}
        for part, module in self._modules().items():
            own = {name for name, p in module.named_parameters() if f"{part}.{name}" in wanted or p.requires_grad}
            if not own:
                modules[part] = module
                continue
            shared: list[Tensor] = [p for name, p in module.named_parameters() if name not in own]
            memo: dict[int, Any] = {id(tensor): tensor for tensor in [*shared, *module.buffers()]}
            modules[part] = copy.deepcopy(module, memo).requires_grad_(False)
            if float32 and any(p.dtype != torch.float32 for p in module.parameters()):
                # Half-precision weights round small updates away, and mixed parts do not multiply: all of the part goes to fp32.
                modules[part] = _float32(modules[part])
        twin.denoiser, twin.text_encoder = modules["unet"], modules["text_encoder"]
        return twin

    def fork(self, parameters: str | Sequence[str]) -> Self:
        names = select(self.named_parameters(), parameters)
        twin = self._copy(names, float32=True)
        owned = dict(twin.named_parameters())
        for name in names:
            owned[name].requires_grad_(True)
        return twin

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    def edited(self) -> dict[str, Tensor]:
        return {name: p.detach().to(self._dtypes[name.partition(".")[0]], copy=True) for name, p in self.trainable().items()}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Self:
        known = dict(self.named_parameters())
        for name, tensor in tensors.items():
            if name not in known:
                raise UserError(f"{self.name} has no parameter {name!r}; this edit was made for another model")
            if tensor.shape != known[name].shape:
                raise UserError(
                    f"{name} is {tuple(known[name].shape)} in {self.name} but {tuple(tensor.shape)} in the edit; "
                    "it was made for another model"
                )
        twin = self._copy(tensors, float32=False)
        owned = dict(twin.named_parameters())
        with torch.no_grad():
            for name, tensor in tensors.items():
                owned[name].copy_(tensor)
        return twin

    def with_words(self, words: Mapping[str, Tensor]) -> Self:
        """A copy whose tokenizer reads each new word as one token of this embedding (D,). Raises UserError for a known word."""
        known = self.tokenizer.get_vocab()
        for word in words:
            # Byte-pair vocabularies mark the end of a word, and CLIP's reads every word in lower case.
            if {word, word.lower(), f"{word.lower()}</w>"} & known.keys():
                raise UserError(f"the tokenizer knows {word!r} already; choose another new word with --set token=…")
        twin = copy.copy(self)
        twin.tokenizer = copy.deepcopy(self.tokenizer)
        twin.tokenizer.add_tokens([*words])
        encoder: Any = copy.deepcopy(self.text_encoder)
        encoder.resize_token_embeddings(len(twin.tokenizer), mean_resizing=False)
        weight = encoder.get_input_embeddings().weight
        with torch.no_grad():
            for word, row in words.items():
                weight[twin.tokenizer.convert_tokens_to_ids(word)] = row.to(weight)
        twin.text_encoder = encoder.requires_grad_(False)
        return twin

    def save(self, folder: Any) -> None:
        """Write a plain diffusers folder that opens with ``StableDiffusionPipeline.from_pretrained(folder)``.

        UNet and VAE keep the base's dtype. The text encoder is written in float32: without a ``torch_dtype`` transformers
        opens a folder in its stored dtype but diffusers in float32, and a half-precision text encoder would not fit the rest.
        """
        unet, text_encoder = self.denoiser, self.text_encoder
        if _dtype(unet) != self._dtypes["unet"]:
            unet = copy.deepcopy(unet).to(self._dtypes["unet"])
        if _dtype(text_encoder) != torch.float32:
            text_encoder = copy.deepcopy(text_encoder).float()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with quiet():
            import diffusers

            pipeline = diffusers.StableDiffusionPipeline(
                unet=unet, text_encoder=text_encoder, vae=self.vae, tokenizer=self.tokenizer, scheduler=self.scheduler,
                safety_checker=None, feature_extractor=None, requires_safety_checker=False,
            )  # fmt: skip
            pipeline.save_pretrained(folder, safe_serialization=True)
        follow_umask(folder.glob("*/*.safetensors"))

    def save_text_encoder(self, folder: Any) -> None:
        """Write the text encoder alone, in float32: a folder that opens with ``CLIPTextModel.from_pretrained(folder)``."""
        text_encoder: Any = self.text_encoder
        if _dtype(text_encoder) != torch.float32:
            text_encoder = copy.deepcopy(text_encoder).float()
        folder = Path(folder)
        with quiet():
            text_encoder.save_pretrained(folder, safe_serialization=True)
        follow_umask(folder.glob("*.safetensors"))


def follow_umask(files: Iterable[Path]) -> None:
    """safetensors writes files only their owner can read; a release folder follows the umask like any other file."""
    os.umask(mask := os.umask(0))
    for file in files:
        file.chmod(0o666 & ~mask)


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def _float32(module: nn.Module) -> nn.Module:
    """The module with every parameter and buffer replaced by a float32 one; tensors shared with the base stay as they were."""
    for child in module.modules():
        for name, parameter in list(child._parameters.items()):
            if parameter is not None and parameter.dtype != torch.float32:
                child._parameters[name] = nn.Parameter(parameter.detach().float(), requires_grad=False)
        for name, buffer in list(child._buffers.items()):
            if buffer is not None and buffer.is_floating_point():
                child._buffers[name] = buffer.float()
    return module
