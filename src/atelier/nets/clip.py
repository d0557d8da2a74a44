"""A text tower and an image tower that lead to one space. B batch, T tokens or places, E width, P shared numbers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atelier.core.condition import Condition
from atelier.core.errors import UserError
from atelier.core.ranges import Levels, Name, PositiveInt, Width
from atelier.nets.layers import Down, Residual, norm
from atelier.nets.noisy_classifier import AttentionPool
from atelier.nets.unet import map_sizes
from atelier.nets.words import BytePairs, HashedWords, Tokenizer, padded

TEMPERATURE = 0.07  # what cosines are divided by at first


class ClipNet(nn.Module):
    """Images and texts to vectors whose cosine says how well they fit   (Radford et al. 2021, CLIP, section 2).

    `TextEncoder` and `ImageEncoder` of `nets/contracts.py`. A vector has length sqrt(P), so that its numbers have a
    mean square of 1, whatever it describes: training looks at its direction alone. Tokens are the last hidden states
    behind the last norm; those of a text see all others of it, unlike the published ones, which see those before.

    Args:
        image_size: height and width of images; must halve evenly down to the smallest map.
        image_channels: channels of images.
        width: channels of the first level of the image tower.
        multipliers: one level per entry, width * entry channels each, half the size of the one above.
        n_blocks: residual blocks per level.
        patch_size: 2 folds 2x2 pixels into channels first; None: folds down to 16x16 maps.
        token_dim: E, of both towers.
        n_layers: blocks of the text tower.
        heads: heads of every attention, by number.
        max_tokens: tokens of a text that are read, its start and end among them.
        vector_dim: P.
        n_rows: rows of the table of hashed words; of no meaning with a vocabulary.
        vocabulary: path of CLIP's vocabulary, bpe_simple_vocab_16e6.txt.gz; None: words are hashed.

    Raises:
        UserError: an image size that does not halve evenly, heads that do not divide the width, no room for a word.
    """

    def __init__(
        self,
        *,
        image_size: PositiveInt,
        image_channels: PositiveInt,
        width: Width,
        multipliers: Levels,
        n_blocks: PositiveInt,
        patch_size: PositiveInt | None,
        token_dim: Width,
        n_layers: PositiveInt,
        heads: PositiveInt,
        max_tokens: PositiveInt,
        vector_dim: PositiveInt,
        n_rows: PositiveInt,
        vocabulary: Name | None,
    ) -> None:
        super().__init__()
        if token_dim % heads:
            raise UserError(".heads", heads, f"it does not divide the width {token_dim}", ".heads=1")
        if max_tokens < 3:
            raise UserError(".max_tokens", max_tokens, "start and end leave no room for a word", ".max_tokens=16")
        self.token_dim, self.vector_dim, self.max_tokens = token_dim, vector_dim, max_tokens
        self.words: Tokenizer = HashedWords(n_rows) if vocabulary is None else BytePairs.published(vocabulary)
        self.text = TextTower(self.words, token_dim, n_layers, heads, max_tokens, vector_dim)
        patch = patch_size or max(1, image_size // 16)
        size = map_sizes(image_size, patch, len(multipliers))[-1]
        self.n_places = size**2
        self.image = ImageTower(image_channels, patch, [width * m for m in multipliers], n_blocks, token_dim)
        self.pool = AttentionPool(token_dim, size, heads, vector_dim)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))  # of what cosines are multiplied by

    def n_tokens(self, texts: list[str]) -> list[int]:
        return [len(self.words(text)) for text in texts]

    def encode_texts(self, texts: list[str]) -> Condition:
        """Vectors (B, P) of length sqrt(P), tokens (B, max_tokens, E), 0 where the mask is false."""
        vector, tokens, mask = self.text(texts)
        rest = (0, self.max_tokens - mask.shape[1])
        return Condition(_long(vector), F.pad(tokens, (0, 0, *rest)), F.pad(mask, rest))

    def encode_images(self, x: Tensor) -> Condition:
        """Vectors (B, P) of length sqrt(P) and tokens (B, h w, E) of the h x w places of the smallest map, by rows."""
        h = self.image(x)                                                  # (B, E, h, w)
        return Condition(_long(self.pool(h)), h.flatten(2).transpose(1, 2))

    def forward(self, x: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Vectors (B, P) of images and of texts, of length 1, float32."""
        image, (text, _, _) = self.pool(self.image(x)), self.text(texts)
        return F.normalize(image.float(), dim=1), F.normalize(text.float(), dim=1)


class ImageTower(nn.Module):
    """Residual convolutions down to a map (B, E, h, w) of places."""

    def __init__(self, channels: int, patch_size: int, widths: list[int], n_blocks: int, n_out: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        layers: list[nn.Module] = [nn.Conv2d(channels * patch_size**2, widths[0], 3, padding=1)]
        n = widths[0]
        for level, wide in enumerate(widths):
            layers += [Down(n)] if level else []
            for _ in range(n_blocks):
                layers.append(Residual(n, wide))
                n = wide
        self.layers = nn.Sequential(*layers, norm(n), nn.SiLU(), nn.Conv2d(n, n_out, 1), norm(n_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(F.pixel_unshuffle(x, self.patch_size))          # (B, E, h, w)


class TextTower(nn.Module):
    """A transformer over the tokens of a text, whose state at the end mark is projected to P numbers."""

    def __init__(
        self, words: Tokenizer, width: int, n_layers: int, heads: int, max_tokens: int, n_out: int
    ) -> None:
        super().__init__()
        self.words, self.max_tokens = words, max_tokens
        self.rows, self.places = nn.Embedding(words.n_rows, width), nn.Embedding(max_tokens, width)
        nn.init.normal_(self.rows.weight, std=0.5)
        nn.init.normal_(self.places.weight, std=0.1)
        self.blocks = nn.ModuleList([TextBlock(width, heads) for _ in range(n_layers)])
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, n_out, bias=False)

    def forward(self, texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors (B, P), tokens (B, T, E), 0 where there is none, and their mask (B, T); T of the longest text."""
        tokens, device = [self.words(text) for text in texts], self.out.weight.device
        lengths = [min(len(own), self.max_tokens) for own in tokens]
        n, length = torch.tensor(lengths, device=device), max(lengths)     # (B,)
        rows = padded(tokens, length, self.words.end, self.words.pad).to(device)                 # (B, T)
        mask = torch.arange(length, device=device) < n[:, None]
        h = self.rows(rows) + self.places.weight[:length]                  # (B, T, E)
        for block in self.blocks:
            h = block(h, mask)
        h = self.norm(h) * mask[:, :, None]
        return self.out(h[torch.arange(len(h), device=device), n - 1]), h, mask


class TextBlock(nn.Module):
    """Attention to all tokens that are there, then a perceptron, each behind a norm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (B, T, E), mask (B, T)."""
        qkv = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1))    # (B, T, 3, K, E / K)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                               # (B, K, T, E / K) each
        h = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.out(h.transpose(1, 2).flatten(2))                     # (B, T, E)
        return x + self.mlp(self.norm2(x))


def _long(vector: Tensor) -> Tensor:
    """Vectors (B, P) of length sqrt(P), float32."""
    return F.normalize(vector.float(), dim=1) * vector.shape[1] ** 0.5
