"""What a container or a batch job may still take, by files as Linux writes them."""

import psutil
import pytest

from recipe.memory import probe
from recipe.memory.cgroups import left_by_cgroups

UNLIMITED = 9223372036854771712  # version 1's


def group(folder, *, version, limit, used, droppable=0):
    folder.mkdir(parents=True, exist_ok=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"cache 77\nactive_file 5\n{names[2]} {droppable}\n")


@pytest.fixture
def left(tmp_path):
    def found(membership):
        (tmp_path / "cgroup").write_text(membership)
        return left_by_cgroups(tmp_path / "cgroup", tmp_path / "mount")

    return found


def test_of_version_2_the_least_of_all_above_counts(left, tmp_path):
    mount = tmp_path / "mount"
    group(mount / "slurm", version=2, limit=1000, used=400, droppable=50)
    group(mount / "slurm/job_1", version=2, limit=2000, used=100)
    group(mount / "slurm/job_1/step_0", version=2, limit="max", used=90)
    assert left("0::/slurm/job_1/step_0\n") == 650
    group(mount / "slurm/job_1", version=2, limit=300, used=100)
    assert left("0::/slurm/job_1/step_0\n") == 200
    group(mount / "slurm/job_1", version=2, limit=300, used=400)
    assert left("0::/slurm/job_1/step_0\n") == 0


def test_in_a_container_the_limit_lies_at_the_top(left, tmp_path):
    group(tmp_path / "mount", version=2, limit=500, used=200)
    assert left("0::/\n") == 300
    assert left("0::/kubepods/of/the/host\n") == 300


def test_version_1_has_a_folder_and_names_of_its_own(left, tmp_path):
    memory = tmp_path / "mount/memory"
    group(memory, version=1, limit=UNLIMITED, used=10)
    group(memory / "job", version=1, limit=600, used=200, droppable=30)
    group(memory / "of:another", version=1, limit=5, used=0)
    lines = "9:name=systemd:/\n4:cpuset,memory:/job\n3:cpu,cpuacct:/of:another\n"
    assert left(lines) == 430
    assert left("4:memory:/elsewhere\n") == UNLIMITED - 10


def test_without_groups_nothing_is_limited(left, tmp_path):
    assert left("") is None
    assert left("0::/user.slice\n") is None
    assert left_by_cgroups(tmp_path / "absent", tmp_path) is None
    assert left_by_cgroups(tmp_path, tmp_path) is None  # which cannot be read


def test_what_is_free_is_the_less_of_both(monkeypatch):
    available = psutil.virtual_memory().available
    monkeypatch.setattr(probe, "left_by_cgroups", lambda: 5)
    assert probe.free_memory("cpu") == 5
    monkeypatch.setattr(probe, "left_by_cgroups", lambda: None)
    assert probe.free_memory("cpu") == pytest.approx(available, rel=0.5)
    assert probe.free_memory("mps") is None
