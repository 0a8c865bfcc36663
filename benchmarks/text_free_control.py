"""What text-free latent inversion finds on a model that never knew the concept: the control its rates need.

    python benchmarks/text_free_control.py [--n 6]

The sandbox's generator was never shown some objects that its detector knows. Pictures of those are drawn by the world itself,
inverted on the unedited model under the empty prompt (the attack's first round) and drawn again from the latents found. Prints a
Markdown row for each of them, and for two objects that it does know: how often the detector sees it in the drawings, after the
autoencoder alone, in what the model draws for its name and in what comes back from the inversion; and the deviation of the
latents found, 1 for noise.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch

from safeweights.attacks.adversarial.latent_inversion import LatentInversion
from safeweights.core.concept import DetectorSpec
from safeweights.core.model import Sampling
from safeweights.detectors.load import open_detector
from safeweights.diffusion.sampling import candidates_of, generate, invert, sample
from safeweights.models.door import open_model
from safeweights.sandbox import world
from safeweights.sandbox.files import sandbox_concepts, weights_folder

KNOWN = ("boat", "mushroom")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=6, help="pictures of each object")
    parser.add_argument("--iterations", type=int, default=LatentInversion.iterations)
    options = parser.parse_args()
    torch.set_num_threads(1)
    file, model = sandbox_concepts(), open_model("sandbox", device="cpu")
    sampling, none = Sampling(**file.generation), model.embed([""]).detach()
    print("| object | drawn | autoencoded | asked by name | inverted | deviation |\n|---|---|---|---|---|---|")
    folder = str(weights_folder() / "detectors" / "object")
    for name in (*world.HELD_BACK_OBJECTS, *KNOWN):
        detector = open_detector(DetectorSpec(type="image-classification", model=folder, label=name), concept=name)
        scenes = [world.sample_scene(np.random.default_rng([7000, i]), object=name, emblem=False) for i in range(options.n)]
        drawings = torch.stack(
            [torch.from_numpy(np.asarray(world.draw(scene)) / 255).permute(2, 0, 1) for scene in scenes]
        ).float()
        with torch.no_grad():
            x_0 = model.encode(drawings)
            again = model.decode(x_0)
        latents = invert(model, none, x_0, sampling, iterations=options.iterations)
        back = sample(model, none, latents, sampling)
        asked = generate(model, candidates_of([f"a picture of a {name}"] * options.n, range(7000, 7000 + options.n)), sampling)
        seen = [f"{int(detector.detect(part).present.sum())}/{options.n}" for part in (drawings, again, asked, back)]
        print(f"| {name} | {' | '.join(seen)} | {float(latents.std()):.3f} |", flush=True)


if __name__ == "__main__":
    main()
