"""What one stage of a pipeline does, as functions made from one."""

from jaxpipe.stage.effects import check_effects as check_effects
from jaxpipe.stage.flops import matmul_flops as matmul_flops
from jaxpipe.stage.once import vjp_once as vjp_once
from jaxpipe.stage.split import split_stage as split_stage
from jaxpipe.stage.stage import Residuals as Residuals
from jaxpipe.stage.stage import SplitStage as SplitStage
