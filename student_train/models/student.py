"""A vision-language model split into its last hidden states and its head, as losses and generation need it.

A LLaVA is split at its vision tower too, so that a frozen tower's features are computed once for each image.

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
from student_train.data.sample_images import TensorStore, VisionInput
from student_train.models.huggingface import get_trunk, is_llava


class Student(nn.Module):
    """Wraps a transformers model: cuts the vocabulary to the tokenizer's, keeps a frozen tower's features."""

    def __init__(self, model: Any, *, vocab_size: int, image_token_id: int, features: TensorStore | None) -> None:
        """`vocab_size`: the tokenizer's real one. `features`: keeps a frozen tower's output."""
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
        """The number of experts that process a token, of a sparse student."""
        return self.model.config.text_config.num_experts_per_tok

    def embed_inputs(
        self, input_ids: Int[Tensor, "b t"], visual_positions: Int[Tensor, " s"], vision: VisionInput
    ) -> Float[Tensor, "b t d"]:
        """Compute the decoder's inputs: token embeddings, with projected image features at visual positions (flat)."""
        is_image = input_ids == self._image_token_id  # an id that may lie beyond the embedding
        tokens = self.model.get_input_embeddings()(input_ids.masked_fill(is_image, 0))
        width = tokens.shape[-1]
        projected = self.model.model.multi_modal_projector(self.compute_tower_features(vision))
        if not vision.names:  # a blank image: the projector runs, without effect
            return tokens + 0 * projected.sum()
        merged = tokens.view(-1, width).index_copy(0, visual_positions, projected.view(-1, width).to(tokens.dtype))
        return merged.view(*input_ids.shape, width)

    def compute_hidden(
        self, input_ids: Int[Tensor, "b t"], visual_positions: Int[Tensor, " s"], vision: VisionInput
    ) -> Float[Tensor, "bt d"]:
        """Compute the final-norm hidden states of all positions of sequences padded on the right."""
        if vision.inputs is not None:
            return self._run_whole_model(input_ids, vision.inputs)
        embedded = self.embed_inputs(input_ids, visual_positions, vision)
        output = self.model.model.language_model(inputs_embeds=embedded, use_cache=False)
        return output.last_hidden_state.flatten(0, 1)

    def _run_whole_model(self, input_ids: Int[Tensor, "b t"], inputs: ModelInputs) -> Float[Tensor, "bt d"]:
        """Compute the hidden states of a model that places its images itself."""
        shape, ids = input_ids.shape, input_ids
        with_blank = inputs.blank_ids is not None and torch.is_grad_enabled()
        if with_blank:  # in a sequence of its own: tower and projector run on every rank, without effect
            ids = _append_row(ids, torch.as_tensor(inputs.blank_ids, device=ids.device))
        shown = inputs.tensors if inputs.blank_ids is None or with_blank else {}
        output = get_trunk(self.model)(input_ids=ids, use_cache=False, **self.make_arguments(ids, inputs, shown))
        states = output.last_hidden_state
        hidden = states[: shape[0], : shape[1]].flatten(0, 1)
        return hidden + 0 * states[shape[0] :].sum() if with_blank else hidden

    def make_arguments(self, input_ids: Tensor, inputs: ModelInputs, shown: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's arguments besides the token ids, in its dtype."""
        if not shown:
            return {}
        types = (input_ids == self._image_token_id).long()
        cast = {name: each.to(self.model.dtype) if each.is_floating_point() else each for name, each in shown.items()}
        return {**cast, **dict.fromkeys(inputs.token_types, types)}

    def compute_hidden_and_routers(
        self, input_ids: Int[Tensor, "b t"], visual_positions: Int[Tensor, " s"], vision: VisionInput
    ) -> tuple[Float[Tensor, "bt d"], tuple[Float[Tensor, "bt e"], ...]]:
        """Compute the hidden states, and the logits of each sparse layer's router."""
        embedded = self.embed_inputs(input_ids, visual_positions, vision)
        output = self.model.model.language_model(inputs_embeds=embedded, use_cache=False, output_router_logits=True)
        return output.last_hidden_state.flatten(0, 1), tuple(output.router_logits)

    def compute_tower_features(self, vision: VisionInput) -> Float[Tensor, "i n f"]:
        """Compute the projector's input, from selected layers of the tower; keep new features of a frozen tower."""
        if vision.pixel_values is None:
            assert vision.known is not None
            return vision.known
        with torch.set_grad_enabled(self._vision_trains and torch.is_grad_enabled()):
            fresh = compute_tower_features(self.model, vision.pixel_values)
        if self._features is not None and vision.names:
            self._features.put([vision.names[slot] for slot in vision.pixel_slots.tolist()], list(fresh))
        if vision.known is None:
            return fresh
        merged = fresh.new_empty(len(vision.names), *fresh.shape[1:])
        merged = merged.index_copy(0, vision.known_slots, vision.known.to(fresh.dtype))
        return merged.index_copy(0, vision.pixel_slots, fresh)

    def compute_logits(self, hidden: Float[Tensor, "r d"]) -> Float[Tensor, "r v"]:
        """Compute raw logits over the real vocabulary."""
        return self.head(hidden)[:, : self.vocab_size]


def _append_row(ids: Int[Tensor, "b t"], row: Int[Tensor, " e"]) -> Int[Tensor, "c u"]:
    """Append a sequence; pad all on the right to the longest."""
    length = max(ids.shape[1], len(row))
    padded = ids.new_zeros(len(ids) + 1, length)
    padded[: len(ids), : ids.shape[1]] = ids
    padded[-1, : len(row)] = row
    return padded


def compute_tower_features(model: Any, pixel_values: Float[Tensor, "p c h w"]) -> Float[Tensor, "p n f"]:
    """Compute the vision tower's output as LlavaModel.get_image_features passes it to the projector."""
    tower, config = model.model.vision_tower, model.config
    layers = config.vision_feature_layer
    output = tower(pixel_values.to(dtype=tower.dtype), output_hidden_states=True, return_dict=True)
    chosen = [output.hidden_states[layer] for layer in ([layers] if isinstance(layers, int) else layers)]
    if config.vision_feature_select_strategy == "default":
        chosen = [states[:, 1:] for states in chosen]
    return torch.cat(chosen, dim=-1)
