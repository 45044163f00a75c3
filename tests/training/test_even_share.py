"""However many processes there are, a step takes the rows that it takes of a single one."""

from itertools import chain, product

import pytest
import torch
from accelerate import PartialState
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from recipe.data.batch import flatten
from recipe.model.lora import add_lora
from recipe.training.head import OutputHead
from recipe.training.loss import TokenLoss, count_trained
from recipe.training.order import deal_evenly, evaluated_batches, steps_of

ROWS = [1, 2, 3, 5, 8, 9, 13, 30]


def loader(rows, size, *, processes=1, process=0, even=True, drop_last=False, workers=0):
    """A process's loader as the Trainer makes it, by accelerate; it hands out places of rows."""
    PartialState(cpu=True)
    plain = DataLoader(
        range(rows),
        size,
        shuffle=True,
        collate_fn=list,
        drop_last=drop_last,
        num_workers=workers,
    )
    made = prepare_data_loader(
        plain,
        num_processes=processes,
        process_index=process,
        put_on_device=False,
        use_seedable_sampler=True,
        data_seed=7,
    )
    if processes > 1 and even:
        deal_evenly(made)
    return made


def of_each(processes, rows, size, *, accumulation, steps, **named):
    """Of each process its steps: lists of micro-batches."""
    return [
        list(
            steps_of(
                loader(rows, size, processes=processes, process=process, **named),
                steps=steps,
                accumulation=accumulation,
            )
        )
        for process in range(processes)
    ]


def flat(batches):
    return list(chain.from_iterable(batches))


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("processes", [2, 3, 4, 5])
def test_a_step_of_all_processes_is_that_of_one(processes, drop_last):
    for rows, (size, accumulation) in product(ROWS, [(1, 1), (2, 2), (3, 1), (4, 2)]):
        case = f"{rows} rows, {size} at a time, {accumulation} times"
        window = processes * accumulation
        # Two epochs, of another order each.
        steps = 2 * -(-rows // (size * window))
        named = {"steps": steps, "drop_last": drop_last}
        (alone,) = of_each(1, rows, size, accumulation=window, **named)
        shares = of_each(processes, rows, size, accumulation=accumulation, **named)
        assert {len(share) for share in shares} == {len(alone)}, case
        for single, *several in zip(alone, *shares, strict=True):
            assert len({len(step) for step in several}) == 1, case
            # As many rows behind one another as one process takes, in its micro-batches.
            rounds = flat(zip(*several, strict=True))
            assert [batch for batch in rounds if batch] == single, case


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_no_row_is_taken_twice_in_an_epoch(processes):
    for rows, size in product(ROWS, range(1, 5)):
        shares = [loader(rows, size, processes=processes, process=p) for p in range(processes)]
        taken = [list(share) for share in shares]
        assert sorted(flat(flat(taken))) == list(range(rows))
        assert {len(batches) for batches in taken} == {len(shares[0])}


def test_accelerates_own_deal_takes_rows_twice():
    """Why there is a deal of ours."""
    taken = [list(loader(5, 2, processes=2, process=p, even=False)) for p in range(2)]
    assert len(flat(flat(taken))) > 5


def resumed(skipped, epoch, **named):
    """The batches left in an epoch of which some were taken, as the Trainer goes on.

    accelerate then finds the sampler that knows epochs by its name in the deal below the skip.
    """
    left = skip_first_batches(loader(11, 2, **named), skipped)
    left.set_epoch(epoch)
    return list(left)


@pytest.mark.parametrize("process", [0, 1])
@pytest.mark.parametrize("epoch", [0, 1, 2])
def test_a_resumed_epoch_goes_on_in_its_own_order(process, epoch):
    whole = loader(11, 2, processes=2, process=process)
    whole.set_epoch(epoch)
    expected = list(whole)
    assert len(expected) == 3
    for skipped in range(3):
        left = resumed(skipped, epoch, processes=2, process=process)
        assert left == expected[skipped:]


def test_data_workers_hand_out_the_same():
    for process in range(2):
        plain, with_workers = (
            loader(9, 2, processes=2, process=process, workers=workers) for workers in (0, 1)
        )
        assert list(with_workers) == list(plain)


def test_every_row_is_evaluated_once():
    for rows, size, processes in product(range(1, 31), range(1, 5), range(1, 6)):
        shares = [
            evaluated_batches(rows, size, processes=processes, process=process)
            for process in range(processes)
        ]
        assert sorted(flat(flat(shares))) == list(range(rows))
        assert len({len(share) for share in shares}) == 1
        assert all(len(batch) <= size for share in shares for batch in share)
        assert any(share[-1] for share in shares)  # no pass for nothing


@pytest.fixture
def model(tiny_checkpoint):
    """An adapter that is no longer at its start, where half of its gradients are zero anyway."""
    base = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    made = add_lora(base, {"r": 4, "target_modules": ["q_proj", "v_proj"]})
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made.train()


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("share_openings", [False, True])
def test_no_rows_give_a_gradient_of_zero(model, whole, share_openings):
    """Not none: DDP waits for each parameter of each process."""
    head = OutputHead(model, whole=whole)
    loss = TokenLoss(head.nll)
    inputs = flatten([], share_openings=share_openings)
    assert inputs.pop("row_indices") == []
    assert inputs["shift_labels"].ne(-100).sum() == 0
    labels = inputs.pop("labels")
    assert int(count_trained(labels)) == 0
    with head.apart():
        outputs = model(**inputs)
        value = loss(outputs, labels, num_items_in_batch=torch.tensor(12))
    assert value.item() == 0
    value.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 8
    for name, parameter in trained.items():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert loss.take(torch.device("cpu")) == (0.0, 0)
