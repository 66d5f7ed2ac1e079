"""Pipeline parallelism for JAX: DualPipe, DualPipeV and their rivals as one SPMD program.

What `__all__` names is public; all modules below are internal and may change without notice.

`value_and_grad` makes a pipelined training step of a model's functions, a schedule and a mesh, and `forward` the
forward pass alone; `Params`, `Context` and `Output` are what passes between them and the model. `make_mesh`,
`stack_stages`, `pad_batch` and `compiler_options` prepare a run, `floating_only` and `shard_optimizer` an optimizer,
`plan` foretells memory and time, `fit_stash` how much stages may keep, and `choose` measures a model's stage and picks
the schedule.

Public packages and modules beside this one: `jaxpipe.schedule` builds, checks, simulates and draws schedules,
`jaxpipe.stage` divides the backward pass of one stage, and `jaxpipe.vocabulary` shards an embedding over the ranks.
Imported by their own names, because they need Flax, are `jaxpipe.flax`, which makes stages of Flax modules and of rows
of layers, and `jaxpipe.deepseek`, DeepSeek-V3's model.
"""

import importlib.metadata

from jaxpipe import schedule, vocabulary
from jaxpipe.api import Pipeline, forward, make_mesh, value_and_grad
from jaxpipe.batches import pad_batch
from jaxpipe.compiling import compiler_options
from jaxpipe.layer_optimizers import muon, per_layer
from jaxpipe.optimizer import Unchanged, floating_only
from jaxpipe.optimizer_state import init_optimizer
from jaxpipe.params import Params, stack_stages, unstack_stages
from jaxpipe.planning.chips import Achieved, Chip
from jaxpipe.planning.choosing import choose, choose_pipeline
from jaxpipe.planning.comparing import ScheduleChoice
from jaxpipe.planning.fitting import FittedStash, fit_stash
from jaxpipe.planning.memory import Memory
from jaxpipe.planning.planner import Plan, plan
from jaxpipe.restacking import restack, restore
from jaxpipe.runtime.model import Context, Output
from jaxpipe.runtime.stage_kinds import StageKinds
from jaxpipe.stacking import Stacking
from jaxpipe.trainable import trainable_mask
from jaxpipe.zero import shard_optimizer

__all__ = [
    "Achieved",
    "Chip",
    "Context",
    "FittedStash",
    "Memory",
    "Output",
    "Params",
    "Pipeline",
    "Plan",
    "ScheduleChoice",
    "Stacking",
    "StageKinds",
    "Unchanged",
    "choose",
    "choose_pipeline",
    "compiler_options",
    "fit_stash",
    "floating_only",
    "forward",
    "init_optimizer",
    "make_mesh",
    "muon",
    "pad_batch",
    "per_layer",
    "plan",
    "restack",
    "restore",
    "schedule",
    "shard_optimizer",
    "stack_stages",
    "trainable_mask",
    "unstack_stages",
    "value_and_grad",
    "vocabulary",
]

try:
    __version__ = importlib.metadata.version("jaxpipe")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path, installed nowhere
    __version__ = "unknown"
