"""Mask piloting for Hugging Face ``transformers``' Mask2Former, in a loop of your own or in its ``Trainer``.

The piloted part is made and supervised by what trains this project's own model, :mod:`mpformer.modeling.mask_piloting`
and :mod:`mpformer.modeling.criterion`. Here it is brought into a decoder that knows nothing of it: slots before the
learnable queries, attention through ground-truth masks, and self-attention in which no learnable query reads a slot.
The loss of the matching part stays the one of ``transformers``. detectron2 is not needed.

Shapes, beside those of :mod:`mpformer.modeling.outputs`: the decoder of ``transformers`` puts queries first, (P+Q, B,
hidden), and has one attention mask a head, (B * heads, P+Q, h*w).
"""

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import make_dataclass
from functools import cached_property, lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from analysis.matching import MatchWeights
from mpformer.config.schema import WITHOUT_PILOTING, Toggles, toggle_names
from mpformer.modeling.criterion import Criterion, LossSettings
from mpformer.modeling.decoder import open_blocked_rows
from mpformer.modeling.mask_piloting import PilotBatch, Size, pilot_batch
from mpformer.modeling.outputs import Targets, padded_targets
from mpformer.modeling.points import Points, PointSettings
from mpformer.runtime.errors import UserError, choices

TOGGLES = tuple(name for name in toggle_names() if name not in WITHOUT_PILOTING)
"""Toggles that :meth:`MaskPiloting.for_huggingface` takes; learnable query positions are part of the model."""


class MaskPiloting(nn.Module):
    """A model that is trained with mask piloting; ``model`` is the model itself, trained in place.

    >>> pilot = MaskPiloting.for_huggingface(model)  # doctest: +SKIP
    >>> optimizer = torch.optim.AdamW(pilot.parameters())  # doctest: +SKIP
    >>> pilot.train()(batch).loss.backward()  # doctest: +SKIP
    >>> model = pilot.remove()  # doctest: +SKIP

    Its own parameters are the label embedding ``label_enc``. In evaluation mode it is the model.
    """

    accepts_loss_kwargs = False
    """For ``Trainer``: the loss is a mean of the batch at hand, to be divided by the number of accumulated batches."""

    def __init__(self, model: Any, toggles: Toggles) -> None:
        super().__init__()
        self.model = model
        self.toggles = toggles
        self.label_enc = _label_embedding(model, toggles)
        self.criterion = Criterion(_loss_settings(model.config)).to(self.label_enc.weight.device)
        self._removed = False

    @classmethod
    def for_huggingface(
        cls,
        model: Any,
        *,
        point_noise: float = 0.2,
        flip_noise: float = 0.2,
        guided_layers: str = "every",
        **toggles: Any,
    ) -> "MaskPiloting":
        """Attach mask piloting to a ``Mask2FormerForUniversalSegmentation``; the defaults are the paper's.

        ``toggles`` are further ones of :class:`~mpformer.config.schema.Toggles`, such as ``mp_groups``. Raises
        UserError for another model, an unknown toggle or value, and without ``transformers``.
        """
        _check_model(model)
        given = {"point_noise": point_noise, "flip_noise": flip_noise, "guided_layers": guided_layers}
        return cls(model, _toggles(given | toggles))

    def forward(
        self,
        batch: Mapping[str, Any] | None = None,
        *,
        pixel_values: Tensor | None = None,
        mask_labels: Sequence[Tensor] | None = None,
        class_labels: Sequence[Tensor] | None = None,
        noise: torch.Generator | None = None,
        points: Points | torch.Generator | None = None,
        **others: Any,
    ) -> Any:
        """Call the model; in training ``loss`` is its own loss plus ``pilot_loss``, that of the piloted part.

        The inputs are the model's, as one mapping or by name. Training needs ``mask_labels``, per image (n, H, W) of 0
        and 1, and ``class_labels``, per image (n,). ``noise`` draws the noise and ``points`` the points of the piloted
        part; None: a generator that follows the default one and leaves it untouched. Raises UserError if labels
        are missing or of no class of the model, and after :meth:`remove`.
        """
        if self._removed:
            raise UserError("mask piloting was removed from this model; MaskPiloting.for_huggingface attaches it again")
        named = {"pixel_values": pixel_values, "mask_labels": mask_labels, "class_labels": class_labels}
        inputs = {**(batch or {}), **{name: value for name, value in named.items() if value is not None}, **others}
        if not self.training:
            return self.model(**inputs)
        targets = _targets(inputs, self.model.config.num_labels)
        step = _Step(self, targets, noise or _following(targets.all_masks.device))
        with step.in_decoder():
            outputs = self.model(**(inputs | {"return_dict": True}))
        of_pilot = step.loss(points)
        return _output_type(outputs.__class__)(**outputs | {"loss": outputs.loss + of_pilot, "pilot_loss": of_pilot})

    def remove(self) -> Any:
        """End piloting and return the model, which holds nothing of it; only a call of this module pilots."""
        self._removed = True
        return self.model


class _Step:
    """One training step: hooks put the slots into the decoder and take their predictions out."""

    def __init__(self, piloting: MaskPiloting, targets: Targets, generator: torch.Generator) -> None:
        self._piloting = piloting
        self._decoder = _decoder(piloting.model)
        self._targets = targets
        self._generator = generator
        self._pilot: PilotBatch | None = None
        self._hidden: Tensor
        """(L+1, B, P, hidden) normalised slots, as the heads see them."""
        self._mask_features: Tensor
        self._layer_sizes: list[Size]

    @contextmanager
    def in_decoder(self) -> Iterator[None]:
        """The decoder has its hooks inside, and none of them outside."""
        with ExitStack() as hooks:
            enter = partial(self._decoder.register_forward_pre_hook, with_kwargs=True)
            for handle in (enter(self._put_in), self._decoder.register_forward_hook(self._take_out)):
                hooks.callback(handle.remove)
            for index, layer in enumerate(self._decoder.layers):
                hooks.callback(layer.register_forward_pre_hook(partial(self._guide, index), with_kwargs=True).remove)
                hooks.callback(layer.self_attn.register_forward_pre_hook(self._hide, with_kwargs=True).remove)
            yield

    def _put_in(self, decoder: Any, args: tuple[()], given: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]] | None:
        """Before the decoder: slots stand before the learnable queries, without a position."""
        queries, sizes = given["inputs_embeds"], given["feature_size_list"]
        self._layer_sizes = [(sizes[i % len(sizes)][0], sizes[i % len(sizes)][1]) for i in range(len(decoder.layers))]
        self._mask_features = given["pixel_embeddings"]
        toggles, table = self._piloting.toggles, self._piloting.label_enc.weight
        pilot = pilot_batch(toggles, self._targets, table, len(queries), self._layer_sizes, self._generator)
        self._pilot = pilot
        if pilot is None:
            return None
        slots = pilot.content.transpose(0, 1).to(queries.dtype)
        position = F.pad(given["query_position_embeddings"], (0, 0, 0, 0, pilot.slots, 0))
        return args, given | {"inputs_embeds": torch.cat([slots, queries]), "query_position_embeddings": position}

    def _guide(self, index: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer: the slots attend through the ground truth where the layer is guided."""
        if self._pilot is None:
            return None
        call = inspect.signature(layer.forward).bind(*args, **kwargs)
        given, guided = call.arguments, self._pilot.attention(index, self._layer_sizes[index])
        given["hidden_states"] = self._pilot.feed(index, given["hidden_states"].transpose(0, 1)).transpose(0, 1)
        if guided is not None:
            allowed, _ = open_blocked_rows(guided)
            predicted = given["encoder_attention_mask"][:, self._pilot.slots :]
            given["encoder_attention_mask"] = torch.cat([~allowed.repeat_interleave(self._heads, 0), predicted], dim=1)
        return call.args, call.kwargs

    def _hide(self, attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Before a layer's self-attention: no learnable query reads a slot."""
        return None if self._pilot is None else (args, kwargs | {"attention_mask": self._self_attention})

    @cached_property
    def _self_attention(self) -> Tensor:
        """(B * heads, P+Q, P+Q) to add to attention logits: -inf where the row query may not read the column query."""
        assert self._pilot is not None
        hidden = self._pilot.self_attention
        added = torch.zeros(hidden.shape, device=hidden.device).masked_fill(hidden, float("-inf"))
        return added.expand(len(self._pilot.real), -1, -1).repeat_interleave(self._heads, 0)

    @property
    def _heads(self) -> int:
        return self._decoder.config.num_attention_heads

    def _take_out(self, decoder: Any, args: tuple[()], output: Any) -> Any:
        """After the decoder: the model goes on with the matching part."""
        if self._pilot is None:
            return output
        slots, normed = self._pilot.slots, output.intermediate_hidden_states
        self._hidden = torch.stack([queries[:slots].transpose(0, 1) for queries in normed])
        output.last_hidden_state = output.last_hidden_state[:, slots:]
        output.intermediate_hidden_states = tuple(queries[slots:] for queries in normed)
        output.masks_queries_logits = tuple(masks[:, slots:] for masks in output.masks_queries_logits)
        if output.hidden_states is not None:
            output.hidden_states = tuple(queries[slots:] for queries in output.hidden_states)
        if output.attentions is not None:
            output.attentions = tuple(weights[..., slots:, slots:] for weights in output.attentions)
        return output

    def loss(self, points: Points | torch.Generator | None) -> Tensor:
        """The weighted losses of the piloted part, summed; 0 for a batch without objects."""
        criterion, table = self._piloting.criterion, self._piloting.label_enc.weight
        if self._pilot is None:
            criterion.join(1 + len(self._decoder.layers), table.device)
            return table.float().sum() * 0  # in the graph, which distributed training relies on
        logits = self._piloting.model.class_predictor(self._hidden)
        embed = self._decoder.mask_predictor.mask_embedder(self._hidden)
        points = self._generator if points is None else points
        losses = criterion.of_pilot(logits, embed, self._mask_features, self._targets, self._pilot, points)
        return torch.cat(list(criterion.weighted(losses).values())).sum()


def _check_model(model: Any) -> None:
    try:
        from transformers import Mask2FormerForUniversalSegmentation
    except ImportError:
        raise UserError(
            "mask piloting of a Hugging Face model needs transformers: pip install 'mpformer[huggingface]'"
        ) from None
    name = Mask2FormerForUniversalSegmentation.__name__
    if not isinstance(model, Mask2FormerForUniversalSegmentation):
        raise UserError(
            f"mask piloting takes a {name} of transformers, without a wrapper, not a {type(model).__name__}"
        )


@lru_cache
def _output_type(base: type) -> type:
    """The model's class of outputs with one field more; distributed training takes outputs apart by their fields."""
    return make_dataclass("MaskPilotingOutput", [("pilot_loss", Tensor | None, None)], bases=(base,))


def _toggles(given: dict[str, Any]) -> Toggles:
    for name in given:
        if name not in TOGGLES:
            raise choices("toggle", name, TOGGLES)
    try:
        return Toggles(mp_queries=True, **given)
    except ValidationError as error:
        first = error.errors()[0]
        reason = first["msg"].removeprefix("Value error, ")
        raise UserError(f"invalid value for {first['loc'][0]}: {reason} (got {first['input']!r:.80})") from None


def _decoder(model: Any) -> Any:
    return model.model.transformer_module.decoder


def _label_embedding(model: Any, toggles: Toggles) -> nn.Embedding:
    like = model.class_predictor.weight
    rows = model.config.num_labels if toggles.class_embedding == "label" else 1
    table = torch.empty(rows, like.shape[1], device=like.device, dtype=like.dtype)
    return nn.Embedding.from_pretrained(nn.init.normal_(table, generator=_following(like.device)), freeze=False)


def _loss_settings(config: Any) -> LossSettings:
    return LossSettings(
        classes=config.num_labels,
        weights=MatchWeights(config.class_weight, config.mask_weight, config.dice_weight),
        no_object_weight=config.no_object_weight,
        points=PointSettings(config.train_num_points, config.oversample_ratio, config.importance_sample_ratio),
        class_mean="per-rank",  # as transformers takes it
    )


def _following(device: torch.device) -> torch.Generator:
    """A generator seeded by what the device's default one would draw next, without drawing it.

    What the model draws is then what it draws without piloting, and a training resumed with the states of the default
    generators, as ``Trainer`` keeps them, draws the same again.
    """
    with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
        seed = int(torch.randint(2**62, (), device=device))
    return torch.Generator(device).manual_seed(seed)


def _targets(inputs: Mapping[str, Any], classes: int) -> Targets:
    """The ground truth of a batch, masks padded to the largest as the loss of ``transformers`` pads them."""
    masks, labels = inputs.get("mask_labels"), inputs.get("class_labels")
    if masks is None or labels is None:
        raise UserError("training needs mask_labels and class_labels in the batch; pilot.eval() predicts without them")
    images, device = len(inputs["pixel_values"]), inputs["pixel_values"].device
    if len(masks) != images or [len(part) for part in masks] != [len(part) for part in labels]:
        raise UserError("mask_labels and class_labels must have an entry for each image, with as many objects in both")
    size = (max(part.shape[-2] for part in masks), max(part.shape[-1] for part in masks))
    targets = padded_targets([part.to(device) for part in labels], [part.to(device) for part in masks], size)
    if len(targets.all_labels) and not 0 <= int(targets.all_labels.min()) <= int(targets.all_labels.max()) < classes:
        raise UserError(f"class_labels must be in 0 ... {classes - 1}, the labels of the model")
    return targets
