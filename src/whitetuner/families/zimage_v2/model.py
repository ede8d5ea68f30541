"""Z-Image V2: from its own folder, or from one of V1, converted tensor by tensor while it loads."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from whitetuner.families import z_image_merge as merge
from whitetuner.families.files import read_config
from whitetuner.families.z_image_facts import V1_CLASS
from whitetuner.families.z_image_family import ZImageFamily
from whitetuner.families.z_image_keys import V1_KEYS
from whitetuner.families.zimage_v2.keys import KEYS
from whitetuner.families.zimage_v2.spec import SPEC, ZImageV2Options, layers_of
from whitetuner.families.zimage_v2.transformer import ZImageV2Transformer2DModel, v2_names
from whitetuner.family import BuildFn, Recast


class Model(ZImageFamily):
    """The Family of Z-Image V2."""

    spec = SPEC
    keys = KEYS
    options: ZImageV2Options

    def load(self, build: BuildFn) -> dict[str, nn.Module]:
        folder, layers = self.paths.component("transformer"), layers_of(self.options, self.paths)
        factors = self.merged()
        kind: type = ZImageV2Transformer2DModel
        if layers.converted:
            recast = Recast(
                reads=(V1_CLASS,),
                config={"n_double_layers": layers.double},
                targets=lambda name: v2_names(name, layers.double),
                additions=merge.additions(factors),
            )
        else:
            recast = Recast(additions=merge.additions(factors))
        if layers.converted or factors:
            kind = type(kind.__name__, (kind,), {"recast": recast})
        if factors:
            width = read_config(folder / "config.json").get("dim", 3840)
            merge.check_width(factors, width, str(self.options.merge_adapter))
        return {"transformer": build(kind, folder, keep_precise=SPEC.keep_precise)}

    def merged(self) -> Mapping[str, merge.Factors]:
        """An adapter of V1 goes to both streams."""
        if self._merged is None:
            double = layers_of(self.options, self.paths).double
            found = (
                {}
                if self.options.merge_adapter is None
                else merge.read_lora(self.options.merge_adapter, V1_KEYS)
            )
            self._merged = {
                target.removesuffix(".weight"): factors
                for path, factors in found.items()
                for target in v2_names(f"{path}.weight", double)
            }
        return self._merged
