"""The model that the tests of the pretraining example train, and its batches; to be imported first."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples"))

from tests.jaxpipe.deepseek.models import SMALL as SMALL
from tests.jaxpipe.deepseek.models import make_batch as make_batch
from tests.jaxpipe.deepseek.models import small as small
