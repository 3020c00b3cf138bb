"""Transformer decoder with masked attention (Mask2Former, section 3.2).

Layer i attends to level i mod n, coarse first: masked cross-attention, self-attention, feed-forward. All layers
share the prediction heads, and layer 0 of the output is the heads on the bare queries. The piloted part comes
as one optional :class:`~mpformer.modeling.mask_piloting.PilotBatch`; the decoder knows nothing else of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mpformer.modeling.checkpointing import checkpointed
from mpformer.modeling.mask_piloting import PilotBatch
from mpformer.modeling.outputs import DecoderOutput
from mpformer.modeling.pixel_decoder import PixelFeatures
from mpformer.modeling.points import resize
from mpformer.modeling.position import sine_position

Projection = tuple[Tensor, Tensor]
"""Weight (n, D) and bias (n,)."""
AttentionHook = Callable[[Tensor, tuple[int, int]], Tensor]
"""Takes a layer's attention mask (B, P+Q, h*w), True = blocked, and (h, w); returns the mask that the layer uses."""


@dataclass(frozen=True)
class DecoderSettings:
    """Shape of the decoder."""

    classes: int
    input_channels: int = 256
    hidden: int = 256
    mask_channels: int = 256
    heads: int = 8
    layers: int = 9
    feedforward: int = 2048
    queries: int = 100
    levels: int = 3
    query_position: bool = True
    pilot_embeddings: int = 0
    """Rows of the piloted part's content table: the classes, 1 for one learnt vector, 0 without piloting."""


@dataclass(frozen=True)
class Memory:
    """What one decoder layer attends to."""

    to_query: Projection
    key: Tensor
    """(B, h*w, hidden), projected."""
    value: Tensor
    """(B, h*w, hidden), projected."""


@dataclass(frozen=True)
class Level:
    """One attention level, prepared once for all layers that attend to it."""

    memories: tuple[Memory, ...]
    """Per decoder layer that attends here, in order."""
    mask_features: Tensor
    """(B, D, h*w) mask features at this size, without gradient."""
    size: tuple[int, int]


class Attention(nn.Module):
    """Multi-head attention with ``nn.MultiheadAttention``'s parameters, through the fused kernel."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * channels, channels))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * channels))
        self.out_proj = nn.Linear(channels, channels)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def projections(self, *sizes: int) -> tuple[Projection, ...]:
        """The query, key and value projections, as many together as each of ``sizes`` (in all 3) says.

        They are cut in one go, so that their gradients are joined in one, too.
        """
        rows = [size * self.out_proj.in_features for size in sizes]
        return tuple(zip(self.in_proj_weight.split(rows), self.in_proj_bias.split(rows), strict=True))

    def forward(self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None) -> Tensor:
        """Attend from projected query (B, N, D) to projected key, value (B, S, D).

        ``allowed`` (B or 1, N, S) is False where attention is forbidden; no row may be all False.
        """
        q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (query, key, value))
        of_heads = None if allowed is None else allowed[:, None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=of_heads)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class SelfAttentionLayer(nn.Module):
    """Attention among the queries, residual, normalised after."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.self_attn = Attention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, position: Tensor | None, allowed: Tensor | None) -> Tensor:
        """Refine queries (B, N, D); position (B, N, D) is added to queries and keys only."""
        to_both, to_value = self.self_attn.projections(2, 1)
        query, key = F.linear(_positioned(queries, position), *to_both).chunk(2, dim=-1)
        return self.norm(queries + self.self_attn(query, key, F.linear(queries, *to_value), allowed))


class CrossAttentionLayer(nn.Module):
    """Masked attention from the queries to one level, residual, normalised after."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = Attention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, queries: Tensor, position: Tensor | None, memory: Memory, allowed: Tensor) -> Tensor:
        """Refine queries (B, N, D); allowed (B, N, S) has no row that is all False."""
        query = F.linear(_positioned(queries, position), *memory.to_query)
        return self.norm(queries + self.multihead_attn(query, memory.key, memory.value, allowed))


class FeedForwardLayer(nn.Module):
    """Two linear layers with ReLU, residual, normalised after."""

    def __init__(self, channels: int, feedforward: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, feedforward)
        self.linear2 = nn.Linear(feedforward, channels)
        self.norm = nn.LayerNorm(channels)
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(self, queries: Tensor) -> Tensor:
        """Refine queries (B, N, D)."""
        return self.norm(queries + self.linear2(F.relu(self.linear1(queries))))


class MaskHead(nn.Module):
    """Three linear layers from a query to its mask embedding."""

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(channels, channels), nn.Linear(channels, channels), nn.Linear(channels, outputs)]
        )

    def forward(self, queries: Tensor) -> Tensor:
        """Map (..., channels) to (..., outputs)."""
        first, second, last = self.layers
        return last(F.relu(second(F.relu(first(queries)))))


class MaskedAttentionDecoder(nn.Module):
    """Mask2Former's decoder with released parameter names; ``label_enc`` is MP-Former's."""

    def __init__(self, settings: DecoderSettings) -> None:
        super().__init__()
        self.settings = settings
        hidden, heads, count = settings.hidden, settings.heads, settings.layers
        self.transformer_self_attention_layers = nn.ModuleList(SelfAttentionLayer(hidden, heads) for _ in range(count))
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttentionLayer(hidden, heads) for _ in range(count)
        )
        self.transformer_ffn_layers = nn.ModuleList(
            FeedForwardLayer(hidden, settings.feedforward) for _ in range(count)
        )
        self.decoder_norm = nn.LayerNorm(hidden)
        self.query_feat = nn.Embedding(settings.queries, hidden)
        self.level_embed = nn.Embedding(settings.levels, hidden)
        self.input_proj = nn.ModuleList(_input_projection(settings) for _ in range(settings.levels))
        self.class_embed = nn.Linear(hidden, settings.classes + 1)
        self.mask_embed = MaskHead(hidden, settings.mask_channels)
        # What a toggle adds comes last, so that it does not shift the random numbers of what is before it.
        self.query_embed = nn.Embedding(settings.queries, hidden) if settings.query_position else None
        self.label_enc = nn.Embedding(settings.pilot_embeddings, hidden) if settings.pilot_embeddings else None

    def forward(
        self, pixels: PixelFeatures, pilot: PilotBatch | None = None, attention: AttentionHook | None = None
    ) -> DecoderOutput:
        """Decode; with ``pilot`` its slots stand before the learnable queries in every layer.

        ``attention`` sees, and may replace, each layer's attention mask before rows that are blocked whole are opened.
        """
        used = pixels.levels[: self.settings.layers]
        levels = [self._level(i, maps, pixels.mask_features) for i, maps in enumerate(used)]
        slots = 0 if pilot is None else pilot.slots
        readable = None if pilot is None else ~pilot.self_attention
        queries = [self._first_queries(len(pixels.mask_features), pilot)]
        position = self._position(len(pixels.mask_features), slots)
        empty = []
        for i in range(self.settings.layers):
            level = levels[i % len(levels)]
            blocked = self._blocked(i, queries[-1], level, pilot)
            if attention is not None:
                blocked = attention(blocked, level.size)
            allowed, was_empty = open_blocked_rows(blocked)
            fed = queries[-1] if pilot is None else pilot.feed(i, queries[-1])
            queries.append(self._layer(i, fed, position, level, allowed, readable))
            empty.append(was_empty[:, slots:])
        # The heads of all layers at once: what a layer's attention asks of them has no gradient.
        normed = self.decoder_norm(torch.stack(queries))
        logits, embeds = self.class_embed(normed), self.mask_embed(normed)
        return _split(logits, embeds, pixels.mask_features, torch.stack(empty), slots)

    def _first_queries(self, batch: int, pilot: PilotBatch | None) -> Tensor:
        learnable = self.query_feat.weight.expand(batch, -1, -1)
        return learnable if pilot is None else torch.cat([pilot.content.to(learnable.dtype), learnable], dim=1)

    def _position(self, batch: int, slots: int) -> Tensor | None:
        """Position embedding (B, P+Q, hidden): zero for piloted slots; None when the toggle is off."""
        if self.query_embed is None:
            return None
        return F.pad(self.query_embed.weight, (0, 0, slots, 0)).expand(batch, -1, -1)

    def _level(self, index: int, maps: Tensor, mask_features: Tensor) -> Level:
        size = (maps.shape[-2], maps.shape[-1])
        memory = self.input_proj[index](maps).flatten(2).transpose(1, 2) + self.level_embed.weight[index]
        position = sine_position(size, self.settings.hidden, maps.device)
        # The layers that attend here project the same tokens: one product instead of one per layer.
        to_queries, to_keys, to_values = zip(*self._projections(index), strict=True)
        keys = checkpointed(lambda tokens: _project_for_all(to_keys, tokens + position), memory)
        values = _project_for_all(to_values, memory)
        # Resizing is linear: resized features x embedding = resized (features x embedding).
        resized = resize(mask_features.detach(), size).flatten(2)
        return Level(tuple(map(Memory, to_queries, keys, values)), resized, size)

    def _projections(self, level: int) -> list[tuple[Projection, ...]]:
        """The query, key and value projections of the layers that attend to a level, in order."""
        layers = self.transformer_cross_attention_layers[level :: self.settings.levels]
        return [layer.multihead_attn.projections(1, 1, 1) for layer in layers if isinstance(layer, CrossAttentionLayer)]

    @torch.no_grad()
    def _blocked(self, layer: int, queries: Tensor, level: Level, pilot: PilotBatch | None) -> Tensor:
        """Attention mask (B, P+Q, h*w), True = blocked: ground truth where guided, else predicted background."""
        guided = None if pilot is None else pilot.attention(layer, level.size)
        if pilot is not None and guided is not None:
            queries = queries[:, pilot.slots :]
        # detached as well: what counts operations by module follows inputs that ask for a gradient
        embed = self.mask_embed(self.decoder_norm(queries.detach()))
        predicted = torch.bmm(embed, level.mask_features) < 0
        return predicted if guided is None else torch.cat([guided, predicted], dim=1)

    def _layer(
        self,
        index: int,
        queries: Tensor,
        position: Tensor | None,
        level: Level,
        allowed: Tensor,
        readable: Tensor | None,
    ) -> Tensor:
        memory = level.memories[index // self.settings.levels]
        queries = self.transformer_cross_attention_layers[index](queries, position, memory, allowed)
        queries = self.transformer_self_attention_layers[index](queries, position, readable)
        return self.transformer_ffn_layers[index](queries)


def open_blocked_rows(blocked: Tensor) -> tuple[Tensor, Tensor]:
    """Where rows (..., cells) may attend: off what is blocked, everywhere if all is; and which rows those were."""
    empty = blocked.all(dim=-1)
    return empty[..., None] | ~blocked, empty


def _project_for_all(projections: Sequence[Projection], tokens: Tensor) -> tuple[Tensor, ...]:
    """Project tokens (B, S, D) with several projections at once."""
    weight, bias = map(torch.cat, zip(*projections, strict=True))
    return F.linear(tokens, weight, bias).chunk(len(projections), dim=-1)


def _positioned(queries: Tensor, position: Tensor | None) -> Tensor:
    return queries if position is None else queries + position


def _input_projection(settings: DecoderSettings) -> nn.Module:
    if settings.input_channels == settings.hidden:
        return nn.Sequential()
    conv = nn.Conv2d(settings.input_channels, settings.hidden, 1)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _split(logits: Tensor, embeds: Tensor, features: Tensor, empty: Tensor, slots: int) -> DecoderOutput:
    """Separate the piloted slots (L+1, B, P, ...) from the learnable queries behind them."""
    pilot_logits = logits[:, :, :slots] if slots else None
    pilot_embeds = embeds[:, :, :slots] if slots else None
    return DecoderOutput(logits[:, :, slots:], embeds[:, :, slots:], features, pilot_logits, pilot_embeds, empty)
