"""Engines that turn prompt tokens into completion tokens, and the lockstep that batches many questions.

The agent and the trainer use an engine through these methods (train.py knows a few more, for LoRA):

    engine.encode(prompt)           -> prompt_ids, through the tokenizer's chat template
    engine.generate_batch(list)     -> a `Completion` for each `Request`, in order; or, if the engine batches by itself,
    await engine.generate(request)  -> a `Completion`; requests run together as they come
    engine.load_weights(weights)    takes new weights (name, tensor), and drops everything cached from the old ones
    engine.forget()                 drops what was read in a rollout, if the engine keeps anything
    engine.sleep()                  gives memory back to the trainer, until the next `load_weights`

    TransformersEngine   in this process, on CPU, CUDA or MPS; repeats bit for bit on a CPU
    VLLMEngine           lab/vllm_engine.py: in this process, for a GPU; no trajectory waits for another
    HTTPEngine           lab/http_engine.py: any server with the OpenAI API; it cannot be given new weights

Text is tokenised once, when it becomes a prompt. Sampled ids go into the loss as they are.
"""

import asyncio
import functools
import hashlib
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache
from transformers.utils import logging as transformers_logging

from tools import UserError, find, one_line
from tree import RowCache, Tree, TreeCache, has_trees, micro_batches, old_nodes, plant, use_trees

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
    if name != "auto":
        return name
    return str(torch.accelerator.current_accelerator(check_available=True) or "cpu")


def load_model(path: str | Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """(model, tokenizer) from a Hugging Face folder, a hub name, or the folder of a LoRA adapter, which comes with its
    base; `UserError` when it is none of them."""
    try:
        model, found = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path)
        assert not found["missing_keys"], f"its weights lack {', '.join(found['missing_keys'])}"  # they would be random
        assert tokenizer("a")["input_ids"] and model.model and model.lm_head, "its tokenizer knows no words"
        for name in ("logits_scaling", "logit_scale", "final_logit_softcapping"):  # Granite, Cohere, Gemma 2
            changed = getattr(model.config.get_text_config(), name, None) not in (None, 1)
            assert not changed, f"its {name} changes the logits of lm_head, which are used here as they are"
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

    def __init__(self, tokenizer, generation_config, positions: int, thinking=True):
        self.tokenizer, self.positions = tokenizer, positions
        eos = generation_config.eos_token_id
        eos = [eos] if isinstance(eos, int) else eos or []
        self.eos_ids = sorted({*eos, tokenizer.eos_token_id} - {None})
        control_tokens = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
        message = [{"role": "user", "content": "{prompt}"}]
        try:
            options = dict(add_generation_prompt=True, enable_thinking=thinking)  # most templates ignore the second
            chat = tokenizer.apply_chat_template(message, tokenize=False, **options)
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

    def check_length(self, request: Request) -> int:
        """The positions that the request needs at most. Past its last position, a model writes nonsense."""
        needed = len(request.prompt_ids) + request.max_tokens
        if needed > self.positions:
            advice = "lower --result_chars, --max_turns or --max_tokens"
            raise UserError(f"prompt and completion need {needed} of the model's {self.positions} positions: {advice}")
        return needed

    def complete(self, prompt_ids: list[int], completion_ids: list[int], logprobs: list[float]) -> Completion:
        text = self.tokenizer.decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        finish_reason = "stop" if completion_ids[-1] in self.eos_ids else "length"
        usage = (len(prompt_ids), len(completion_ids))
        return Completion(prompt_ids, completion_ids, logprobs, text, finish_reason, usage)

    def sleep(self) -> None:
        """Give memory back to the trainer, if the engine can; the next `load_weights` takes it again."""


# --- transformers, in this process ------------------------------------------------------------------------------------


class TransformersEngine(Engine):
    """Samples in batches with a KV cache. It holds its own copy of the weights, so a frozen module stays frozen."""

    def __init__(self, path: str | Path, device="cpu", dtype=torch.float32, lora_rank=0, thinking=True, batch_tokens=0):
        self.model, tokenizer = load_model(path, device, dtype)
        config = self.model.config.get_text_config()
        super().__init__(tokenizer, self.model.generation_config, config.max_position_embeddings, thinking)
        if lora_rank:  # `load_weights` will fill it with the policy's adapter
            add_adapter(self.model, lora_rank)
        # The most tokens of requests that run together: prompts and completions, with padding.
        self.batch_tokens = batch_tokens or (65536 if device == "cuda" else 32768)
        self.forget()

    def forget(self) -> None:
        """Drop the prompts that were read, with keys and values. A rollout begins without, as a resumed run does."""
        self.read = [], None, None  # prompts, their tree, their cache

    def load_weights(self, weights: Iterable) -> None:
        own = self.model.state_dict()
        for name, weight in weights:
            own[name].copy_(weight)
        self.forget()

    def generate_batch(self, requests: list[Request]) -> list[Completion]:
        """Run all requests, in batches of similar length. Equal requests run once: greedy ones often are equal."""
        different, completions = list(dict.fromkeys(requests)), {}
        lengths = [self.check_length(request) for request in different]
        max_padding = 1.0 if has_trees(self.model) else 0.0  # a pad would count in a window of attention
        for rows in micro_batches(lengths, self.batch_tokens, max_padding):
            batch = [different[i] for i in rows]
            completions |= zip(batch, self._generate(batch))
        return [completions[request] for request in requests]

    @torch.inference_mode()
    def _generate(self, requests: list[Request]) -> list[Completion]:
        """Read the prompts in one pass, as a tree; then sample for R running rows."""
        device = self.model.device
        tree, cache, states = self._read([request.prompt_ids for request in requests])

        # From here each request has a row of its own: its tokens' keys and values are copied from the tree.
        longest = max(len(request.prompt_ids) for request in requests)  # S
        nodes = tree.nodes[-len(requests) :, :longest]  # (B, S)
        hidden = states[torch.searchsorted(tree.reads, nodes.amax(dim=1))]  # (B, D), of each row's last token
        mask = nodes >= 0  # (B, S), True on real tokens
        positions = mask.sum(dim=1, keepdim=True) - 1  # (B, 1)
        temperatures = torch.tensor([request.temperature for request in requests], device=device)  # (B,)
        limits = torch.tensor([request.max_tokens for request in requests], device=device)  # (B,)
        room = int(limits.max())  # T
        cache = Cache([RowCache(layer, nodes, room) for layer in cache.layers])
        # A row of uniform numbers depends on its request's seed, not on the batch. In float64, a vocabulary of 150k
        # sums up to 1 within 1e-16. MPS has no float64.
        generator = torch.Generator()
        uniforms = [torch.rand(room, generator=generator.manual_seed(request.seed)) for request in requests]
        uniforms = torch.stack(uniforms).to(device, torch.float32 if device.type == "mps" else torch.float64)  # (B, T)
        eos = torch.tensor(self.eos_ids, device=device)
        rows = torch.arange(len(requests), device=device)  # the requests that still run
        sampled, logprobs = [[] for _ in requests], [[] for _ in requests]
        for t in range(room):
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

    def _read(self, prompts: list[tuple]) -> tuple[Tree, Cache, Tensor]:
        """(tree, cache of its nodes, states (M, D) of the nodes read now). A memory only grows, so the later prompts of
        a rollout continue earlier ones. What these hold is not read again, as long as the cache has room."""
        before, old_tree, old_cache = self.read
        tree, cache = plant([*before, *prompts], self.model, known=len(before)), DynamicCache()
        if before and tree.nodes.max() < self.batch_tokens:
            old = old_nodes(tree, old_tree)
            cache = Cache([TreeCache(layer, old, tree.reads) for layer in old_cache.layers])
        elif before:
            before, tree = [], plant(prompts, self.model)
        states = self.model.model(**tree.inputs, past_key_values=cache, use_cache=True).last_hidden_state
        if has_trees(self.model):
            self.read = [*before, *prompts], tree, cache
        return tree, cache, states.flatten(0, 1)


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


# --- which engine -----------------------------------------------------------------------------------------------------


def open_engine(config: Any, model: str, dtype: torch.dtype | None = None, lora_rank=0, can_sleep=False) -> Engine:
    """The engine for a model: HTTP for a URL, else as --engine, --engine_memory and --device say. The default `dtype`
    is bfloat16 on cuda, else float32. With a `lora_rank` the engine samples the model with an adapter."""
    thinking = config.enable_thinking
    if model.startswith(("http://", "https://")):
        return find("lab.http_engine.HTTPEngine", {})(model, thinking)
    device = best_device(config.device)
    dtype = dtype or (torch.bfloat16 if device == "cuda" else torch.float32)
    if config.engine == "vllm":
        engine_class = find("lab.vllm_engine.VLLMEngine", {})
        return engine_class(model, device, dtype, lora_rank, thinking, config.engine_memory, can_sleep)
    return TransformersEngine(model, device, dtype, lora_rank, thinking)


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
        try:
            return await asyncio.gather(*map(self._follow, trajectories))
        finally:  # also when one failed: what an engine keeps from it would change the rounding of the next rollout
            for engine in self.waiting:
                if hasattr(engine, "forget"):
                    engine.forget()

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
                batch.sort()  # by order, which no two of them share
                completions = engine.generate_batch([request for _, request, _ in batch])
                for (_, _, future), completion in zip(batch, completions):
                    future.set_result(completion)
                return
