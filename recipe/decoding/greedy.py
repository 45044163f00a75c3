"""Greedy decoding of one prompt, shown as it comes."""

from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, TextStreamer

from recipe.data.templates import Template
from recipe.settings import UserError


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompt: str,
    context: str = "",
    *,
    max_new_tokens: int,
    stream: bool,
) -> tuple[str, str]:
    """Return the greedy answer to ``prompt`` and why it ended: ``eos`` or ``length``.

    Args:
        context: the row's ``input``, which the template sets apart from the instruction.
        stream: print each word as soon as it is known.

    Raises:
        UserError: the prompt leaves no room in the model's context.
    """
    text = template.prompt(prompt, context)
    encoded = tokenizer(
        text, add_special_tokens=template.add_special_tokens, return_tensors="pt"
    ).to(model.device)
    used, limit = encoded["input_ids"].shape[1], model.config.max_position_embeddings
    if used + max_new_tokens > limit:
        raise UserError.single(
            "prompt",
            f"{used} tokens and {max_new_tokens} new ones do not fit into the model's context of "
            f"{limit}. Shorten the prompt, or lower --max-new-tokens.",
        )
    eos = tokenizer.eos_token_id
    # A config of our own: the checkpoint's may sample, penalise or search beams, and generate fills
    # whatever is not set from the one that the model holds.
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=eos, pad_token_id=eos
    )
    model.generation_config = config
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with torch.inference_mode():
        ids = model.generate(
            **encoded, generation_config=config, streamer=streamer if stream else None
        )[0, used:]
    reason = "eos" if ids[-1] == eos else "length"
    return tokenizer.decode(ids, skip_special_tokens=True), reason
