"""Clips of made motions: a shape with a random texture moves before a random textured ground in one of eight ways.

Appearance (ground, texture, outline, size, colours) and motion are drawn independently, so one picture says nothing of
the class. Positions wrap around at the border, and a growth starts again after 16 frames, so a motion never ends.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

MOTIONS = ("left", "right", "up", "down", "clockwise", "counterclockwise", "grow", "shrink")
PERIOD = 16  # frames until a growth starts again


def clips(motion_B: Tensor, n_frames: int, side: int, random: torch.Generator) -> Tensor:
    """uint8 RGB clips (B, T, side, side, 3), one for each index into MOTIONS; all else is drawn from `random`."""
    n = len(motion_B)

    def draw(*shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=random)

    def texture() -> Tensor:
        """Noise of three scales in random colours, (B, 3, side, side) between 0 and 1."""
        noise = sum(
            functional.interpolate(draw(3, cells, cells, low=-weight, high=weight), (side, side), mode="bilinear")
            for cells, weight in ((4, 0.3), (9, 0.25), (20, 0.2))
        )
        return (draw(3, 1, 1, low=0.2, high=0.8) + noise).clamp(0, 1)

    time = torch.arange(n_frames) + draw(1, high=PERIOD).floor()  # (B, T)
    code = motion_B[:, None]
    sign = torch.where(code % 2 == 0, -1.0, 1.0)
    pace = draw(1, low=0.7, high=1.3) * sign * time
    zero = torch.zeros_like(pace)
    x = draw(1, low=-1.0, high=1.0) + torch.where(code // 2 == 0, 0.085 * pace, zero)
    y = draw(1, low=-1.0, high=1.0) + torch.where(code // 2 == 1, 0.085 * pace, zero)
    angle = draw(1, high=2 * math.pi) + torch.where(code // 2 == 2, 0.14 * pace, zero)
    phase = (time % PERIOD) / PERIOD - 0.5
    growth = torch.where(code // 2 == 3, draw(1, low=0.9, high=1.3) * -sign * phase, zero).exp()
    scale = draw(1, low=0.4, high=0.62) * growth
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    dx = (line - x[..., None] + 1) % 2 - 1  # (B, T, W)
    dy = (line - y[..., None] + 1) % 2 - 1
    cos, sin = (angle.cos() / scale)[..., None, None], (angle.sin() / scale)[..., None, None]
    u = cos * dx[:, :, None, :] + sin * dy[:, :, :, None]  # the shape's own coordinates, (B, T, H, W)
    v = cos * dy[:, :, :, None] - sin * dx[:, :, None, :]
    radius = torch.ones_like(u)
    theta = torch.atan2(v, u)
    for waves in (2, 3, 4, 5):
        size, shift = draw(1, 1, 1, low=0.05, high=0.35 / math.sqrt(waves)), draw(1, 1, 1, high=2 * math.pi)
        radius = radius + size * torch.cos(waves * theta + shift)
    mask = torch.sigmoid(((radius - torch.hypot(u, v)) * scale[..., None, None]) * side / 2 * 1.5)[:, None]
    grid = torch.stack((u, v), -1).reshape(n, n_frames * side, side, 2) / 1.8
    shape = functional.grid_sample(texture(), grid, padding_mode="reflection", align_corners=False)
    shape = shape.reshape(n, 3, n_frames, side, side)
    picture = mask * shape + (1 - mask) * texture()[:, :, None]
    return (picture * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1)
