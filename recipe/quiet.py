"""The libraries' chatter, kept off the screen; their errors stay."""

import logging
import os
import sys
import warnings

import torch


def quiet_libraries() -> None:
    """Call it before anything imports transformers or peft; it imports transformers itself."""
    # bitsandbytes looks for a package of faster kernels when it is imported, and warns.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 renames gradient_checkpointing to activation_checkpointing and warns even
    # of its own uses; 5.17 knows only the old name, which goes away in v6.
    warnings.filterwarnings("ignore", r".*checkpointing.* is deprecated", FutureWarning)
    # peft warns that PiSSA and OLoRA change the base; save_portable is what it asks for.
    warnings.filterwarnings("ignore", r"(PiSSA|OLoRA) changes the base weights", UserWarning)
    # accelerate imports DeepSpeed where it is installed, which warns where it finds no GPU, unless
    # it is told.
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # It finds its own accumulation of 1 beside the Trainer's, which is the one that counts.
    logging.getLogger("accelerate.accelerator").setLevel(logging.ERROR)
    # The head hands on what it is given, and nothing is done in place with it.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view", UserWarning)
    # DeepSpeed's and FSDP2's use of names that torch is about to change.
    warnings.filterwarnings("ignore", r".*(gather|scatter).* is deprecated", FutureWarning)
    # When it tries again it prints the address, which for uploads carries a signature that lets
    # anybody write there.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
