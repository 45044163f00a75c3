"""What two real processes do together, one mode after the other; test_collective.py starts them.

    torchrun --standalone --nproc_per_node 2 tests/training/several.py FOLDER MODE...

What a mode returns stands in FOLDER, as ``MODE-RANK.json``.
"""

import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import get_total_norm
from transformers import LlamaConfig, LlamaForCausalLM

from recipe.exit_codes import run_command
from recipe.model.shards import (
    adapter_parameters,
    is_sharded,
    local,
    saved_state,
    set_whole,
    whole,
    whole_adapter,
)
from recipe.settings import RunFailed, UserError
from recipe.training import collective
from recipe.training.collective import (
    check_all_alike,
    check_all_answer,
    check_seen_by_all,
    leave,
    of_first,
    own_log,
    told_once,
)
from recipe.training.engine import Engine
from recipe.training.finite import FiniteSteps, _broken
from recipe.training.loss import TokenLoss
from recipe.training.meeting import explained
from recipe.training.run_log import RunLog

CPU = torch.device("cpu")


def first():
    return dist.get_rank() == 0


def answer(folder):
    check_all_answer(CPU)
    return "answered"


def late(folder):
    if not first():
        time.sleep(60)
    check_all_answer(CPU)


def seen(folder):
    check_seen_by_all(folder)
    dist.barrier()
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def blind(folder, content=""):
    """The same path on both, and another disk under it for the second."""
    run = folder / "run"
    if first():
        run.mkdir()
        if content:
            (run / content).touch()
    else:
        collective._appears = lambda mark: False
    check_seen_by_all(run)


def blind_and_full(folder):
    with pytest.raises(UserError, match="is not seen by rank 1"):
        blind(folder, "settings.yaml")
    dist.barrier()  # the first one has cleared up
    return sorted(path.name for path in (folder / "run").iterdir())


def alike(folder):
    check_all_alike({"training.seed": 0, "data.path": "rows.json"})
    with pytest.raises(UserError) as raised:
        check_all_alike({"training.seed": dist.get_rank(), "data.path": "rows.json"})
    return str(raised.value).split("\n")


def from_the_first(folder):
    asked = []

    def compute(value):
        asked.append(value)
        return {"value": value, "rank": dist.get_rank()}

    return [of_first(compute, f"of rank {dist.get_rank()}"), len(asked)]


def logs(folder):
    """Each process says something before, within and behind."""
    rank = dist.get_rank()
    for where in ("before", "within", "behind"):
        if where == "within":
            with own_log(folder):
                print(f"rank {rank} prints {where}")
                os.write(2, f"rank {rank} writes {where}\n".encode())
                subprocess.run(["echo", f"rank {rank} calls {where}"], check=True)
        else:
            print(f"rank {rank} prints {where}", flush=True)


def both_tell(folder):
    """The second needs 5 s more on its way out, when the launcher is already ending it."""
    try:
        with told_once(), own_log(folder):
            raise RunFailed("the disk is full.")
    finally:
        time.sleep(5 * dist.get_rank())


def one_tells(folder):
    with told_once(), own_log(folder):
        if not first():
            raise RunFailed("the disk is full.")
        time.sleep(60)


def leaves(folder):
    """From within its own log, as the thread of the heartbeat does."""
    with own_log(folder):
        if not first():
            leave("nothing moves.")
        time.sleep(60)


def tiny(rank):
    """A model with an adapter that has been trained, the same in each process."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=1,
    )
    model = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(task_type="CAUSAL_LM", r=rank, target_modules=["q_proj", "k_proj", "v_proj"]),
    )
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    return model


def cut(model):
    """The same as FSDP2 has it, a layer at a time."""
    made, mesh = copy.deepcopy(model), init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in made.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(made, mesh=mesh)


def same(found, expected):
    """Whether two mappings have the same names, in order, and the same values."""
    return list(found) == list(expected) and all(
        map(torch.equal, found.values(), expected.values())
    )


def numbers(tensors):
    return sum(tensor.numel() for tensor in tensors)


def put_together(parameter):
    """The parts of all processes, behind one another."""
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, local(parameter))
    return torch.cat(parts)


def shards(folder):
    """Of an odd rank, and of one whose matrix the second process holds nothing of."""
    return {str(rank): {n: bool(ok) for n, ok in of_shards(rank)} for rank in (3, 1)}


def of_shards(rank):
    plain = tiny(rank)
    sharded, names = cut(plain), dict(plain.named_parameters())
    held = dict(sharded.named_parameters())
    yield "all are cut", all(map(is_sharded, held.values()))
    yield "less than all", numbers(map(local, held.values())) < numbers(plain.parameters())
    yield "parts", same({n: put_together(p) for n, p in held.items()}, names)
    with whole([*held.values(), None]) as values:
        yield "none stays none", values[-1] is None
        yield "whole", same(dict(zip(held, values[:-1], strict=True)), names)
    state = whole_adapter(sharded)
    yield "no copy of what is whole", whole_adapter(plain) is None
    yield "whole adapter", same(state, {n: p for n, p in names.items() if "lora_" in n})
    yield "saved", same(saved_state(sharded, state), get_peft_model_state_dict(plain))
    yield "saved when whole", same(saved_state(plain), get_peft_model_state_dict(plain))
    asked = adapter_parameters(sharded)
    yield "the model's own", {*map(id, asked.values())} <= {*map(id, held.values())}
    for number, (name, parameter) in enumerate(asked.items()):
        set_whole(parameter, saved_state(plain)[name] + number)
    changed = saved_state(sharded, whole_adapter(sharded))
    expected = saved_state(plain)
    yield "set", same(changed, {n: v + i for i, (n, v) in enumerate(expected.items())})


def finite(folder):
    """The norm of an adapter in parts, and who is named when one process alone holds a NaN."""
    plain = tiny(3)
    model = cut(plain)
    loss = TokenLoss()
    looks = FiniteSteps(model, loss, RunLog(loss, peak_memory=dict), engine=Engine("fsdp2"))
    state = SimpleNamespace(global_step=1, is_world_process_zero=first())
    args = SimpleNamespace(learning_rate=0.1)
    looks.on_train_begin(args, state, None)
    looks.micro_batches = [[dist.get_rank()]]
    looks.on_step_end(args, state, None)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = _broken(trained)
    expected = float(get_total_norm([p.detach() for p in plain.parameters() if p.requires_grad]))
    close = math.isclose(looks._adapter_norm(), expected, rel_tol=1e-6)
    name = next(n for n in trained if "1.self_attn.k_proj.lora_B" in n)
    if not first():
        local(trained[name])[-1, -1] = math.nan
    said = ""
    try:
        looks.on_step_end(args, state, None)
    except RunFailed as error:
        said = str(error)
    return {"close": close, "before": before, "broken": _broken(trained), "said": said}


MODES = {
    one.__name__.replace("_", "-"): one
    for one in (
        *(answer, late, seen, blind, blind_and_full, alike, from_the_first, logs),
        *(both_tell, one_tells, leaves, shards, finite),
    )
}


def main():
    folder, *modes = sys.argv[1:]
    dist.init_process_group("gloo")
    try:
        for mode in modes:
            own = Path(folder) / mode
            own.mkdir(exist_ok=True)
            dist.barrier()
            result = MODES[mode](own)
            (Path(folder) / f"{mode}-{dist.get_rank()}.json").write_text(json.dumps(result))
    except Exception as error:  # as in recipe/train.py
        raise explained(error) from error
    dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(run_command(main))
