"""How large a workload is."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from eplb_jax import MoEConfig, RouterConfig
from jaxpipe.deepseek import MODELS, LayerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes(LayerConfig):
    """Equal layers, as `LayerConfig` describes them, and what runs through them.

    Tokens go to experts in turn (``RouterConfig.balanced``), as in DeepSeek's profiles.

    Attributes:
      layers: of the model's part.
      sequence: tokens of one training sequence, one sequence a microbatch and device.
      prompts, prompt: prompts of a device in prefill, both microbatches together, and tokens of each.
      requests, context: requests of a device in decode, both microbatches together, and tokens of each that are cached.
      expert_parallel: over how many devices the experts are spread in training, prefill and decode. A run on fewer
        devices holds the experts that one of those devices would hold, with all the tokens that they would get.
    """

    layers: int = 4
    sequence: int = 4096
    prompts: int = 4
    prompt: int = 4096
    requests: int = 128
    context: int = 4096
    expert_parallel: Mapping[str, int] = dataclasses.field(
        default_factory=lambda: {"train": 64, "prefill": 32, "decode": 128}
    )

    def __post_init__(self) -> None:
        """Checks what would otherwise fail within a compiled program."""
        super().__post_init__()
        if self.layers < 1:
            raise ValueError(f"layers={self.layers}: there is at least one")
        if self.prompts % 2 or self.requests % 2 or min(self.prompts, self.requests) < 2:
            raise ValueError(
                f"prompts={self.prompts}, requests={self.requests}: two microbatches share them, so make them even"
            )
        for workload, devices in self.expert_parallel.items():
            if self.moe.router.num_experts % devices:
                raise ValueError(
                    f"expert_parallel[{workload!r}]={devices} does not divide the {self.moe.router.num_experts} experts"
                )


def _published(name: str) -> Sizes:
    """A model's layer with balanced routing and activations that travel in full width."""
    model = MODELS[name]
    layer: dict[str, Any] = {field.name: getattr(model, field.name) for field in dataclasses.fields(LayerConfig)}
    router = dataclasses.replace(model.moe.router, balanced=True)
    layer["moe"] = dataclasses.replace(model.moe, router=router, fp8=False, precision="bf16")
    return Sizes(**layer)


SIZES: Mapping[str, Sizes] = {
    "dsv3": _published("dsv3-671b"),
    "tiny": Sizes(
        layers=2,
        heads=4,
        query_rank=24,
        latent=16,
        content=8,
        rotary=4,
        value=8,
        moe=MoEConfig(
            width=32, hidden=16, router=RouterConfig(16, 4, 4, 2, balanced=True), capacity_factor=1.25, backend="xla"
        ),
        sequence=64,
        prompts=4,
        prompt=32,
        requests=8,
        context=32,
        expert_parallel={"train": 8, "prefill": 8, "decode": 16},
    ),
}
"""DeepSeek-V3 (arXiv 2412.19437, 4.2) with the batch sizes of its published profiles, and one for CPU devices."""
