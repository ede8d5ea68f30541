"""Z-Image: the released denoiser, as it is; or with an adapter merged into it while it loads."""

from __future__ import annotations

from diffusers import ZImageTransformer2DModel
from torch import nn

from whitetuner.families import z_image_merge as merge
from whitetuner.families.files import read_config
from whitetuner.families.z_image_family import ZImageFamily
from whitetuner.families.zimage.keys import KEYS
from whitetuner.families.zimage.spec import SPEC
from whitetuner.family import BuildFn, Recast


class Model(ZImageFamily):
    """The Family of Z-Image."""

    spec = SPEC
    keys = KEYS

    def load(self, build: BuildFn) -> dict[str, nn.Module]:
        folder, factors = self.paths.component("transformer"), self.merged()
        kind: type = ZImageTransformer2DModel
        if factors:
            width = read_config(folder / "config.json").get("dim", 3840)
            merge.check_width(factors, width, str(self.options.merge_adapter))
            kind = type(kind.__name__, (kind,), {"recast": Recast(additions=merge.additions(factors))})
        return {"transformer": build(kind, folder, keep_precise=SPEC.keep_precise)}
