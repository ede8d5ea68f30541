"""Runs in a process of its own: a small VAE of ComfyUI's class for WAN 2.2 5B, its file, and what it makes of a clip.

python vae_in_comfyui.py COMFYUI_DIR FOLDER: writes vae.safetensors and answers.safetensors (clip, latent, drawn) there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from in_comfyui import prepare


def main(comfyui: str, folder: Path) -> None:
    prepare(comfyui)
    import torch
    from comfy.ldm.wan.vae2_2 import WanVAE
    from safetensors.torch import save_file

    torch.manual_seed(0)
    vae = WanVAE(dim=8, dec_dim=12, z_dim=48, temperal_downsample=[False, True, True]).float().eval()
    for parameter in vae.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    clip = torch.randn(1, 3, 5, 32, 64)
    with torch.no_grad():
        latent = vae.encode(clip)
        drawn = vae.decode(latent)
    save_file(
        {name: tensor.contiguous() for name, tensor in vae.state_dict().items()}, folder / "vae.safetensors"
    )
    answers = {"clip": clip, "latent": latent, "drawn": drawn}
    save_file({name: tensor.contiguous() for name, tensor in answers.items()}, folder / "answers.safetensors")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
