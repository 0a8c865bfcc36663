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

    def draw(self, candidates: Sequence[Candidate], *, workspace: Workspace | None = None, what: str = "drawing") -> Tensor:
        """One picture for each candidate: (N, 3, H, W) in [0, 1], rounded to 8 bits as a saved picture would be."""
        import torch

        from safeweights.diffusion.sampling import generate

        workspace = workspace or Workspace()
        kept = [self._load(candidate) for candidate in candidates]
        missing = [i for i, picture in enumerate(kept) if picture is None]
        chunks = range(0, len(missing), self.batch_size)
        for start in workspace.track(chunks, what) if len(chunks) > 1 else chunks:
            rows = missing[start : start + self.batch_size]
            images = generate(self.model, [candidates[i] for i in rows], self.sampling)
            for i, image in zip(rows, images.mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy(), strict=True):
                kept[i] = image
                self._save(candidates[i], image)
        return torch.stack([torch.from_numpy(image).permute(2, 0, 1) for image in kept if image is not None]).float() / 255

    def ask(
        self, prompts: Sequence[str], seeds: Sequence[int], *, workspace: Workspace | None = None, what: str = "drawing"
    ) -> Tensor:
        """One picture for each prompt and seed."""
        return self.draw([Candidate(p, s) for p, s in zip(prompts, seeds, strict=True)], workspace=workspace, what=what)

    def _path(self, candidate: Candidate) -> Path | None:
        if self.folder is None or candidate.states is not None or candidate.latents is not None:
            return None
        key = json.dumps([self.fingerprint, candidate.prompt, candidate.seed, asdict(self.sampling)])
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.png"

    def _load(self, candidate: Candidate) -> np.ndarray | None:
        import numpy as np
        from PIL import Image, UnidentifiedImageError

        path = self._path(candidate)
        if path is None or not path.is_file():
            return None
        try:
            return np.array(Image.open(path).convert("RGB"))
        except (UnidentifiedImageError, OSError):  # cut off by a full disk or a kill: draw it again
            return None

    def _save(self, candidate: Candidate, image: np.ndarray) -> None:
        from PIL import Image

        if (path := self._path(candidate)) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.stem}.{os.getpid()}.partial")  # two runs may share the folder
        Image.fromarray(image).save(partial, format="PNG")
        partial.replace(path)
