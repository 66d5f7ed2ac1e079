"""One rank of peers_gpu.py's PyTorch side: the dense model through PyTorch's own schedules and DeepSeek's.

peers_gpu.py starts one such process for each GPU. Weights are bfloat16, their gradients are added up in float32 or
bfloat16 as soon as a schedule asks for the weights' part of a backward (`Sums`). What all programs of a run do alike
stands here once: clear the sums, run the schedule, and, where a stage has two copies, bring weights and gradients from
one to the other.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from peers_model import HEAD, ROUNDS, seed, shapes, spread

torch: Any = importlib.import_module("torch")
nn: Any = torch.nn
functional: Any = torch.nn.functional
distributed: Any = importlib.import_module("torch.distributed")

TORCH = {  # name -> its stages on a rank: one, two a world apart, or two that mirror each other
    "Schedule1F1B": "one",
    "ScheduleInterleaved1F1B": "apart",
    "ScheduleInterleavedZeroBubble": "apart",
    "ScheduleZBVZeroBubble": "mirrored",
    "ScheduleDualPipeV": "mirrored",
}


def numbers(name: str, layer: int, shape: tuple[int, ...], scale: float, device: Any) -> Any:
    """float32, uniform within -scale and scale: those of `peers_model.numbers`, bit by bit."""

    def mix(values: Any) -> Any:
        for shift, factor in ROUNDS:  # in 64 bits, of which the lower 32 count
            values = ((values ^ (values >> shift)) * factor) & 0xFFFFFFFF
        return values

    places = torch.arange(math.prod(shape), dtype=torch.int64, device=device)
    unit = (mix(mix(places) ^ seed(layer, name)) >> 8).to(torch.float32) * 2.0**-23 - 1.0
    return (unit * scale).reshape(shape)


def mean_square(count: int) -> Callable[[Any, Any], Any]:
    """A microbatch's part in the mean over so many; the target is not looked at."""
    return lambda y, _: y.float().square().mean() / count


class Sums:
    """Weight gradients that a backward puts off, and how they are added up.

    Attributes:
      dtype: of the sums.
      kind: "fused", a product that adds to the sum, or "added", a product in bfloat16 and then a sum.
      later: whether to put them off.
      waiting: those that were put off.
    """

    def __init__(self, dtype: str, kind: str, device: Any) -> None:
        self.dtype, self.later, self.waiting = getattr(torch, dtype), lambda: True, []
        self.put: Callable[[Callable[[], None]], None] = self.waiting.append
        self.kind = kind if kind != "best" else "fused" if self._is_right("fused", device) else "added"

    def add(self, total: Any, ct: Any, x: Any) -> None:
        """Adds ``ct.T @ x`` to a sum."""
        if self.kind == "added":
            total.add_(ct.T @ x)
        elif total.dtype == x.dtype:
            total.addmm_(ct.T, x)
        else:
            torch.addmm(total, ct.T, x, out_dtype=total.dtype, out=total)

    def runner(self) -> Callable[[], None]:
        """What the last backward put off, to be run later."""
        calls = list(self.waiting)
        self.waiting.clear()

        def run() -> None:
            for call in calls:
                call()

        return run

    def _is_right(self, kind: str, device: Any) -> bool:
        """Whether a way to add up is there, and right."""
        self.kind = kind
        ct, x = (torch.randn(256, width, device=device).bfloat16() for width in (128, 64))
        total = torch.ones(128, 64, device=device, dtype=self.dtype)
        try:
            self.add(total, ct, x)
        except (RuntimeError, TypeError, NotImplementedError):
            return False
        expected = 1 + ct.double().T @ x.double()
        return bool((total.double() - expected).abs().max() < 0.5)


def linear_of(sums: Sums) -> Any:
    """A linear layer without bias whose weight gradient goes into ``weight.total``, now or later."""

    class Apply(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            ctx.save_for_backward(x, weight)
            return functional.linear(x, weight)

        @staticmethod
        def backward(ctx: Any, ct: Any) -> Any:
            x, weight = ctx.saved_tensors

            def add() -> None:
                sums.add(weight.total, ct.flatten(0, -2), x.flatten(0, -2))

            if sums.later():
                sums.put(add)
            else:
                add()
            return (ct @ weight if ctx.needs_input_grad[0] else None), None

    class Linear(nn.Module):
        def __init__(self, name: str, layer: int, inputs: int, outputs: int, device: Any) -> None:
            super().__init__()
            values = numbers(name, layer, (inputs, outputs), spread(inputs), device)
            self.weight = nn.Parameter(values.to(torch.bfloat16).T.contiguous())
            self.weight.total = torch.zeros(outputs, inputs, dtype=sums.dtype, device=device)

        def forward(self, x: Any) -> Any:
            return Apply.apply(x, self.weight)

    return Linear


def stage_class(sums: Sums, width: int, device: Any) -> Any:
    """A stage of the dense model: ``DenseStage(first layer, layers)``."""
    linear = linear_of(sums)

    class Layer(nn.Module):
        def __init__(self, index: int) -> None:
            super().__init__()
            for name, (inputs, outputs) in shapes(width).items():
                setattr(self, name, linear(name, index, inputs, outputs, device))

        def forward(self, x: Any) -> Any:
            heads = max(1, width // HEAD)
            qkv = self.qkv(x).view(x.shape[0], -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            mixed = functional.scaled_dot_product_attention(*qkv, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).reshape(x.shape))
            gate, value = self.up(x).chunk(2, -1)
            return x + self.down(functional.silu(gate) * value)

    class DenseStage(nn.Module):
        def __init__(self, first: int, layers: int) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Layer(first + i) for i in range(layers))

        def forward(self, x: Any) -> Any:
            for layer in self.layers:
                x = layer(x)
            return x

        @classmethod
        def overlapped_forward_backward(
            cls, module: Any, inputs: Any, criterion: Any, labels: Any, _: Any, loss: Any, outputs: Any, cts: Any
        ) -> Any:
            """A forward, then another microbatch's backward; nothing of the dense model could hide behind the other."""
            y = module(*inputs)
            value = None if criterion is None else criterion(y, *labels)
            if loss is None:
                importlib.import_module("dualpipe.utils").run_backward(outputs, cts)
            else:
                loss.backward()
                loss.detach_()
            return [y], value

    return DenseStage


class Rank:
    """One process: its device, and the programs that it runs together with the others'."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.rank, self.world = args, int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", self.rank) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
            distributed.init_process_group("nccl", device_id=self.device)
        else:
            distributed.init_process_group("gloo")
        self.sums = Sums(args.grad_dtype, args.sums, self.device)
        self.stage = stage_class(self.sums, args.width, self.device)

    def batch(self, count: int) -> Any:
        """The microbatches, ``[count, tokens, width]``."""
        shape = (count, self.args.tokens, self.args.width)
        return numbers("batch", 0, shape, 3**0.5, self.device).to(torch.bfloat16)

    def of_torch(self, name: str, count: int) -> tuple[list[Any], Callable[[], Any], None]:
        """PyTorch's schedule: this rank's stages, and a step that returns the losses it knows."""
        schedules: Any = importlib.import_module("torch.distributed.pipelining.schedules")
        pipelining: Any = importlib.import_module("torch.distributed.pipelining")
        kind, layers = TORCH[name], self.args.layers
        if not hasattr(schedules, name):
            raise NotImplementedError(f"torch {torch.__version__} has no {name}")
        last = self.world * (1 if kind == "one" else 2) - 1
        mine = {
            "one": [self.rank],
            "apart": [self.rank, self.rank + self.world],
            "mirrored": [self.rank, last - self.rank],
        }[kind]
        layers //= len(mine)
        modules = [self.stage(i * layers, layers) for i in mine]
        x = self.batch(count)
        self.sums.later, self.sums.put = lambda: True, self.sums.waiting.append
        stages = [
            pipelining.PipelineStage(
                module, i, last + 1, self.device, input_args=(x[:1],), output_args=(x[:1],), dw_builder=self.sums.runner
            )
            for module, i in zip(modules, mine, strict=True)
        ]
        for each in stages if not self.cuda else ():  # it warms up links, also to itself, which gloo has not
            each._get_init_p2p_neighbors_ops = list
        run = getattr(schedules, name)(
            stages[0] if kind == "one" else stages, count, loss_fn=mean_square(count), scale_grads=False
        )

        def step() -> Any:
            inputs, losses = (x,) if 0 in mine else (), []
            ends = {"target": x.new_zeros(count, 1), "losses": losses} if last in mine else {}
            run.step(*inputs, **ends, return_outputs=False)
            return sum(losses)

        return modules, step, None

    def of_deepseek(self, name: str, count: int) -> tuple[list[Any], Callable[[], Any], Callable[[str], None] | None]:
        """DeepSeek's: this rank's modules, a step, and for DualPipe what goes from one copy of a stage to the other."""
        package: Any = importlib.import_module("dualpipe")
        store: Any = importlib.import_module("dualpipe.utils").WeightGradStore
        self.sums.later, self.sums.put = lambda: store.enabled, store.put
        package.set_p2p_tensor_shapes([(1, self.args.tokens, self.args.width)])
        package.set_p2p_tensor_dtype(torch.bfloat16)
        folded = name == "DualPipeV"
        layers = self.args.layers // (2 if folded else 1)
        mirror = (2 * self.world if folded else self.world) - 1 - self.rank
        modules = [self.stage(i * layers, layers) for i in (self.rank, mirror)]
        model = getattr(package, name)(modules)
        x = self.batch(count)
        targets = x.new_zeros(count, 1)
        if folded:
            ends = (x, targets) if self.rank == 0 else (None, None)
        else:  # half the microbatches enter at either end, and leave at the other
            half = count // 2
            ends = {0: (x[:half], targets[half:]), self.world - 1: (x[half:], targets[:half])}.get(
                self.rank, (None, None)
            )

        def step() -> Any:
            loss, _ = model.step(ends[0], num_chunks=count, criterion=mean_square(count), labels=(ends[1],))
            return 0.0 if loss is None else loss.sum()

        return modules, step, None if folded else lambda part: self.exchange(modules, part)

    def exchange(self, modules: list[Any], part: str) -> None:
        """Brings the second module's "weights" from the rank that owns its stage, or takes its "gradients" there."""
        own, copy = (list(module.parameters()) for module in modules)
        if part == "weights":
            send, receive = [p.data for p in own], [p.data for p in copy]
        else:
            send = [p.total for p in copy]
            receive = [torch.empty_like(total) for total in send]
        peer = self.world - 1 - self.rank
        both = [distributed.P2POp(distributed.isend, each, peer) for each in send]
        both += [distributed.P2POp(distributed.irecv, each, peer) for each in receive]
        for work in distributed.batch_isend_irecv(both):
            work.wait()
        if part == "gradients":
            for parameter, more in zip(own, receive, strict=True):
                parameter.total.add_(more)

    def measure(self, side: str, name: str, count: int) -> dict[str, Any]:
        """A row: the median of some steps, loss and norm of the gradients, and the largest memory of a rank."""
        modules, run, exchange = (self.of_torch if side == "torch" else self.of_deepseek)(name, count)
        totals = [parameter.total for module in modules for parameter in module.parameters()]

        def step() -> Any:
            torch._foreach_zero_(totals)
            if exchange:
                exchange("weights")
            loss = run()
            if exchange:
                exchange("gradients")
            return loss

        loss = torch.as_tensor(step(), dtype=torch.float32, device=self.device).detach()
        owned = modules[:1] if exchange else modules
        square = sum(p.total.float().square().sum() for module in owned for p in module.parameters())
        checks = torch.stack([loss, square])
        distributed.all_reduce(checks)
        loss, square = checks.tolist()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        row = {"step": self.seconds(step), "loss": loss, "norm": square**0.5, "how": self.sums.kind}
        if exchange:
            row["ends"] = self.seconds(lambda: (exchange("weights"), exchange("gradients")))
        peak = torch.tensor(torch.cuda.max_memory_allocated() if self.cuda else 0, device=self.device)
        distributed.all_reduce(peak, op=distributed.ReduceOp.MAX)
        return row | {"peak": peak.item()}

    def seconds(self, call: Callable[[], Any]) -> float:
        """Median of calls that begin and end on all ranks together."""
        taken: list[float] = []
        for _ in range(self.args.repeats):
            self.wait()
            begin = time.perf_counter()
            call()
            self.wait()
            taken.append(time.perf_counter() - begin)
        return statistics.median(taken)

    def wait(self) -> None:
        """Until the devices of all ranks are done."""
        if self.cuda:
            torch.cuda.synchronize()
        distributed.barrier()
        if self.cuda:
            torch.cuda.synchronize()


def main() -> None:
    """Runs the jobs of the first argument, ``{"args": options, "jobs": [[side, name, microbatches], ..]}``."""
    given = json.loads(sys.argv[1])
    rank = Rank(argparse.Namespace(**given["args"]))
    for index, job in enumerate(given["jobs"]):
        if rank.rank == 0:
            print(json.dumps({"job": index}), flush=True)
        try:
            row = rank.measure(*job)
        except Exception as error:  # the others may wait for this rank for ever
            print(json.dumps({"job": index, "error": f"{type(error).__name__}: {error}".splitlines()[0]}), flush=True)
            traceback.print_exc()
            os._exit(1)
        if rank.rank == 0:
            print(json.dumps({"job": index, "row": row}), flush=True)
        gc.collect()
        if rank.cuda:
            torch.cuda.empty_cache()
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
