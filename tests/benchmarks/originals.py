"""The starter model as Meta would have written it, converted; and the memory that it takes.

    make bench-convert

Written are the starter in 1 and in 3 shards, and random weights in 4. Each is converted by
recipe/convert.py in a process of its own, whose peak resident size is told beside that of the
conversion of a tiny checkpoint. Then the starter and what came back answer 100 prompts greedily.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from tests.model.meta.files import COLUMNS, ROWS, greedy, tiny_llama, write_ranks, write_shards

REPOSITORY = Path(__file__).parents[2]
STARTER = REPOSITORY / "models/smollm2-135m-instruct"
LARGE = {"hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 20}
CONVERTS = """
import sys
from recipe import convert
from recipe.memory.probe import peak_memory
convert.main(sys.argv[1:])
print(peak_memory("cpu")["resident"])
"""


def converted(folder: Path) -> tuple[list[str], int]:
    """What the command says of a folder, and the bytes that it was resident with at most."""
    command = [sys.executable, "-c", CONVERTS, folder.name, f"{folder.name}-model"]
    done = subprocess.run(command, cwd=folder.parent, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    *lines, peak = done.stdout.splitlines()
    return lines, int(peak)


def starter(place: Path, model: LlamaForCausalLM, shards: int, embedding: int) -> Path:
    config = model.config
    params = {
        "vocab_size": config.vocab_size,
        "n_kv_heads": config.num_key_value_heads,
        "rope_theta": config.rope_parameters["rope_theta"],
    }
    return write_shards(
        model, place / f"starter-{shards}", shards=shards, embedding=embedding, params=params
    )


def main() -> None:
    model = LlamaForCausalLM.from_pretrained(STARTER, dtype=torch.float32).eval()
    prompts = torch.randint(
        model.config.vocab_size, (100, 6), generator=torch.Generator().manual_seed(0)
    )
    answers = greedy(model, prompts)
    with tempfile.TemporaryDirectory(prefix="recipe-originals-") as made:
        place = Path(made)
        write_ranks(place / "tokenizer.model", model.config.vocab_size - 256)
        for shards, embedding in ((1, ROWS), (3, COLUMNS)):
            folder = starter(place, model, shards, embedding)
            lines, _ = converted(folder)
            print("\n".join(lines))
            found = LlamaForCausalLM.from_pretrained(f"{folder}-model", dtype="auto").eval()
            same = int((greedy(found, prompts) == answers).all(dim=1).sum())
            print(f"greedy    20 tokens after {len(prompts)} prompts: {same} the same\n")
        write_ranks(place / "tokenizer.model", 512)
        params = {"vocab_size": 768}
        tiny = write_shards(tiny_llama(), place / "tiny", shards=4, embedding=ROWS, params=params)
        large = write_shards(
            tiny_llama(**LARGE, initializer_range=0.02),
            place / "large", shards=4, embedding=ROWS, params=params,
        )  # fmt: skip
        (_, least), (_, most) = converted(tiny), converted(large)
        shard = (large / "consolidated.00.pth").stat().st_size
        print(
            f"memory    4 shards of {shard / 1e6:.0f} MB: {(most - least) / 1e6:.0f} MB more than "
            f"a tiny checkpoint takes ({least / 1e6:.0f} MB, of the libraries)"
        )


if __name__ == "__main__":
    main()
