"""launch/trainjob.yaml against the models that Kubeflow generates from its own API."""

import copy

import pytest
import yaml

from recipe.settings import load_settings
from tests.launch.fake_slurm import REPOSITORY

FILE = REPOSITORY / "launch/trainjob.yaml"


@pytest.fixture
def job():
    return yaml.safe_load(FILE.read_text())


def understood(job):
    """The API's own reading: types are strict, and what it does not know is left out."""
    models = pytest.importorskip(
        "kubeflow_trainer_api.models", reason="pip install kubeflow-trainer-api"
    )
    return models.TrainerV1alpha1TrainJob.from_dict(copy.deepcopy(job)).to_dict()


def test_the_api_knows_every_field(job):
    assert (job["apiVersion"], job["kind"]) == ("trainer.kubeflow.org/v1alpha1", "TrainJob")
    assert understood(job) == job


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("spec", "podTemplateOverrides"),
        ("spec.trainer", "workingDir"),
        ("spec.trainer.env.1.valueFrom.secretKeyRef", "secret"),
        ("spec.runtimePatches.0", "spec"),
    ],
)
def test_a_field_that_it_does_not_know_would_be_seen(job, path, key):
    place = job
    for name in path.split("."):
        place = place[int(name) if name.isdigit() else name]
    place[key] = "x"
    assert understood(job) != job


def test_a_value_of_another_type_would_be_seen(job):
    job["spec"]["trainer"]["numNodes"] = "2"
    with pytest.raises(ValueError, match="numNodes"):
        understood(job)


def test_torchrun_takes_the_nodes_from_the_runtime(job):
    """It sets PET_NNODES, PET_NODE_RANK and others, which options would overrule."""
    trainer = job["spec"]["trainer"]
    assert job["spec"]["runtimeRef"] == {"name": "torch-distributed"}
    assert trainer["command"] == ["torchrun", "recipe/train.py"]
    assert not [entry for entry in trainer["env"] if entry["name"].startswith("PET_")]


def test_the_run_lies_on_the_disk_that_nodes_share(job):
    (patch,) = job["spec"]["runtimePatches"]
    (node,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pod = node["template"]["spec"]["template"]["spec"]
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    claims = {volume["name"] for volume in pod["volumes"] if "persistentVolumeClaim" in volume}
    shared = {path for name, path in mounts.items() if name in claims}
    arguments = job["spec"]["trainer"]["args"]
    written = [word.split("=")[1] for word in arguments if word.startswith("training.output_dir=")]
    written += [e["value"] for e in job["spec"]["trainer"]["env"] if e["name"] == "HF_HOME"]
    assert len(written) == 2
    assert all(path.startswith(tuple(f"{one}/" for one in shared)) for path in written)
    assert pod["terminationGracePeriodSeconds"] > 30  # torchrun's own patience
    assert {node["name"], pod["containers"][0]["name"]} == {"node"}  # as the runtime calls them


def test_its_arguments_are_valid(job):
    config, *overrides = job["spec"]["trainer"]["args"]
    load_settings(config.removeprefix("--config="), overrides)


def test_the_token_comes_from_a_secret(job):
    (token,) = [entry for entry in job["spec"]["trainer"]["env"] if entry["name"] == "HF_TOKEN"]
    assert set(token["valueFrom"]) == {"secretKeyRef"}
    assert "hf_..." in FILE.read_text()
