"""bitsandbytes layers as they must be to be trained and evaluated in turns."""

from torch import nn


def keep_layout(model: nn.Module) -> None:
    """Leave 4-bit weights as they were stored, on every processor.

    On a CPU with AVX512-BF16 bitsandbytes 0.50 repacks them at the first forward pass that wants
    no gradient, such as an evaluation before training. The repacked kernel computes in bfloat16
    whatever ``bnb_4bit_compute_dtype`` says, and has no backward: every gradient below it is
    silently zero.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010
