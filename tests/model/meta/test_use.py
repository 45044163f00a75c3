"""A converted folder is one as others are: its chat template is Meta's, and it can be trained."""

import itertools

import pytest
import sentencepiece
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig

from recipe import convert
from recipe.finetune import finetune
from recipe.model.checkpoint import load_base, load_config, load_tokenizer
from recipe.model.special_ids import check_special_ids
from recipe.settings import ModelSettings, load_settings
from recipe.verify import verified
from tests.model.meta.files import COLUMNS, SCALED_ROPE, tiny_llama, write_shards

TALK = [
    {"role": "system", "content": "Be short. "},
    {"role": "user", "content": " Name a fruit.\n"},
    {"role": "assistant", "content": " Apple "},
    {"role": "user", "content": "Another?"},
]
LLAMA_3 = (
    "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe short.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nName a fruit.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nApple<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nAnother?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
# What is before the first question is part of its turn, whose ends alone are stripped.
LLAMA_2 = (
    "<s>[INST] <<SYS>>\nBe short. \n<</SYS>>\n\n Name a fruit. [/INST] Apple </s>"
    "<s>[INST] Another? [/INST]"
)


@pytest.fixture
def folder(request, tmp_path, fewer_texts):
    """Of a family, as asked for on the command line."""
    family, *options = request.param
    if family == "llama-2":
        model, params = tiny_llama(vocab_size=448), {"vocab_size": -1}
    else:
        scaled = {"rope_parameters": SCALED_ROPE} if family == "llama-3.1" else {}
        model = tiny_llama(num_key_value_heads=4, **scaled)
        params = {"vocab_size": 768, "n_kv_heads": 4, "use_scaled_rope": bool(scaled)}
    meta = write_shards(model, tmp_path / "meta", shards=2, embedding=COLUMNS, params=params)
    file = request.getfixturevalue("pieces" if family == "llama-2" else "ranks")
    convert.main([str(meta), str(tmp_path / "model"), "--tokenizer", str(file), *options])
    return tmp_path / "model"


def of(*cases):
    return pytest.mark.parametrize("folder", cases, indirect=True, ids=" ".join)


def written(folder, talk, **options):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return tokenizer.apply_chat_template(talk, tokenize=False, **options)


@of(("llama-3", "--instruct"), ("llama-3.1", "--instruct"))
def test_a_conversation_of_llama_3_is_written_as_meta_does(folder):
    whole = written(folder, TALK, add_generation_prompt=True)
    assert whole == LLAMA_3
    before = LLAMA_3.removesuffix("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert written(folder, TALK) == before
    assert written(folder, TALK[1:2]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nName a fruit.<|eot_id|>"
    )


@of(("llama-2", "--instruct"))
def test_a_conversation_of_llama_2_is_written_as_meta_does(folder):
    assert written(folder, TALK, add_generation_prompt=True) == LLAMA_2
    assert written(folder, TALK) == LLAMA_2
    assert written(folder, TALK[1:]) == (
        "<s>[INST] Name a fruit. [/INST] Apple </s><s>[INST] Another? [/INST]"
    )


@of(("llama-2", "--instruct"))
def test_a_conversation_of_llama_2_has_the_ids_that_meta_gives_it(folder, pieces):
    """Each turn by itself: BOS, its text with a space behind the answer, EOS."""
    original = sentencepiece.SentencePieceProcessor(model_file=str(pieces))
    turns = ["[INST] Name a fruit. [/INST] Apple ", "[INST] Another? [/INST]"]
    encoded = [[1, *original.encode(turn), 2] for turn in turns]
    expected = list(itertools.chain(*encoded))[:-1]
    found = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK[1:], return_dict=False)
    assert found == expected


@of(("llama-3", "--instruct"))
def test_a_conversation_of_llama_3_has_its_special_ids(folder):
    found = AutoTokenizer.from_pretrained(folder).apply_chat_template(TALK, return_dict=False)
    assert [n for n in found if n >= 512] == [512, *[518, 519, 521] * 4]


ENDS = {
    ("llama-2",): 2,
    ("llama-2", "--instruct"): 2,
    ("llama-3",): 513,
    ("llama-3", "--instruct"): [513, 521],
    ("llama-3.1",): 513,
    ("llama-3.1", "--instruct"): [513, 520, 521],  # as published: 128001, 128008, 128009
}


@of(*ENDS)
def test_special_ids_of_all_files_agree(folder, request):
    settings = ModelSettings(name_or_path=str(folder))
    tokenizer = load_tokenizer(settings)
    check_special_ids(settings, tokenizer, load_config(settings))
    case = request.node.callspec.params["folder"]
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == ENDS[case]
    assert generation.bos_token_id == tokenizer.bos_token_id
    last = {"llama-2": 2, "llama-3": 521, "llama-3.1": 521}[case[0]]
    expected = last if "--instruct" in case else ENDS[case]
    assert LlamaConfig.from_pretrained(folder).eos_token_id == expected
    assert tokenizer.eos_token_id == expected
    assert (tokenizer.chat_template is not None) == ("--instruct" in case)


@of(("llama-2",), ("llama-2", "--instruct"), ("llama-3.1", "--instruct"))
def test_it_can_be_trained_and_its_adapter_verified(folder, write_config):
    chat = load_tokenizer(ModelSettings(name_or_path=str(folder))).chat_template is not None
    before = load_base(ModelSettings(name_or_path=str(folder))).state_dict()
    config = write_config(
        model={"name_or_path": str(folder)},
        data={"template": "chat" if chat else "alpaca"},
        training={"max_steps": 1, "num_train_epochs": 1},
    )
    run = finetune(load_settings(str(config)))
    verification = verified(str(run / "adapter"), model=None, runs=run.parent).verification
    assert "probes" in dict(verification.passed)
    assert verification.unproven is None
    after = load_base(ModelSettings(name_or_path=str(folder))).state_dict()
    assert all((before[name] == after[name]).all() for name in before)
