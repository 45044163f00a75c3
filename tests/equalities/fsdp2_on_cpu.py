"""train.py with FSDP2 on CPU processes, which torch does and accelerate does not.

accelerate shards where it believes to see several GPUs. It is made to believe so here, with the
CPU's devices and gloo in their place, so that the path of ``launch/fsdp2.yaml`` runs on any
machine: accelerate's own sharding, loading and gathering, and all of ours. What it cannot show is
how CUDA streams and NCCL behave; tests/gpu does.
"""

import sys

from accelerate import PartialState
from accelerate.utils import DistributedType

from recipe import train
from recipe.exit_codes import run_command
from recipe.training import engine_limits

_init = PartialState.__init__


def _as_on_gpus(self: PartialState, *arguments: object, **named: object) -> None:
    _init(self, *arguments, **named)
    if self.distributed_type == DistributedType.MULTI_CPU:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


PartialState.__init__ = _as_on_gpus
engine_limits._of_the_launcher = lambda engine, on_cpu: iter(())

if __name__ == "__main__":
    sys.exit(run_command(train.main))
