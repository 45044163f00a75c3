"""The libraries' chatter, kept off the screen; their errors stay."""

import logging
import sys
import warnings


def quiet_libraries() -> None:
    """Call it before anything imports transformers or peft; it imports transformers itself."""
    # bitsandbytes looks for a package of faster kernels when it is imported, and warns.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # transformers 5.23 renames gradient_checkpointing to activation_checkpointing and warns even
    # of its own uses; 5.17 knows only the old name, which goes away in v6.
    warnings.filterwarnings("ignore", r".*checkpointing.* is deprecated", FutureWarning)
    # peft warns that PiSSA and OLoRA change the base; save_portable is what it asks for.
    warnings.filterwarnings("ignore", r"(PiSSA|OLoRA) changes the base weights", UserWarning)
    # DeepSpeed, which accelerate imports where it is installed, says that it finds no GPU, and
    # without this reports it found on each step.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
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
