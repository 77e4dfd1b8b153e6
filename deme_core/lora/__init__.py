"""LoRA experts (Hu et al. 2021, arXiv 2106.09685): copies that differ from theta_0 by a product B A in some layers.

- `attach_lora` gives a denoiser such layers, by peft, and freezes all else; with them switched off it is theta_0, which
  `LoraTeacher` uses.
- `LoraFactors` are the two matrices of one layer, in a file as diffusers' ``save_lora_weights`` writes it.
- `LoraExpert` is the whole model that an adapter makes of theta_0, tensor by tensor: what merges and searches read.
- `LoraEnsemble` denoises with several adapters on one model.
- `sum_adapters` and `truncate` make one adapter of several.
"""

from deme_core.lora.attach import attach_lora, is_lora, trained_factors
from deme_core.lora.ensemble import LoraEnsemble
from deme_core.lora.expert import LoraExpert
from deme_core.lora.factors import LORA_NAME, LoraFactors, read_factors, write_factors
from deme_core.lora.summed import TruncatedAdapter, sum_adapters, truncate, truncate_difference
from deme_core.lora.teacher import LoraTeacher

__all__ = [
    "LORA_NAME",
    "LoraEnsemble",
    "LoraExpert",
    "LoraFactors",
    "LoraTeacher",
    "TruncatedAdapter",
    "attach_lora",
    "is_lora",
    "read_factors",
    "sum_adapters",
    "trained_factors",
    "truncate",
    "truncate_difference",
    "write_factors",
]
