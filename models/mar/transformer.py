"""The MAR transformer: a masked autoencoder over latent tokens, class "buffer" tokens in front.

Numerics and state-dict keys follow LTH14/mar `models/mar.py` with timm 0.9.12's block (exact GELU,
LayerNorm eps 1e-6). Dropout acts in training only, here on the outputs of both branches of a block.

The encoder sees the buffer and the visible image tokens in raster order; the decoder sees the
buffer and all image tokens, the hidden ones replaced by a learned mask token. Token positions
passed to the linears are slots of the running sequence: 0 .. buffer - 1 are the buffer tokens,
everything from there on is an image token.

Kept surprises: the class embedding fills the whole buffer; the first norm comes after the position
embedding; hidden tokens enter `z_proj` as zeros and are dropped only afterwards.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import KVCache, Linear, Mask, MatMul, Mlp, attend
from models.mar.diffloss import DiffLoss
from models.mar.diffusion import cosine_diffusion

QKV_CHUNKS = ("q", "k", "v")  # outputs of qkv, in the order of their rows


class Attention(nn.Module):
    """Multi-head attention of every token to every token."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5
        self.qkv = Linear(dim, 3 * dim)
        self.proj = Linear(dim, dim)
        self.qk = MatMul()
        self.pv = MatMul()

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.proj(self.average(self.qkv(x, positions), positions), positions)

    def average(
        self,
        qkv: Tensor,
        positions: Tensor,
        mask: Mask = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """The average of values (B, T, C) of queries, keys and values (B, T, 3 * C)."""
        qkv = qkv.unflatten(-1, (3, self.heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, H, T, D) each
        return attend(q, k, v, self.qk, self.pv, self.scale, mask, positions, cache)


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, hidden)
        self.drop = nn.Dropout(0.0)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        return self.branches(x, None, positions, None, None)

    def branches(
        self,
        x: Tensor,
        modulation: None,
        positions: Tensor,
        mask: Mask,
        cache: KVCache | None,
    ) -> Tensor:
        """Attention and MLP of x (B, T, C); there is no modulation here, no mask and no cache."""
        x = x + self.drop(self.attn(self.norm1(x), positions))
        return x + self.drop(self.mlp(self.norm2(x), positions))


class MAR(nn.Module):
    """The generator. L image tokens of D = vae_embed_dim * patch_size^2 channels, in raster order.

    Args:
        img_size, vae_stride, patch_size: pixels a side, pixels per latent, latents per token.
        encoder_*, decoder_*: width, depth and heads of the two halves. mlp_ratio: hidden over
            width.
        vae_embed_dim: channels of a latent. class_num: classes. buffer_size: class tokens in front.
        diffloss_d, diffloss_w: depth and width of the diffusion head.
    """

    def __init__(
        self,
        img_size: int,
        vae_stride: int,
        patch_size: int,
        encoder_embed_dim: int,
        encoder_depth: int,
        encoder_num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        vae_embed_dim: int,
        class_num: int,
        buffer_size: int,
        diffloss_d: int,
        diffloss_w: int,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.vae_embed_dim = vae_embed_dim
        self.side = img_size // vae_stride // patch_size  # tokens a side
        self.seq_len = self.side**2
        self.token_embed_dim = vae_embed_dim * patch_size**2
        self.num_classes = class_num
        self.buffer_size = buffer_size
        slots = buffer_size + self.seq_len

        self.fake_latent = nn.Parameter(torch.zeros(1, encoder_embed_dim))
        self.encoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, encoder_embed_dim))
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_embed_dim))
        self.decoder_pos_embed_learned = nn.Parameter(torch.zeros(1, slots, decoder_embed_dim))
        self.diffusion_pos_embed_learned = nn.Parameter(
            torch.zeros(1, self.seq_len, decoder_embed_dim)
        )

        self.class_emb = nn.Embedding(class_num, encoder_embed_dim)
        self.z_proj = Linear(self.token_embed_dim, encoder_embed_dim)
        self.z_proj_ln = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        self.encoder_blocks = nn.ModuleList(
            Block(encoder_embed_dim, encoder_num_heads, int(encoder_embed_dim * mlp_ratio))
            for _ in range(encoder_depth)
        )
        self.encoder_norm = nn.LayerNorm(encoder_embed_dim, eps=1e-6)
        self.decoder_embed = Linear(encoder_embed_dim, decoder_embed_dim)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, int(decoder_embed_dim * mlp_ratio))
            for _ in range(decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim, eps=1e-6)
        self.diffloss = DiffLoss(self.token_embed_dim, decoder_embed_dim, diffloss_w, diffloss_d)

    def set_dropout(self, p: float) -> None:
        """Dropout probability of both branches' outputs while training."""
        for block in (*self.encoder_blocks, *self.decoder_blocks):
            block.drop.p = p

    def patchify(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) as tokens (B, L, C * p * p)."""
        p = self.patch_size
        x = latents.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, p)
        # (B, h, w, C, p, p), then one row of channels a token
        return x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def unpatchify(self, tokens: Tensor) -> Tensor:
        """Tokens (B, L, C * p * p) as latents (B, C, H, W)."""
        p = self.patch_size
        # (B, h, w, C, p, p)
        x = tokens.unflatten(1, (self.side, self.side)).unflatten(3, (self.vae_embed_dim, p, p))
        # (B, C, h, p, w, p), then sides of h * p and w * p
        return x.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def class_embedding(self, labels: Tensor) -> Tensor:
        """(B, C) of class labels (B,); a label equal to the number of classes means "no class"."""
        # the clamp keeps "no class" inside the table; the next line replaces its rows
        known = self.class_emb(labels.clamp(max=self.num_classes - 1))  # (B, C)
        return torch.where((labels < self.num_classes)[:, None], known, self.fake_latent)

    def seen(self, mask: Tensor, visible: int | None = None) -> Tensor:
        """Slots (B, buffer + V) that the encoder sees, in raster order.

        Args:
            mask: True where hidden (B, L), V False entries in every row.
            visible: V, if the caller knows it; to count waits for the device.
        """
        if visible is None:
            visible = int((~mask[0]).sum())
        # (B, buffer + L); the buffer is never hidden
        hidden = F.pad(mask, (self.buffer_size, 0)).byte()
        # stable keeps raster order
        return hidden.argsort(dim=1, stable=True)[:, : self.buffer_size + visible]

    def encode(
        self, tokens: Tensor, mask: Tensor, labels: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """Buffer and visible tokens after the encoder (B, buffer + V, C).

        Args:
            tokens: (B, L, D). mask: True where hidden (B, L), V False entries in every row. labels:
                (B,).
            seen: the method's result for this mask, if the caller has it.
        """
        seen = self.seen(mask) if seen is None else seen
        slots = torch.arange(self.buffer_size + self.seq_len, device=tokens.device)
        x = tokens.masked_fill(mask[..., None], 0)  # (B, L, D)
        x = self.z_proj(x, slots[self.buffer_size :])  # (B, L, C)
        # (B, buffer, C)
        buffer = self.class_embedding(labels)[:, None].expand(-1, self.buffer_size, -1)
        x = self.z_proj_ln(torch.cat((buffer, x), dim=1) + self.encoder_pos_embed_learned)
        x = x.gather(1, seen[..., None].expand(-1, -1, x.shape[2]))  # (B, buffer + V, C)
        for block in self.encoder_blocks:
            x = block(x, slots[: x.shape[1]])
        return self.encoder_norm(x)

    def pad(self, x: Tensor, mask: Tensor, seen: Tensor | None = None) -> Tensor:
        """The decoder's sequence (B, buffer + L, C) with the encoder's tokens x put back into their
        places."""
        seen = self.seen(mask) if seen is None else seen
        slots = self.buffer_size + self.seq_len
        # (B, buffer + V, C)
        visible = self.decoder_embed(x, torch.arange(x.shape[1], device=x.device))
        padded = self.mask_token.to(visible.dtype).repeat(len(x), slots, 1)  # (B, buffer + L, C)
        return padded.scatter(1, seen[..., None].expand_as(visible), visible)

    def decode(self, padded: Tensor) -> Tensor:
        """Conditions (B, L, C) of the diffusion head."""
        x = padded + self.decoder_pos_embed_learned  # (B, buffer + L, C)
        slots = torch.arange(x.shape[1], device=x.device)
        for block in self.decoder_blocks:
            x = block(x, slots)
        return self.decoder_norm(x)[:, self.buffer_size :] + self.diffusion_pos_embed_learned

    def forward(self, tokens: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Conditions (B, L, C); rows may hide different numbers of tokens.

        Rows that hide equally many go through the encoder together, fewest first; the decoder takes
        all in one call.
        """
        hidden = mask.sum(dim=1)  # (B,)
        slots = self.buffer_size + self.seq_len
        # (B, buffer + L, C)
        padded = self.mask_token.new_empty(len(mask), slots, self.mask_token.shape[2])
        for count in hidden.unique():
            rows = hidden == count
            seen = self.seen(mask[rows])
            # (rows, buffer + V, C)
            visible = self.encode(tokens[rows], mask[rows], labels[rows], seen)
            # under autocast the linears give less
            padded[rows] = self.pad(visible, mask[rows], seen).to(padded.dtype)
        return self.decode(padded)

    def denoise(
        self, tokens: Tensor, mask: Tensor, labels: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """The diffusion head's output (..., B, L, 2 D) for the hidden tokens noised to step t, zero
        for visible ones.

        Args:
            tokens, mask, labels: as in `encode`.
            t: steps of the full diffusion (..., B, L); a leading dimension noises each token
                several times.
            noise: standard normal (..., B, L, D).
        """
        z = self(tokens, mask, labels)  # (B, L, C)
        # the N hidden tokens of all images and draws
        hidden = mask.expand(t.shape)
        clean = tokens.expand_as(noise)[hidden]  # (N, D)
        z = z.expand(*t.shape, -1)[hidden]  # (N, C)
        x = cosine_diffusion(device=t.device).q_sample(clean, t[hidden], noise[hidden])
        output = noise.new_zeros(*noise.shape[:-1], 2 * self.token_embed_dim)  # (..., B, L, 2 D)
        output[hidden] = self.diffloss.net(x, t[hidden], z).to(output.dtype)
        return output

    def loss(
        self, tokens: Tensor, mask: Tensor, labels: Tensor, t: Tensor, noise: Tensor
    ) -> Tensor:
        """Diffusion loss (..., B, L) of the hidden tokens, zero for visible ones; arguments as in
        `denoise`.

        The training loss is its mean over the hidden entries.
        """
        output = self.denoise(tokens, mask, labels, t, noise)
        return loss_of_output(output, tokens, mask, t, noise)


def loss_of_output(
    output: Tensor, tokens: Tensor, mask: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Diffusion loss (..., B, L) of an output (..., B, L, 2 D) of `MAR.denoise`, with what it was
    made of."""
    diffusion = cosine_diffusion(device=t.device)
    hidden = mask.expand(t.shape)
    clean = tokens.expand_as(noise)[hidden]  # (N, D)
    t = t[hidden]
    noise = noise[hidden]
    noised = diffusion.q_sample(clean, t, noise)  # (N, D)
    error, bound = diffusion.losses(output[hidden], clean, noised, t, noise)  # (N,) each
    return error.new_zeros(hidden.shape).masked_scatter(hidden, error + bound)
