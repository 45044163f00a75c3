"""The Trainer where a process holds only its share: of the weights, or of the optimizer's states.

transformers would gather the whole base at each checkpoint under FSDP2, and DeepSpeed's own
checkpoints are pickles that only a full unpickler reads. Here a checkpoint holds the adapter whole,
in safetensors, and what each process keeps of the optimizer as plain tensors.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor

from recipe.model.lora import save_portable
from recipe.model.shards import adapter_parameters, local, set_whole, whole_adapter
from recipe.training.arguments import autocast_dtype
from recipe.training.checkpoints import ADAPTER
from recipe.training.engine import asked_engine, check_running
from recipe.training.trainer import TokenWeightedTrainer

_SCHEDULER = "scheduler.pt"


class ShardedTrainer(TokenWeightedTrainer):
    """For the engines ``fsdp2``, ``zero2`` and ``zero3``, started by accelerate."""

    def create_accelerator_and_postprocess(self) -> None:
        """The engines would cast the adapter, or the gradients that they add up, to 16 bits."""
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if self.is_deepspeed_enabled:
            for name in ("bf16", "fp16"):
                state.deepspeed_plugin.deepspeed_config.pop(name, None)
        else:
            state.fsdp_plugin.mixed_precision_policy = None

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        # The stock one reads the engines' own checkpoints.
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        dtype = autocast_dtype(self.args)
        if dtype is not None:  # as accelerate does it for one process and for DDP
            cast = torch.autocast(self.args.device.type, dtype)
            self.model.forward = convert_outputs_to_fp32(cast(self.model.forward))
        if resume_from_checkpoint is not None:
            self._load_states(Path(resume_from_checkpoint))
        return prepared

    def take_up(self, checkpoint: Path, *, best: Path | None) -> None:
        """The model in its place with the adapter of ``best``, or of ``checkpoint``, which stands
        behind the last step.
        """
        self._prepare_for_training(self.state.max_steps, self.get_train_dataloader(), None)
        self._load_adapter(best or checkpoint)
        check_running(self, asked_engine())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Gather the adapter, nothing else; the first process writes it."""
        state = whole_adapter(self.model)
        if self.args.should_save:
            save_portable(self.model, Path(output_dir or self.args.output_dir), None, state=state)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        optimizer = self._own_optimizer()
        states = [_plain(optimizer.state.get(part, {})) for part in self._parts()]
        groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
        file = Path(output_dir) / self._optimizer_file()
        torch.save({"states": states, "param_groups": groups}, file)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULER)

    def _load_best_model(self) -> None:
        self._load_adapter(Path(self.state.best_model_checkpoint))

    def _load_states(self, checkpoint: Path) -> None:
        self._load_adapter(checkpoint)
        file = checkpoint / self._optimizer_file()
        saved = torch.load(file, map_location="cpu", weights_only=True)
        optimizer = self._own_optimizer()
        for group, values in zip(optimizer.param_groups, saved["param_groups"], strict=True):
            group.update(values)
        # As in torch's own load_state_dict: fused code reads the count of steps where it computes.
        fused = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
        for part, states in zip(self._parts(), saved["states"], strict=True):
            optimizer.state[part] = _like(part, states, steps_too=fused)
        scheduler = torch.load(checkpoint / _SCHEDULER, weights_only=True)
        self.lr_scheduler.load_state_dict(scheduler)

    def _load_adapter(self, checkpoint: Path) -> None:
        saved = load_file(checkpoint / ADAPTER)
        for name, parameter in adapter_parameters(self.model).items():
            set_whole(parameter, saved[name])
        if self.is_deepspeed_enabled:
            self.deepspeed.optimizer.refresh_fp32_params()

    def _own_optimizer(self) -> torch.optim.Optimizer:
        """torch's, below accelerate's shell and DeepSpeed's."""
        shell = self.deepspeed.optimizer if self.is_deepspeed_enabled else self.optimizer
        own: torch.optim.Optimizer = shell.optimizer
        return own

    def _parts(self) -> list[torch.Tensor]:
        """What this process updates, in an order that is the same each time."""
        if not self.is_deepspeed_enabled:
            return [p for group in self._own_optimizer().param_groups for p in group["params"]]
        shell = self.deepspeed.optimizer
        if self.deepspeed.zero_optimization_stage() == 3:
            return list(shell.fp32_partitioned_groups_flat)
        return list(shell.single_partition_of_fp32_groups)

    def _optimizer_file(self) -> str:
        return f"optimizer_{self.args.process_index}.pt"

    def _rehearsed(self) -> Any:
        # DeepSpeed's engine would count what it is given, and what is passed back.
        return self.model if self.is_deepspeed_enabled else super()._rehearsed()

    def _backward(self, loss: torch.Tensor) -> None:
        if not self.is_deepspeed_enabled:
            super()._backward(loss)
            return
        trained = [p for p in self.model.parameters() if p.requires_grad]
        torch.autograd.grad(loss, trained)  # nothing accumulates


def _plain(states: dict[str, Any]) -> dict[str, Any]:
    """The same with this process's part of each tensor."""
    return {
        name: local(value) if isinstance(value, torch.Tensor) else value
        for name, value in states.items()
    }


def _like(part: torch.Tensor, states: dict[str, Any], *, steps_too: bool) -> dict[str, Any]:
    """Saved states of ``part`` as its optimizer keeps them: where it does, and cut as it is."""
    own = local(part)
    found = dict(states)
    for name, value in states.items():
        if not isinstance(value, torch.Tensor):
            continue
        if value.dim() and value.shape == own.shape:
            found[name] = _cut(part, value.to(own.device))
        elif steps_too:
            found[name] = value.to(own.device)
    return found


def _cut(part: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    if not isinstance(part, DTensor):
        return value
    return DTensor.from_local(
        value,
        part.device_mesh,
        part.placements,
        run_check=False,
        shape=part.shape,
        stride=part.stride(),
    )
