"""Generated images of the past, so that a discriminator does not forget them (Shrivastava et al. 2017, section 2.3)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atelier.core import ranks
from atelier.core.ranges import NonNegInt, PositiveInt


class ImagePool(nn.Module):
    """The last images that were shown, one pool for all ranks, which hold the same copy of it; in the checkpoint.

    Args:
        size: images kept; 0 keeps none and gives every image back.
        image_size, image_channels: side and channels of the images.
    """

    images: Tensor

    def __init__(self, *, size: NonNegInt, image_size: PositiveInt, image_channels: PositiveInt) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("images", torch.zeros(size, image_channels, image_size, image_size))

    @torch.no_grad()
    def swapped(self, new: Tensor, seen: int) -> Tensor:
        """Each of this rank's images (B, C, H, W), or with probability 1/2 an older one whose place it takes.

        While the pool is not full, every image is kept and given back.

        Args:
            seen: images that all ranks have shown the pool before.
        """
        if self.size == 0:
            return new.detach()
        images = ranks.gathered(new.detach().float())                      # (all B, C, H, W)
        luck, places = ranks.of_first(torch.rand(2, len(images), device=new.device))  # (all B,) each
        swaps, places = luck < 0.5, (places.double() * self.size).long()
        given = []
        for k, image in enumerate(images):
            if seen + k < self.size:
                self.images[seen + k] = image
                given.append(image)
                continue
            place = places[k : k + 1]                                      # stays on the device, which is not asked
            older = self.images[place][0]
            given.append(torch.where(swaps[k], older, image))
            self.images[place] = torch.where(swaps[k], image, older)[None]
        return ranks.mine(torch.stack(given))                              # (B, C, H, W)
