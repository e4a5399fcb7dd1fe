"""FSDP2: parameters, gradients and the optimizer's memories are sharded; each matrix is stepped whole on one rank.

torchrun --nproc-per-node 2 examples/fsdp2.py        (on CPUs with gloo; on GPUs with nccl)

Run it twice: the second run goes on from the checkpoint of the first, on any number of ranks.
"""

import os
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard

import deep_optim

WIDTH, STEPS = 32, 20


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))))


def main(folder: str = "checkpoint") -> None:
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    torch.manual_seed(0)  # the same model on every rank
    model = nn.Sequential(nn.Linear(8, WIDTH), Block(), Block(), nn.Linear(WIDTH, 1)).to(device)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    optimizer = deep_optim.create_optimizer("DMGD", model, lr=3e-3)  # after sharding, which exchanges the parameters

    first = 0
    if Path(folder).exists():
        weights, state = get_state_dict(model, optimizer)
        saved = {"model": weights, "optimizer": state, "step": 0}
        dcp.load(saved, checkpoint_id=folder)
        set_state_dict(model, optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
        first = saved["step"]

    for step in range(first, first + STEPS):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())  # each its own data
        x = torch.randn(64, 8, generator=generator).to(device)
        loss = (model(x) - x.sin().sum(1, keepdim=True)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if dist.get_rank() == 0 and step % 5 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "step": first + STEPS}, checkpoint_id=folder)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
