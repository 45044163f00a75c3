"""Models small enough that every answer can be written down, and slow references."""

import functools
import itertools
import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList

from recipe.decoding.steps import Steps
from recipe.decoding.stopping import Interruption, Stop

EOS = 0


class Letters:
    """A tokenizer of sorts: token 1 is "b", 2 is "c"…; the EOS is no text."""

    eos_token_id = EOS

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(ord("a") + i) for i in ids if i != EOS)


@functools.cache
def toy(vocabulary=5, seed=0, spread=0.6):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


def stop(max_new_tokens, stop_strings=()):
    return Stop(
        Letters(), eos_token_ids=[EOS], stop_strings=stop_strings, max_new_tokens=max_new_tokens
    )


def steps(model, prompt, **named):
    return Steps(model, torch.tensor([prompt]), None, **named)


def parts(model, prompt, max_new_tokens, **named):
    """The arguments that every search begins with."""
    return (
        steps(model, prompt, **named),
        LogitsProcessorList(),
        stop(max_new_tokens),
        Interruption(),
    )


def log_probabilities(model, ids):
    """Of the token that follows ``ids``, computed from nothing."""
    return _log_probabilities(model, tuple(ids))


@functools.cache
@torch.no_grad()
def _log_probabilities(model, ids):
    return model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)


def every_answer(model, prompt, length):
    """All answers of at most ``length`` tokens that end at the EOS or at that length."""
    vocabulary = model.config.vocab_size
    for size in range(1, length + 1):
        for body in itertools.product(range(1, vocabulary), repeat=size - 1):
            for last in range(vocabulary) if size == length else (EOS,):
                answer = [*body, last]
                score = sum(
                    float(log_probabilities(model, [*prompt, *answer[:at]])[token])
                    for at, token in enumerate(answer)
                )
                yield answer, score


def best_answer(model, prompt, length, *, length_penalty=1.0, allowed=lambda answer: True):
    scored = (
        (score / len(answer) ** length_penalty, answer)
        for answer, score in every_answer(model, prompt, length)
        if allowed(answer)
    )
    return max(scored, default=(-math.inf, []))


def contains(answer, phrase):
    return any(answer[i : i + len(phrase)] == list(phrase) for i in range(len(answer)))
