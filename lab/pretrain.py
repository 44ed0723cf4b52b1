"""Train the bundled backbone from scratch: a tiny Qwen2 that speaks the language of the agent, in other worlds.

    python -m lab.pretrain             # writes tinyworld/backbone/; 20 minutes on one CPU core
    python -m lab.pretrain --check     # measures the backbone that is there, on the test split

A `Teacher` that knows the facts plays all modules through the real `agent.solve()`, so the prompts are the agent's own,
to the letter. As executor, verifier, generator and tools' model it is perfect. As a planner it is clumsy on purpose.
Its steps are well-formed, and it notes what is still missing. But it prefers the wrong tool, sticks to the tool it used
last, and picks its goals from anything in view. The backbone learns to imitate all of that. Planning, and only
planning, is then left for Flow-GRPO to teach.
"""

import math
import random
import re
import string
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

import agent
import tools
from eval import Ranged, evaluate, run_main, setting, table
from llm import Completion, Request, TransformersEngine, load_model
from sandbox import Sandbox
from tasks import Corpus, load_corpus, load_examples
from tinyworld import world as w
from tinyworld.world import NAMES, OPERATIONS, Question, World, ideal_plan

BACKBONE = Path(__file__).parent.parent / "tinyworld" / "backbone"
TEST_WORLD = 0  # its facts never occur in a pretraining world


@dataclass
class PretrainConfig(Ranged):
    out: str = setting("tinyworld/backbone", "folder to write the model to, or to check")
    check: bool = setting(False, "whether to train nothing and only measure the model in --out")
    from_stage: int = setting(1, "stage to begin with; the second continues the model in --out", low=1, high=2)
    layers: int = setting(3, "layers of the model", low=2)
    share: float = setting(1.0, "share of each stage's steps; below 1 the model is worse", low=0.001, high=100)
    rows_per_step: int = setting(64, "prompts with their completions per optimizer step", low=4)
    lr: float = setting(1e-3, "peak learning rate of AdamW, for embeddings, norms and biases", low=0)
    muon_lr: float = setting(0.02, "peak learning rate of Muon, for the matrices of the layers", low=0)
    seed: int = setting(0, "seed of the weights, the worlds and the order of rows", low=0)


def main(config: PretrainConfig) -> None:
    if not config.check:
        make_backbone(config)
    check(Path(config.out))


def make_backbone(config: PretrainConfig) -> None:
    """All stages, from random weights or from the model of the stage before."""
    if config.from_stage == 1:
        new_model(Path(config.out), config.seed, config.layers)
    load_model(config.out)  # a folder without a model, or with half of one, shows now
    for number in range(config.from_stage - 1, len(STAGES)):
        train_stage(number, config)


# --- the teacher ------------------------------------------------------------------------------------------------------

ANALYSES = {
    "lookup": "One fact has to be looked up.",
    "two-hop": "Two facts have to be looked up, one after the other.",
    "three-hop": "Three facts have to be looked up, one after the other.",
    "difference": "Two numbers have to be looked up, then subtracted.",
    "earlier": "Two years have to be looked up, then compared.",
    "arithmetic": "A number has to be computed.",
}
PLAN = "Justification: {why}.\nContext: {context}\nSub-Goal: {sub_goal}\nTool Name: {tool}"
UNKNOWN = "unknown"
STOP, CONTINUE = ".\nConclusion: STOP", ".\nConclusion: CONTINUE"
ANSWER = ".\n<answer>{}</answer>"
CODE = "```python\nprint({})\n```"
NO_TOOL = "Calculator"  # a tool that does not exist: the rarest of the planner's habits
RELATIONS = [*w.ENTITY_RELATIONS, *w.NUMBER_RELATIONS]
TERM = r"(\d+) ([-+*<]) (\d+)"

TOOL_HABITS = {  # what a clumsy planner reaches for, by kind of goal
    "find": {"Base_Generator": 0.58, "Search": 0.24, "Python_Coder": 0.16, NO_TOOL: 0.02},
    "compute": {"Base_Generator": 0.8, "Search": 0.05, "Python_Coder": 0.13, NO_TOOL: 0.02},
    "compute from results": {"Base_Generator": 0.51, "Search": 0.05, "Python_Coder": 0.42, NO_TOOL: 0.02},
}
STICKY = 0.7  # chance to use the tool of the last step again, when it suits the habit
# Chance that a clumsy goal is the right one; else it is picked at random from what is in view. It is higher if a random
# plan would never succeed: a family in which no rollout succeeds gives Flow-GRPO nothing to compare.
INSIGHT = {"lookup": 0.2, "two-hop": 0.4, "three-hop": 0.65, "difference": 0.85, "earlier": 0.85, "arithmetic": 0.5}


class Teacher:
    """Plays every module for one question. A pure function of the prompt, the question's facts and the dice."""

    def __init__(self, question: Question, world: World, rng: random.Random, skill: float):
        self.question, self.world, self.rng = question, world, rng
        self.skill = skill  # chance that the step which is really run is the ideal one
        self.rows: list[tuple[str, str, str]] = []  # (role, prompt, completion)

    async def plan(self, prompt: str) -> Completion:
        """The row to learn is always clumsy. The step that runs may be ideal, so that good states are seen too."""
        self.rows.append(("planner", prompt, self.clumsy_plan(prompt)))
        why, missing = self.findings(prompt)
        use_ideal = missing is not None and self.rng.random() < self.skill
        text = render_plan(why, missing) if use_ideal else self.clumsy_plan(prompt)
        return Completion([], [], [], text, "stop", usage=(0, 0))

    async def ask(self, role: str, prompt: str) -> str:
        text = getattr(self, role)(prompt)
        self.rows.append((role, prompt, text))
        return text

    # What the memory already holds, and what an ideal planner would do next.

    def findings(self, prompt: str) -> tuple[str, w.Step | None]:
        """(the line of facts that planner, verifier and generator write, up to the first unknown one; the step that
        would find that one, None if nothing is missing)."""
        facts = []
        for step in ideal_plan(self.question):
            if not self.is_done(step, prompt):
                return ", ".join([*facts, f"{expression(step)} is {UNKNOWN}"]), step
            facts.append(f"{expression(step)} is {self.value(step)}")
        return ", ".join(facts), None

    def is_done(self, step: w.Step, prompt: str) -> bool:
        if step.tool == "Search":
            return f"\nResult: {step.context}: {self.world.articles[step.context]}" in prompt
        return f'\nTool: Python_Coder\nCommand: Python_Coder(query="{expression(step)}")' in prompt

    def value(self, step: w.Step) -> str:
        if step.tool == "Search":
            return self.world.facts[step.context][step.sub_goal.removeprefix("Find the ")].value
        return calculate(*re.fullmatch(TERM, expression(step)).groups())

    # The frozen modules, perfect.

    def analyst(self, prompt: str) -> str:
        return ANALYSES[self.question.family]

    def executor(self, prompt: str) -> str:
        tool = prompt.split("Tool:\n")[1].split("(")[0]
        context, sub_goal = prompt.rsplit("\nContext: ")[1].split("\nSub-Goal: ")
        return f'{tool}(query="{expression(w.Step(context, sub_goal, tool))}")'

    def coder(self, prompt: str) -> str:
        query = prompt.removeprefix(literals(tools.PYTHON_CODER_PROMPT)[0])
        return CODE.format(query if re.fullmatch(TERM, query) else '"unknown"')

    def base(self, prompt: str) -> str:
        return "I do not know."

    def verifier(self, prompt: str) -> str:
        findings, missing = self.findings(prompt)
        return findings + (CONTINUE if missing else STOP)

    def generator(self, prompt: str) -> str:
        findings, missing = self.findings(prompt)
        return findings + ANSWER.format(UNKNOWN if missing else self.question.answer)

    # The clumsy planner. It sees what is missing, and does not know what to do about it.

    def clumsy_plan(self, prompt: str) -> str:
        why, missing = self.findings(prompt)
        goal = missing if self.rng.random() < INSIGHT[self.question.family] else None
        goal = goal or self.random_goal(prompt)
        kind = "find" if goal.sub_goal.startswith("Find") else "compute"
        last = re.findall(r"\nTool: (\w+)\nCommand", prompt)
        habits = TOOL_HABITS["compute from results" if kind == "compute" and "Search" in last else kind]
        if last and kind == "find":
            habits = {tool: share * (1 - STICKY) + STICKY * (tool == last[-1]) for tool, share in habits.items()}
        tool = self.rng.choices(list(habits), list(habits.values()))[0]
        return render_plan(why, goal._replace(tool=tool))

    def random_goal(self, prompt: str) -> w.Step:
        """A goal from anything in view: an entity with a relation of the question, or two numbers with an operation."""
        asked = self.question.question
        relations = [r for r in RELATIONS if f"the {r}" in asked]
        if not relations:  # arithmetic
            return w.compute(*re.findall(r"\d+", asked), self.rng.choice(list(OPERATIONS)))
        view = prompt.split("\nQuestion: ")[1]
        numbers = re.findall(r" (\d{3,})\b", "".join(re.findall(r"Result: .*", view)))
        compute_chance = 0.3 if self.question.family in ("difference", "earlier") else 0.03
        if len(numbers) > 1 and self.rng.random() < compute_chance:
            return w.compute(*self.rng.sample(numbers, 2), self.rng.choice(list(OPERATIONS)))
        entities = sorted(set(re.findall(r"[A-Z][a-z]+", view)) & set(NAMES))
        return w.find(self.rng.choice(relations), self.rng.choice(entities))


def render_plan(why: str, step: w.Step) -> str:
    return PLAN.format(why=why, context=step.context, sub_goal=step.sub_goal, tool=step.tool)


def expression(step: w.Step) -> str:
    """The query a perfect executor makes of a context and a sub-goal."""
    if step.sub_goal.startswith("Find "):
        return f"{step.sub_goal.removeprefix('Find ')} of {step.context}"
    operation = next(op for op, text in OPERATIONS.items() if text == step.sub_goal)
    left, right = step.context.split(", ")
    return f"{left} {operation} {right}"


def calculate(left: str, operation: str, right: str) -> str:
    """What Python prints for a term."""
    one, two = int(left), int(right)
    return str({"+": one + two, "-": one - two, "*": one * two, "<": one < two}[operation])


class TeacherSandbox:
    """Takes the sandbox's place while transcripts are made: the teacher's programs only print one term."""

    async def run(self, code: str) -> str:
        match = re.search(TERM, code)
        return calculate(*match.groups()) if match else "unknown"


def transcript(
    question: Question, world: World, corpus: Corpus, rng: random.Random, skill: float
) -> tuple[Teacher, agent.Trajectory]:
    """Run the real loop with a teacher in all roles."""
    teacher = Teacher(question, world, rng, skill)
    env = tools.ToolEnv(teacher.ask, corpus, TeacherSandbox(), tools.TOOLS)
    return teacher, drive(agent.solve(question.question, teacher.plan, env))


def drive(coroutine: Coroutine) -> Any:
    """The result of a coroutine that never really waits, without the cost of an event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a teacher never waits")


# --- the tokenizer ----------------------------------------------------------------------------------------------------

EOS, USER, ASSISTANT = "<|end|>", "<|user|>", "<|assistant|>"
SPECIAL = (EOS, USER, ASSISTANT, "<|endoftext|>")  # the last is never used, but a Qwen2 tokenizer adds it if it lacks
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def literals(template: str) -> list[str]:
    """The fixed text of a format string."""
    return [text for text, *_ in string.Formatter().parse(template) if text]


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
    texts += ["the difference between ", *w.EARLIER.values()]
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

SKILLS = (0.0, 0.5, 0.8, 0.95, 1.0)  # transcripts come from clumsy planners, ideal ones, and some in between
FAMILY_SHARES = {"lookup": 2, "two-hop": 3, "three-hop": 4, "difference": 3, "earlier": 3, "arithmetic": 3}
# Share of each role's rows that is kept, and share of the generator's rows without an answer: many are much the same.
KEEP = dict(analyst=0.05, base=0.05, executor=0.3, coder=0.6, planner=0.4, verifier=0.4, generator=1.0)
KEEP_UNKNOWN = 0.3


@dataclass(frozen=True)
class Stage:
    """Optimizer steps on one mix of rows, with a warm-up and a cosine decay of its own."""

    steps: int
    lr_share: float  # the stage's share of the peak learning rates
    prompt_weight: float = 0.0  # weight of the loss on the prompts' own tokens, from which copying is learned first


STAGES = (Stage(steps=550, lr_share=1.0, prompt_weight=0.3), Stage(steps=1000, lr_share=0.7))


def row_stream(seed: int) -> Iterator[tuple[str, str, str]]:
    """Endless rows (role, prompt, completion): a new world every 100 questions, and no fact of the test world."""
    rng = random.Random(f"pretrain {seed}")
    avoid = World(TEST_WORLD).all_facts()
    families, shares = list(FAMILY_SHARES), list(FAMILY_SHARES.values())
    for world_seed in range(1_000_000 * (seed + 1), 1_000_000 * (seed + 2)):
        world = World(world_seed, avoid)
        corpus = Corpus.from_articles(world.articles.items())
        for _ in range(100):
            question = world.sample_question(rng.choices(families, shares)[0], rng)
            teacher, _ = transcript(question, world, corpus, rng, rng.choice(SKILLS))
            for role, prompt, completion in teacher.rows:
                no_answer = completion.endswith(ANSWER.format(UNKNOWN))
                if rng.random() < KEEP[role] * (KEEP_UNKNOWN if no_answer else 1):
                    yield role, prompt, completion


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


# --- what it has reached ----------------------------------------------------------------------------------------------


class IdealPlanner:
    """An engine that answers planner prompts with the ideal next step, in a share `skill` of the turns. In the others
    it plans as clumsily as the backbone was taught to. It knows no tokens: texts take the place of ids."""

    def __init__(self, questions: list[Question], world: World, skill: float = 1.0):
        self.teachers = {q.question: Teacher(q, world, random.Random(0), skill) for q in questions}

    def encode(self, prompt: str) -> tuple[str]:
        return (prompt,)

    def generate_batch(self, requests: list[Request]) -> list[Completion]:
        return [self._plan(request.prompt_ids[0], request.seed) for request in requests]

    def _plan(self, prompt: str, seed: int) -> Completion:
        question = prompt.split("\nQuestion: ")[1].split("\n")[0]
        teacher = self.teachers[question]
        teacher.rng = random.Random(seed)
        why, missing = teacher.findings(prompt)
        lost = missing is None and teacher.skill < 1  # all is known, and the verifier still goes on
        if teacher.rng.random() >= teacher.skill or lost:
            text = teacher.clumsy_plan(prompt)
        else:
            text = render_plan(why, missing) if missing else "The plan is complete."
        return Completion([prompt], [text], [0.0], text, "stop", usage=(0, 0))


def check(folder: Path) -> None:
    """Print what the backbone reaches on the test split, with the real tools: with ideal plans, and as a planner."""
    world, examples = World(TEST_WORLD), load_examples("tinyworld", "test")
    engine, ideal = TransformersEngine(folder), IdealPlanner(world.questions("test"), world)
    system = agent.AgentSystem(engine, engine, load_corpus("tinyworld"), Sandbox())
    systems = {
        "ideal plans": replace(system, planner=ideal),
        "sampled, T = 1": system,
        "greedy": replace(system, temperature=0.0),
    }
    results = {name: evaluate(system, examples, ("check",), name)[0] for name, system in systems.items()}
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(f"{folder}: {sum(p.numel() for p in engine.model.parameters()) / 1e6:.2f} M parameters, {size:.1f} MB")
    print(table(results))


if __name__ == "__main__":
    run_main(main, PretrainConfig)
