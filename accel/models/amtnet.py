"""AMTNet: micro-tubes, the boxes of one action in T frames, from one or two streams."""

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from accel.detection.priors import BOXES_PER_CELL
from accel.models.amtnet_heads import MicrotubeHead
from accel.models.vgg_ssd import SSDTrunk

StreamFusion = Literal["none", "sum", "mean", "cat"]


class AMTNet(nn.Module):
    """Class scores and boxes of micro-tubes: an SSD trunk per stream, heads over T frames.

    Args:
        num_classes: K, background included.
        num_frames: T, frames of a micro-tube.
        fusion: of the streams' maps: their sum, mean or concatenation; "none": one stream.
        input_frames: images of the base stream (RGB: 1) stacked in the channels of a frame.
        extra_frames: those of the second stream (flow: 5); 0 with fusion "none".
        width, levels, batch_norm: of the trunks; published: 64, 6 and none.

    Raises:
        ValueError: a second stream without fusion, or the other way round.
    """

    system = "amtnet"

    def __init__(
        self,
        num_classes: int,
        *,
        num_frames: int = 2,
        fusion: StreamFusion = "none",
        input_frames: int = 1,
        extra_frames: int = 0,
        width: int = 64,
        levels: int = 6,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if (fusion == "none") != (extra_frames == 0):
            raise ValueError(
                f'AMTNet: fusion "{fusion}" with {extra_frames} images of a second stream; '
                'fusion "none" takes 0, the others at least 1.'
            )
        self.num_classes, self.num_frames, self.fusion = num_classes, num_frames, fusion
        self.levels = levels
        trunk = partial(SSDTrunk, width=width, levels=levels, batch_norm=batch_norm)
        self.base = trunk(3 * input_frames)
        self.extra = trunk(3 * extra_frames) if extra_frames else None
        self.heads = nn.ModuleList(
            MicrotubeHead(
                channels,
                num_frames=num_frames * (2 if fusion == "cat" else 1),
                boxes_per_cell=boxes,
                loc_size=4 * num_frames,
                num_classes=num_classes,
            )
            for channels, boxes in zip(self.base.channels, BOXES_PER_CELL, strict=False)
        )

    @property
    def trunks(self) -> list[SSDTrunk]:
        """The trunks of the streams, base first."""
        return [trunk for trunk in (self.base, self.extra) if isinstance(trunk, SSDTrunk)]

    def forward(self, frames: Tensor, extra: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and coded boxes of every prior.

        Args:
            frames: [N*T, 3*F, H, W], the frames of a micro-tube adjoin.
            extra: [N*T, 3*E, H, W] of the second stream.

        Returns:
            conf [N, P, K] and loc [N, P, 4*T], numbers 4t to 4t + 3 being those of frame t.

        Raises:
            ValueError: a second stream that is missing or not expected.
        """
        if (extra is None) != (self.extra is None):
            raise ValueError(f'AMTNet: fusion "{self.fusion}" and extra is {type(extra).__name__}.')
        sources = self.base(frames)
        if self.extra is not None and extra is not None:
            pairs = zip(sources, self.extra(extra), strict=True)
            sources = [self._fused(first, second) for first, second in pairs]
        outputs = [head(x) for head, x in zip(self.heads, sources, strict=True)]
        return torch.cat([conf for _, conf in outputs], 1), torch.cat(
            [loc for loc, _ in outputs], 1
        )

    def _fused(self, first: Tensor, second: Tensor) -> Tensor:
        if self.fusion != "cat":
            both = first + second
            return both / 2 if self.fusion == "mean" else both
        frames = [torch.unflatten(x, 0, (-1, self.num_frames)) for x in (first, second)]
        return torch.cat(frames, dim=1).flatten(0, 1)  # stream outside frame
