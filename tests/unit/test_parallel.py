"""Two processes descend as one does: same losses, same tensors, whatever is parted, also from a checkpoint."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from safeweights.core.launch import follows, processes
from safeweights.diffusion.parallel import part

SCRIPT = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from safeweights.core.workspace import Workspace
from safeweights.diffusion.noise import generator
from safeweights.diffusion.parallel import join, part
from safeweights.diffusion.training import descend
from safetensors.torch import save_file

folder, steps = Path(sys.argv[1]), int(sys.argv[2])
rank, size = join()
seen = []

def learn(name, batch, parted, workspace=None, stop=None):
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    data = torch.randn(64, 4, generator=generator("data"))
    state = {"drift": torch.zeros(1)}

    def loss_at(step):
        if step == stop:
            raise KeyboardInterrupt
        rows = torch.randint(64, (batch,), generator=generator("rows", step))
        mine = part(rows) if parted else rows
        seen.append(len(mine))
        state["drift"] = state["drift"] + 0.01
        return (net(data[mine]) - data[mine].sum(1, keepdim=True) - state["drift"]).square().mean()

    losses = descend(dict(net.named_parameters()), loss_at, steps=steps, lr=0.02, state=state, workspace=workspace)
    return {f"{name}/{key}": value.detach() for key, value in net.named_parameters()} | {f"{name}/losses": torch.tensor(losses)}

found = learn("even", 8, True) | learn("odd", 7, True) | learn("whole", 8, False)
workspace = Workspace(folder / f"work-{size}", every=2)
try:
    learn("resumed", 8, True, workspace, stop=5)
except KeyboardInterrupt:
    pass
found |= learn("resumed", 8, True, workspace)
found["seen"] = torch.tensor(seen[:steps])
save_file(found, folder / f"{size}-{rank}.safetensors")
"""


def port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def begun(command: list[str], size: int) -> list[subprocess.Popen[bytes]]:
    shared = {**os.environ, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port(), "OMP_NUM_THREADS": "1",
              "ACCELERATE_USE_CPU": "true"}  # fmt: skip
    return [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stderr=subprocess.PIPE,
                         stdout=subprocess.PIPE)
        for rank in range(size)
    ]  # fmt: skip


def ended(processes: list[subprocess.Popen[bytes]]) -> list[bytes]:
    told = []
    for process in processes:
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error.decode()[-2000:]
        told.append(out)
    return told


def test_two_processes_end_with_the_tensors_of_one(tmp_path: Path) -> None:
    script = tmp_path / "learn.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(tmp_path), "9"]
    alone, pair = begun(command, 1), begun(command, 2)
    ended(alone)
    ended(pair)
    one, first, second = (load_file(tmp_path / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1"))
    assert one["seen"].tolist() == [8] * 9
    assert first["seen"].tolist() == [4] * 9
    for name in one:
        if name != "seen":
            assert torch.equal(first[name], second[name]), name
            assert torch.allclose(first[name], one[name], atol=2e-6), name
    assert not torch.allclose(one["even/0.weight"], one["odd/0.weight"], atol=1e-3)


@pytest.mark.parametrize(
    ("rank", "size", "told"),
    [(None, None, (0, 1)), ("1", "2", (1, 2)), ("x", "2", (0, 1)), ("2", "2", (0, 1)), ("0", "1", (0, 1))],
)
def test_what_the_launcher_says(
    rank: str | None, size: str | None, told: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
    assert processes() == told
    assert follows() == (told[0] > 0)


def test_parts_make_up_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(6)
    assert part(rows) is rows
    monkeypatch.setenv("WORLD_SIZE", "3")
    parts = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        parts.append(part(rows))
        assert len(part(torch.arange(7))) == 7
    assert sorted(torch.cat(parts).tolist()) == rows.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["erase", "adapt"])
def test_a_command_on_two_processes_writes_once(tmp_path: Path, tiny_sd: Callable[..., Path], verb: str) -> None:
    concepts = tmp_path / "concepts.yaml"
    concepts.write_text("version: 1\nconcepts: {dog: {kind: object, prompts: [a red dog], term: dog, anchor: cat}}\n")
    common = [str(tiny_sd()), "--concept", "dog", "--concepts-file", str(concepts), "--device", "cpu", "--json"]
    settings = {
        "erase": "--method esd --set steps=3 --set trajectories=2 --set ddim_steps=2 --set batch_size=4",
        "adapt": "--method full --steps 3 --set batch_size=4 --pictures 2",
    }[verb].split()
    command = [sys.executable, "-m", "safeweights", verb, *common, *settings, "-o"]
    alone, pair = begun([*command, str(tmp_path / "one")], 1), begun([*command, str(tmp_path / "two")], 2)
    ended(alone)
    said = ended(pair)
    assert said[0].startswith(b"{")
    assert said[1] == b""
    one, two = (load_file(tmp_path / name / "unet" / "diffusion_pytorch_model.safetensors") for name in ("one", "two"))
    base = load_file(tiny_sd() / "unet" / "diffusion_pytorch_model.safetensors")
    changed = [name for name in base if not torch.equal(base[name], one[name])]
    assert changed
    for name in one:
        assert torch.allclose(one[name], two[name], atol=3e-5), name
