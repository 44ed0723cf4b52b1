"""Teach a model the agent's language, in other worlds: the bundled backbone from scratch, or a model that exists.

    python -m lab.pretrain             # writes tinyworld/backbone/; 13 minutes on 2 CPU cores
    python -m lab.pretrain --check     # measures the backbone that is there, on both test splits
    python -m lab.pretrain --model models/smollm2-135m --out models/smollm2-135m-planner     # a cold start, 10 minutes

Both imitate the teacher of lab/teacher.py, who is clumsy as a planner on purpose, so planning is left for Flow-GRPO. A
real model has to be taught first, as reinforcement learning needs some success to begin with: asked without it, a small
one writes plans that nobody can read. As a planner it is taught with the bundled backbone in all other roles.
"""

import math
import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import agent
import tools
from eval import Ranged, evaluate, run_main, setting, table
from flow_grpo import token_logprobs
from lab.teacher import (
    ANALYSES,
    ANSWER,
    CODE,
    CONTINUE,
    NO_TOOL,
    RELATIONS,
    STOP,
    UNKNOWN,
    IdealPlanner,
    literals,
    row_stream,
    teachers,
)
from llm import TransformersEngine, best_device, load_model
from sandbox import Sandbox
from tasks import append, bundled_world, load_corpus, load_examples
from tinyworld import world as w
from tinyworld.world import NAMES, OPERATIONS
from tools import UserError
from train import build_trainer, choose_precision, listen_for_stop, restore, save, take_step
from tree import split_rows

BACKBONE = Path(__file__).parent.parent / "tinyworld" / "backbone"


@dataclass
class PretrainConfig(Ranged):
    out: str = setting("tinyworld/backbone", "folder to write the model to, or to check", group="what is taught")
    model: str = setting("", "model to teach, folder or hub name; empty: a new backbone")
    check: bool = setting(False, "whether to train nothing and only measure the model in --out")
    seed: int = setting(0, "seed of the weights, the worlds and the order of rows", low=0)
    # the backbone
    from_stage: int = setting(
        1, "stage to begin with; the second continues the model in --out", group="a new backbone", low=1, high=2
    )
    words: bool = setting(False, "whether to write only the tokenizer anew: enough after a prompt's words have changed")
    layers: int = setting(3, "layers of the model", low=2)
    share: float = setting(1.0, "share of each stage's steps; below 1 the model is worse", low=0.001, high=100)
    rows_per_step: int = setting(64, "prompts with their completions per optimizer step", low=4)
    lr: float = setting(1e-3, "peak learning rate of AdamW, for embeddings, norms and biases")
    muon_lr: float = setting(0.02, "peak learning rate of Muon, for the matrices of the layers")
    # a model that exists
    steps: int = setting(30, "optimizer steps", group="a model that exists", low=1)
    roles: Literal["planner", "all"] = setting("planner", "roles to teach; planner: the backbone plays the others")
    questions_per_step: int = setting(4, "transcripts per step, each with all its turns", low=1)
    plans: int = setting(4, "plans for each prompt, from which the model learns", low=1)
    skill: float = setting(0.1, "share of ideal plans; the others are clumsy", high=1)
    learning_rate: float = setting(1e-4, "peak learning rate of AdamW")
    lora_rank: int = setting(0, "rank of a LoRA adapter, merged into the weights at the end; 0: all weights")
    dtype: Literal["auto", "float32", "mixed", "float16", "bfloat16"] = setting("auto", "number format, as in train.py")
    optimizer: Literal["adamw", "adamw8bit"] = setting("adamw", "optimizer, as in train.py")
    micro_batch_tokens: int = setting(4096, "different tokens of one forward and backward pass", low=1)
    save_every: int = setting(10, "steps between checkpoints", low=1)
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "device")
    questions: int = setting(200, "test questions of the check at the end; 0: all")
    max_tokens: int = setting(96, "tokens of one completion in the check, at most", low=1)
    shard = False  # one process has the whole model


def main(config: PretrainConfig) -> None:
    out = Path(config.out)
    if config.model:
        if not config.check:
            teach(config)
        return check_taught(config)
    if config.words:
        return build_tokenizer(out)
    if not config.check:
        make_backbone(config)
    check(out)


def make_backbone(config: PretrainConfig) -> None:
    """All stages, from random weights or from the model of the stage before."""
    if config.from_stage == 1:
        new_model(Path(config.out), config.seed, config.layers)
    load_model(config.out)  # a folder without a model, or with half of one, shows now
    for number in range(config.from_stage - 1, len(STAGES)):
        train_stage(number, config)


# --- the tokenizer ----------------------------------------------------------------------------------------------------

EOS, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (EOS, USER, ASSISTANT, "<|endoftext|>")  # the last is never used, but a Qwen2 tokenizer adds it if it lacks
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def prompt_texts() -> list[str]:
    """The fixed text of every prompt, and each tool's description."""
    prompts = [agent.ANALYST_PROMPT, agent.PLANNER_PROMPT, agent.EXECUTOR_PROMPT, agent.VERIFIER_PROMPT]
    prompts += [agent.GENERATOR_PROMPT, agent.MEMORY_STEP, agent.MEMORY_VERDICT]
    prompts += [tools.BASE_GENERATOR_PROMPT, tools.PYTHON_CODER_PROMPT]
    texts = [text for prompt in prompts for text in literals(prompt)]
    return texts + [tools.tool_metadata(tool) for tool in tools.TOOLS.values()]


def fixed_texts() -> list[str]:
    """All texts that become one token each: prompts, what the modules write, the encyclopedia's phrases, the names."""
    texts = prompt_texts() + ["\n"]
    texts += ["Justification: ", ".\nContext: ", "\nSub-Goal: Find ", "\nTool Name: ", *tools.TOOLS, NO_TOOL, "Find "]
    texts += [*OPERATIONS.values(), *(f" {operation} " for operation in OPERATIONS)]
    texts += [*(f'{tool}(query="' for tool in tools.TOOLS), '")', *literals(CODE), f'"{UNKNOWN}"']
    texts += [*ANALYSES.values(), STOP, CONTINUE, "STOP", "CONTINUE", *literals(ANSWER), UNKNOWN]
    texts += ["I do not know.", "No results.", "none", "True", "False"]
    texts += [*(f"the {relation}" for relation in RELATIONS), " of ", "What is ", "Who is ", "?", " and ", ", "]
    texts += [" rather than of ", "the difference between ", *w.EARLIER.values()]
    texts += [*(f" is a {kind}: " for kind in w.KINDS), " is ", ".", ": "]
    texts += ["Error: there is no tool ", ". Use one of: " + ", ".join(tools.TOOLS) + "."]
    pairs_of_digits = [f"{number:02d}" for number in range(100)]  # a year is two tokens to copy, not four
    return list(dict.fromkeys([*texts, *NAMES, *pairs_of_digits]))


def build_tokenizer(folder: Path) -> None:
    """A byte-level BPE without merges, so any text survives unchanged; fixed texts and names are added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    qwen_words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    qwen_words += r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(qwen_words), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in fixed_texts()])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """Optimizer steps on one mix of rows, with a warm-up and a cosine decay of its own."""

    steps: int
    lr_share: float  # the stage's share of the peak learning rates
    prompt_weight: float = 0.0  # weight of the loss on the prompts' own tokens, from which copying is learned first


STAGES = (Stage(steps=550, lr_share=1.0, prompt_weight=0.3), Stage(steps=1250, lr_share=0.7))


def batch_stream(
    tokenizer: Any, rows: Iterator, seed: int, rows_per_step: int, prompt_weight: float, parts: int = 4
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Endless steps, each a list of (ids (B, S), weights (B, S)): a random mix of rows, in parts of similar length.

    The weights of a step sum to 1 over the tokens to write, and to `prompt_weight` over the tokens of the prompts.
    """
    encode = encoder(tokenizer)
    rng, pool = random.Random(f"batches {seed}"), []
    while True:
        while len(pool) < 16 * rows_per_step:  # far more than a question's own rows: a step mixes many questions
            pool.append(encode(*next(rows)[1:]))
        batch = sorted((pool.pop(rng.randrange(len(pool))) for _ in range(rows_per_step)), key=lambda row: len(row[0]))
        written = sum(len(ids) - begin for ids, begin in batch)
        read = sum(begin - 1 for _, begin in batch)
        step = []
        for part in (batch[n * rows_per_step // parts : (n + 1) * rows_per_step // parts] for n in range(parts)):
            width = len(part[-1][0])
            ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part])
            starts, ends = torch.tensor([[begin, len(ids)] for ids, begin in part]).T[:, :, None]
            position = torch.arange(width)
            weights = torch.where(position < starts, prompt_weight / read, 1 / written) * (position < ends)
            step.append((ids, weights))
        yield step


def encoder(tokenizer: Any) -> Callable[[str, str], tuple[list[int], int]]:
    """A function (prompt, completion) -> (ids of both in the chat template, how many of them are the prompt's)."""

    def encode(prompt: str, completion: str) -> tuple[list[int], int]:
        prompt_ids = tokenizer(f"{USER}{prompt}{ASSISTANT}")["input_ids"]
        return prompt_ids + tokenizer(f"{completion}{EOS}")["input_ids"], len(prompt_ids)

    return encode


def new_model(out: Path, seed: int, layers: int) -> None:
    """Write the tokenizer and an untrained model to `out`. The circuit that it begins with takes two layers."""
    out.mkdir(parents=True, exist_ok=True)  # a file in its place shows now
    build_tokenizer(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,  # head size 32
        num_key_value_heads=4,
        intermediate_size=320,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},  # slow rotations: most of a head can match content
        initializer_range=0.08,  # about 1 / sqrt(hidden_size): the usual 0.02 is made for far wider models
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    start_as_induction(model)
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, vocabulary {len(tokenizer)}")
    model.save_pretrained(out)


@torch.no_grad()
def start_as_induction(model: Qwen2ForCausalLM) -> None:
    """Begin with the circuit that copies what followed an earlier, equal context ("induction heads", arXiv 2209.11895).

    Nearly all that the modules do is to look up and copy. From random weights a model this small needs thousands of
    steps to find the circuit. From here it can look up any fact after a hundred steps. Head h of layer 0 carries the
    token h + 1 places back. Head h of layer 1 looks for a place whose token h + 1 back is what its own query has h
    back, and copies what stands there. Training changes all weights from there on.
    """
    (carry, match, *_), config = model.model.layers, model.config
    size, width, std = config.hidden_size // config.num_attention_heads, config.hidden_size, config.initializer_range
    frequencies = config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)[:6]  # of fast rotations
    what, where, copy = (torch.linalg.qr(torch.randn(width, width))[0] for _ in range(3))  # random orthogonal bases
    for layer in model.model.layers:  # the residual stream begins as the pure embedding
        layer.mlp.down_proj.weight.zero_()
        layer.self_attn.o_proj.weight.zero_()
    carry.self_attn.q_proj.weight.mul_(0.1)
    carry.self_attn.k_proj.weight.mul_(0.1)
    for head in range(config.num_attention_heads):
        rows = slice(head * size, (head + 1) * size)
        # The score, a sum of cos(frequency * (distance - (head + 1))), is largest at the distance head + 1.
        query, key = carry.self_attn.q_proj.bias[rows], carry.self_attn.k_proj.bias[rows]
        query[: len(frequencies)] = 5 * torch.cos((head + 1) * frequencies)
        query[size // 2 : size // 2 + len(frequencies)] = -5 * torch.sin((head + 1) * frequencies)
        key[: len(frequencies)] = 5
        carry.self_attn.v_proj.weight[rows] = what[:size]  # the same view of the token from every distance ...
        carry.self_attn.o_proj.weight[:, rows] = 2 * std * where[:, rows]  # ... to a place of its own
        before = where[:, (head - 1) * size : head * size].T if head else what[:size]
        match.self_attn.q_proj.weight[rows] = 2 * before
        match.self_attn.k_proj.weight[rows] = 2 * where[:, rows].T
    match.self_attn.v_proj.weight.copy_(copy)
    match.self_attn.o_proj.weight.copy_(2 * std * copy.T)


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (kellerjordan.github.io/posts/muon), in float32, for all matrices of one
    shape at once. On a CPU without bfloat16, `torch.optim.Muon` takes longer than the forward and backward passes.
    """

    def __init__(self, params: list[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.01):
        shapes = dict.fromkeys(p.shape for p in params)
        super().__init__([{"params": [p for p in params if p.shape == shape]} for shape in shapes], {"lr": lr})
        self.momentum, self.weight_decay = momentum, weight_decay

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params, lr = group["params"], group["lr"]
            gradient = torch.stack([p.grad for p in params])
            average = self.state.setdefault(params[0], {"average": torch.zeros_like(gradient)})["average"]
            average.lerp_(gradient, 1 - self.momentum)
            rows, columns = params[0].shape
            update = orthogonal(gradient.lerp(average, self.momentum)) * math.sqrt(max(1, rows / columns))
            for p, change in zip(params, update):
                p.mul_(1 - lr * self.weight_decay).add_(change, alpha=-lr)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """The nearest matrices with all singular values near 1, by five Newton-Schulz steps. (N, R, C) -> (N, R, C)"""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def train_stage(number: int, config: PretrainConfig) -> None:
    """Train the model in --out on the rows of stage `number` and write it back."""
    stage, seed, out = STAGES[number], config.seed + number, config.out
    stage = replace(stage, steps=max(1, round(config.share * stage.steps)))
    tokenizer, model = AutoTokenizer.from_pretrained(out), Qwen2ForCausalLM.from_pretrained(out).train()
    # Muon for the matrices of the layers, AdamW for embeddings, norms and biases: fewer steps than AdamW alone.
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        Muon(matrices, lr=stage.lr_share * config.muon_lr),
        torch.optim.AdamW(others, lr=stage.lr_share * config.lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]

    def share_of_lr(step: int) -> float:  # warm-up, then cosine
        return min(1, (step + 1) / 100) * (0.02 + 0.98 * (1 + math.cos(math.pi * step / stage.steps)) / 2)

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_lr) for optimizer in optimizers]
    batches = batch_stream(tokenizer, row_stream(seed), seed, config.rows_per_step, stage.prompt_weight)
    started, running = time.time(), None
    for _ in (bar := tqdm(range(stage.steps), desc=f"stage {number + 1} of {len(STAGES)}", unit="step")):
        total = 0.0
        for ids, weights in next(batches):
            hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state
            real = weights[:, 1:] > 0
            losses = torch.nn.functional.cross_entropy(model.lm_head(hidden[real]), ids[:, 1:][real], reduction="none")
            loss = (losses * weights[:, 1:][real]).sum()
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        running = total if running is None else 0.98 * running + 0.02 * total
        bar.set_postfix(loss=f"{running:.3f}")
    model.save_pretrained(out)
    print(f"stage {number + 1}: {stage.steps} steps, {(time.time() - started) / 60:.1f} minutes, loss {running:.3f}")


# --- a model that exists ----------------------------------------------------------------------------------------------


def teach(config: PretrainConfig) -> None:
    """Fine-tune the model on the teacher's rows and write it to --out, an ordinary model folder. Until it is finished,
    the folder has a checkpoint, from which the same command continues."""
    out = Path(config.out)
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model already: name another folder with --out, or add --check to measure it")
    precision = choose_precision(config, best_device(config.device))
    policy, tokenizer, optimizer = build_trainer(config, precision)
    engine = TransformersEngine(config.model, precision.device, precision.engine)  # knows the model's chat template
    out.mkdir(parents=True, exist_ok=True)
    done, _ = restore(out, policy, optimizer)
    steps = islice(lessons(engine, config), done, config.steps)
    stop = listen_for_stop()
    with tqdm(total=config.steps, initial=done, desc="cold start", unit="step") as bar:
        for step, rows in enumerate(steps, start=done + 1):
            rate = min(step / 5, 1 - (step - 1) / config.steps)  # warm-up, then a linear decay
            started = time.time()
            loss = imitate(policy, rows, config, precision)
            take_step(policy, optimizer, config.learning_rate * rate, precision)
            append(out / "metrics.jsonl", {"step": step, "loss": loss, "rows": len(rows), "t": time.time() - started})
            bar.update()
            bar.set_postfix(loss=f"{loss:.3f}")
            if step % config.save_every == 0 or step == config.steps or stop:
                save(out, step, policy, tokenizer, optimizer, {})
            if stop:
                raise UserError(f"stopped after step {step} and saved; the same command continues")
    signal.signal(signal.SIGINT, signal.default_int_handler)  # all is learnt: it may end at once
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if config.lora_rank:
        policy = merged(policy, config.model)
    policy.save_pretrained(out)
    tokenizer.save_pretrained(out)
    shutil.rmtree(out / "checkpoint")


def lessons(engine: TransformersEngine, config: PretrainConfig) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Endless steps of rows (prompt_ids, completion_ids). The rows of a step are whole transcripts and several plans
    for each prompt: they share most of their tokens, and a tree computes these once."""
    rng = random.Random(f"cold start {config.seed}")
    stream = teachers(rng, config.seed)
    while True:
        rows = []
        for teacher in islice(stream, config.questions_per_step):
            for role, prompt, completion in teacher.rows:
                if role == "planner":
                    texts = [teacher.mixed_plan(prompt, config.skill) for _ in range(config.plans)]
                else:
                    texts = [completion] if config.roles == "all" else []
                prompt_ids = list(engine.encode(prompt))
                for text in texts:
                    ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"]
                    rows.append((prompt_ids, [*ids, engine.tokenizer.eos_token_id]))
        yield rows


def imitate(policy: Any, rows: list, config: PretrainConfig, precision: Any) -> float:
    """The gradient on rows (prompt_ids, completion_ids) -> the mean of -log pi over their tokens."""
    total, tokens = 0.0, sum(len(completion) for _, completion in rows)
    policy.train()
    for batch in split_rows([prompt + completion for prompt, completion in rows], config.micro_batch_tokens, policy):
        prompts, completions = zip(*(rows[i] for i in batch))
        with precision.autocast():
            logprobs, mask, _ = token_logprobs(policy, list(prompts), list(completions))
        loss = -logprobs[mask].sum() / tokens
        precision.scaler.scale(loss).backward()
        total += loss.item()
    policy.eval()
    return total


def merged(policy: Any, base: str) -> Any:
    """The base model with the adapter added to its weights."""
    model = load_model(base)[0]
    with torch.no_grad():
        for name, module in policy.named_modules():
            if hasattr(module, "get_delta_weight"):  # a layer of peft
                model.get_submodule(name).weight += module.get_delta_weight("default").float().cpu()
    return model


def check_taught(config: PretrainConfig) -> None:
    """Print what the model in --out reaches as a planner on the test split, and the share of plans that can be read."""
    device = best_device(config.device)
    engine = TransformersEngine(config.out, device)
    frozen = engine if config.roles == "all" else TransformersEngine(BACKBONE, device)
    system = agent.AgentSystem(engine, frozen, load_corpus("tinyworld"), Sandbox(), max_tokens=config.max_tokens)
    examples = load_examples("tinyworld", "test", config.questions)
    figures, _ = evaluate(system, examples, (config.seed, "check"), "check")
    print(table({f"{config.out} as the planner": figures}))
    print(f"readable plans: {100 * (1 - figures['format_error_rate']):.1f} %")


# --- what it has reached ----------------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """Print what the backbone reaches on both test splits, with the real tools: with ideal plans, and as a planner."""
    world, engine = bundled_world(), TransformersEngine(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {sum(p.numel() for p in engine.model.parameters()) / 1e6:.2f} M parameters, {size:.1f} MB")
    for task, families, turns in (("tinyworld", w.FAMILIES, 4), ("tinyworld-hard", w.HARD_FAMILIES, w.HARD_TURNS)):
        ideal = IdealPlanner(world.questions("test", families), world)
        system = agent.AgentSystem(engine, engine, load_corpus(task), Sandbox(), max_turns=turns)
        systems = {
            "ideal plans": replace(system, planner=ideal),
            "sampled, T = 1": system,
            "greedy": replace(system, temperature=0.0),
        }
        examples = load_examples(task, "test")
        results = {name: evaluate(system, examples, ("check",), name)[0] for name, system in systems.items()}
        print(f"{task}\n{table(results)}")


if __name__ == "__main__":
    run_main(main, PretrainConfig)
