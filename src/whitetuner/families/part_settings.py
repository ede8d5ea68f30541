"""What of a model no file of weights holds: schedulers and picture processors, and where each part is to be had.

Sources: scheduler_config.json and preprocessor_config.json of the released folders; the files that ComfyUI's templates name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
_ZIMAGE = {"scheduler": {"scheduler_config.json": {**_FLOW, "shift": 3.0, "use_dynamic_shifting": False}}}
#: Family -> component -> file -> what it says.
SETTINGS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "flux2-klein": {
        "scheduler": {
            "scheduler_config.json": {
                **_FLOW,
                "use_dynamic_shifting": True,
                "time_shift_type": "exponential",
                "base_image_seq_len": 256,
                "base_shift": 0.5,
                "max_image_seq_len": 4096,
                "max_shift": 1.15,
                "shift": 3.0,
            }
        }
    },
    "zimage": _ZIMAGE,
    "zimage-v2": _ZIMAGE,
    "qwen-image": {
        "scheduler": {
            "scheduler_config.json": {
                **_FLOW,
                "use_dynamic_shifting": True,
                "time_shift_type": "exponential",
                "base_image_seq_len": 256,
                "base_shift": 0.5,
                "max_image_seq_len": 8192,
                "max_shift": 0.9,
                "shift": 1.0,
                "shift_terminal": 0.02,
            }
        },
        "processor": {
            "preprocessor_config.json": {
                "image_processor_type": "Qwen2VLImageProcessor",
                "min_pixels": 3136,
                "max_pixels": 12845056,
                "patch_size": 14,
                "temporal_patch_size": 2,
                "merge_size": 2,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
            }
        },
    },
    "wan": {
        "scheduler": {
            "scheduler_config.json": {
                "_class_name": "UniPCMultistepScheduler",
                "num_train_timesteps": 1000,
                "prediction_type": "flow_prediction",
                "use_flow_sigmas": True,
                "flow_shift": 5.0,
            }
        },
        "image_processor": {
            "preprocessor_config.json": {
                "image_processor_type": "CLIPImageProcessor",
                "crop_size": {"height": 224, "width": 224},
                "do_center_crop": True,
                "do_convert_rgb": True,
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": [0.48145466, 0.4578275, 0.40821073],
                "image_std": [0.26862954, 0.26130258, 0.27577711],
                "resample": 3,
                "rescale_factor": 1 / 255,
                "size": {"shortest_edge": 224},
            }
        },
    },
}

_REPACKED = "huggingface.co/Comfy-Org/"
_KLEIN = {
    "transformer": f"flux-2-klein-base-4b.safetensors of {_REPACKED}flux2-klein (models/diffusion_models)",
    "vae": f"flux2-vae.safetensors of {_REPACKED}flux2-dev (models/vae)",
    "text_encoder": f"qwen_3_4b.safetensors of {_REPACKED}flux2-klein, for the 9B qwen_3_8b (models/text_encoders)",
}
_Z = {
    "transformer": f"z_image_bf16.safetensors of {_REPACKED}z_image (models/diffusion_models)",
    "vae": f"ae.safetensors of {_REPACKED}z_image_turbo (models/vae)",
    "text_encoder": f"qwen_3_4b.safetensors of {_REPACKED}z_image_turbo (models/text_encoders)",
}
#: Family -> component -> the single file that ComfyUI users have of it.
FROM: Mapping[str, Mapping[str, str]] = {
    "flux2-klein": _KLEIN,
    "zimage": _Z,
    "zimage-v2": _Z,
    "qwen-image": {
        "transformer": f"qwen_image_bf16.safetensors of {_REPACKED}Qwen-Image_ComfyUI (models/diffusion_models)",
        "vae": f"qwen_image_vae.safetensors of {_REPACKED}Qwen-Image_ComfyUI (models/vae)",
        "text_encoder": f"qwen_2.5_vl_7b.safetensors of {_REPACKED}Qwen-Image_ComfyUI (models/text_encoders)",
    },
    "wan": {
        "transformer": f"a file of {_REPACKED}Wan_2.1_ComfyUI_repackaged or Wan_2.2_ComfyUI_Repackaged "
        "(models/diffusion_models)",
        "transformer_2": f"the low-noise file of {_REPACKED}Wan_2.2_ComfyUI_Repackaged (models/diffusion_models)",
        "vae": f"wan_2.1_vae.safetensors of {_REPACKED}Wan_2.1_ComfyUI_repackaged, for the 5B wan2.2_vae.safetensors of "
        f"{_REPACKED}Wan_2.2_ComfyUI_Repackaged (models/vae)",
        "text_encoder": f"umt5_xxl_fp16.safetensors of {_REPACKED}Wan_2.1_ComfyUI_repackaged (models/text_encoders)",
        "image_encoder": f"clip_vision_h.safetensors of {_REPACKED}Wan_2.1_ComfyUI_repackaged (models/clip_vision)",
        "tokenizer": "the folder google/umt5-xxl of huggingface.co/Wan-AI (tokenizer.json, tokenizer_config.json)",
    },
}
