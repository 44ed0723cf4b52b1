"""Engines that turn prompt tokens into completion tokens, and the lockstep that batches many questions.

The agent and the trainer use an engine through these methods (train.py knows a few more, for LoRA and for pi_ref):

    engine.encode(prompt)           -> prompt_ids, through the tokenizer's chat template
    engine.generate_batch(list)     -> a `Completion` for each `Request`, in order; or, if the engine batches by itself,
    await engine.generate(request)  -> a `Completion`; requests run together as they come
    engine.load_weights(state)      takes new weights, and drops everything cached from the old ones
    engine.sleep()                  gives memory back to the trainer, until the next `load_weights`

    TransformersEngine   in this process, on CPU, CUDA or MPS; repeats bit for bit on a CPU
    VLLMEngine           in this process, for a GPU; continuous batching, so no trajectory waits for another
    HTTPEngine           in lab/http_engine.py: any server with the OpenAI API; it cannot be given new weights

Text is tokenised once, when it becomes a prompt. Sampled ids go into the loss as they are.
"""

import asyncio
import copy
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.utils import logging as transformers_logging

from tools import UserError, find, one_line
from tree import RowCache, has_trees, micro_batches, plant, use_trees

transformers_logging.set_verbosity_error()  # our own errors have one line
transformers_logging.disable_progress_bar()  # it shows loads and saves; our own bars show what takes time


class EngineError(RuntimeError):
    """The engine failed. This stops the run, so that no empty answer is judged in place of a real one."""


@dataclass(frozen=True)
class Request:
    prompt_ids: tuple[int, ...] | str  # what `encode` returned: for a server, the text itself
    max_tokens: int
    temperature: float  # 0 is greedy
    seed: int = 0  # this request's own; greedy requests do not use it


@dataclass
class Completion:
    prompt_ids: list[int]
    completion_ids: list[int]  # with the EOS token, unless the token limit came first; empty from a server
    logprobs: list[float]  # of each sampled token at the sampling temperature (at temperature 1 when greedy)
    text: str  # without special tokens
    finish_reason: str  # "stop" or "length"
    usage: tuple[int, int]  # tokens read and written, as if nothing were cached


def derive_seed(*key) -> int:
    """A seed of 63 bits from run seed, step, question, sample, role and turn, so no two requests share randomness."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "big") >> 1


# --- models and adapters ----------------------------------------------------------------------------------------------


def best_device(name: str = "auto") -> str:
    """The device of that name; auto means cuda or mps if the machine has one, else cpu."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        name = accelerator.type if accelerator else "cpu"
    return name


def load_model(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) from a Hugging Face folder, a hub name, or the folder of a LoRA adapter, which comes with its
    base; `UserError` when it is none of them."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert not found["missing_keys"], f"its weights lack {', '.join(found['missing_keys'])}"  # they would be random
        assert tokenizer("a")["input_ids"] and model.model and model.lm_head, "its tokenizer knows no words"
        use_trees(model)
        model.to(device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # the libraries raise nearly every class for what can be wrong with a folder
        raise UserError(f"cannot load a model from {path}: {one_line(error)}") from error
    return model.eval(), tokenizer


def add_adapter(model: Any, rank: int, seed: int = 0) -> None:
    """Freeze the model and put a LoRA adapter, in float32, on all its linear layers. It begins as zero."""
    from peft import LoraConfig

    torch.manual_seed(seed)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # a bfloat16 weight would round small updates away


class Engine:
    """What the engines share: the tokenizer, which turns each prompt into ids once."""

    def __init__(self, tokenizer, generation_config, positions: int):
        self.tokenizer, self.positions = tokenizer, positions
        eos = generation_config.eos_token_id
        eos = [eos] if isinstance(eos, int) else list(eos or [])
        self.eos_ids = sorted({*eos, tokenizer.eos_token_id} - {None})
        control_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        message = [{"role": "user", "content": "{prompt}"}]
        try:
            chat = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
            assert "{prompt}" in chat, "it leaves the message out"
        except Exception as error:  # a template is a program, so anything can go wrong in it
            raise UserError(f"{tokenizer.name_or_path} needs a chat template that works: {one_line(error)}") from error

        @functools.lru_cache(4096)  # the rollouts of a group begin with the same prompts
        def encode(prompt: str) -> tuple[int, ...]:
            """The ids of one user message. A space inside each control token in the prompt makes it plain text."""
            for token in control_tokens:
                prompt = prompt.replace(token, f"{token[0]} {token[1:]}")
            return tuple(tokenizer(chat.replace("{prompt}", prompt), add_special_tokens=False)["input_ids"])

        self.encode = encode

    def check_length(self, request: Request) -> None:
        """Past its last position, a model writes nonsense."""
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.positions:
            advice = "lower --result_chars, --max_turns or --max_tokens"
            raise UserError(f"prompt and completion need {needed} of the model's {self.positions} positions: {advice}")

    def complete(self, prompt_ids: list[int], completion_ids: list[int], logprobs: list[float]) -> Completion:
        text = self.tokenizer.decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        finish_reason = "length" if set(self.eos_ids).isdisjoint(completion_ids) else "stop"
        usage = (len(prompt_ids), len(completion_ids))
        return Completion(prompt_ids, completion_ids, logprobs, text, finish_reason, usage)

    def sleep(self) -> None:
        """Give memory back to the trainer, if the engine can; the next `load_weights` takes it again."""


# --- transformers, in this process ------------------------------------------------------------------------------------


class TransformersEngine(Engine):
    """Samples in batches with a KV cache. It holds its own copy of the weights, so a frozen module stays frozen."""

    def __init__(self, path: str | Path, device="cpu", dtype=torch.float32, lora_rank=0, batch_tokens=0):
        self.model, tokenizer = load_model(path, device, dtype)
        config = self.model.config.get_text_config()
        super().__init__(tokenizer, self.model.generation_config, config.max_position_embeddings)
        if lora_rank:  # `load_weights` will fill it with the policy's adapter
            add_adapter(self.model, lora_rank)
        # Of requests that run together: prompts and completions, padding included.
        self.batch_tokens = batch_tokens or (65536 if device == "cuda" else 32768)

    def load_weights(self, state_dict: dict[str, Tensor]) -> None:
        self.model.load_state_dict(state_dict)

    def generate_batch(self, requests: list[Request]) -> list[Completion]:
        """Run all requests, in batches of similar length. Equal requests run once: greedy ones often are equal."""
        different, completions = list(dict.fromkeys(requests)), {}
        for request in different:
            self.check_length(request)
        lengths = [len(request.prompt_ids) + request.max_tokens for request in different]
        max_padding = 1.0 if has_trees(self.model) else 0.0  # a pad would count in a window of attention
        for rows in micro_batches(lengths, self.batch_tokens, max_padding):
            batch = [different[i] for i in rows]
            completions |= zip(batch, self._generate(batch))
        return [completions[request] for request in requests]

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> list[Completion]:
        """Read U prompts in one pass, as a tree; then sample for R running rows."""
        device = self.model.device
        prompts = list(dict.fromkeys(request.prompt_ids for request in requests))  # equal prompts share one pass
        tree, cache = plant(prompts, self.model), DynamicCache()
        states = self.model.model(**tree.inputs, past_key_values=cache, use_cache=True).last_hidden_state

        # From here each request has a row of its own: its tokens' keys and values are copied from the tree.
        number = {prompt: n for n, prompt in enumerate(prompts)}
        nodes = tree.nodes[[number[request.prompt_ids] for request in requests]]  # (B, S)
        hidden = states.flatten(0, 1)[nodes.amax(dim=1)]  # (B, D), of each row's last token
        mask = nodes >= 0  # (B, S), True on real tokens
        positions = mask.sum(dim=1, keepdim=True) - 1  # (B, 1)
        temperatures = torch.tensor([request.temperature for request in requests], device=device)  # (B,)
        limits = torch.tensor([request.max_tokens for request in requests], device=device)  # (B,)
        cache.layers = [RowCache(layer, nodes, int(limits.max())) for layer in cache.layers]
        uniforms = self._uniforms(requests, int(limits.max()))  # (B, T)
        eos = torch.tensor(self.eos_ids, device=device)
        rows = torch.arange(len(requests), device=device)  # the requests that still run
        sampled, logprobs = [[] for _ in requests], [[] for _ in requests]
        for t in range(int(limits.max())):
            logits = self.model.lm_head(hidden).float()  # (R, V)
            tokens, token_logprobs = sample(logits, temperatures[rows], uniforms[rows, t])
            for row, token, logprob in zip(rows.tolist(), tokens.tolist(), token_logprobs.tolist()):
                sampled[row].append(token)
                logprobs[row].append(logprob)
            keep = (~torch.isin(tokens, eos) & (limits[rows] > t + 1)).nonzero()[:, 0]
            if len(keep) == 0:
                break
            if len(keep) < len(rows):  # finished rows leave the batch
                rows, tokens, mask, positions = rows[keep], tokens[keep], mask[keep], positions[keep]
                cache.batch_select_indices(keep)
            mask = torch.cat([mask, mask.new_ones(len(rows), 1)], dim=1)
            positions = positions + 1
            sees = mask[:, None, None] if has_trees(self.model) else mask  # (R, 1, 1, S)
            inputs = dict(input_ids=tokens[:, None], attention_mask=sees, position_ids=positions)
            output = self.model.model(**inputs, past_key_values=cache, use_cache=True)
            hidden = output.last_hidden_state[:, -1]  # (R, D)
        return [self.complete(list(r.prompt_ids), *row) for r, *row in zip(requests, sampled, logprobs)]

    def _uniforms(self, requests: list[Request], max_tokens: int) -> Tensor:
        """(B, max_tokens) numbers in [0, 1). A row depends on its request's seed, not on the batch."""
        generator = torch.Generator()
        rows = [torch.rand(max_tokens, generator=generator.manual_seed(request.seed)) for request in requests]
        # In float64, a vocabulary of 150k sums up to 1 within 1e-16. MPS has no float64.
        on_mps = self.model.device.type == "mps"
        return torch.stack(rows).to(self.model.device, torch.float32 if on_mps else torch.float64)


def sample(logits: Tensor, temperatures: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """(R, V), (R,), (R,) -> token ids (R,) and their log-probs (R,): the policy itself, no top-k, top-p or penalty.

    One uniform number picks a token by the inverse of the cumulative distribution; temperature 0 takes the likeliest.
    """
    greedy = temperatures < 1e-6
    all_logprobs = torch.log_softmax(logits / torch.where(greedy, 1.0, temperatures)[:, None], dim=-1)
    cdf = all_logprobs.to(uniforms.dtype).exp().cumsum(dim=-1)
    drawn = torch.searchsorted(cdf, (uniforms * cdf[:, -1])[:, None], right=True)[:, 0].clamp(max=logits.shape[1] - 1)
    tokens = torch.where(greedy, logits.argmax(dim=-1), drawn)
    return tokens, all_logprobs.gather(1, tokens[:, None])[:, 0]


# --- vLLM, in this process --------------------------------------------------------------------------------------------

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
        self, path: str | Path, device: str, dtype: torch.dtype, memory_share=0.4, lora_rank=0, can_sleep=False
    ):
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
        super().__init__(self.llm.get_tokenizer(), GenerationConfig.from_pretrained(base), positions)
        self.vllm, self.engine = vllm, self.llm.llm_engine
        self.lora_rank, self.lora_request = lora_rank, None
        self.can_sleep, self.asleep = can_sleep and device != "cpu", False
        self.seeded = device != "cpu"  # the CPU sampler of vLLM fails on requests with a seed of their own
        self.numbers = itertools.count()
        self.waiting = {}  # request id -> future
        self.greedy = {}  # (prompt_ids, max_tokens, is it the base?) -> future, which equal greedy requests share
        if adapter.is_file():
            self.load_adapter(path)

    def without_adapter(self) -> "VLLMEngine":
        """The same engine with its base weights, for the frozen modules beside a LoRA planner."""
        frozen = copy.copy(self)
        frozen.lora_request = None
        return frozen

    async def generate(self, request: Request) -> Completion:
        self.check_length(request)
        key = (request.prompt_ids, request.max_tokens, self.lora_request is None)
        if request.temperature == 0 and key in self.greedy:
            return await self.greedy[key]
        number, future = str(next(self.numbers)), asyncio.get_running_loop().create_future()
        if request.temperature == 0:
            self.greedy[key] = future
        params = self.vllm.SamplingParams(
            max_tokens=request.max_tokens,
            temperature=request.temperature,
            seed=request.seed if self.seeded and request.temperature else None,
            stop_token_ids=self.eos_ids,
            logprobs=0,  # only the sampled token's
            flat_logprobs=True,
            detokenize=False,
        )
        prompt = self.vllm.TokensPrompt(prompt_token_ids=list(request.prompt_ids))
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
                        completion = self._completion(output)
                        self.waiting.pop(output.request_id).set_result(completion)
        except Exception as error:  # all who wait must get the error, or the run would hang
            for future in self.waiting.values():
                future.set_exception(error)
        finally:  # also when the rollouts were cancelled
            self.engine.abort_request(list(self.waiting))
            self.waiting.clear()
            self.greedy.clear()

    def _completion(self, output) -> Completion:
        sampled = output.outputs[0]
        if sampled.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a request by {sampled.finish_reason!r}")
        prompt_ids, completion_ids = list(output.prompt_token_ids), list(sampled.token_ids)
        return self.complete(prompt_ids, completion_ids, list(sampled.logprobs.logprobs))

    def load_weights(self, state_dict: dict[str, Tensor]) -> None:
        self._wake("weights")
        weights = ((name, tensor.detach()) for name, tensor in state_dict.items())
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
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


def open_engine(kind: str, model: str, device: str, dtype: torch.dtype, lora_rank: int = 0, **vllm_options) -> Engine:
    """The engine for a model: HTTP for a URL, else the `kind`, transformers or vllm. With a `lora_rank` the engine
    samples the model with an adapter. The `vllm_options` are memory_share and can_sleep."""
    if model.startswith(("http://", "https://")):
        return find("lab.http_engine.HTTPEngine", {})(model)
    if kind == "vllm":
        return VLLMEngine(model, device, dtype, lora_rank=lora_rank, **vllm_options)
    return TransformersEngine(model, device, dtype, lora_rank)


# --- many trajectories, one engine that takes batches -----------------------------------------------------------------


class Lockstep:
    """Runs many trajectories and batches their requests in an order that repeats. It waits until every live trajectory
    has asked for a text, so tools finish first. Then it runs the requests for one engine, in the order of trajectories.
    An engine that comes first in `engines` also runs first, so that the prompts for later ones gather.

    An engine with its own `generate` batches by itself. Then the lockstep waits for its text as it waits for a tool.
    """

    def __init__(self, *engines: Engine):
        self.live = 0  # trajectories that have not ended
        self.waiting = {engine: [] for engine in engines}  # engine -> (order, request, future) of each request

    async def generate(self, engine: Engine, request: Request, order: int) -> Completion:
        """Answer trajectory number `order`, which may have only one request pending."""
        if hasattr(engine, "generate"):
            return await engine.generate(request)
        future = asyncio.get_running_loop().create_future()
        self.waiting[engine].append((order, request, future))
        self._run_if_all_wait()
        return await future

    async def gather(self, trajectories: Iterable[Coroutine]) -> list:
        """Await all trajectories. The first error is raised; then the `asyncio.run` around this cancels the others."""
        trajectories = list(trajectories)
        self.live = len(trajectories)
        return await asyncio.gather(*map(self._follow, trajectories))

    async def _follow(self, trajectory: Coroutine):
        result = await trajectory
        self.live -= 1
        self._run_if_all_wait()
        return result

    def _run_if_all_wait(self) -> None:
        if sum(map(len, self.waiting.values())) < self.live:
            return
        for engine, batch in self.waiting.items():
            if batch:
                self.waiting[engine] = []
                batch.sort(key=lambda item: item[0])
                completions = engine.generate_batch([request for _, request, _ in batch])
                for (_, _, future), completion in zip(batch, completions):
                    future.set_result(completion)
                return
