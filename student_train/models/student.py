"""A vision-language model, cut where losses and generation need it: last hidden states and head.

A LLaVA is cut at its vision tower too, so that a frozen tower's features are made once an image.

Legend: b sequences, t tokens, r rows, i images, n visual tokens of a LLaVA's image, s those of all images, e tokens
that stand for an image, p images whose pixels are given, f channels of the vision tower, c h w channels, height and
width, d hidden, v real vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from student_train.data.image_inputs import ModelInputs
from student_train.data.sample_images import FeatureStore, VisionInput
from student_train.models.huggingface import is_llava


class Student(nn.Module):
    """A model of transformers, its vocabulary cut to the tokenizer's, a frozen tower's features kept."""

    def __init__(self, model: Any, *, vocab_size: int, image_token_id: int, features: FeatureStore | None) -> None:
        """`vocab_size`: the tokenizer's real one. `features`: where a frozen tower's output is kept."""
        super().__init__()
        self.model: Any = model
        self.vocab_size = vocab_size
        self._image_token_id = image_token_id
        self._features = features
        self.is_llava = is_llava(model.config)
        self._vision_trains = self.is_llava and any(p.requires_grad for p in model.model.vision_tower.parameters())

    @property
    def head(self) -> Any:
        """The output head, a linear layer."""
        return self.model.get_output_embeddings()

    @property
    def top_k(self) -> int:
        """Experts that see a token, of a sparse student."""
        return self.model.config.text_config.num_experts_per_tok

    def embedded(
        self, input_ids: Int[Tensor, "b t"], visual_positions: Int[Tensor, " s"], vision: VisionInput
    ) -> Float[Tensor, "b t d"]:
        """What the decoder reads: embeddings, with projected image features at visual positions (flat)."""
        is_image = input_ids == self._image_token_id  # an id that may lie beyond the embedding
        tokens = self.model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        width = tokens.shape[-1]
        projected = self.model.model.multi_modal_projector(self.tower_features(vision))
        if not vision.names:  # a blank image: the projector takes part, with no effect
            return tokens + 0 * projected.sum()
        merged = tokens.view(-1, width).index_copy(0, visual_positions, projected.view(-1, width).to(tokens.dtype))
        return merged.view(*input_ids.shape, width)

    def hidden(
        self, input_ids: Int[Tensor, "b t"], visual_positions: Int[Tensor, " s"], vision: VisionInput
    ) -> Float[Tensor, "bt d"]:
        """Final-norm hidden states of every position of sequences padded on the right."""
        if vision.inputs is not None:
            return self._called_whole(input_ids, vision.inputs)
        embedded = self.embedded(input_ids, visual_positions, vision)
        output = self.model.model.language_model(inputs_embeds=embedded, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)

    def _called_whole(self, input_ids: Int[Tensor, "b t"], inputs: ModelInputs) -> Float[Tensor, "bt d"]:
        """`hidden` of a model that places its images itself."""
        shape, ids = input_ids.shape, input_ids
        with_blank = inputs.blank_ids is not None and torch.is_grad_enabled()
        if with_blank:  # in a sequence of its own: every rank's tower and projector take part, with no effect
            ids = _with_row(ids, torch.as_tensor(inputs.blank_ids, device=ids.device))
        shown = inputs.tensors if inputs.blank_ids is None or with_blank else {}
        output = self.model.base_model(input_ids=ids, use_cache=False, **self.arguments(ids, inputs, shown))
        states = output.last_hidden_state
        hidden = states[: shape[0], : shape[1]].flatten(0, 1)
        return hidden + 0 * states[shape[0] :].sum() if with_blank else hidden

    def arguments(self, input_ids: Tensor, inputs: ModelInputs, shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a model is called with beside its token ids, in its dtype."""
        if not shown:
            return {}
        types = (input_ids == self._image_token_id).long()
        cast = {name: each.to(self.model.dtype) if each.is_floating_point() else each for name, each in shown.items()}
        return {**cast, **dict.fromkeys(inputs.token_types, types)}

    def hidden_and_routers(
        self, input_ids: Int[Tensor, "b t"], visual_positions: Int[Tensor, " s"], vision: VisionInput
    ) -> tuple[Float[Tensor, "bt d"], tuple[Float[Tensor, "bt e"], ...]]:
        """`hidden`, and the logits of each sparse layer's router."""
        embedded = self.embedded(input_ids, visual_positions, vision)
        output = self.model.model.language_model(inputs_embeds=embedded, use_cache=False, output_router_logits=True)
        return output.last_hidden_state.flatten(0, 1), tuple(output.router_logits)

    def tower_features(self, vision: VisionInput) -> Float[Tensor, "i n f"]:
        """What the projector reads: selected layers of the tower. New ones of a frozen tower are kept."""
        if vision.pixel_values is None:
            assert vision.known is not None
            return vision.known
        with torch.set_grad_enabled(self._vision_trains and torch.is_grad_enabled()):
            fresh = tower_features(self.model, vision.pixel_values)
        if self._features is not None and vision.names:
            self._features.put([vision.names[slot] for slot in vision.pixel_slots.tolist()], list(fresh))
        if vision.known is None:
            return fresh
        merged = fresh.new_empty(len(vision.names), *fresh.shape[1:])
        merged = merged.index_copy(0, vision.known_slots, vision.known.to(fresh.dtype))
        return merged.index_copy(0, vision.pixel_slots, fresh)

    def logits(self, hidden: Float[Tensor, "r d"]) -> Float[Tensor, "r v"]:
        """Raw logits over the real vocabulary."""
        return self.head(hidden)[:, : self.vocab_size]


def _with_row(ids: Int[Tensor, "b t"], row: Int[Tensor, " e"]) -> Int[Tensor, "c u"]:
    """The sequences and one more, all padded on the right to the longest."""
    length = max(ids.shape[1], len(row))
    padded = ids.new_zeros(len(ids) + 1, length)
    padded[: len(ids), : ids.shape[1]] = ids
    padded[-1, : len(row)] = row
    return padded


def tower_features(model: Any, pixel_values: Float[Tensor, "p c h w"]) -> Float[Tensor, "p n f"]:
    """The vision tower's output as LlavaModel.get_image_features hands it to the projector."""
    tower, config = model.model.vision_tower, model.config
    layers = config.vision_feature_layer
    output = tower(pixel_values.to(dtype=tower.dtype), output_hidden_states=True, return_dict=True)
    chosen = [output.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [states[:, 1:] for states in chosen]
    return torch.cat(chosen, dim=-1)
