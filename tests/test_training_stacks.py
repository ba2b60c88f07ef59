"""Differentiable ops inside what trains: autocast, activation checkpointing, torch.compile, DDP and FSDP2."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import pygen

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Of a U-Net: GroupNorm and SiLU, a convolution, attention over pixels with rotated heads, and a gated unit."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(8, WIDTH), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.turns = nn.Buffer(pygen.rope_table(pygen.rope_frequencies(WIDTH // HEADS)[0], positions=64))

    def forward(self, image: Tensor) -> Tensor:
        y = self.conv(pygen.group_norm_silu(image, self.norm.weight, self.norm.bias, 8))
        x = (image + y).flatten(2).transpose(1, 2).contiguous()
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        positions = torch.zeros((), dtype=torch.int64)
        q, k = (pygen.rope(tensor, positions, self.turns) for tensor in (q, k))
        x = x + self.out(pygen.attention(q, k, v).transpose(1, 2).flatten(2))
        gate, up = self.up(pygen.layer_norm(x, self.scale.weight, self.scale.bias)).chunk(2, dim=-1)
        return x + self.down(pygen.geglu(gate, up))


class Net(nn.Module):
    def __init__(self, checkpointed: bool = False) -> None:
        super().__init__()
        self.blocks, self.checkpointed = nn.ModuleList(Block() for _ in range(2)), checkpointed

    def forward(self, image: Tensor) -> Tensor:
        for block in self.blocks:
            tokens = checkpoint(block, image, use_reentrant=False) if self.checkpointed else block(image)
            image = tokens.transpose(1, 2).unflatten(2, image.shape[2:]).contiguous()
        return image


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def images() -> Tensor:
    return torch.randn(4, WIDTH, 6, 8, generator=torch.Generator().manual_seed(1))


def gradients(model: Any, batch: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(batch).float().square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_attention_follows_autocast_as_torchs_does_and_norms_leave_dtypes_alone() -> None:
    q, h = torch.randn(2, 2, 5, 8, requires_grad=True), torch.randn(2, 8, 3).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = pygen.attention(q, q.detach().bfloat16(), q.detach().double().float())
        assert y.dtype == functional.scaled_dot_product_attention(q, q, q).dtype == torch.bfloat16
        for x in (h, h.float()):
            assert pygen.group_norm_silu(x, None, None, 2).dtype == functional.group_norm(x, 2).dtype == x.dtype
        loss = net()(images()).float().square().mean()
    y.float().sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.float32
    assert loss.isfinite()


def test_checkpointing_and_the_compiler_give_the_same_gradients() -> None:
    model, batch = net(), images()
    plain = gradients(model, batch)
    model.checkpointed = True
    assert all(map(torch.equal, gradients(model, batch), plain))
    model.checkpointed = False
    torch._dynamo.reset()
    close(gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), batch), plain)


def worker(rank: int, place: str, sharded: bool) -> None:
    """One of two: each has half of the batch."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{place}/meeting", rank=rank, world_size=2)
    model, part = net(), images().chunk(2)[rank]
    if sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        found = gradients(model, part)
        found = [gradient.full_tensor() for gradient in found]  # type: ignore[attr-defined]
    else:
        found = gradients(nn.parallel.DistributedDataParallel(model), part)
    if rank == 0:
        torch.save(found, Path(place) / "gradients.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP2"])
def test_two_ranks_give_the_gradients_of_the_whole_batch(sharded: bool, tmp_path: Path) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(worker, args=(str(tmp_path), sharded), nprocs=2)
    close(torch.load(tmp_path / "gradients.pt"), gradients(copy.deepcopy(net()), images()))
