"""A SLURM of two folders: programs by its names that run everything on this machine.

A task of a step is a shell of this user. ``accelerate`` starts one process in a session of its own,
as torchrun does; that one does what ``FAKE_TRAINING`` says (fails on the ``FAKE_FAILING`` nodes).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
JOB = "4711"

SRUN = r"""#!/usr/bin/env bash
command=("$@")
for argument in "$@"; do
  case $argument in
    --nodes=*) nodes=${argument#*=} ;;
    --output=*) output=${argument#*=} ;;
  esac
  [[ $argument == --* ]] || break
  command=("${command[@]:1}")
done
for ((node = 0; node < nodes; node++)); do
  SLURM_NODEID=$node "${command[@]}" >>"${output//%n/$node}" 2>&1 &
  echo "$!" >>"$FAKE/tasks"
done
code=0
for task in $(jobs -p); do
  wait -n || { code=$?; [[ "$*" != *--kill-on-bad-exit=1* ]] || kill $(jobs -p); }
done
exit "$code"
"""
# FAKE_TRACKING=linuxproc: every process of the step gets it, and not its tasks alone.
SCANCEL = r"""#!/usr/bin/env bash
[ "$*" = "--signal=USR1 $SLURM_JOB_ID" ] || exit 1
for task in $(cat "$FAKE/tasks"); do
  if [ "$FAKE_TRACKING" = linuxproc ]; then pkill -USR1 -P "$task"; fi
  kill -USR1 "$task"
done
"""
SCONTROL = r"""#!/usr/bin/env bash
case "$1 $2" in
  "show hostnames") printf '%s\n' ${3//,/ } ;;
  "show job") echo "JobId=$4 PreemptEligibleTime=2026-11-26T10:00:00 PreemptTime=$FAKE_PREEMPTED" ;;
  "requeue $SLURM_JOB_ID") echo "$2" >>"$FAKE/requeued" ;;
  *) exit 1 ;;
esac
"""
ACCELERATE = r"""#!{python}
import json, os, subprocess, sys, time
fake = os.environ["FAKE"]
pet = {{name: value for name, value in os.environ.items() if name.startswith("PET_")}}
with open(fake + "/calls", "a") as calls:
    print(json.dumps([os.environ["SLURM_NODEID"], sys.argv[1:], pet]), file=calls)
trainer = [sys.executable, fake + "/trainer.py", *sys.argv[1:]]
code = subprocess.Popen(trainer, start_new_session=True).wait()
with open(fake + "/ended", "a") as ended:
    print(code, file=ended)
time.sleep(float(os.environ.get("FAKE_LINGERING", 0)))
sys.exit(code % 256)
"""
TRAINER = r"""
import os, signal, sys, time
from pathlib import Path
asked = [word.split("=", 1)[1] for word in sys.argv if word.startswith("training.output_dir=")]
asked += [word.split("=", 1)[1] for word in sys.argv if "resume_from_checkpoint=" in word]
run, does = Path(asked[0]), os.environ["FAKE_TRAINING"]
def save(number, frame):
    if does == "save":
        (run / "checkpoint-7").mkdir(exist_ok=True)
    if does == "end":
        (run / "adapter").mkdir(exist_ok=True)
    sys.exit(128 + number)
signal.signal(signal.SIGUSR1, save)
signal.signal(signal.SIGTERM, save)
run.mkdir(parents=True, exist_ok=True)
(run / "settings.yaml").touch()
if does == "finish":
    (run / "adapter").mkdir(exist_ok=True)
elif does.startswith("fail") and os.environ["SLURM_NODEID"] in os.environ["FAKE_FAILING"]:
    others = set("01") - set(os.environ["FAKE_FAILING"])
    while not all(Path(os.environ["FAKE"], "trains-" + node).exists() for node in others):
        time.sleep(0.02)
    sys.exit(int(does.split()[1]))
else:
    Path(os.environ["FAKE"], "trains-" + os.environ["SLURM_NODEID"]).touch()
    time.sleep(60)
"""
# What the script waits with between two signals.
SLEEP = "#!/bin/sh\nexec /bin/sleep 0.3\n"


class FakeSlurm:
    """A checkout in ``root``/repository, and SLURM's programs beside it."""

    def __init__(self, root: Path) -> None:
        self.repository, self.fake = root / "repository", root / "fake"
        (self.repository / "recipe").mkdir(parents=True)
        (self.repository / "recipe/train.py").touch()
        shutil.copytree(REPOSITORY / "launch", self.repository / "launch")
        (self.fake / "bin").mkdir(parents=True)
        (self.fake / "trainer.py").write_text(TRAINER)
        programs = {
            "srun": SRUN,
            "scancel": SCANCEL,
            "scontrol": SCONTROL,
            "accelerate": ACCELERATE.format(python=sys.executable),
            "sleep": SLEEP,
        }
        for name, text in programs.items():
            (self.fake / "bin" / name).write_text(text)
            (self.fake / "bin" / name).chmod(0o755)

    def submit(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        """Start the script as a job of two nodes with a GPU each, unless told otherwise."""
        path = f"{self.fake / 'bin'}{os.pathsep}{os.environ['PATH']}"
        job = {
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NODELIST": "n1,n2",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_GPUS_ON_NODE": "1",
            "FAKE": str(self.fake),
            "FAKE_TRAINING": "finish",
            "FAKE_FAILING": "01",
            "FAKE_TRACKING": "cgroup",
            "FAKE_PREEMPTED": "None",
        }
        return subprocess.Popen(
            ["bash", "launch/slurm.sh", *arguments],
            cwd=self.repository,
            env={"HOME": str(self.fake), "PATH": path, **job, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Its exit code, and what the job's output says."""
        return self.ended(self.submit(*arguments, **environment))

    def ended(self, job: subprocess.Popen[str]) -> tuple[int, str]:
        try:
            said, _ = job.communicate(timeout=20)
        finally:
            job.kill()
        return job.returncode, said

    def wait_until_it_trains(self, nodes: int = 2) -> None:
        deadline = time.monotonic() + 20
        while len(list(self.fake.glob("trains-*"))) < nodes:
            assert time.monotonic() < deadline, "no training began"
            time.sleep(0.02)

    def terminate_tasks(self) -> None:
        """As scancel and a preemption do."""
        for task in (self.fake / "tasks").read_text().split():
            os.kill(int(task), signal.SIGTERM)

    def calls(self) -> list[tuple[str, list[str], dict[str, str]]]:
        """Node, arguments of accelerate, and torchrun's variables; by node."""
        file = self.fake / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return sorted(tuple(json.loads(line)) for line in lines)

    def ended_trainings(self) -> list[str]:
        """Exit codes of those whose accelerate lived to see them."""
        return (self.fake / "ended").read_text().split()

    def requeued(self) -> list[str]:
        file = self.fake / "requeued"
        return file.read_text().split() if file.exists() else []
