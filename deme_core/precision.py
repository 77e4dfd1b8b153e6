"""What torch calls the precisions that a recipe names."""

import torch

from deme_core.recipe import Precision

DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
