"""4 and 8 bit: loaded as asked, trained, and reloaded with the adapter."""

import pytest

from recipe.answerer import load_answerer
from recipe.finetune import finetune
from recipe.settings import load_settings
from recipe.sharing.receipt import read_receipt
from tests.asking import ask_one

QUANTIZATIONS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": "float32",
    },
    "int8": {"load_in_8bit": True},
}


@pytest.mark.parametrize("name", QUANTIZATIONS)
def test_trains_and_answers(write_config, tmp_path, name):
    # The evaluation before training is a forward pass without gradient; see keep_layout.
    config = write_config(
        model={"quantization": QUANTIZATIONS[name]}, data={"rows": "0:8", "held_out": "8:12"}
    )
    folder = finetune(load_settings(str(config)))
    receipt = read_receipt(folder / "adapter")
    assert receipt.base.quantization == QUANTIZATIONS[name]
    answerer = load_answerer(
        adapter=str(folder / "adapter"), model=None, template=None, runs=tmp_path
    )
    assert answerer.model.get_base_model().is_quantized
    answer = ask_one(answerer, "Name a fruit.", max_new_tokens=3)
    assert answer.finish_reason in ("eos", "length")
    assert 1 <= len(answer.ids) <= 3
