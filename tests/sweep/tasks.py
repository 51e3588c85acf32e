"""The tasks: which classes, what fields their configurations have, what is a batch, and the losses."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, ctc_loss, log_softmax
from transformers.models.auto import modeling_auto

from tests.sweep.tiny import VOCABULARY

N, LENGTH, LABELS = 4, 8, 2
END, SPECIAL = 1, 2
"""Tokens that end a text, and that stand for audio or an image, where a model has such; drawn tokens begin at 3."""

Inputs = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True)
class Call:
    """How a model is called, and what its losses are.

    Attributes:
        inputs: what makes each keyword argument, of ``N`` rows.
        target: what makes the target from the keyword arguments.
        losses: one value a sample from the output and the target.
    """

    inputs: Inputs
    target: Callable[[dict[str, Tensor]], Tensor]
    losses: Callable[[Any, Tensor], Tensor]

    def batch(self) -> tuple[dict[str, Tensor], Tensor]:
        """Keyword arguments and a target."""
        inputs = {name: make() for name, make in self.inputs.items()}
        return inputs, self.target(inputs)


@dataclass(frozen=True)
class Task:
    """One of the lists that transformers has of its classes.

    Attributes:
        name: as `AutoModelFor...` has it.
        mappings: the names of the lists in transformers.
        calls: how a model of the task may be called; tried in turn.
        fields: what fields of configurations are to be, besides those that are tiny for every task.
        chosen: whether a type of model and its class belong here.
    """

    name: str
    mappings: tuple[str, ...]
    calls: Callable[[nn.Module], Iterator[Call]]
    fields: Mapping[str, Any] = field(default_factory=dict)
    chosen: Callable[[str, str], bool] = lambda model_type, name: True

    def classes(self) -> Iterator[tuple[str, str]]:
        """Types of model and their classes, each class once."""
        found = set()
        for model_type, names in itertools.chain(*(getattr(modeling_auto, one).items() for one in self.mappings)):
            for name in (names,) if isinstance(names, str) else names:
                if self.chosen(model_type, name) and name not in found:
                    found.add(name)
                    yield model_type, name


def _tokens(length: int = LENGTH, special: int = 0, specials: int = 0, ending: bool = False) -> Tensor:
    tokens = torch.randint(3, VOCABULARY, (N, length + specials))
    tokens[:, 1 : 1 + specials] = special
    if ending:
        tokens[:, -1] = END
    return tokens


def _boxes() -> Tensor:
    """Boxes of words on a page: left, top, right, bottom."""
    corner = torch.randint(0, 20, (N, LENGTH, 2))
    return torch.cat([corner, corner + torch.randint(1, 20, (N, LENGTH, 2))], -1)


def _next_tokens(output: Any, tokens: Tensor) -> Tensor:
    """The mean over the tokens that are to be foreseen."""
    logits = output.logits[:, :-1].transpose(1, 2)
    return cross_entropy(logits, tokens[:, 1:], reduction="none").mean(1)


def _all_tokens(output: Any, tokens: Tensor) -> Tensor:
    return cross_entropy(output.logits.movedim(-1, 1), tokens, reduction="none").mean(1)


def _classes(output: Any, labels: Tensor) -> Tensor:
    logits = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return cross_entropy(logits, labels, reduction="none")


def _connectionist(output: Any, tokens: Tensor) -> Tensor:
    logits = log_softmax(output.logits, -1).transpose(0, 1)
    lengths = torch.full((len(tokens),), len(logits)), torch.full((len(tokens),), tokens.shape[1])
    return ctc_loss(logits, tokens, *lengths, reduction="none")


def _labels(inputs: dict[str, Tensor]) -> Tensor:
    return torch.randint(LABELS, (N,))


def _same_tokens(inputs: dict[str, Tensor]) -> Tensor:
    return inputs["input_ids"]


def _drawn_tokens(inputs: dict[str, Tensor], name: str = "input_ids", length: int | None = None) -> Tensor:
    return _tokens(inputs[name].shape[1] if length is None else length)


def _arguments(model: Any) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _of_config(model: nn.Module, *names: str) -> Iterator[Any]:
    """The values that a configuration, or those in it, has under some names."""
    left = [model.config]
    while left:
        config = left.pop(0)
        yield from (vars(config)[name] for name in names if isinstance(vars(config).get(name), (int, tuple, list)))
        left += [value for value in vars(config).values() if hasattr(value, "model_type")]


def _causal(model: nn.Module) -> Iterator[Call]:
    yield Call({"input_ids": _tokens}, _same_tokens, _next_tokens)


def _text(model: nn.Module) -> Iterator[Inputs]:
    names = _arguments(model)
    boxes = {"bbox": _boxes} if "bbox" in names else {}
    for length, ending in ((LENGTH, False), (LENGTH, True), (64, False)):
        yield {"input_ids": partial(_tokens, length, ending=ending), **boxes}
    if "image" in names:
        yield {"input_ids": _tokens, **boxes, "image": partial(torch.rand, N, 3, 224, 224)}


def _text_classes(model: nn.Module) -> Iterator[Call]:
    yield from (Call(inputs, _labels, _classes) for inputs in _text(model))


def _masked(model: nn.Module) -> Iterator[Call]:
    yield from (Call(inputs, _drawn_tokens, _all_tokens) for inputs in _text(model))


def _seq2seq(model: nn.Module) -> Iterator[Call]:
    for inputs in _text(model):
        inputs = {**inputs, "decoder_input_ids": _tokens}
        yield Call(inputs, partial(_drawn_tokens, name="decoder_input_ids"), _all_tokens)


def _images(model: nn.Module) -> Iterator[Inputs]:
    names = _arguments(model)
    sizes = [size if isinstance(size, int) else size[0] for size in _of_config(model, "image_size")]
    for size in dict.fromkeys([*sizes, 32, 64, 224]):
        pixels = partial(torch.randn, N, 3, size, size)
        if "input_ids" in names and "pixel_values" in names:
            for count in _of_config(model, "mm_tokens_per_image"):
                yield {
                    "input_ids": partial(_tokens, special=SPECIAL, specials=count),
                    "pixel_values": pixels,
                }
        elif "spatial_shapes" in names:
            for patch in _of_config(model, "patch_size"):
                yield {
                    "pixel_values": partial(torch.randn, N, 16, 3 * patch**2),
                    "pixel_attention_mask": partial(torch.ones, N, 16, dtype=torch.long),
                    "spatial_shapes": partial(torch.full, (N, 2), 4),
                }
        elif "pixel_values" in names:
            yield {"pixel_values": pixels}
    if "pixel_values" not in names:
        yield {"input_ids": _tokens}


def _image_classes(model: nn.Module) -> Iterator[Call]:
    yield from (Call(inputs, _labels, _classes) for inputs in _images(model))


def _audio(model: nn.Module) -> Iterator[Inputs]:
    """Waves, or features of frames with either axis first."""
    names = _arguments(model)
    if "input_values" in names:
        for shape in ((N, 6400), (N, 1, 6400), (N, 24000)):
            yield {"input_values": partial(torch.randn, *shape)}
    if {"input_features", "input_values"}.isdisjoint(names):
        yield {"input_ids": _tokens}
        return
    features = _of_config(
        model, "num_mel_bins", "feature_projection_input_dim", "input_dim", "input_feat_per_channel", "d_model"
    )
    frames = [2 * count for count in _of_config(model, "max_source_positions")]
    frames += _of_config(model, "max_length")
    name = "input_features" if "input_features" in names else "input_values"
    for width, length in itertools.product(dict.fromkeys(features), dict.fromkeys([*frames, 64, 200])):
        yield {name: partial(torch.randn, N, width, length)}
        yield {name: partial(torch.randn, N, length, width)}


def _audio_classes(model: nn.Module) -> Iterator[Call]:
    yield from (Call(inputs, _labels, _classes) for inputs in _audio(model))


def _audio_frames(model: nn.Module) -> Iterator[Call]:
    target = partial(_drawn_tokens, name="", length=3)
    yield from (Call(inputs, lambda inputs: target({"": _tokens()}), _connectionist) for inputs in _audio(model))


def _audio_to_text(model: nn.Module) -> Iterator[Call]:
    names = _arguments(model)
    if "decoder_input_ids" in names:
        for inputs in _audio(model):
            inputs = {**inputs, "decoder_input_ids": _tokens}
            yield Call(inputs, partial(_drawn_tokens, name="decoder_input_ids"), _all_tokens)
    elif {"input_features", "input_values"} & names:
        masks = [name for name in ("input_features_mask", "feature_attention_mask", "padding_mask") if name in names]
        for inputs in _audio(model):
            ((name, audio),) = inputs.items()
            for masked, count in itertools.product(([], masks) if masks else ([],), range(32, 0, -1)):
                # Of those that count no tokens, the most that run are as many as there are frames.
                inputs = {
                    "input_ids": partial(_tokens, special=SPECIAL, specials=count),
                    name: audio,
                    **{mask: partial(_mask, audio) for mask in masked},
                }
                yield Call(inputs, _same_tokens, _next_tokens)
    else:
        yield from _causal(model)


def _mask(audio: Callable[[], Tensor]) -> Tensor:
    return torch.ones(N, audio().shape[-1], dtype=torch.long)


def _only_masked(model_type: str, name: str) -> bool:
    return model_type not in modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES


def _speaks(model_type: str, name: str) -> bool:
    """Whether a class takes audio, or is among those for speech."""
    if name in modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES.values():
        return True
    return not {"input_features", "input_values"}.isdisjoint(_arguments(getattr(transformers, name)))


def _writes(model_type: str, name: str) -> bool:
    return not _speaks(model_type, name)


ENCODES = {"is_decoder": False, "pad_token_id": SPECIAL}
IMAGES = {
    **ENCODES,
    **{"image_size": 32, "patch_size": 8, "embed_dim": 32, "window_size": 4, "num_channels": 3, "patch_stride": 4},
    **{"image_token_index": SPECIAL, "mm_tokens_per_image": 4, "projection_dim": 32, "d_latents": 32},
}
SPEAKS = {
    "is_decoder": False,
    **{"audio_token_id": SPECIAL, "audio_token_index": SPECIAL, "num_mel_bins": 16, "max_source_positions": 32},
    **{"num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 4, "classifier_proj_size": 16},
    **{"context_size": 8, "max_pos_emb": 16, "encoder_hidden_size": 32, "hidden_dim": 32, "input_dim": 16},
    **{"window_size": 4, "downsample_rate": 2, "output_dim": 32, "downsample_hidden_size": 16},
    **{"feature_projection_input_dim": 16, "input_feat_per_channel": 16, "subsampling_conv_channels": 8},
    **{"audio_pad_token_id": 2, "audio_bos_token_id": 1, "max_length": 32, "conv_channels": 16},
    **{"speech_encoder_layers": 2, "speech_encoder_intermediate_size": 48, "intermediate_size": 128},
    **{"speech_encoder_attention_heads": 4, "num_stacked_frames": 1, "num_filters": 2, "upsample_groups": 1},
}

TASKS = {
    "causal-lm": Task("CausalLM", ("MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",), _causal),
    "text": Task(
        *("SequenceClassification", ("MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",), _text_classes, ENCODES),
    ),
    "masked-lm": Task("MaskedLM", ("MODEL_FOR_MASKED_LM_MAPPING_NAMES",), _masked, ENCODES, _only_masked),
    "seq2seq": Task(
        *("Seq2SeqLM", ("MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",), _seq2seq, {"is_decoder": False}, _writes),
    ),
    "image": Task("ImageClassification", ("MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",), _image_classes, IMAGES),
    "audio": Task("AudioClassification", ("MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",), _audio_classes, SPEAKS),
    "ctc": Task("CTC", ("MODEL_FOR_CTC_MAPPING_NAMES",), _audio_frames, SPEAKS),
    "speech": Task(
        "SpeechSeq2Seq",
        ("MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
        *(_audio_to_text, SPEAKS, _speaks),
    ),
}
