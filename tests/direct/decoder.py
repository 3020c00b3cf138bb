"""The masked-attention decoder (Mask2Former, section 3.2) with an optional piloted part in front of its queries."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mpformer.config.schema import ModelConfig, Toggles
from tests.direct.attention import sine_position
from tests.direct.piloting import Pilot, Target, blocked_cells, guided, self_attention_mask


@dataclass
class DirectOutput:
    """Every layer's predictions at full mask-feature size; lists run over layers 0 (bare queries) ... L."""

    logits: list[Tensor] = field(default_factory=list)  # (B, P + Q, C + 1)
    masks: list[Tensor] = field(default_factory=list)  # (B, P + Q, h, w) logits
    queries: list[Tensor] = field(default_factory=list)  # (P + Q, B, C), after each of the L layers
    blocked: list[Tensor] = field(default_factory=list)  # (B, P + Q, h_i * w_i) bool, as computed
    opened: list[Tensor] = field(default_factory=list)  # the same, fully blocked rows opened
    self_mask: Tensor | None = None  # (B, P + Q, P + Q) bool
    pilot: Pilot | None = None

    @property
    def slots(self) -> int:
        return self.pilot.slots if self.pilot else 0

    def matching(self, name: str) -> Tensor:
        """(L + 1, B, Q, ...) of the matching part; ``name`` is logits or masks."""
        return torch.stack([x[:, self.slots :] for x in getattr(self, name)])

    def piloted(self, name: str) -> Tensor:
        """(L + 1, B, P, ...) of the piloted part."""
        return torch.stack([x[:, : self.slots] for x in getattr(self, name)])


class SelfAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.self_attn = nn.MultiheadAttention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor, mask: Tensor | None) -> Tensor:
        q = x + position
        return self.norm(x + self.self_attn(q, q, value=x, attn_mask=mask)[0])


class CrossAttention(nn.Module):
    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.multihead_attn = nn.MultiheadAttention(channels, heads)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor, position: Tensor, memory: Tensor, place: Tensor, mask: Tensor) -> Tensor:
        return self.norm(x + self.multihead_attn(x + position, memory + place, value=memory, attn_mask=mask)[0])


class FeedForward(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, width)
        self.linear2 = nn.Linear(width, channels)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.linear2(F.relu(self.linear1(x))))


class MaskEmbed(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Linear(channels, channels), nn.Linear(channels, channels), nn.Linear(channels, out)]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](F.relu(self.layers[1](F.relu(self.layers[0](x)))))


class Decoder(nn.Module):
    """One predictor for the piloted and the matching part; the piloted slots come first."""

    def __init__(self, model: ModelConfig, toggles: Toggles, classes: int) -> None:
        super().__init__()
        self.model, self.toggles = model, toggles
        channels, layers, levels = model.hidden_dim, model.decoder_layers, len(model.attention_strides)
        self.transformer_self_attention_layers = nn.ModuleList(
            SelfAttention(channels, model.heads) for _ in range(layers)
        )
        self.transformer_cross_attention_layers = nn.ModuleList(
            CrossAttention(channels, model.heads) for _ in range(layers)
        )
        self.transformer_ffn_layers = nn.ModuleList(FeedForward(channels, model.decoder_ffn) for _ in range(layers))
        self.decoder_norm = nn.LayerNorm(channels)
        self.query_feat = nn.Embedding(model.queries, channels)
        if toggles.query_position:
            self.query_embed = nn.Embedding(model.queries, channels)
        self.level_embed = nn.Embedding(levels, channels)
        same = model.conv_dim == channels
        self.input_proj = nn.ModuleList(
            nn.Sequential() if same else nn.Conv2d(model.conv_dim, channels, 1) for _ in range(levels)
        )
        self.class_embed = nn.Linear(channels, classes + 1)
        self.mask_embed = MaskEmbed(channels, model.mask_dim)
        if toggles.mp_queries:
            self.label_enc = nn.Embedding(classes if toggles.class_embedding == "label" else 1, channels)

    def forward(
        self,
        levels: list[Tensor],
        mask_features: Tensor,
        targets: list[Target] | None = None,
        pilot: Pilot | None = None,
        pilot_masks: Mapping[int, Tensor] | None = None,
    ) -> DirectOutput:
        """Run every layer; ``pilot_masks`` injects the (noised) masks (B, P, h * w) of guided layers."""
        out = DirectOutput(pilot=pilot)
        memory, places, sizes = self._memory(levels)
        batch = len(mask_features)
        queries = self.query_feat.weight[:, None].expand(-1, batch, -1)
        position = (
            self.query_embed.weight[:, None].expand(-1, batch, -1) if self.toggles.query_position else 0 * queries
        )
        if pilot is not None:
            content = self._pilot_content(pilot)
            queries, position = torch.cat([content, queries]), torch.cat([0 * content, position])
            hide = self.toggles.pilot_padding == "masked"
            out.self_mask = self_attention_mask(pilot, self.model.queries, hide)
        self._predict(queries, mask_features, out)
        for i in range(self.model.decoder_layers):
            level = i % len(levels)
            if pilot is not None and i > 0 and self.toggles.class_embedding_layers == "every":
                queries = torch.cat([queries[: pilot.slots] + content, queries[pilot.slots :]])
            out.blocked.append(self._blocked(i, sizes[level], targets, pilot, pilot_masks, out))
            out.opened.append(_open_full_rows(out.blocked[i]))
            mask = out.opened[i].repeat_interleave(self.model.heads, dim=0)
            queries = self.transformer_cross_attention_layers[i](queries, position, memory[level], places[level], mask)
            hidden = None if out.self_mask is None else out.self_mask.repeat_interleave(self.model.heads, dim=0)
            queries = self.transformer_self_attention_layers[i](queries, position, hidden)
            queries = self.transformer_ffn_layers[i](queries)
            out.queries.append(queries)
            self._predict(queries, mask_features, out)
        return out

    def _memory(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[tuple[int, int]]]:
        memory, places, sizes = [], [], []
        for i, x in enumerate(levels):
            sizes.append((x.shape[2], x.shape[3]))
            flat = self.input_proj[i](x).flatten(2) + self.level_embed.weight[i][None, :, None]
            memory.append(flat.permute(2, 0, 1))
            places.append(sine_position(self.model.hidden_dim, *sizes[-1]).flatten(2).permute(2, 0, 1))
        return memory, places, sizes

    def _pilot_content(self, pilot: Pilot) -> Tensor:
        """(P, B, C): the class embedding in real slots, zero in padding."""
        rows = []
        for image in range(len(pilot.slot_label)):
            for slot in range(pilot.slots):
                label = int(pilot.slot_label[image, slot])
                index = label if self.toggles.class_embedding == "label" else 0
                rows.append(self.label_enc.weight[index] if label >= 0 else torch.zeros(self.model.hidden_dim))
        return torch.stack(rows).view(-1, pilot.slots, self.model.hidden_dim).transpose(0, 1)

    def _predict(self, queries: Tensor, mask_features: Tensor, out: DirectOutput) -> None:
        x = self.decoder_norm(queries).transpose(0, 1)
        out.logits.append(self.class_embed(x))
        out.masks.append(torch.einsum("bqc,bchw->bqhw", self.mask_embed(x), mask_features))

    def _blocked(
        self,
        layer: int,
        size: tuple[int, int],
        targets: list[Target] | None,
        pilot: Pilot | None,
        pilot_masks: Mapping[int, Tensor] | None,
        out: DirectOutput,
    ) -> Tensor:
        logits = F.interpolate(out.masks[-1], size=size, mode="bilinear", align_corners=False)
        blocked = (logits.sigmoid() < 0.5).flatten(2).detach()
        if pilot is not None and targets is not None and guided(self.toggles, layer):
            given = pilot_masks.get(layer) if pilot_masks else None
            own = blocked_cells(pilot, targets, size) if given is None else given.bool()
            blocked = torch.cat([own, blocked[:, pilot.slots :]], dim=1)
        return blocked


def _open_full_rows(blocked: Tensor) -> Tensor:
    return blocked & ~blocked.all(dim=-1, keepdim=True)
