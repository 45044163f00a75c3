"""Train, push, pull, verify and generate, typed as in README, against the hub on loopback."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.hub.faults import Fault
from tests.hub.publishing import BASE, TUNED
from tests.hub.server import ALICE, ALICE_READS, BOB, Token

PUBLISHED = ["README.md", "adapter_config.json", "adapter_model.safetensors", "loss.png"]
PUBLISHED += ["recipe.json", "sha256.json"]


def test_trained_and_pushed_in_one_command(user, hub, tmp_path):
    answer = user.train(
        "data.rows=0:8", "data.held_out=8:12", "training.eval_strategy=epoch",
        hub={"push": True, "repo_id": TUNED, "license": "mit"},
    )  # fmt: skip
    assert answer.code == 0, answer.err
    assert "licence   mit; the base has apache-2.0" in answer.out
    assert f"published {hub.endpoint}/{TUNED} at " in answer.out
    assert "verified  6 files fetched again" in answer.out
    repository = hub.repositories.get(TUNED)
    assert repository.private
    clone = tmp_path / "clone"
    url = hub.endpoint.replace("://", f"://alice:{ALICE}@")
    subprocess.run(["git", "clone", "-q", f"{url}/{TUNED}", str(clone)], check=True)
    there = {file.name for file in clone.iterdir()} - {".git", ".gitattributes"}
    assert sorted(there) == PUBLISHED
    for name in ("adapter_config.json", "recipe.json"):
        assert (clone / name).read_bytes() == (user.run / "adapter" / name).read_bytes()
    commit = hub.repositories.get(BASE).resolve("main")
    assert json.loads((clone / "recipe.json").read_text())["base"]["revision"] == commit
    assert json.loads((clone / "adapter_config.json").read_text())["revision"] == commit
    card = (clone / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert metadata["base_model"] == BASE
    assert metadata["library_name"] == "peft"
    assert metadata["license"] == "mit"
    (result,) = metadata["model-index"][0]["results"]
    values = {metric["type"]: metric["value"] for metric in result["metrics"]}
    logged = [json.loads(x) for x in (user.run / "metrics.jsonl").read_text().splitlines()]
    last = [record for record in logged if "eval_perplexity" in record][-1]
    assert values["perplexity"] == pytest.approx(last["eval_perplexity"], abs=1e-4)
    assert str(tmp_path) not in card + (clone / "recipe.json").read_text()
    # And whoever has the token uses it by its name.
    assert user.adapter("verify", TUNED).code == 0
    asked = user.command(
        "generate", "--adapter", TUNED, "--prompt", "Name a fruit.", "max_new_tokens=9"
    )
    assert asked.code == 0, asked.err
    here = user.command("generate", "--prompt", "Name a fruit.", "max_new_tokens=9")
    assert asked.out.splitlines()[0] == here.out.splitlines()[0]
    assert "no folder" in user.adapter("verify", TUNED, token=BOB).err


def test_the_published_adapter_in_stock_peft(user, trained, python):
    assert user.adapter("push", TUNED).code == 0
    here, there = python(
        """
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM
        said = []
        for name in (folder, "alice/tuned"):
            base = AutoModelForCausalLM.from_pretrained("alice/tiny-llama")
            model = PeftModel.from_pretrained(base, name)
            with torch.no_grad():
                said.append(model(torch.arange(5, 25)[None]).logits.double().tolist())
        say(said)
        """,
        folder=str(trained),
    )
    assert here == there


def test_pull_into_a_folder(user, trained):
    assert user.adapter("push", TUNED, "--adapter", str(trained)).code == 0
    answer = user.adapter("pull", TUNED, "--output", "mine")
    assert answer.code == 0, answer.err
    assert "probes" in answer.out
    mine = user.folder / "mine"
    weights = "adapter_model.safetensors"
    assert (mine / weights).read_bytes() == (trained / weights).read_bytes()
    assert user.adapter("verify", "mine").code == 0
    assert user.adapter("pull", TUNED, "--output", "mine").code == 2


def test_a_dry_run_sends_nothing(user, trained, hub):
    hub.requests.clear()
    answer = user.adapter("push", TUNED, "--dry-run", "--license", "mit", token=None)
    assert answer.code == 0, answer.err
    assert "license: mit" in answer.out
    assert "nothing was sent" in answer.out
    assert not [record for record in hub.requests if record.method not in ("GET", "HEAD")]
    assert TUNED not in hub.repositories


def test_pushing_again_is_no_new_commit(user, trained, hub):
    assert user.adapter("push", TUNED).code == 0
    commits = len(hub.repositories.get(TUNED).history("main"))
    assert user.adapter("push", TUNED).code == 0
    assert len(hub.repositories.get(TUNED).history("main")) == commits


@pytest.mark.parametrize(
    ("token", "hub_section", "said"),
    [
        (None, {}, "hub.repo_id: no token for the hub. Run `hf auth login`"),
        ("hf_unknown", {}, "hub.repo_id: the hub answered 401"),
        (ALICE_READS, {}, "hub.repo_id: the token can only read."),
        (BOB, {}, "hub.repo_id: the token is of bob, who cannot publish as alice."),
        (BOB, {"repo_id": "lab/x"}, "hub.repo_id: bob may only read in lab."),
        (BOB, {"repo_id": "lab/new"}, "hub.repo_id: bob may only read in lab."),
        (ALICE, {"repo_id": "alice/old"}, "hub.repo_id: alice/old holds model.bin, which can run"),
        (ALICE, {"repo_id": "alice/a--b"}, "hub.repo_id: expected a repository such as"),
        ("hf_fine", {}, "hub.repo_id: the token is fine-grained and may not write to alice/tuned"),
        (ALICE, {"repo_id": "alice/open"}, "hub.repo_id: alice/open is there already and public"),
        (ALICE, {"repo_id": "mine"}, "hub.repo_id: expected a repository such as 'user/name'"),
        (ALICE, {"license": "Apache"}, "hub.license: expected an identifier of the hub"),
    ],
)
def test_what_cannot_be_published_is_told_before_training(user, hub, token, hub_section, said):
    hub.tokens["hf_fine"] = Token("alice", "fineGrained", (("model", BASE, ("repo.write",)),))
    hub.create("alice/open", {"a": b"a"})
    hub.create("lab/x", {"a": b"a"})
    hub.create("alice/old", {"model.bin": b"a"}, private=True)
    hub.tokens[BOB] = Token("bob")
    answer = user.train(hub={"push": True, "repo_id": TUNED, **hub_section}, token=token)
    assert answer.code == 2
    assert said in answer.err
    assert len(answer.err.strip().splitlines()) == 1
    assert not user.written


def test_a_licence_that_does_not_go_with_the_base_s(user, hub, tiny_checkpoint):
    hub.repositories.delete(BASE)
    user.upload_base(tiny_checkpoint, licence="llama2")
    hub_section = {"push": True, "repo_id": TUNED, "license": "mit"}
    answer = user.train(hub=hub_section)
    assert answer.code == 2
    assert "hub.license: mit, but the base is under llama2" in answer.err
    assert not user.written
    assert user.train(hub={**hub_section, "license": "llama2"}).code == 0


def test_a_base_that_the_hub_does_not_have(user, trained, hub):
    answer = user.adapter("push", TUNED, "--base-model", "alice/none")
    assert answer.code == 2
    assert answer.err.startswith("hub.base_model: alice/none cannot be had from the hub")
    hub.create("alice/other", {"README.md": b"x"})
    assert user.adapter("push", TUNED, "--base-model", "alice/other").code == 2
    assert TUNED not in hub.repositories


def test_a_licence_that_could_not_be_read_is_not_said_to_be_none(user, trained, hub):
    hub.faults.add(Fault(f"GET /api/models/{BASE}$", status=403, times=None))
    answer = user.adapter("push", TUNED, "--license", "mit")
    assert answer.code == 0, answer.err
    assert "licence   mit; not checked against the base's, because the hub answered 403" in (
        answer.out
    )


def test_a_file_that_somebody_changed_on_the_hub(user, trained, hub):
    assert user.adapter("push", TUNED).code == 0
    config = json.loads((trained / "adapter_config.json").read_text())
    changed = json.dumps({**config, "lora_alpha": 64}).encode()
    hub.repositories.get(TUNED).commit({"adapter_config.json": changed}, "edit", author="alice")
    answer = user.adapter("pull", TUNED)
    assert answer.code == 3
    assert "adapter_config.json: changed since it was written" in answer.err
    # The card is there to be edited.
    hub.repositories.get(TUNED).commit(
        {
            "adapter_config.json": (trained / "adapter_config.json").read_bytes(),
            "README.md": b"# Mine\n",
        },
        "card",
        author="alice",
    )
    assert user.adapter("pull", TUNED).code == 0


@pytest.mark.parametrize(
    ("files", "code", "said"),
    [
        ({"training_args.bin": b"x"}, 2, "holds training_args.bin, which can run code"),
        ({"README.md": b"x", "adapter_config.json": b"{}"}, 2, "has no adapter_model.safetensors"),
        (None, 2, "no folder bob/x here, and the hub has no bob/x"),
    ],
)
def test_a_repository_that_is_no_adapter(user, hub, files, code, said):
    if files is not None:
        hub.create("bob/x", {"adapter_config.json": b"{}", **files})
    answer = user.adapter("pull", "bob/x")
    assert answer.code == code
    assert said in answer.err


def test_a_folder_with_a_pickle_is_not_published(user, trained, hub):
    (trained / "training_args.bin").write_bytes(b"x")
    answer = user.adapter("push", TUNED)
    assert answer.code == 3
    assert "training_args.bin is a pickle" in answer.err
    assert TUNED not in hub.repositories


def test_an_adapter_of_plain_peft_is_not_published_and_said_to_be_unproven(user, trained, hub):
    plain = shutil.copytree(trained, user.folder / "plain")
    for name in ("recipe.json", "sha256.json"):
        (plain / name).unlink()
    answer = user.adapter("push", TUNED, "--adapter", "plain")
    assert answer.code == 3
    assert "unproven" in answer.err
    assert TUNED not in hub.repositories


def test_the_token_reaches_the_hub_alone_and_no_file(user, trained, hub):
    assert user.adapter("push", TUNED).code == 0
    assert user.adapter("pull", TUNED, "--output", "mine").code == 0
    stored = [record for record in hub.requests if record.place == "storage"]
    assert stored
    assert not [record for record in stored if record.authorization]
    places = [*user.folder.rglob("*"), *Path(user.client.home).rglob("*")]
    for file in (place for place in places if place.is_file()):
        assert ALICE.encode() not in file.read_bytes(), file


def test_a_base_in_a_folder_of_this_machine(user, hub, tiny_checkpoint):
    config = user.write_config()
    folder = user.folder / "runs/mine"
    override = f"training.output_dir={folder}"
    assert user.command("train", "--config", str(config), override).code == 0
    answer = user.adapter("push", TUNED, "--adapter", str(folder))
    assert answer.code == 2
    assert "names its base by a path of this machine" in answer.err
    assert user.adapter("push", TUNED, "--adapter", str(folder), "--base-model", BASE).code == 0
    # Others have the base from the hub, and its weights are the same.
    assert user.adapter("verify", TUNED).code == 0
    assert str(tiny_checkpoint) not in hub.repositories.get(TUNED).files()["recipe.json"].decode()
