"""Draw pictures once: the same model, prompt, seed and sampling is never drawn twice in a run."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safeweights.core.attack import Candidate
from safeweights.core.concept import Prompt
from safeweights.core.model import DiffusionModel, Sampling
from safeweights.core.workspace import Workspace

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(frozen=True)
class Painter:
    """A model, how to sample it, and a folder of pictures already drawn (None: keeps none).

    ``fingerprint`` stands for the model's weights in the names of kept pictures.
    """

    model: DiffusionModel
    sampling: Sampling
    fingerprint: str
    folder: Path | None = None
    batch_size: int = 32

    def draw(
        self,
        candidates: Sequence[Candidate],
        guidance: Sequence[float | None] | None = None,
        *,
        workspace: Workspace | None = None,
        what: str = "drawing",
    ) -> Tensor:
        """One picture for each candidate: (N, 3, H, W) in [0, 1], rounded to 8 bits as a saved picture would be.

        ``guidance`` holds a scale for each candidate, None for that of the painter's sampling.
        """
        import torch

        from safeweights.diffusion.sampling import at_guidance, by_guidance, finite, generate

        workspace = workspace or Workspace()
        samplings = [at_guidance(self.sampling, scale) for scale in guidance or [None] * len(candidates)]
        kept = [self._load(candidate, sampling) for candidate, sampling in zip(candidates, samplings, strict=True)]
        missing = [i for i, picture in enumerate(kept) if picture is None]
        batches = by_guidance([samplings[i].guidance_scale for i in missing], self.batch_size)
        numbers = range(len(batches))
        for number in workspace.track(numbers, what) if len(batches) > 1 else numbers:
            rows = [missing[i] for i in batches[number]]
            images = generate(self.model, [candidates[i] for i in rows], samplings[rows[0]])
            # Embeddings and latents are the attacker's own: where a search diverged it drew nothing, and its doubt says so.
            plain = [n for n, i in enumerate(rows) if candidates[i].states is None and candidates[i].latents is None]
            finite(self.model, images[plain])
            images = images.nan_to_num(0.0).clamp(0, 1)
            for i, image in zip(rows, images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                kept[i] = image
                self._save(candidates[i], samplings[i], image)
        return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in kept if image is not None]).float() / 255

    def ask(self, prompts: Sequence[Prompt], *, workspace: Workspace | None = None, what: str = "drawing") -> Tensor:
        """One picture for each prompt, with its own seed and guidance."""
        candidates = [Candidate(p.text, p.seed or 0) for p in prompts]
        return self.draw(candidates, [p.guidance for p in prompts], workspace=workspace, what=what)

    def _path(self, candidate: Candidate, sampling: Sampling) -> Path | None:
        if self.folder is None or candidate.states is not None or candidate.latents is not None:
            return None
        key = json.dumps([self.fingerprint, candidate.prompt, candidate.seed, asdict(sampling)])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.png"

    def _load(self, candidate: Candidate, sampling: Sampling) -> np.ndarray | None:
        import numpy as np
        from PIL import Image, UnidentifiedImageError

        path = self._path(candidate, sampling)
        if path is None or not path.is_file():
            return None
        try:
            return np.array(Image.open(path).convert("RGB"))
        except (UnidentifiedImageError, OSError):  # cut off by a full disk or a kill: draw it again
            return None

    def _save(self, candidate: Candidate, sampling: Sampling, image: np.ndarray) -> None:
        from PIL import Image

        if (path := self._path(candidate, sampling)) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")  # two runs may share the folder
        Image.fromarray(image).save(partial, format="PNG")
        partial.replace(path)
