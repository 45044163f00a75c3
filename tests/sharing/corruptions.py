"""What can be wrong with an adapter or its base, and which check must say so."""

from dataclasses import dataclass
from functools import partial

import torch

from recipe.sealed import SEAL
from recipe.sharing.receipt import ADAPTER_CONFIG, RECEIPT
from recipe.sharing.tensors import WEIGHTS
from tests.sharing.damage import (
    Damage,
    also,
    another_base,
    as_pickle_only,
    base_config,
    base_saved_as,
    config,
    config_and_proof,
    cropped,
    cut,
    each,
    exchanged,
    first_value,
    flipped_bit,
    moved,
    next_float,
    noise,
    of_base,
    of_proof,
    permuted,
    pickled,
    probe,
    receipt,
    removed,
    renamed,
    rounded,
    tensors,
    tokenizer,
    without,
    written,
)
from tests.untrusted.payload import edit

UP = "layers.1.mlp.up_proj.lora_"
OF_UP = f"base_model.model.model.{UP}"
BASE = "model.safetensors"
NAN, INFINITY = float("nan"), float("inf")


@dataclass(frozen=True)
class Case:
    """``said`` are the check and a part of the message of each line, in order.

    ``damage`` is done to an adapter trained with ``template``, or to its base where ``of_base``.
    Where ``sealed``, the damaged adapter gets correct hashes, as whoever hands it on can do; with
    ``proof`` those of its tensors in ``recipe.json`` too.
    """

    damage: Damage
    said: list[tuple[str, str]]
    of_base: bool = False
    sealed: bool = True
    proof: bool = True
    template: str = "alpaca"


SWAPPED = "lora_A and lora_B are swapped in base_model.model.model.layers.0.mlp.down_proj.lora_A"
ZERO = "B·A is zero for base_model.model.model.layers."
OTHER_NAMES = {
    "names as within peft": renamed(r"\.weight$", ".default.weight"),
    "names of a plain model": renamed(r"^base_model\.model\.", ""),
}

OF_TENSORS = {
    "every B is zero": (each("lora_B", torch.zeros_like), "effect", ZERO),
    "B of one module is zero": (each(f"{UP}B", torch.zeros_like), "effect", f"{ZERO}1.mlp.up"),
    "every A is zero": (each("lora_A", torch.zeros_like), "effect", ZERO),
    "A of one module is zero": (each(f"{UP}A", torch.zeros_like), "effect", f"{ZERO}1.mlp.up"),
    "A and B meet in nothing": (
        also(
            each(f"{UP}A", lambda a: a * torch.tensor([[1.0], [0], [0], [0]])),
            each(f"{UP}B", lambda b: b * torch.tensor([[0.0, 1, 1, 1]])),
        ),
        "effect",
        f"{ZERO}1.mlp.up",
    ),
    "A is called B": (exchanged("lora_A", "lora_B"), "shapes", SWAPPED),
    "q_proj is called v_proj": (
        exchanged("q_proj", "v_proj"),
        "shapes",
        "q_proj.lora_B.weight and 3 more of another shape",
    ),
    "another rank": (
        cropped(2),
        "shapes",
        "27 more of another shape than needed: (2, 128) where (4, 128) was expected",
    ),
    "one B has another rank": (
        each(f"{UP}B", lambda b: b[:, :2]),
        "shapes",
        f"{OF_UP}B.weight of another shape than needed: (128, 2) where (128, 4)",
    ),
    "one A is flat": (each(f"{UP}A", torch.ravel), "shapes", "(256,) where (4, 64)"),
    "one B is a number": (each(f"{UP}B", torch.sum), "shapes", "() where (128, 4)"),
    "of a base half as wide": (
        each("", lambda t: t[: t.shape[0] // 2] if t.shape[1] == 4 else t[:, : t.shape[1] // 2]),
        "shapes",
        "27 more of another shape than needed: (4, 64) where (4, 128)",
    ),
    "one tensor is missing": (without(f"{UP}A"), "keys", f"1 tensor missing: {OF_UP}A.weight"),
    "a module is missing": (without(UP), "keys", "2 tensors missing"),
    "a layer is missing": (without("layers.1"), "keys", "14 tensors missing"),
    "no tensor is there": (tensors(lambda old: {}), "keys", "28 tensors missing"),
    "one tensor too many": (
        tensors(lambda old: {**old, "lm_head.weight": torch.ones(2)}),
        "keys",
        "1 tensor that nothing of the base takes: lm_head.weight",
    ),
    "one NaN": (each(f"{UP}B", first_value(NAN)), "finite", f"NaN or infinity in {OF_UP}B"),
    "one infinity": (each(f"{UP}A", first_value(INFINITY)), "finite", "NaN or infinity in"),
    "nothing but NaN": (each("", lambda t: t * NAN), "finite", "and 27 more"),
    "no safetensors": (written(WEIGHTS, "no"), "files", "cannot be read"),
    "an end is missing": (cut(WEIGHTS, -9), "files", "cannot be read"),
}

TUNED = "this is not the adapter that was trained"

OF_ANSWERS = {
    "two layers exchanged": exchanged("layers.0", "layers.1"),
    "up_proj is called gate_proj": exchanged("up_proj", "gate_proj"),
    "A of q_proj and v_proj exchanged": exchanged("q_proj", "v_proj", among="lora_A"),
    "every B times 1.05": each("lora_B", lambda b: 1.05 * b),
    "one B times 1.05": each(f"{UP}B", lambda b: 1.05 * b),
    "every sign of B": each("lora_B", torch.neg),
    "one sign of B": each(f"{UP}B", torch.neg),
    "one A is noise": each(f"{UP}A", noise),
    "rows of one A in another order": each(f"{UP}A", lambda a: a.flip(0)),
    # It moves these logits by 2e-3 standard deviations.
    "rounded to 8 bits": each("", partial(rounded, bits=8)),
    "bfloat16": each("", torch.Tensor.bfloat16),
    "8-bit floats": each("", lambda t: t.to(torch.float8_e4m3fn)),
    # Whoever changes what was trained in both places is found out by what it answers.
    "alpha, and the proof": config_and_proof(lora_alpha=16),
    "rsLoRA, and the proof": config_and_proof(use_rslora=True),
    "alpha of q_proj, and the proof": config_and_proof(alpha_pattern={"q_proj": 16}),
    "rank, tensors and the proof": also(cropped(2), config_and_proof(r=2, lora_alpha=4)),
    "stored logits of the tuned model": moved("tuned", by=0.1),
    "NaN in the last probe, tuned": moved("tuned", by=NAN),
}

_IN_PROOF = ("proof", "of the tuned model", "tuned")

OF_CONFIG = {
    "lora_alpha": 16,
    "r": 8,
    "target_modules": ["q_proj"],
    "use_rslora": True,
    "use_dora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"q_proj": 16},
    "lora_dropout": 0.5,
    "layers_to_transform": [0],
    "modules_to_save": ["lm_head"],
    "bias": "all",
    "fan_in_fan_out": True,
    "layer_replication": [[0, 2], [0, 2]],
    "task_type": "SEQ_CLS",
}

_NO_LORA = "not of a LoRA adapter"
_NO_RECEIPT = "or not as this recipe writes it"
_PROMPTS = "the prompts become other text or other token ids"
_STORED_BASE = "without the adapter the logits differ"

OF_FILES = {
    "IA3": (config(peft_type="IA3"), "config", _NO_LORA),
    "modules to import": (config(megatron_config={"a": 1}), "config", _NO_LORA),
    "half a configuration": (cut(ADAPTER_CONFIG, 100), "config", "cannot be read"),
    "a list as configuration": (written(ADAPTER_CONFIG, "[]"), "config", "cannot be read"),
    "half a receipt": (cut(RECEIPT, 300), "receipt", "Invalid JSON"),
    "a list as receipt": (written(RECEIPT, "[]"), "receipt", _NO_RECEIPT),
    "a receipt nested too deep": (written(RECEIPT, "[" * 100_000), "receipt", _NO_RECEIPT),
    "an unknown template": (receipt(lambda r: r.update(template="vicuna")), "receipt", "template"),
    "another template": (
        receipt(lambda r: r.update(template="raw")),
        "template",
        "another raw template than",
    ),
    "a key of the base that is none": (of_base(trust_remote_code=True), "receipt", _NO_RECEIPT),
    "the base in another dtype": (of_base(dtype="bfloat16"), "base", "another set of weights than"),
    "the base in 4 bit": (
        of_base(quantization={"load_in_4bit": True}),
        "base",
        "another set of weights",
    ),
    "another hash of the base": (of_proof(base_sha256="0" * 64), "base", "instead of 000000"),
    "no probes": (of_proof(probes=[]), "receipt", "no whole probes"),
    "a probe too few": (receipt(lambda r: r["proof"]["probes"].pop()), "probes", _PROMPTS),
    "a probe without logits": (
        probe(lambda p: p.update(token_ids=[], base=[], tuned=[])),
        "receipt",
        "no whole probes",
    ),
    "a logit too few": (probe(lambda p: p["tuned"].pop()), "receipt", "no whole probes"),
    "a token that is no number": (
        probe(lambda p: p["token_ids"].append("x")),
        "receipt",
        "token_ids",
    ),
    "tokens that the base has not": (
        probe(lambda p: p["token_ids"].__setitem__(0, 99_999)),
        "probes",
        "tokens that this base does not have",
    ),
    "another prompt": (probe(lambda p: p.update(prompt="Hello")), "probes", _PROMPTS),
    "other token ids of a prompt": (probe(lambda p: p["input_ids"].pop()), "probes", _PROMPTS),
    "stored logits of the base": (moved("base", by=0.1), "probes", _STORED_BASE),
    "NaN in the last probe, base": (moved("base", by=NAN), "probes", _STORED_BASE),
}

UNSEALED = {
    "a flipped bit": (flipped_bit, [("whole", f"{WEIGHTS}: changed since it was written")]),
    "half a file": (cut(WEIGHTS, 500), [("whole", f"{WEIGHTS}: changed")]),
    "another alpha": (config(lora_alpha=16), [("whole", f"{ADAPTER_CONFIG}: changed")]),
    "another receipt": (of_base(revision="main"), [("whole", f"{RECEIPT}: changed")]),
    "no README": (removed("README.md"), [("whole", "README.md: missing")]),
    "no receipt": (removed(RECEIPT), [("whole", f"{RECEIPT}: missing")]),
    "no weights": (removed(WEIGHTS), [("whole", "missing"), ("files", "nothing else is read")]),
    "no seal": (removed(SEAL), [("whole", f"{SEAL}: missing, so nothing proves")]),
    "no hashes in the seal": (written(SEAL, "{}"), [("whole", "not a table of hashes")]),
    "half a seal": (cut(SEAL, 20), [("whole", "not readable as JSON")]),
    "a pickle beside": (pickled("training_args.bin"), [("files", "training_args.bin is a pickle")]),
    "a pickle below": (
        also(lambda folder: (folder / "old").mkdir(), pickled("old/model.PT")),
        [("files", "old/model.PT is a pickle")],
    ),
    "a pickle alone": (
        as_pickle_only,
        [
            ("whole", f"{WEIGHTS}: missing"),
            ("files", "adapter_model.bin is a pickle"),
            ("files", f"{WEIGHTS} is missing"),
        ],
    ),
}

_LEFT = "that nothing of the base takes"

OF_BASE = {
    "one value of the base": (
        each("1.mlp.up", next_float, BASE),
        "base",
        "another set of weights than",
    ),
    "another seed": (another_base(seed=1), "base", "another set of weights than"),
    "rounded to bfloat16": (base_saved_as(torch.bfloat16), "base", "another set of weights than"),
    "half as wide": (another_base(hidden_size=32, head_dim=8), "shapes", "of another shape"),
    "one layer": (another_base(num_hidden_layers=1), "keys", f"14 tensors {_LEFT}"),
    "three layers": (another_base(num_hidden_layers=3), "base", "another set of weights than"),
    "a permuted vocabulary": (tokenizer(permuted), "tokenizer", "another tokenizer than"),
    "lower case": (
        tokenizer(lambda t: t.update(normalizer={"type": "Lowercase"})),
        "tokenizer",
        "another tokenizer than",
    ),
    "another end of text": (
        lambda base: edit(base / "tokenizer_config.json", eos_token="<s>"),
        "tokenizer",
        "another tokenizer than",
    ),
    "a merge less": (
        tokenizer(lambda t: t["model"]["merges"].pop()),
        "tokenizer",
        "another tokenizer than",
    ),
    "other positions": (
        base_config(rope_parameters={"rope_type": "default", "rope_theta": 2e4}),
        "base",
        "config.json of the base: rope_parameters is",
    ),
    "another activation": (base_config(hidden_act="gelu"), "base", "hidden_act is 'gelu', but"),
    "another epsilon": (base_config(rms_norm_eps=2e-6), "base", "rms_norm_eps is 2e-06, but"),
}


def _cases() -> dict[str, Case]:
    """All of them, under the name of their table and their own."""
    tuned = {name: (damage, "probes", TUNED) for name, damage in OF_ANSWERS.items()}
    values = {
        key: (config(**{key: value}), "config", f"{ADAPTER_CONFIG}: {key} is {value!r}, but")
        for key, value in OF_CONFIG.items()
    }
    found = {
        f"{table}: {name}": Case(damage, [(check, part)])
        for table, rows in (
            ("tensors", OF_TENSORS),
            ("answers", tuned),
            ("configuration", values),
            ("files", OF_FILES),
        )
        for name, (damage, check, part) in rows.items()
    }
    for name, damage in OTHER_NAMES.items():
        found[f"tensors: {name}"] = Case(damage, [("keys", "28 tensors missing"), ("keys", "28")])
    for name, damage in OF_ANSWERS.items():
        if not name.endswith(_IN_PROOF):
            changed = [("weights", "the tensors are not those that were saved")]
            found[f"saved: {name}"] = Case(damage, changed, proof=False)
    for name, (damage, said) in UNSEALED.items():
        found[f"not sealed: {name}"] = Case(damage, said, sealed=False)
    for name, (damage, check, part) in OF_BASE.items():
        found[f"base: {name}"] = Case(damage, [(check, part)], of_base=True)
    found["base: heads half as wide"] = Case(
        base_config(num_attention_heads=8, num_key_value_heads=4, head_dim=8),
        [("base", key) for key in ("head_dim", "num_attention_heads", "num_key_value_heads")],
        of_base=True,
    )
    found["base: another chat template"] = Case(
        written("chat_template.jinja", "{% for m in messages %}{{ m['content'] }}{% endfor %}"),
        [("template", "another chat template than")],
        of_base=True,
        template="chat",
    )
    return found


CASES = _cases()
