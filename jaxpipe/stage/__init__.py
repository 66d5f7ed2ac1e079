"""What one stage of a pipeline does, as functions made from one."""

from jaxpipe.stage.flops import matmul_flops as matmul_flops
from jaxpipe.stage.stage import Residuals as Residuals
from jaxpipe.stage.stage import SplitStage as SplitStage
from jaxpipe.stage.stage import split_stage as split_stage
