"""Tiny random models of all architectures of Transformers, each with arguments that it runs with."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from shrunk import HIDDEN, config_for, value_of
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

MAPPINGS = {
    "causal": ("FOR_CAUSAL_LM_",),
    "multimodal": ("FOR_IMAGE_TEXT_TO_TEXT_", "FOR_MULTIMODAL_LM_"),
    "sequence": ("FOR_SEQ_TO_SEQ_CAUSAL_LM_", "FOR_SPEECH_SEQ_2_SEQ_"),
    "masked": ("FOR_MASKED_LM_",),
    "classifier": ("FOR_SEQUENCE_CLASSIFICATION_",),
    "base": ("",),
    "perception": ("FOR_IMAGE_CLASSIFICATION_", "FOR_AUDIO_CLASSIFICATION_", "FOR_CTC_"),
}
LANGUAGE_MODELS = ("causal", "multimodal")
_MOST_PARAMETERS = 130_000_000
_OUTPUTS = (
    "logits",
    "last_hidden_state",
    "prediction_logits",
    "seq_logits",
    "logits_per_image",
    "image_embeds",
    "start_logits",
)


def architectures(kinds: list[str]) -> Iterator[tuple[str, str, str]]:
    """Kind, `model_type` and name of every model class in Transformers' automatic mappings, each once."""
    seen = set()
    for kind in kinds:
        for mapping in MAPPINGS[kind]:
            for model_type, classes in getattr(modeling_auto, f"MODEL_{mapping}MAPPING_NAMES").items():
                for name in classes if isinstance(classes, (tuple, list)) else [classes]:
                    if name not in seen:
                        seen.add(name)
                        yield kind, model_type, name


def build(model_type: str, name: str) -> PreTrainedModel:
    """The tiny model of a class, in float32, in evaluation mode."""
    model_class = getattr(transformers, name)
    with torch.device("meta"), contextlib.suppress(Exception):
        size = sum(p.numel() for p in model_class(config_for(model_class, model_type)).parameters())
        assert size <= _MOST_PARAMETERS, f"the tiny configuration has {size:,} parameters"
    torch.manual_seed(0)
    model = model_class(config_for(model_class, model_type)).eval().float()
    if hasattr(model, "set_experts_implementation"):
        with contextlib.suppress(Exception):
            model.set_experts_implementation("eager")
    for name, parameter in model.named_parameters():
        # Some are made by torch.empty, and never initialized. A weight of zeros hides all that is before it.
        if not torch.isfinite(parameter).all() or not ("bias" in name or parameter.any()):
            nn.init.normal_(parameter, std=0.1)
    for name, buffer in model.named_buffers():
        if "embed" in name and buffer.is_floating_point() and not buffer.any():  # codebooks
            buffer.normal_(std=0.1)
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id, generation.pad_token_id, generation.bos_token_id = None, 0, 1
        for setting in ("forced_eos_token_id", "forced_bos_token_id", "suppress_tokens", "begin_suppress_tokens"):
            setattr(generation, setting, None)
    return model


def tokens(lengths: tuple[int, ...], side: str = "right") -> dict[str, torch.Tensor]:
    """Random token ids `[b, t]` of rows of these lengths, padded on a side, and their attention mask."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, length in enumerate(lengths):
        place = slice(0, length) if side == "right" else slice(longest - length, longest)
        ids[i, place] = torch.randint(10, 33, (length,), generator=generator)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def main_output(output: Any) -> torch.Tensor | None:
    """What a model puts out: its logits, or what comes first."""
    if isinstance(output, torch.Tensor):
        return output
    for name in _OUTPUTS:
        value = getattr(output, name, None)
        value = value[0] if isinstance(value, tuple) and value else value
        if isinstance(value, torch.Tensor):
            return value
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    floats = (v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel() > 1)
    return next(floats, None)


_OF_TOKENS = {
    "input_ids",
    "attention_mask",
    "decoder_input_ids",
    "bbox",
    "token_type_ids",
    "mm_token_type_ids",
    "use_cache",
}


@dataclass
class Subject:
    """A model, and how it is called.

    Attributes:
        kind: one of `MAPPINGS`.
        model: the model.
        inputs: arguments that it runs with.
        takes_tokens: whether token ids, and what follows from them, are all of these.
        error: why it does not run with anything that is known here, None if it runs.
    """

    kind: str
    model: PreTrainedModel
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)
    takes_tokens: bool = False
    takes_types: bool = False
    takes_positions: bool = False
    ends: bool = False
    error: Exception | None = None

    def __post_init__(self) -> None:
        self.parameters = set(inspect.signature(self.model.forward).parameters)
        self.encoder_decoder = bool(getattr(self.model.config, "is_encoder_decoder", False))
        errors = []
        for inputs in self._candidates():
            try:
                with torch.no_grad():
                    output = main_output(self.model(**inputs))
            except Exception as error:
                errors.append(error)
                continue
            if output is not None:
                self.inputs = inputs
                self.takes_tokens = "attention_mask" in inputs and inputs.keys() <= _OF_TOKENS
                self.ends = self.takes_tokens and torch.equal(ids := inputs["input_ids"], self._ended(ids, ids >= 0))
                self.takes_types = "token_type_ids" in inputs or "mm_token_type_ids" in inputs
                return
        self.error = next(iter(errors), ValueError("forward takes nothing that is known here"))

    def told(self, batch: dict[str, torch.Tensor], **more: Any) -> dict[str, Any]:
        """The arguments for token ids and their mask, with what the model wants beside them."""
        ids, mask = batch["input_ids"], batch["attention_mask"]
        ids = self._ended(ids, mask) if self.ends else ids
        call = {"input_ids": ids, "attention_mask": mask}
        if self.takes_types:
            names = {"token_type_ids", "mm_token_type_ids"} & self.parameters
            call |= {name: torch.zeros_like(ids) for name in names}
        if self.takes_positions:
            call["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        if "use_cache" in self.inputs:
            call["use_cache"] = False
        if "bbox" in self.inputs:
            call["bbox"] = self.inputs["bbox"].new_zeros(*ids.shape, 4)
        if "decoder_input_ids" in self.inputs:
            call["decoder_input_ids"] = self.inputs["decoder_input_ids"][:1, :4].expand(len(ids), -1)
        return call | more

    def _ended(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids with the token that ends a sequence at the last real place of each row."""
        end, ended = self._setting("eos_token_id", default=2), ids.clone()
        for row, real in zip(ended, mask, strict=True):
            row[real.nonzero()[-1]] = int(end[0] if isinstance(end, (list, tuple)) else end)
        return ended

    def _setting(self, *names: str, default: Any = None) -> Any:
        """The first of some settings that the configuration, or that of a part of the model, has."""
        config = self.model.config
        parts = (value_of(config, name) for name in config.sub_configs or ())
        configs = [config, *(part for part in parts if isinstance(part, PreTrainedConfig))]
        values = (value_of(part, name) for name in names for part in configs)
        return next((value for value in values if value is not None), default)

    def _candidates(self) -> Iterator[dict[str, torch.Tensor]]:
        """Arguments to try, by the names of those that `forward` takes."""
        batch = tokens((8, 8))
        ids = batch["input_ids"]
        text = {name: value for name, value in batch.items() if name in self.parameters}
        decoder = {}
        if "decoder_input_ids" in self.parameters:
            decoder = {"decoder_input_ids": ids[:, :5].clone()}
        if "input_ids" in self.parameters:
            types = {n: torch.zeros_like(ids) for n in ("token_type_ids", "mm_token_type_ids") if n in self.parameters}
            yield from ({**text, **decoder, **types}, {**text, **decoder})
            for kind in (torch.long, torch.float) if "bbox" in self.parameters else ():
                yield {**text, **decoder, "bbox": torch.zeros(2, 8, 4, dtype=kind)}
        for others in (*self._images(), *self._sounds(), *self._series(), *self._steps()):
            calls = ({**text, **decoder, **others}, {**decoder, **others})
            # A mask without token ids is one of places, of which there may be more.
            yield from calls if "input_ids" in text else reversed(calls)
        if "input_ids" in self.parameters:
            yield from ({**text, **decoder, "use_cache": False}, {"input_ids": ids})
            # Some classify at the end of the sequence, and make the decoder's tokens themselves.
            yield {**text, "input_ids": self._ended(ids, torch.ones_like(ids))}
            codebooks = self._setting("num_codebooks", default=1)
            yield {"input_ids": ids.repeat(codebooks, 1)}
            # Some have a word beside the codes of a token.
            yield from ({"input_ids": ids[..., None].repeat(1, 1, count)} for count in (codebooks, codebooks + 1))
        if "hidden_states" in self.parameters:
            yield {"hidden_states": torch.randn(2, 8, HIDDEN)}
        yield from self._among_tokens(ids)

    def _images(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self._setting("image_size", "input_size", default=32)
        size = tuple(map(int, (size if isinstance(size, (tuple, list)) else (size, size))[-2:]))
        channels = self._setting("num_channels", "in_channels", "in_chans", default=3)
        channels = channels if isinstance(channels, int) else 3
        frames = self._setting("frames_per_clip", "num_frames", default=4) or 4
        if "pixel_values" in self.parameters:
            small = ((32, 32), (64, 64))
            # Large images take long, and many models take smaller ones.
            for shape in dict.fromkeys((*small, size) if max(size) > 256 else (size, *small, (224, 224))):
                yield {"pixel_values": torch.randn(2, channels, *shape)}
            yield {"pixel_values": torch.randn(2, frames, channels, *size)}
        if "pixel_values_videos" in self.parameters:
            yield {"pixel_values_videos": torch.randn(2, frames, channels, *size)}
        grids = self.parameters & {"grid_thw", "image_grid_thw"} if "input_ids" not in self.parameters else ()
        for grid_name in grids:
            name = "hidden_states" if "hidden_states" in self.parameters else "pixel_values"
            patch, grid = self._setting("patch_size", default=8), torch.tensor([[1, 4, 4]] * 2)
            for frames in (self._setting("temporal_patch_size", default=1), 2):
                yield {name: torch.randn(32, channels * frames * patch**2), grid_name: grid}
        if "spatial_shapes" in self.parameters:
            places = torch.randn(2, 16, channels * self._setting("patch_size", default=8) ** 2)
            told = {"pixel_attention_mask": torch.ones(2, 16), "spatial_shapes": torch.tensor([[4, 4]] * 2)}
            yield {"pixel_values": places, **told}
        if "visual_feats" in self.parameters:
            yield {"visual_feats": torch.randn(2, 4, 2048), "visual_pos": torch.rand(2, 4, 4)}

    def _among_tokens(self, ids: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
        """An image among the tokens, for models that take no text alone."""
        image = self._setting("image_token_id", "image_token_index")
        if not self.parameters >= {"pixel_values", "input_ids"}:
            return
        for pixels in self._images():
            if "image_attention_mask" in self.parameters and "pixel_values" in pixels:
                several = {"pixel_values": pixels["pixel_values"][:, None], "image_attention_mask": torch.ones(2, 8, 1)}
                yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **several}
            for count in (0, 4, 16, 1, 5, 17, 64) if image is not None else (0,):
                together = torch.cat([torch.full((2, count), image or 0), ids], dim=1)
                call = {"input_ids": together, "attention_mask": torch.ones_like(together), **pixels}
                yield call | {name: ids for name in ("qformer_input_ids",) if name in self.parameters}

    def _sounds(self) -> Iterator[dict[str, torch.Tensor]]:
        names = ("num_mel_bins", "feature_size", "input_feat_per_channel", "feature_projection_input_dim", "input_dim")
        bins = self._setting(*names, default=80)
        if "input_values" in self.parameters:
            for shape in ((2, 2000), (2, 1, 2000), (2, 4000), (2, 1, 4000)):
                yield {"input_values": torch.randn(shape)}
            for width in (bins, HIDDEN):
                yield {"input_values": torch.randn(2, self._setting("max_length", default=64), width)}
        if "input_features" in self.parameters:
            for length in (2 * (self._setting("max_source_positions", default=16) or 16), 32, 64):
                masks = {name: torch.ones(2, length).bool() for name in self.parameters & {"input_features_mask"}}
                yield {"input_features": torch.randn(2, bins, length), **masks}
                yield {"input_features": torch.randn(2, length, bins), **masks}

    def _steps(self) -> Iterator[dict[str, torch.Tensor]]:
        """What an agent saw, did and won."""
        if "returns_to_go" in self.parameters:
            states, actions = (torch.randn(2, 8, self._setting(name, default=4)) for name in ("state_dim", "act_dim"))
            won = {"rewards": torch.randn(2, 8, 1), "returns_to_go": torch.randn(2, 8, 1)}
            steps = {"timesteps": torch.arange(8).expand(2, -1), "attention_mask": torch.ones(2, 8)}
            yield {"states": states, "actions": actions, **won, **steps}

    def _series(self) -> Iterator[dict[str, torch.Tensor]]:
        if "past_values" not in self.parameters:
            return
        features = self._setting("num_time_features", default=0)
        length, ahead = self._setting("context_length", default=32), self._setting("prediction_length", default=8) or 8
        past = length + max(self._setting("lags_sequence", default=[0]) or [0])
        for count in (1, features):
            told = {
                "past_values": torch.randn(2, past),
                "past_time_features": torch.randn(2, past, count),
                "past_observed_mask": torch.ones(2, past),
                "future_values": torch.randn(2, ahead),
                "future_time_features": torch.randn(2, ahead, count),
            }
            yield {name: value for name, value in told.items() if name in self.parameters}
        yield {"past_values": torch.randn(2, length, self._setting("num_input_channels", default=1) or 1)}
