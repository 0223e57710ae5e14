"""A study of a small network on made-up images, for a device that has no data."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ranksearch as rs

N_CLASSES, SIZE = 4, 16


def make_study(device: str) -> rs.StudySpec:
    """The study, its network trained for a moment on the CPU; on the CPU itself a tiny one."""
    tiny = device == "cpu"
    mode, width, batch_size = ("eager", 8, 8) if tiny else ("cuda_graph", 32, 64)
    methods = ("none", "svd") if tiny else ("none", "svd", "spatial_svd", "tucker2")
    data = rs.Data(calibration=images(256, 0), validation=images(256, 1), train=images(512, 2), test=images(256, 3))
    model = trained(images(512, 2), width)
    return rs.StudySpec(
        name=f"gpu-check-{device.replace(':', '-')}",
        model=lambda: model,
        data=lambda: data,
        loss=F.cross_entropy,
        score=rs.top1,
        target=rs.Target(runtime="torch", mode=mode, device=device, batch_size=batch_size, threads=1, precision="f32"),
        space=rs.Space(decompositions=methods, weight_bits=(32,), rank_multiple=8),
        recovery=rs.Recovery(steps=8, learning_rate=0.01, device=device),
    )


def images(n_rows: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Noise with a bright stripe whose place is the class, in batches of 64."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, N_CLASSES, (n_rows,), generator=generator)
    pictures = 0.5 * torch.randn((n_rows, 3, SIZE, SIZE), generator=generator)
    width = SIZE // N_CLASSES
    for picture, label in zip(pictures, labels.tolist(), strict=True):
        picture[:, :, label * width : (label + 1) * width] += 1
    return list(zip(pictures.split(64), labels.split(64), strict=True))


def trained(batches: list[tuple[Tensor, Tensor]], width: int) -> nn.Module:
    """A network of three convolutions."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), nn.BatchNorm2d(2 * width), nn.ReLU(),
        nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * width, N_CLASSES),
    )  # fmt: skip
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    for inputs, targets in batches * 3:
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), targets).backward()
        optimizer.step()
    return model.eval()
