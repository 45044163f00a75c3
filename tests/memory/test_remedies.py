"""A remedy is what the settings with its overrides forecast, and it fits."""

import json
from dataclasses import replace

import pytest

from recipe.memory import forecast as forecast_module
from recipe.memory import remedies as remedies_module
from recipe.memory.forecast import Forecast, Plan, forecast
from recipe.memory.remedies import Remedy, remedies, smaller
from recipe.settings import dump, load_settings, plain
from tests.memory.test_trace import rows, shape

ANY = 1 << 60
CHECKPOINTED = "training.gradient_checkpointing=true"
LENGTHS = (400, 60, 300, 90)
HELD_OUT = (60, 80, 420, 410)
HALVED = ["training.per_device_train_batch_size=2", "training.gradient_accumulation_steps=2"]
SHORTER = ["data.max_length=200", "data.too_long=drop"]
EIGHT_BIT_ADAM = ["training.optim=adamw_bnb_8bit"]
INT8 = ["model.quantization={load_in_8bit: true}"]
NF4 = [
    "model.quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4, "
    "bnb_4bit_use_double_quant: true, bnb_4bit_compute_dtype: bfloat16}"
]
REMEMBERED: dict[str, Forecast] = {}


def remembered(plan: Plan) -> Forecast:
    """A forecast depends on nothing else, and takes a fifth of a second."""
    lengths = [list(map(len, part)) for part in (plan.rows, plan.evaluated)]
    key = f"{dump(plan.settings)} {plan.config} {lengths} {plan.device} {plan.share_openings}"
    # Settings of a test are of its own folder.
    key = key.replace(str(plan.settings.data.path), "")
    if key not in REMEMBERED:
        REMEMBERED[key] = forecast(plan)
    return REMEMBERED[key]


@pytest.fixture(autouse=True)
def once(monkeypatch):
    monkeypatch.setattr(remedies_module, "forecast", remembered)


@pytest.fixture
def load(write_config):
    """Settings of a tiny model, and what a remedy makes of them."""
    config = write_config(training={"output_dir": "run"})

    def made(*overrides: str):
        last = {one.partition("=")[0]: one for one in overrides}
        return load_settings(str(config), list(last.values()))

    return made


@pytest.fixture
def planned(load):
    def made(*overrides: str, device: str = "cuda", lengths=LENGTHS, held_out=HELD_OUT):
        return Plan(
            load(*overrides), shape(1), rows(*lengths), rows(*held_out), device, share_openings=True
        )

    return made


@pytest.fixture
def offered(planned, monkeypatch):
    """Everything that is thought of; a forecast is not needed for that."""

    def made(*overrides: str, **other) -> list[Remedy]:
        plan = planned(*overrides, **other)
        found = remembered(planned(device="cpu"))
        with monkeypatch.context() as patch:
            patch.setattr(remedies_module, "forecast", lambda plan: found)
            return remedies(plan, found, room=ANY)

    return made


def overrides_of(ways: list[Remedy]) -> list[list[str]]:
    return [list(way.overrides) for way in ways]


@pytest.mark.parametrize(("device", "asked"), [("cpu", [CHECKPOINTED]), ("cuda", ["lora.r=64"])])
def test_a_remedy_is_what_its_overrides_forecast(planned, load, device, asked):
    plan = planned(*asked, device=device)
    ways = remedies(plan, remembered(plan), room=ANY)
    assert len(ways) == (4 if device == "cpu" else 8)
    for way in ways:
        assert way.forecast == forecast(replace(way.plan, settings=load(*asked, *way.overrides)))


def test_those_that_train_the_same_go_first_and_then_the_quickest(planned):
    plan = planned()
    ways = remedies(plan, remembered(plan), room=ANY)
    assert {" ".join(way.overrides) for way in ways if way.same} == {
        " ".join(HALVED), "training.per_device_eval_batch_size=2", CHECKPOINTED
    }  # fmt: skip
    keys = [(not way.same, round(way.time, 2), way.forecast.peak) for way in ways]
    assert keys == sorted(keys)
    by_name = {" ".join(way.overrides): way for way in ways}
    # A forward pass more to the two of a backward pass, and what it writes.
    assert 1.2 < by_name[CHECKPOINTED].time < 1.6
    assert by_name[" ".join(NF4)].time > 1 > by_name["model.dtype=bfloat16"].time
    assert by_name["training.per_device_eval_batch_size=2"].time == 1
    assert by_name[" ".join(EIGHT_BIT_ADAM)].time == 1


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_only_what_fits_is_named(planned, device):
    plan = planned(device=device)
    found = remembered(plan)
    every = remedies(plan, found, room=ANY)
    peaks = sorted(way.forecast.peak for way in every)
    for room in (peaks[0], peaks[1], peaks[len(peaks) // 2]):
        ways = remedies(plan, found, room=room)
        fitting = [way for way in every if way.forecast.peak <= room]
        assert overrides_of(ways)[-len(fitting) :] == overrides_of(fitting)
        more = ways[: -len(fitting)]
        assert all(way.same and len(way.overrides) > 1 for way in more)
        assert not (more and any(way.same for way in fitting))


def test_where_no_single_one_suffices_they_are_put_together(planned, load, monkeypatch):
    # Of one layer, computing it again saves less than what malloc wastes of it.
    monkeypatch.setattr(forecast_module, "_CPU_LAYER_SHARE", 0)
    REMEMBERED.clear()
    asked = ["lora.r=1024"]
    plan = planned(*asked, device="cpu", held_out=(), lengths=(127, 120, 110, 100))
    plan = replace(plan, config=shape(3))
    found = remembered(plan)
    single = remedies(plan, found, room=ANY)
    halved = " ".join(HALVED)
    assert {" ".join(way.overrides): way.same for way in single} == {
        CHECKPOINTED: True, halved: True, EIGHT_BIT_ADAM[0]: False
    }  # fmt: skip
    room = min(way.forecast.peak for way in single) - 1
    (way,) = remedies(plan, found, room=room)
    assert way.forecast.peak <= room
    assert len(way.overrides) > 1
    assert way.same == (EIGHT_BIT_ADAM[0] not in way.overrides)
    assert way.forecast == forecast(replace(way.plan, settings=load(*asked, *way.overrides)))
    # All of them, where less would not do, and a batch halved twice.
    (all_of_them,) = remedies(plan, found, room=least(plan))
    names = [one.partition("=")[0] for one in all_of_them.overrides]
    assert len(names) == len(set(names))
    assert {CHECKPOINTED, *EIGHT_BIT_ADAM} <= set(all_of_them.overrides)
    assert [len(all_of_them.plan.rows), all_of_them.same] == [1, False]
    assert dump(all_of_them.plan.settings) == dump(load(*asked, *all_of_them.overrides))
    assert remedies(plan, found, room=least(plan) - 1) == []
    REMEMBERED.clear()


def test_what_trains_the_same_is_put_together_before_rows_are_left_out(planned):
    asked = [
        CHECKPOINTED,
        EIGHT_BIT_ADAM[0],
        "model.dtype=bfloat16",
        "lora.init_lora_weights=pissa",
    ]
    plan = planned(*asked, device="cuda", held_out=())
    plan = replace(plan, rows=rows(400, 400, 100, 100, trained=0.1), share_openings=False)
    found = remembered(plan)
    single = {" ".join(way.overrides): way for way in remedies(plan, found, room=ANY)}
    assert set(single) == {" ".join(HALVED), " ".join(SHORTER)}
    # What saves most is to leave rows out.
    least_peak = single[" ".join(SHORTER)].forecast.peak
    assert least_peak < single[" ".join(HALVED)].forecast.peak
    (way,) = remedies(plan, found, room=least_peak - 1)
    assert list(way.overrides) == [
        "training.per_device_train_batch_size=1", "training.gradient_accumulation_steps=4"
    ]  # fmt: skip
    assert way.same


def least(plan: Plan) -> int:
    """With checkpointing, Adam in 8 bit and the longer row alone."""
    training = {
        "gradient_checkpointing": True,
        "optim": "adamw_bnb_8bit",
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 4,
    }
    settings = plan.settings
    settings = settings.model_copy(update={"training": {**settings.training, **training}})
    return remembered(replace(plan, settings=settings, rows=[max(plan.rows, key=len)])).peak


def test_smaller_ones_are_those_that_take_a_twentieth_less(planned):
    plan = planned(device="cpu")
    found = remembered(plan)
    every = remedies(plan, found, room=ANY)
    ways = smaller(plan, found)
    assert 0 < len(ways) < len(every)
    assert overrides_of(ways) == overrides_of(
        [way for way in every if found.allocated - way.forecast.allocated >= 0.05 * found.allocated]
    )


def test_everything_is_thought_of(offered):
    expected = [[CHECKPOINTED], HALVED, ["training.per_device_eval_batch_size=2"], EIGHT_BIT_ADAM]
    on_cuda = [["model.dtype=bfloat16"], INT8, NF4]
    found = overrides_of(offered(device="cpu"))
    assert sorted(found) == sorted([*expected, SHORTER])
    found = overrides_of(offered(device="cuda"))
    assert sorted(found) == sorted([*expected, SHORTER, *on_cuda])


@pytest.mark.parametrize(
    ("asked", "other", "missing"),
    [
        ([CHECKPOINTED], {}, [[CHECKPOINTED]]),
        (["training.activation_checkpointing=true"], {}, [[CHECKPOINTED]]),
        (["training.per_device_train_batch_size=1"], {"lengths": (400,)}, [HALVED]),
        (["training.per_device_eval_batch_size=1"], {"held_out": (400,)}, ["eval"]),
        ([], {"held_out": ()}, ["eval"]),
        (["training.optim=adamw_8bit"], {}, [EIGHT_BIT_ADAM]),
        (["training.optim=paged_lion_8bit"], {}, [EIGHT_BIT_ADAM]),
        (["model.dtype=bfloat16"], {}, [["model.dtype=bfloat16"]]),
        (["model.dtype=float16"], {}, [["model.dtype=bfloat16"]]),
        (INT8, {}, [INT8, NF4, ["model.dtype=bfloat16"]]),
        (NF4, {}, [INT8, NF4, ["model.dtype=bfloat16"]]),
        ([], {"lengths": (127, 100)}, ["data.max_length"]),
        # peft computes such a start from weights that are whole.
        (["lora.init_lora_weights=pissa"], {}, [INT8, NF4]),
    ],
    ids=str,
)
def test_what_is_so_already_or_cannot_be_is_not_offered(offered, asked, other, missing):
    before, found = overrides_of(offered()), overrides_of(offered(*asked, **other))
    for one in missing:
        if isinstance(one, str):
            assert any(one in " ".join(way) for way in before)
            assert not any(one in " ".join(way) for way in found)
        else:
            assert one in before
            assert one not in found


@pytest.mark.parametrize("batch", [2, 3, 4, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_rows_a_step_stay(offered, load, batch, accumulation):
    asked = [
        f"training.per_device_train_batch_size={batch}",
        f"training.gradient_accumulation_steps={accumulation}",
    ]
    lengths = [100 + 10 * (n * 7 % 12) for n in range(batch)]
    (way,) = [
        way for way in offered(*asked, lengths=lengths) if "train_batch" in " ".join(way.overrides)
    ]
    training = load(*asked, *way.overrides).training
    size = training["per_device_train_batch_size"]
    assert 1 <= size <= batch // 2
    assert size * training["gradient_accumulation_steps"] == batch * accumulation
    # Nothing says which of them will stay together.
    assert sorted(map(len, way.plan.rows)) == sorted(lengths)[-size:]
    assert way.same


def test_the_longest_held_out_rows_may_stay_together(offered):
    (way,) = [
        way
        for way in offered("training.per_device_eval_batch_size=4")
        if "eval_batch" in " ".join(way.overrides)
    ]
    assert list(way.overrides) == ["training.per_device_eval_batch_size=2"]
    assert sum(map(len, way.plan.evaluated)) == sum(sorted(HELD_OUT)[-2:])


def test_what_is_longer_is_left_out(offered):
    (way,) = [way for way in offered() if list(way.overrides) == SHORTER]
    assert max(map(len, (*way.plan.rows, *way.plan.evaluated))) <= 200
    assert not way.same


def test_overrides_are_what_a_shell_gives_back(offered, load):
    """As YAML has them: true and not True, a mapping in braces."""
    for way in offered():
        text = json.dumps(list(way.overrides))
        assert "True" not in text
        assert "None" not in text
        loaded, meant = load(*way.overrides), way.plan.settings
        assert plain(loaded.training) == plain(meant.training)
        assert loaded.model == meant.model


def test_options_of_another_optimizer_are_in_no_remedys_way(offered, load):
    asked = ["training.optim=adagrad", "training.optim_args=lr_decay=0.1"]
    for way in offered(*asked):
        load(*asked, *way.overrides)
