"""LoRA's dropout on a CPU: the same distribution from a quarter of the random numbers.

torch draws one number for each element, and generating them shows in a training step. Here 64
random bits decide on four elements.
"""

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

_LEVELS = 2**16  # the probability is rounded to a multiple of 1 / 65536


class SixteenBitDropout(nn.Dropout):
    """``nn.Dropout`` by comparing 16 random bits an element; elsewhere than on a CPU, as ever.

    The factor on what is kept is that of the rounded probability, so the mean stays. The bits come
    from torch's own generator: seeds, saved states and checkpointing hold.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Drop elements of ``x``, of any shape and float dtype."""
        dropped = round(self.p * _LEVELS)
        if x.device.type != "cpu" or not self.training or dropped in (0, _LEVELS):
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        kept = words.view(torch.int16)[: x.numel()] >= dropped - _LEVELS // 2
        return x * kept.view(x.shape).to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


def quicken(model: nn.Module) -> None:
    """Exchange every ``nn.Dropout`` of LoRA layers in ``model``."""
    for module in list(model.modules()):
        if isinstance(module, LoraLayer):
            for name, dropout in module.lora_dropout.items():
                if type(dropout) is nn.Dropout:
                    module.lora_dropout[name] = SixteenBitDropout(dropout.p)
