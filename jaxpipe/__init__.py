"""Pipeline parallelism for JAX: DualPipe, DualPipeV and their rivals as one SPMD program."""

import importlib.metadata

from jaxpipe import schedule as schedule
from jaxpipe import vocabulary as vocabulary
from jaxpipe.api import Pipeline as Pipeline
from jaxpipe.api import forward as forward
from jaxpipe.api import make_mesh as make_mesh
from jaxpipe.api import stack_stages as stack_stages
from jaxpipe.api import unstack_stages as unstack_stages
from jaxpipe.api import value_and_grad as value_and_grad
from jaxpipe.compiling import compiler_options as compiler_options
from jaxpipe.optimizer import Unchanged as Unchanged
from jaxpipe.optimizer import floating_only as floating_only
from jaxpipe.planning.chips import Achieved as Achieved
from jaxpipe.planning.chips import Chip as Chip
from jaxpipe.planning.memory import Memory as Memory
from jaxpipe.planning.planner import Plan as Plan
from jaxpipe.planning.planner import plan as plan
from jaxpipe.runtime.model import Context as Context
from jaxpipe.runtime.model import Output as Output
from jaxpipe.runtime.model import Params as Params

try:
    __version__ = importlib.metadata.version("jaxpipe")
except importlib.metadata.PackageNotFoundError:  # a checkout on the path, installed nowhere
    __version__ = "unknown"
