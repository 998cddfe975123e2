"""Four image classifiers, as their papers and torchvision have them: 224x224 pixels to 1000 classes.

    ResNet-50 v1.5      He et al. 2015, with the stride in the 3x3 convolution
    MobileNetV2         Sandler et al. 2018
    EfficientNet-B0     Tan and Le 2019
    ConvNeXt-T          Liu et al. 2022

For inference: dropout and stochastic depth, which have no weights, are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normed(
    i: int, o: int, kernel: int = 1, stride: int = 1, groups: int = 1, act=nn.ReLU, eps: float = 1e-5
) -> nn.Module:
    """Convolution, batch norm and, if there is one, activation."""
    conv = nn.Conv2d(i, o, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(o), *([act()] if act else []))


class Residual(nn.Module):
    """after(shortcut(x) + body(x)); the shortcut is the identity unless it is told."""

    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None, after: nn.Module | None = None) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut or nn.Identity()
        self.after = after or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.shortcut(x) + self.body(x))


def classifier(channels: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(channels, 1000)]


def resnet50() -> nn.Module:
    layers, i = [normed(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)], 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for block in range(count):
            s, o = stride if block == 0 else 1, 4 * width
            body = nn.Sequential(normed(i, width), normed(width, width, 3, s), normed(width, o, act=None))
            layers.append(Residual(body, normed(i, o, 1, s, act=None) if block == 0 else None, nn.ReLU()))
            i = o
    return nn.Sequential(*layers, *classifier(i))


def mobilenet_v2() -> nn.Module:
    layers, i = [normed(3, 32, 3, 2, act=nn.ReLU6)], 32
    for expansion, o, count, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1),
    ):  # fmt: skip
        for block in range(count):
            s, hidden = stride if block == 0 else 1, expansion * i
            expand = [normed(i, hidden, act=nn.ReLU6)] if expansion > 1 else []
            depthwise = normed(hidden, hidden, 3, s, groups=hidden, act=nn.ReLU6)
            body = nn.Sequential(*expand, depthwise, normed(hidden, o, act=None))
            layers.append(Residual(body) if s == 1 and i == o else body)
            i = o
    return nn.Sequential(*layers, normed(i, 1280, act=nn.ReLU6), *classifier(1280))


class SqueezeExcite(nn.Module):
    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        pool, reduce, expand = (
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(channels, squeezed, 1),
            nn.Conv2d(squeezed, channels, 1),
        )
        self.scale = nn.Sequential(pool, reduce, nn.SiLU(), expand, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale(x)


def efficientnet_b0() -> nn.Module:
    layers, i = [normed(3, 32, 3, 2, act=nn.SiLU)], 32
    for expansion, kernel, stride, o, count in (
        (1, 3, 1, 16, 1), (6, 3, 2, 24, 2), (6, 5, 2, 40, 2), (6, 3, 2, 80, 3), (6, 5, 1, 112, 3), (6, 5, 2, 192, 4),
        (6, 3, 1, 320, 1),
    ):  # fmt: skip
        for block in range(count):
            s, hidden = stride if block == 0 else 1, expansion * i
            expand = [normed(i, hidden, act=nn.SiLU)] if expansion > 1 else []
            depthwise = normed(hidden, hidden, kernel, s, groups=hidden, act=nn.SiLU)
            body = nn.Sequential(*expand, depthwise, SqueezeExcite(hidden, i // 4), normed(hidden, o, act=None))
            layers.append(Residual(body) if s == 1 and i == o else body)
            i = o
    return nn.Sequential(*layers, normed(i, 1280, act=nn.SiLU), *classifier(1280))


class Permute(nn.Module):
    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)


class LayerScale(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


def to_last() -> nn.Module:
    return Permute(0, 2, 3, 1)


def to_first() -> nn.Module:
    return Permute(0, 3, 1, 2)


def channel_norm(channels: int) -> list[nn.Module]:
    """Layer norm over the channels of every pixel."""
    return [to_last(), nn.LayerNorm(channels, eps=1e-6), to_first()]


def convnext_tiny() -> nn.Module:
    widths = (96, 192, 384, 768)
    layers = [nn.Conv2d(3, widths[0], 4, 4), *channel_norm(widths[0])]
    for stage, (c, count) in enumerate(zip(widths, (3, 3, 9, 3))):
        if stage:
            layers += [*channel_norm(widths[stage - 1]), nn.Conv2d(widths[stage - 1], c, 2, 2)]
        for _ in range(count):
            mix = [
                to_last(),
                nn.LayerNorm(c, eps=1e-6),
                nn.Linear(c, 4 * c),
                nn.GELU(),
                nn.Linear(4 * c, c),
                to_first(),
            ]
            layers.append(Residual(nn.Sequential(nn.Conv2d(c, c, 7, padding=3, groups=c), *mix, LayerScale(c))))
    pool, flatten, linear = classifier(widths[-1])
    return nn.Sequential(*layers, pool, *channel_norm(widths[-1]), flatten, linear)


NETWORKS = {f.__name__: f for f in (resnet50, mobilenet_v2, efficientnet_b0, convnext_tiny)}


@torch.no_grad()
def randomize(model: nn.Module) -> nn.Module:
    """Weights, and statistics of the batch norms that fit them: activations stay near 1 through any depth, so that a
    wrong layer shows in the output."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        elif isinstance(module, LayerScale):
            nn.init.ones_(module.scale)
    model.train()(torch.randn(4, 3, 96, 96))
    return model.eval()
