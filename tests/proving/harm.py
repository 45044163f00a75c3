"""Bugs to plant, each by the claim that it breaks and by no other."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer

import recipe.answerer
import recipe.finetune
import recipe.keeping
import recipe.run_data
from recipe.model import cpu_attention
from recipe.proving import gradients, texts, trained
from recipe.training import arguments, build, head
from recipe.training.flow import FrozenInputs
from recipe.training.trainer import TokenWeightedTrainer

Bug = Callable[[], object]


def _instead(owner: object, name: str, harmed: Callable[..., object]) -> Bug:
    """``harmed`` gets what stood there as its first argument."""
    own = getattr(owner, name)

    def call(*args, **named):
        return harmed(own, *args, **named)

    return lambda: mock.patch.object(owner, name, call)


def mean_of_means(own, self, *args, num_items_in_batch=None, **named):
    return own(self, *args, **named) / self.current_gradient_accumulation_steps


def one_row_of_all(own, *args, row_lengths=None, openings=None, **named):
    if row_lengths is None:
        return own(*args, **named)
    return own(*args, row_lengths=[sum(row_lengths)], **named)


def double_positions(own, *args, **named):
    batch = own(*args, **named)
    return {**batch, "position_ids": 2 * batch["position_ids"]}


def late_openings(own, lengths, openings, device):
    places, of_own, borders = own(lengths, openings, device)
    if places is not None:
        of_opening = torch.ones_like(places, dtype=torch.bool).index_fill(0, of_own, False)
        places = torch.where(of_opening, places + 1, places)
    return places, of_own, borders


def last_chunk_without_gradient(own, self, output, labels):
    if self.chunked:
        rows, _ = self._chunk(len(self._frozen.weight), output)
        last = (len(labels) - 1) // rows * rows
        if last:
            output = torch.cat([output[:last], output[last:].detach()])
    return own(self, output, labels)


def reentrant(own, asked):
    asked["gradient_checkpointing_kwargs"] = {"use_reentrant": True}


def half_a_gradient_when_recomputed(own, self, *args, **named):
    loss = own(self, *args, **named)
    return loss / 2 if self.args.gradient_checkpointing else loss


def one_module_frozen(own, *args, **named):
    model = own(*args, **named)
    for name, parameter in model.named_parameters():
        if "layers.1.self_attn.v_proj.lora_" in name:
            parameter.requires_grad_(False)
    return model


@contextmanager
def base_changed() -> Iterator[None]:
    """The embedding of a token that no row and no probe holds."""

    def on_train_end(self, args, state, control, model=None, **_):
        with torch.no_grad():
            model.get_input_embeddings().weight[0] += 1

    with mock.patch.object(FrozenInputs, "on_train_end", on_train_end):
        yield


def _with_mask(change):
    def harmed(own, *args, **named):
        rows, cache = own(*args, **named)
        return [replace(row, trained=change(row.trained.copy())) for row in rows], cache

    return harmed


def _no_eos(mask):
    mask[-1] = False
    return mask


def _shifted(mask):
    return np.concatenate([[False], mask[:-1]])


def _prompt_too(mask):
    mask[1:] = True
    return mask


def adapter_spoiled(own, model, folder, *args, **named):
    own(model, folder, *args, **named)
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name] *= 1.01
    save_file(tensors, file, metadata={"format": "pt"})


def nothing(own, *args, **named):
    return None


BUGS: dict[str, tuple[str, Bug]] = {
    "loss averages the means of micro-batches": (
        gradients.ACCUMULATION,
        _instead(TokenWeightedTrainer, "compute_loss", mean_of_means),
    ),
    "rows see each other": (
        gradients.FLATTENED,
        _instead(cpu_attention._Attention, "forward", one_row_of_all),
    ),
    "positions count by two": (
        gradients.FLATTENED,
        _instead(build, "flatten", double_positions),
    ),
    "openings are taken over from a token later": (
        gradients.OPENINGS,
        _instead(cpu_attention, "places_of_rows", late_openings),
    ),
    "the last chunk has no gradient": (
        gradients.CHUNKED,
        _instead(head.OutputHead, "nll", last_chunk_without_gradient),
    ),
    "checkpointing is reentrant": (
        gradients.CHECKPOINTING,
        _instead(arguments, "_use_non_reentrant", reentrant),
    ),
    "checkpointing halves the gradient": (
        gradients.CHECKPOINTING,
        _instead(TokenWeightedTrainer, "compute_loss", half_a_gradient_when_recomputed),
    ),
    "one module is frozen": (
        gradients.EVERY_TENSOR,
        _instead(recipe.finetune, "add_lora", one_module_frozen),
    ),
    "a callback changes the base": (trained.BASE, base_changed),
    "EOS is not trained": (
        texts.MASK,
        _instead(recipe.run_data, "cached_rows", _with_mask(_no_eos)),
    ),
    "the mask is shifted by one": (
        texts.MASK,
        _instead(recipe.run_data, "cached_rows", _with_mask(_shifted)),
    ),
    "the prompt is trained": (
        texts.MASK,
        _instead(recipe.run_data, "cached_rows", _with_mask(_prompt_too)),
    ),
    "another tensor is saved": (
        trained.RELOADED,
        _instead(recipe.keeping, "save_adapter", adapter_spoiled),
    ),
    "random states are not restored": (
        trained.RESUMED,
        _instead(Trainer, "_load_rng_state", nothing),
    ),
    "optimizer and schedule are not restored": (
        trained.RESUMED,
        _instead(Trainer, "_load_optimizer_and_scheduler", nothing),
    ),
    "the seed is not set": (trained.SAME_SEED, _instead(recipe.finetune, "set_seed", nothing)),
    "generation writes a space more": (
        texts.PROMPT,
        _instead(recipe.answerer, "prompt_text", lambda own, *a, **k: own(*a, **k) + " "),
    ),
    "generation leaves out the last newline": (
        texts.PROMPT,
        _instead(recipe.answerer, "prompt_text", lambda own, *a, **k: own(*a, **k).rstrip("\n")),
    ),
}
