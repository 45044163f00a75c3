"""transformers' Trainer with two things changed: evaluation is weighted by tokens, and a step that
is not finite ends the run.

The stock evaluation averages the means of its batches, so eval_loss and the perplexity from it
change with per_device_eval_batch_size. The stock training goes on with NaN, and saves it.
"""

import atexit
import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import EvalLoopOutput, rotate_checkpoints

from recipe.data.batch import flatten, largest_batch
from recipe.data.tokens import TokenizedRow
from recipe.sealed import whole_folder
from recipe.training.checkpoints import LOG_STATE, checkpoints
from recipe.training.faults import how_to_continue, out_of_memory
from recipe.training.finite import FiniteSteps, NotFinite, in_words
from recipe.training.head import OutputHead
from recipe.training.loss import count_trained, distributed, sum_over_processes
from recipe.training.order import deal_evenly, evaluated_batches, micro_batches
from recipe.training.run_log import RunLog
from recipe.training.signals import kill_workers, quiet_worker

_UNCHANGED = 1e-6  # relative; float32 rounds at 1e-7


class TokenWeightedTrainer(Trainer):
    """Each process evaluates its own share of the rows once; sums are added, then divided."""

    def __init__(self, *, finite: FiniteSteps, log: RunLog, head: OutputHead, **named: Any) -> None:
        super().__init__(**named)
        self._finite = finite
        self._log = log
        self._head = head
        # Rows, by their index, whether they are evaluated, and the step before → what to do.
        self.what_takes_less: Callable[[Sequence[int], bool, int], str] | None = None

    def training_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        self._finite.micro_batches.append(inputs.pop("row_indices"))
        tokens = sum(inputs["row_lengths"])
        if self._finite.micro_batches[-1]:  # else nothing was left for this process
            self._log.computed_tokens += tokens
        self._log.shared_tokens += sum(inputs["openings"])
        self._log.ending_tokens += sum(inputs["endings"])
        with self._memory_told(self._finite.micro_batches[-1], tokens):
            loss: torch.Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    @contextmanager
    def _memory_told(
        self, rows: list[int], tokens: int, *, evaluating: bool = False
    ) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            remedy = self._smaller(rows, evaluating=evaluating)
            step, then = self.state.global_step, how_to_continue(Path(self.args.output_dir))
            self._log.stop(
                f"out of memory with {tokens:,} tokens at a time ({in_words(rows)}), after step "
                f"{step} of {self.state.max_steps}. {remedy}."
                + (f" Then, with that and --allow-changed: {then}" if step else "")
            )

    def _smaller(self, rows: list[int], *, evaluating: bool) -> str:
        if self.what_takes_less is not None:
            with suppress(Exception):  # a remedy is worth no second error
                return self.what_takes_less(rows, evaluating, self.state.global_step)
        which = "eval" if evaluating else "train"
        return f"Lower training.per_device_{which}_batch_size"

    def compute_loss(self, *args: Any, **named: Any) -> Any:
        with self._head.apart():
            return super().compute_loss(*args, **named)

    def _get_grad_norm(self, *args: Any, **named: Any) -> torch.Tensor:
        # The one place that has the norm from before clipping, whatever max_grad_norm is.
        norm = super()._get_grad_norm(*args, **named)
        if isinstance(norm, DTensor):  # of FSDP2
            norm = norm.full_tensor()
        # DeepSpeed's is a float.
        self._finite.grad_norm = torch.as_tensor(norm, device=self.args.device)
        return self._finite.grad_norm

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """The stock one writes in place, removes older ones first thing, and seals nothing."""
        self.store_flos()
        run = Path(self.args.output_dir)
        folder = run / f"checkpoint-{self.state.global_step}"
        best = run / f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        staged = run / f".{folder.name}.partial"  # all processes write into it
        if not self.args.should_save:
            self.write_states(staged)
            return
        with whole_folder(folder, replace=True, staged=staged):
            self.write_states(staged)
        self.remove_old_checkpoints()

    def remove_old_checkpoints(self, *, at_the_end: bool = False) -> None:
        """Beyond ``save_total_limit``; at the end of a run that keeps one, all but the best."""
        limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
        rotate_checkpoints(
            output_dir=self.args.output_dir,
            save_total_limit=limit,
            best_model_checkpoint=best,
            use_mtime=True,
        )
        if at_the_end and limit == 1 and best:
            for folder in checkpoints(Path(self.args.output_dir)):
                if folder.name != Path(best).name:
                    shutil.rmtree(folder, ignore_errors=True)

    def write_states(self, staged: Path) -> None:
        """All that a checkpoint holds; every process writes into the one folder."""
        log_state = self._log.state(self.args, self.state)  # on every process: it adds their sums
        open_loss = nested_gather(self._tr_loss, self.args.parallel_mode).reshape(-1).tolist()
        log_state |= {"open_loss": open_loss, "logged_step": self._globalstep_last_logged}
        if distributed():
            dist.barrier()  # the folder is there
        self.save_model(str(staged), _internal_call=True)
        self._save_optimizer_and_scheduler(str(staged))
        self._save_scaler(str(staged))
        self._save_rng_state(str(staged))
        if self.args.should_save:
            self._keep_callbacks()
            self.state.save_to_json(str(staged / "trainer_state.json"))
            (staged / LOG_STATE).write_text(json.dumps(log_state))
            self._log.flush()
        if distributed():
            dist.barrier()  # every random state is in it

    def _keep_callbacks(self) -> None:
        """The states that callbacks such as early stopping go on with."""
        every = [*self.callback_handler.callbacks, self.control]
        for callback in (one for one in every if isinstance(one, ExportableState)):
            name, kept = type(callback).__name__, self.state.stateful_callbacks
            if isinstance(kept[name], list):
                kept[name].append(callback.state())
            else:
                kept[name] = callback.state()

    def longest_micro_batch(self) -> list[TokenizedRow]:
        """That of this process which needs the most tokens, in the order of all epochs."""
        lengths = [row.needed for row in self.train_dataset]
        batches = micro_batches(
            self.callback_handler.train_dataloader,
            steps=self.state.max_steps,
            accumulation=self.args.gradient_accumulation_steps,
        )
        longest = max(batches, key=lambda rows: sum(lengths[i] for i in rows))
        return [self.train_dataset[index] for index in longest]

    def rehearse_step(
        self, rows: Sequence[TokenizedRow], forward: AbstractContextManager[None] | None = None
    ) -> int:
        """Forward and backward of ``rows``, counted nowhere; return the tokens of the batch.

        Args:
            forward: entered while the model computes, without the loss.
        """
        inputs = self._prepare_inputs(self.data_collator(rows))
        labels, indices = inputs.pop("labels"), inputs.pop("row_indices")
        tokens: int = sum(inputs["row_lengths"])
        model = self._rehearsed()
        model.train()
        with self._memory_told(indices, tokens), self._head.apart():
            with self.compute_loss_context_manager():
                with forward or nullcontext():
                    output = model(**inputs).logits[0]
                nll = self._head.nll(output, labels)
                del output
            self._backward(nll.sum() / count_trained(labels).clamp(min=1))
        return tokens

    def _rehearsed(self) -> Any:
        return self.model_wrapped

    def _backward(self, loss: torch.Tensor) -> None:
        torch.autograd.backward(loss)

    def rehearse_evaluation(self) -> None:
        """The batch of held-out rows that needs the most tokens."""
        rows, size = self.eval_dataset, self.args.per_device_eval_batch_size
        inputs = self._prepare_inputs(self.data_collator(largest_batch(rows, size)))
        labels, indices = inputs.pop("labels"), inputs.pop("row_indices")
        self.model.eval()
        self._nll(inputs, labels, indices)

    def report_into(self, folder: Path) -> None:
        """TensorBoard's place, which it would take only when training begins: what is evaluated
        before, and with it all that follows, would go to a folder of its own in ``runs/``.
        """
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.logging_dir is None:
                callback.logging_dir = str(folder / "tensorboard")

    def answers_unchanged(self, row: TokenizedRow) -> bool:
        """Whether the adapter leaves the base's logits for ``row`` as they are.

        PiSSA and OLoRA took their start out of the base, so with them it never does.
        """
        inputs = self._prepare_inputs(flatten([row]))
        for name in ("row_indices", "labels"):
            del inputs[name]
        modes = [(module, module.training) for module in self.model.modules()]
        self.model.eval()
        try:
            tuned = self._logits(inputs)
            with self.model.disable_adapter():
                base = self._logits(inputs)
        finally:
            for module, mode in modes:
                module.training = mode
        return bool((tuned - base).norm() <= _UNCHANGED * base.norm())

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader: DataLoader[Any] = super().get_train_dataloader()
        if self.args.world_size > 1:
            deal_evenly(loader)
        if self.args.dataloader_num_workers:
            own = getattr(loader, "base_dataloader", loader)  # accelerate's is a shell
            own.worker_init_fn = partial(quiet_worker, own.worker_init_fn)
            atexit.unregister(kill_workers)
            atexit.register(kill_workers)
        return loader

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        return DataLoader(
            rows,
            batch_sampler=evaluated_batches(
                len(rows),
                self.args.per_device_eval_batch_size,
                processes=self.args.world_size,
                process=self.args.process_index,
            ),
            collate_fn=self.data_collator,
            # Without one, each pass draws a seed from the global generator, and a run that
            # evaluates would drop out other weights than one resumed behind the evaluation.
            generator=torch.Generator(),
        )

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        self.model.eval()
        sums, tokens = [0.0], 0
        not_finite: NotFinite = []
        for batch in dataloader:
            inputs = self._prepare_inputs(batch)
            labels, rows = inputs.pop("labels"), inputs.pop("row_indices")
            sums.append(self._nll(inputs, labels, rows).sum().item())
            tokens += int(count_trained(labels))
            self.callback_handler.on_prediction_step(self.args, self.state, self.control)
            if not math.isfinite(sums[-1]):
                not_finite.append((sums[-1], rows))
        nll, count = sum_over_processes((math.fsum(sums), tokens), self.args.device)
        if not math.isfinite(nll):
            self._finite.stop_for_evaluation(not_finite, self.state.global_step)
        metrics = {
            f"{metric_key_prefix}_loss": nll / count,
            f"{metric_key_prefix}_perplexity": perplexity(nll / count),
            f"{metric_key_prefix}_trained_tokens": count,
        }
        return EvalLoopOutput(
            predictions=None, label_ids=None, metrics=metrics, num_samples=len(self.eval_dataset)
        )

    def _nll(self, inputs: dict[str, Any], labels: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """float32 (K,) of one batch; see ``token_nll``."""
        tokens = sum(inputs["row_lengths"])
        with torch.no_grad(), self._memory_told(rows, tokens, evaluating=True), self._head.apart():
            return self._head.nll(self._logits(inputs), labels)

    def _logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        """(K, vocabulary) of one batch without labels, or (K, hidden) with the head ``apart``;
        float32, or what the base computes in.
        """
        # autocast here too: before the first step the model is not yet wrapped in it.
        with torch.no_grad(), self.accelerator.autocast():
            logits: torch.Tensor = self.model(**inputs).logits[0]
        return logits


def perplexity(mean_nll: float) -> float:
    """exp of the mean negative log-likelihood in nats; infinite beyond what a float holds."""
    try:
        return math.exp(mean_nll)
    except OverflowError:
        return math.inf
