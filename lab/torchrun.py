"""Several processes on torch's own engine: `torchrun --nproc-per-node 4 train.py ...` (docs/scale.md).

`Team` is what `team.team()` returns there. torch.distributed moves numbers between the processes: gloo between CPUs,
NCCL between GPUs. With --shard, FSDP2 holds a part of each weight, its gradient and its moments in each process.

    python -m lab.torchrun --run RUN    # from the phases of a run: how long a step would take on 1, 2, 4 and 8 GPUs
"""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partialmethod
from pathlib import Path
from types import MethodType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from eval import Ranged, run_main, setting
from flow_grpo import token_logprobs
from tasks import read_kept
from team import Alone, team
from tools import UserError, one_line

ENDED = "another process has ended, or torchrun was told to end; the same command goes on from the last checkpoint"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
PATIENCE = timedelta(days=1)  # torchrun notices a dead process; a slow one is waited for


class Team(Alone):
    """This process among `world_size` equal ones."""

    def __init__(self) -> None:
        local_rank = int(os.environ["LOCAL_RANK"])
        gpus = torch.cuda.device_count()
        if gpus:
            if local_rank >= gpus:
                raise UserError(f"torchrun starts more processes than the {gpus} GPUs here: lower --nproc-per-node")
            torch.cuda.set_device(local_rank)
        try:
            dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            raise UserError(f"the processes of torchrun do not find each other: {one_line(error)}") from error
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        leave_on_sigterm()
        if self.rank:  # one process speaks for all
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
            tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)

    def share(self, rows: list) -> list:
        """Neighbours, so that their prompts begin alike; as many as for the other processes, or one less."""
        return rows[len(rows) * self.rank // self.world_size : len(rows) * (self.rank + 1) // self.world_size]

    def gather(self, rows: list) -> list:
        parts = [None] * self.world_size
        with others_are_there():
            dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def add_gradients(self, policy: Any) -> None:
        if isinstance(policy, FSDPModule):  # it has added them up in the backward pass
            return
        trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        for parameter in trained:
            if parameter.grad is None:  # no row fell to this process
                parameter.grad = torch.zeros_like(parameter)
        with others_are_there():
            for work in [dist.all_reduce(parameter.grad, async_op=True) for parameter in trained]:
                work.wait()

    def announce(self, policy: Any, run: Path) -> None:
        saved = run / "checkpoint" / "trainer.pt"
        seen = self.gather([((run / "config.json").exists(), saved.exists() and saved.stat().st_size)])
        if len(set(seen)) > 1:
            raise UserError(f"the processes see different files in {run}: it must be one folder for all machines")
        sizes = [(p.numel(), p.requires_grad) for p in policy.parameters()]
        total, trained = sum(n for n, _ in sizes), sum(n for n, needed in sizes if needed)
        moved = traffic(total, trained, self.world_size, isinstance(policy, FSDPModule))
        sends = "; ".join(f"{count / 1e9:.3g} GB {when}" for when, count in moved.items())
        print(f"{self.world_size} processes; each sends {sends}")

    def weights(self, policy: Any) -> Iterator[tuple[str, Tensor]]:
        for name, weight in policy.state_dict().items():  # one after the other: all of them may not fit here
            yield name, weight.full_tensor() if isinstance(weight, DTensor) else weight

    def snapshot(self, policy: Any, optimizer: Any) -> tuple[dict, dict]:
        if not isinstance(policy, FSDPModule):
            return super().snapshot(policy, optimizer)
        with others_are_there():
            weights, state = get_state_dict(policy, optimizer, options=WHOLE)  # all to rank 0, nothing to the others
        names = [name for name, _ in policy.named_parameters()]  # once each, if embedding and head share one weight
        return {name: weights[name] for name in names if name in weights}, state

    def restore(self, policy: Any, optimizer: Any, weights: dict, state: dict) -> None:
        if not isinstance(policy, FSDPModule):
            return super().restore(policy, optimizer, weights, state)
        with others_are_there():
            set_state_dict(policy, optimizer, model_state_dict=weights, optim_state_dict=state, options=WHOLE)


# --- a policy of which each process holds a part ----------------------------------------------------------------------


def shard(policy: Any, config: Any, precision: Any) -> None:
    """Split the weights of each layer over the processes. They are gathered only while the layer computes."""
    if team().world_size == 1:
        raise UserError("--shard True needs several processes: start train.py by torchrun")
    if config.lora_rank or config.optimizer != "adamw" or precision.scaler.is_enabled():
        raise UserError("--shard True does not go with --lora_rank, --optimizer adamw8bit or --dtype float16")
    mesh = dist.init_device_mesh(precision.device, (team().world_size,))
    formats = MixedPrecisionPolicy(param_dtype=precision.engine, reduce_dtype=torch.float32)
    for module in [*policy.model.layers, policy]:
        fully_shard(module, mesh=mesh, mp_policy=formats)
        module.set_gradient_divide_factor(1.0)  # the loss is a sum over the rows of all processes: no mean
        module.set_force_sum_reduction_for_comms(True)
    policy.forward = MethodType(token_logprobs, policy)


def level(batches: list, policy: Any) -> list:
    """As many batches in each process, because all must call each layer equally often. Those added weigh nothing."""

    counts = team().gather([len(batches)])
    if min(counts) == max(counts):
        return batches

    def weightless(batch: Any, device: Any) -> Any:
        tensors = (batch.advantages, 0 * batch.weights, batch.sampler_logprobs)
        return type(batch)(batch.turns, *(x.to(device) for x in tensors))

    blank = team().gather([weightless(batch, "cpu") for batch in batches[:1]])[0]  # a process without rows has none
    return batches + [weightless(blank, policy.device)] * (max(counts) - len(batches))


# --- the end of a process ---------------------------------------------------------------------------------------------


def leave(reason: str = "") -> None:
    """One line, then the end of this process: what it would clean up waits for others that are gone."""
    os.write(2, f"{Path(sys.argv[0]).name}: {ENDED}{reason}\n".encode())
    os._exit(1)


@contextmanager
def others_are_there() -> Iterator[None]:
    """A process that has ended closes its connections, and torch calls that a RuntimeError of many lines."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        leave(f" ({one_line(error)})")


def leave_on_sigterm() -> None:
    """torchrun sends SIGTERM to the others if one process has ended. They may wait for that one inside torch, where no
    Python handler runs. So a thread waits for the number of the signal."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    signal.signal(signal.SIGTERM, lambda *_: None)

    def wait() -> None:
        while os.read(reading, 1)[0] != signal.SIGTERM:
            pass
        leave()

    threading.Thread(target=wait, daemon=True).start()


# --- what it costs, and what it brings --------------------------------------------------------------------------------


def traffic(total: int, trained: int, world_size: int, shard: bool) -> dict[str, float]:
    """Bytes that each process sends, for a policy of `total` parameters. A ring of N processes sends (N - 1) / N of a
    tensor to gather it or to add it up in parts, and twice that for both. Gradients are float32. FSDP2 gathers bfloat16
    weights for the forward and the backward pass, and float32 weights for the engine."""
    part = (world_size - 1) / world_size
    if shard:
        return {"per micro-batch": part * (2 * 2 * total + 4 * trained), "per step for the engine": part * 4 * total}
    return {"per update": 2 * part * 4 * trained}


@dataclass
class ScaleConfig(Ranged):
    run: str = setting("runs/tinyworld-seed0", "folder of a run with one process", group="the calculation")
    parameters: float = setting(0.68e6, "parameters that are trained", low=1)
    bandwidth: float = setting(100.0, "GB per second that one process can send", low=0.001)
    updates: int = setting(2, "updates per step", low=1)


def main(config: ScaleConfig) -> None:
    path = Path(config.run) / "metrics.jsonl"
    steps = [m for m in read_kept(path, dict, "is damaged ({error})") if m["step"]]
    if not steps:
        raise UserError(f"{path} has no steps")
    mean = {name: sum(m[name] for m in steps) / len(steps) for name in ("t_rollout", "t_update", "t_judge", "t_sync")}
    print(f"Calculated from {len(steps)} steps of {config.run}: rollouts, judging and updates divide, sync does not.")
    for n in (1, 2, 4, 8):
        sent = config.updates * sum(traffic(config.parameters, config.parameters, n, False).values())
        sending = sent / (config.bandwidth * 1e9)
        divided = (mean["t_rollout"] + mean["t_judge"] + mean["t_update"]) / n
        print(f"{n} processes: {divided + mean['t_sync'] + sending:8.2f} s per step, of which {sending:.3f} s sending")


if __name__ == "__main__":
    run_main(main, ScaleConfig)
