"""The models trained by every optimizer of the package: what one offers is what the other asks for."""

import pytest
import torch
from torch.nn import functional as F

import deep_optim
from deep_optim.models import Hope, Transformer

STEPS = 20


def losses(model, optimizer):
    """Of sequences in which each token is followed by the same other one, over `STEPS` steps."""
    rng = torch.Generator().manual_seed(0)
    found = []
    for _ in range(STEPS):
        tokens = (torch.randint(8, (16, 1), generator=rng) + 3 * torch.arange(24)) % 8
        loss = F.cross_entropy(model(tokens[:, :-1])[0].mT, tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@pytest.mark.parametrize("name", deep_optim.list_optimizers())
@pytest.mark.parametrize("model", [Transformer, Hope])
def test_every_optimizer_trains_it(name, model):
    torch.manual_seed(0)
    options = {"chunk_sizes": (8, 4), "projection_chunk_size": 8} if model is Hope else {}
    net = model(8, 32, 1, **options)
    more = {"missing": "gradient"} if name in ("DGD", "InputDeltaMomentum") else {}  # levels use their weights directly
    before = [param.detach().clone() for param in net.parameters()]
    found = losses(net, deep_optim.create_optimizer(name, net, lr=1e-2, **more))
    assert sum(found[-5:]) / 5 < 0.7 * sum(found[:5]) / 5
    assert not any(map(torch.equal, before, net.parameters()))  # nothing was left out
