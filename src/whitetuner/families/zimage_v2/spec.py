"""Facts of Z-Image V2. No torch."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import Field

from whitetuner.errors import UserError
from whitetuner.families import z_image_facts as facts
from whitetuner.families.files import read_config
from whitetuner.families.z_image_facts import V1_CLASS, ZImageOptions
from whitetuner.family import FamilySpec, ModelPaths, Part
from whitetuner.records import Size

V2_CLASS = "ZImageV2Transformer2DModel"


class ZImageV2Options(ZImageOptions):
    """[model.options] of Z-Image V2."""

    double_layers: int | None = Field(
        None,
        ge=1,
        description="dual-stream layers, which come first; left out: as the folder has, else half of all",
    )
    single_layers: int | None = Field(
        None, ge=1, description="single-stream layers after them; the two add up to the model's layers (30)"
    )


class Layers(NamedTuple):
    """How many layers of each kind; converted: whether the folder holds V1, which has no dual-stream layers yet."""

    double: int
    single: int
    converted: bool


def layers_of(options: ZImageV2Options, paths: ModelPaths) -> Layers:
    """The layers that this folder becomes with these options; reads config.json alone.

    Raises UserError when the two do not add up, or contradict a folder that is V2 already.
    """
    folder = paths.component("transformer")
    config = read_config(folder / "config.json")
    total = int(config.get("n_layers", 30))
    converted = config.get("_class_name") == V1_CLASS
    double, single = options.double_layers, options.single_layers
    held = None if converted else int(config.get("n_double_layers", 15))
    if double is None:
        double = held or (total // 2 if single is None else total - single)
    if single is None:
        single = total - double
    if double + single != total or double < 1 or single < 1:
        raise UserError(
            "{double} dual-stream and {single} single-stream layers are {sum}, but the model has {total}",
            where="model.options.double_layers",
            mend="let the two add up to {total}, at least 1 of each; or leave both out: {half} + {rest}",
            double=double,
            single=single,
            sum=double + single,
            total=total,
            half=total // 2,
            rest=total - total // 2,
        )
    if held is not None and double != held:
        raise UserError(
            "this Z-Image V2 has {held} dual-stream layers already, not {asked}",
            where="model.options.double_layers",
            mend="leave double_layers and single_layers out, or give a Z-Image V1 folder to convert anew",
            held=held,
            asked=double,
        )
    return Layers(double, single, converted)


def _advice(options: Any, paths: ModelPaths) -> tuple[UserError, ...]:
    said = facts.advice(options, paths)
    config = read_config(paths.component("transformer") / "config.json")
    if config.get("_class_name") != V1_CLASS:
        return said
    try:
        layers = layers_of(options, paths)
    except UserError:  # an error, not advice: told where the model is built
        return said
    return (
        *said,
        UserError(
            "this folder holds Z-Image V1: it is converted to V2 each time it is loaded ({double} dual-stream and {single} "
            "single-stream layers), computes at first what V1 computes, and stays as it is on disk",
            where=str(paths.component("transformer")),
            double=layers.double,
            single=layers.single,
        ),
    )


SPEC = FamilySpec(
    name="zimage-v2",
    title="Z-Image V2",
    title_zh="Z-Image V2",
    tasks=("t2i",),
    variants={
        "base": "begun from Z-Image",
        "turbo": "begun from Z-Image-Turbo: merge the de-distill adapter before training it",
        "de-turbo": "begun from Z-Image-De-Turbo",
    },
    variant_of=facts.variant_of,
    options=ZImageV2Options,
    parts=lambda options: (
        Part(
            "transformer",
            ("noise_refiner", "context_refiner", "double_stream_layers", "layers"),
            per_sample=("x", "image", "text", "attn_mask", "freqs_cis", "adaln_input"),
        ),
    ),
    stride_px=16,
    stride_of=facts.stride,
    advice=_advice,
    components=dict.fromkeys(("transformer", "vae", "text_encoder", "tokenizer", "scheduler"), facts.HUB),
    transformer_class=V2_CLASS,
    converts=(V1_CLASS,),
    keep_precise=facts.KEEP_PRECISE,
    adapter_targets=(*facts.ADAPTER_TARGETS, "*.feed_forward_context.w[123]"),
    settings=facts.SETTINGS,
    default_size=Size(1024, 1024),
    auto_shift=lambda tokens: facts.SHIFT,
    sample_steps=50,
    sample_cfg=5.0,
    sampling_of=facts.sampling_of,
    comfyui_loads=False,
    licence=facts.LICENCE,
    tiny_options={"max_sequence_length": 64},
    template_tokens=facts.TEMPLATE_TOKENS,
    sources=(*facts.SOURCES, "whitetuner's original Z-Image V2 trainer (the idea)"),
)
