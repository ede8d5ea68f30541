"""Runs another trainer's checkout by its own program, in a process and a Python of its own; started by peers.py.

    python -m benchmarks.learning.peers_inside ONETRAINER|MUSUBI|AITOOLKIT CHECKOUT told.json

Only sizes, paths and settings are given; what a trainer does with them is its own. Nothing of White Tuner is imported here.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

STANDINS = Path(__file__).parent / "standins"
Told = dict[str, Any]


def onetrainer(checkout: Path, told: Told) -> None:
    """An epoch is one batch, half of each set, so that captions are dropped anew at each step."""
    os.chdir(checkout)  # it looks for its own modules in the working directory
    sys.path.insert(0, str(checkout))
    from modules.util import create
    from modules.util.callbacks.TrainCallbacks import TrainCallbacks
    from modules.util.commands.TrainCommands import TrainCommands
    from modules.util.config.TrainConfig import TrainConfig

    out, plain = Path(told["out"]), "FLOAT_32"
    part = {"weight_dtype": plain, "gradient_checkpointing": False}
    never = {f"{what}_after_unit": "NEVER" for what in ("sample", "backup")}
    config = TrainConfig.default_values()
    values = {
        "training_method": "LORA",
        "model_type": "FLUX_2",
        "base_model_name": told["model"],
        "workspace_dir": str(out / "workspace"),
        "cache_dir": str(out / "cache"),
        "offline_mode": True,
        "tensorboard": False,
        "include_train_config": "NONE",
        "output_dtype": plain,
        "output_model_format": "DIFFUSERS_LORA",
        "output_model_destination": told["adapter"],
        "concepts": [_concept(folder, told) for folder in told["data"]],
        "latent_caching": False,
        "aspect_ratio_bucketing": False,
        "resolution": "64",
        "learning_rate": told["lr"],
        "learning_rate_scheduler": "LINEAR",
        "learning_rate_warmup_steps": told["warmup"],
        "learning_rate_min_factor": 0.0,
        "epochs": told["steps"],
        "batch_size": told["batch"],
        "ema": "OFF",
        "dataloader_threads": 1,
        "train_device": "cpu",
        "temp_device": "cpu",
        "train_dtype": plain,
        "fallback_train_dtype": plain,
        "timestep_distribution": "LOGIT_NORMAL",
        "noising_weight": told["noise_scale"] - 1,
        "noising_bias": told["noise_mean"],
        "timestep_shift": 1.0,
        "clip_grad_norm": told["max_grad_norm"],
        "transformer": part,
        "text_encoder": {**part, "train": False},
        "vae": part,
        "text_encoder_sequence_length": told["tokens"],
        "layer_filter": ",".join(f"^{re.escape(layer)}$" for layer in told["layers"]),
        "layer_filter_preset": "custom",
        "layer_filter_regex": True,
        "lora_rank": told["rank"],
        "lora_alpha": float(told["rank"]),
        "lora_weight_dtype": plain,
        "optimizer": {
            "optimizer": "ADAMW",
            "beta1": told["betas"][0],
            "beta2": told["betas"][1],
            "eps": told["eps"],
            "weight_decay": told["weight_decay"],
            "stochastic_rounding": False,
        },
        "samples": [],
        "backup_before_save": False,
        **never,
    }
    config.from_dict(values, migrate=False)
    torch.manual_seed(told["seed"])  # of the layers' start
    trainer = create.create_trainer(config, TrainCallbacks(), TrainCommands())
    trainer.start()
    trainer.train()
    trainer.end()


def _concept(folder: str, told: Told) -> dict[str, Any]:
    """The whole caption is one tag."""
    return {
        "name": Path(folder).name,
        "path": folder,
        "seed": 1,
        "enabled": True,
        "type": "STANDARD",
        "balancing": told["batch"] // len(told["data"]),
        "balancing_strategy": "SAMPLES",
        "image": {"enable_crop_jitter": False},
        "text": {
            "prompt_source": "sample",
            "tag_delimiter": "\n",
            "keep_tags_count": 0,
            "tag_dropout_enable": True,
            "tag_dropout_mode": "FULL",
            "tag_dropout_probability": told["caption_dropout"],
        },
    }


def musubi(checkout: Path, told: Told) -> None:
    """Its noise level is 1 - u of a logit-normal u, as that of diffusers' script."""
    sys.path.insert(0, str(checkout / "src"))
    from musubi_tuner import flux_2_train_network as program
    from musubi_tuner.flux_2 import flux2_models, flux2_utils

    version, out = "klein-base-4b", Path(told["out"])
    known = flux2_utils.FLUX2_MODEL_INFO
    known[version] = dataclasses.replace(known[version], params=flux2_models.Flux2Params(**told["params"]))
    (out / "data.toml").write_text(
        f'[general]\nresolution = [64, 64]\ncaption_extension = ".txt"\nbatch_size = {told["batch"]}\nenable_bucket = false\n'
        f"[[datasets]]\nimage_directory = {json.dumps(told['data'][0])}\ncache_directory = {json.dumps(str(out / 'cache'))}\n",
        encoding="utf-8",
    )
    betas = ",".join(map(str, told["betas"]))
    given = {
        "model_version": version,
        "dit": out / "dit.safetensors",
        "dataset_config": out / "data.toml",
        "output_dir": out,
        "output_name": Path(told["adapter"]).stem,
        "network_module": "networks.lora_flux_2",
        "network_dim": told["rank"],
        "network_alpha": told["rank"],
        "mixed_precision": "no",
        "save_precision": "float",
        "timestep_sampling": "sigma",
        "weighting_scheme": "logit_normal",
        "logit_mean": -told["noise_mean"],
        "logit_std": told["noise_scale"],
        "discrete_flow_shift": 1.0,
        "optimizer_type": "AdamW",
        "learning_rate": told["lr"],
        "lr_scheduler": "linear",
        "lr_warmup_steps": told["warmup"],
        "max_train_steps": told["steps"],
        "max_grad_norm": told["max_grad_norm"],
        "max_data_loader_n_workers": 0,
        "seed": told["seed"],
    }
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    optimizer = [f"betas=({betas})", f"weight_decay={told['weight_decay']}", f"eps={told['eps']}"]
    parser = program.flux2_setup_parser(program.setup_parser_common())
    args = parser.parse_args([*words, "--sdpa", "--optimizer_args", *optimizer])
    args.dit_dtype = "float32"  # as the others; its own default is bf16
    program.Flux2NetworkTrainer().train(args)


class Encoder(nn.Module):
    """Our VAE in the place of ai-toolkit's class for the released one: latents as that gives them. It only encodes.

    Its loader makes it of meta tensors and gives it a state: ours is there from then on.
    """

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.folder = folder

    def load_state_dict(self, state: Any, *given: Any, **named: Any) -> None:
        from diffusers import AutoencoderKLFlux2

        self.vae = AutoencoderKLFlux2.from_pretrained(self.folder)

    @property
    def device(self) -> torch.device:
        return self.vae.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vae.dtype

    def encode(self, pixels: Tensor) -> Tensor:
        from diffusers import Flux2KleinPipeline

        latents = Flux2KleinPipeline._patchify_latents(self.vae.encode(pixels).latent_dist.mode())
        norm = self.vae.bn
        mean, variance = (one.view(1, -1, 1, 1) for one in (norm.running_mean, norm.running_var))
        return (latents - mean) / (variance + self.vae.config.batch_norm_eps).sqrt()


def aitoolkit(checkout: Path, told: Told) -> None:
    """Of its many models only FLUX.2 is imported; it is loaded by its own method, from our files and of our sizes."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    os.chdir(checkout)
    sys.path.insert(0, str(checkout))
    for name in ("torchaudio", "torchvision.utils", "torchvision.models"):
        if importlib.util.find_spec(name) is None:
            sys.modules[name] = types.ModuleType(name)  # named, never used here
    models = types.ModuleType("extensions_built_in.diffusion_models")
    models.__path__ = [str(checkout / "extensions_built_in/diffusion_models")]
    sys.modules[models.__name__] = models
    from extensions_built_in.diffusion_models.flux2 import flux2_klein_model, flux2_model
    from extensions_built_in.sd_trainer.SDTrainer import SDTrainer
    from safetensors.torch import save_file
    from toolkit.job import get_job
    from toolkit.prompt_utils import PromptEmbeds

    out = Path(told["out"])
    # its loader looks at one tensor of a VAE's file
    save_file({"decoder.up.0.block.0.conv1.bias": torch.zeros(1)}, out / "ae.safetensors")

    class Klein(flux2_klein_model.Flux2Klein4BModel):  # type: ignore[misc]
        flux2_klein_te_path = str(out / "words")

        def get_flux2_params(self) -> Any:
            return flux2_model.Flux2Params(**told["params"])

        def get_prompt_embeds(self, prompt: str) -> Any:
            words = self.pipeline.encode_prompt(
                prompt, device=self.device_torch, max_sequence_length=told["tokens"]
            )
            return PromptEmbeds(words[0])

    flux2_model.AutoEncoder = lambda params: Encoder(f"{told['model']}/vae")
    process = importlib.import_module("jobs.process.BaseSDTrainProcess")
    process.get_model_class = lambda config: Klein  # type: ignore[attr-defined]
    jobs = importlib.import_module("jobs.ExtensionJob")
    jobs.get_all_extensions_process_dict = lambda: {"sd_trainer": SDTrainer}  # type: ignore[attr-defined]
    name = Path(told["adapter"]).stem
    job = get_job({"job": "extension", "config": {"name": name, "process": [_process(out, told)]}})
    job.run()
    job.cleanup()
    (out / name / f"{name}.safetensors").replace(told["adapter"])


def _process(out: Path, told: Told) -> dict[str, Any]:
    """One of its processes, in the words of its examples."""
    return {
        "type": "sd_trainer",
        "training_folder": str(out),
        "training_seed": told["seed"],
        "device": "cpu",
        "network": {"type": "lora", "linear": told["rank"], "linear_alpha": told["rank"]},
        "save": {"dtype": "float32", "save_every": told["steps"] + 1},
        "datasets": [
            {
                "folder_path": str(out / "pictures"),
                "caption_ext": "txt",
                "caption_dropout_rate": told["caption_dropout"],
                "resolution": 64,
                "num_workers": 0,
            }
        ],
        "train": {
            "batch_size": told["batch"],
            "steps": told["steps"],
            "train_unet": True,
            "train_text_encoder": False,
            "gradient_checkpointing": False,
            "noise_scheduler": "flowmatch",
            "timestep_type": "sigmoid",
            "optimizer": "adamw",
            "optimizer_params": {"betas": told["betas"], "weight_decay": told["weight_decay"]},
            "lr": told["lr"],
            "lr_scheduler": "linear",
            "lr_scheduler_params": {"start_factor": 1.0, "end_factor": 0.0},
            "max_grad_norm": told["max_grad_norm"],
            "disable_sampling": True,
            "dtype": "fp32",
        },
        "model": {"name_or_path": str(out), "arch": "flux2_klein_4b", "dtype": "fp32"},
    }


def main() -> None:
    word, checkout, file = sys.argv[1:]
    torch.set_num_threads(1)
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # remembered from here on: the stand-in is for the checkout alone
    sys.path.append(str(STANDINS))
    told = json.loads(Path(file).read_text(encoding="utf-8"))
    {"ONETRAINER": onetrainer, "MUSUBI": musubi, "AITOOLKIT": aitoolkit}[word](Path(checkout).resolve(), told)


if __name__ == "__main__":
    main()
