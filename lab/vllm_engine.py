"""vLLM in the trainer's process, an engine for a GPU: `--engine vllm`."""

import asyncio
import copy
import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path

import torch
from transformers import GenerationConfig

from llm import Completion, Engine, EngineError, Request
from team import team

VLLM_SETTINGS = {  # vLLM reads them once, at its import
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights are handed over in memory, not through a socket
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TRITON_F32_DEFAULT": "ieee",  # else its attention rounds float32 to tf32, unlike the trainer
    "OMP_NUM_THREADS": str(torch.get_num_threads()),
}


class VLLMEngine(Engine):
    """Takes requests as they come and decodes them together, whatever trajectory, turn or module they belong to. No
    trajectory waits for the slowest. But sums depend on the order of arrival, so a run repeats only nearly.

    Weights and KV cache take `memory_share` of the GPU. With a `lora_rank`, one engine serves two models at once: the
    base weights (`without_adapter()`) and the base with the last adapter that was loaded.
    """

    def __init__(
        self, path: str | Path, device: str, dtype: torch.dtype, lora_rank=0, thinking=True, memory_share=0.4,
        can_sleep=False,
    ):  # fmt: skip
        os.environ |= VLLM_SETTINGS
        import vllm

        adapter = Path(path) / "adapter_config.json"
        base = str(path)
        if adapter.is_file():
            settings = json.loads(adapter.read_text())
            lora_rank, base = settings["r"], settings["base_model_name_or_path"]
        options = dict(enforce_eager=True)
        if device != "cpu":  # no piecewise CUDA graphs: a new engine would clear them in all other engines
            options = dict(gpu_memory_utilization=memory_share, enable_sleep_mode=can_sleep, max_num_seqs=512)
            options["compilation_config"] = {"cudagraph_mode": "FULL_DECODE_ONLY"}
        if team().world_size > 1:  # one whole engine in each process of torchrun
            options["distributed_executor_backend"] = "external_launcher"
        if lora_rank:
            rank = 1 << (max(8, lora_rank) - 1).bit_length()  # the next power of two: vLLM takes no others
            # On a CPU, if other rows have an adapter, a row without one reads slot -1, the last: keep that one empty.
            options |= dict(enable_lora=True, max_lora_rank=rank, max_loras=2 if device == "cpu" else 1)
        self.llm = vllm.LLM(
            model=base,
            dtype=str(dtype).removeprefix("torch."),
            generation_config="vllm",  # ignores the model's own sampling settings, such as top-k
            logprobs_mode="processed_logprobs",  # log-probs of the sampled distribution: after the temperature
            **options,
        )
        positions = self.llm.model_config.max_model_len
        super().__init__(self.llm.get_tokenizer(), GenerationConfig.from_pretrained(base), positions, thinking)
        self.vllm, self.engine = vllm, self.llm.llm_engine
        self.lora_rank, self.lora_request = lora_rank, None
        self.can_sleep, self.asleep = can_sleep and device != "cpu", False
        self.seeded = device != "cpu"  # the CPU sampler of vLLM fails on requests with a seed of their own
        self.numbers = itertools.count()
        self.waiting = {}  # request id -> future
        self.futures = {}  # (request, is it for the base?) -> future, which equal requests share
        if adapter.is_file():
            self.load_adapter(path)

    def without_adapter(self) -> "VLLMEngine":
        """The same engine with its base weights, for the frozen modules beside a LoRA planner."""
        frozen = copy.copy(self)
        frozen.lora_request = None
        return frozen

    async def generate(self, request: Request) -> Completion:
        self.check_length(request)
        key = (request, self.lora_request is None)
        if key in self.futures:  # greedy requests often are equal
            return await self.futures[key]
        number, future = str(next(self.numbers)), asyncio.get_running_loop().create_future()
        self.futures[key] = future
        params = self.vllm.SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed if self.seeded and request.temperature else None,
            stop_token_ids=self.eos_ids,
            logprobs=0,  # only the sampled token's
            flat_logprobs=True,
            detokenize=False,
        )
        prompt = {"prompt_token_ids": list(request.prompt_ids)}
        self.engine.add_request(number, prompt, params, lora_request=self.lora_request)
        self.waiting[number] = future
        if len(self.waiting) == 1:
            self.stepping = asyncio.ensure_future(self._step_while_somebody_waits())
        return await future

    async def _step_while_somebody_waits(self) -> None:
        try:
            while self.waiting:
                await asyncio.sleep(0)  # trajectories that just got a text may add a request before the next token
                for output in self.engine.step():
                    if output.finished:
                        sampled = output.outputs[0]
                        if sampled.finish_reason not in ("stop", "length"):
                            raise EngineError(f"vLLM ended a request by {sampled.finish_reason!r}")
                        ids = list(output.prompt_token_ids), list(sampled.token_ids)
                        completion = self.complete(*ids, list(sampled.logprobs.logprobs))
                        self.waiting.pop(output.request_id).set_result(completion)
        except Exception as error:  # all who wait must get the error, or the run would hang
            for future in self.waiting.values():
                future.set_exception(error)
        finally:  # also when the rollouts were cancelled
            self.engine.abort_request(list(self.waiting))
            self.waiting.clear()
            self.futures.clear()

    def load_weights(self, weights: Iterable) -> None:
        self._wake("weights")
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
        self._wake("kv_cache")  # not sooner, as memory has held old and new weights until here
        self._forget()

    def load_adapter(self, folder: str | Path) -> None:
        """Serve the base with the LoRA adapter of this folder."""
        from vllm.lora.request import LoRARequest

        self._wake("weights", "kv_cache")
        self.engine.add_lora(LoRARequest("planner", 1, str(folder), load_inplace=self.lora_request is not None))
        self.lora_request = LoRARequest("planner", 1, str(folder))
        self._forget()

    def _forget(self) -> None:
        """Drop what was computed with the old weights. While a request runs, vLLM refuses, but raises no error."""
        self.asleep = False
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM did not drop its prefix cache after a change of weights: requests are running")

    def sleep(self) -> None:
        if self.can_sleep and not self.asleep:
            # Level 2 drops all weights: `load_weights` brings new ones. Under an adapter the base must stay: level 1.
            self.llm.sleep(level=1 if self.lora_rank else 2)
            self.asleep = True

    def _wake(self, *tags: str) -> None:
        if self.asleep:
            torch.cuda.empty_cache()  # memory that the trainer has freed, but torch still holds
            self.llm.wake_up(tags=list(tags))
