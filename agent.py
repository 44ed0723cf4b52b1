"""The agent: an evolving memory, four modules, and `solve()`, which runs one question through them over several turns.

A module is a prompt and a parser, side by side below. The prompts of planner, verifier and generator begin with what a
question's turns share (instructions, tools, question, analysis) and end with the memory, which only grows.
Parsers accept what models really write: thinking first, JSON, headings, bold labels, code fences, trailing chatter. If
a parser fails, the model's mistake becomes the result of that turn, and the next turn can react to it.

Only the planner is trained. All other modules go through `env.ask`, a frozen model: the initial weights, unless
--frozen_model names others.
"""

import asyncio
import itertools
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from judge import rules
from llm import Completion, Lockstep, Request, derive_seed
from team import team
from tools import TOOLS, CommandError, ToolEnv, find, find_objects, parse_command, reply, run_tool, tool_metadata

# --- what a question leaves behind ------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One action a^t of the planner, and one training row. Its ids and log-probs are the engine's own."""

    prompt_ids: list[int]
    completion_ids: list[int]  # ends with the EOS token unless it was cut at the token limit
    logprobs: list[float]  # log pi(token) of each completion token under the sampler, at the sampling temperature
    truncated: bool = False
    ref_logprobs: list[float] = field(default_factory=list)  # the same under the initial policy; empty without a KL


@dataclass
class Step:
    """What one turn adds to the memory."""

    sub_goal: str
    tool: str
    command: str
    result: str
    verdict: str = ""  # CONTINUE or STOP; empty until the verifier has spoken
    error: str = ""  # what failed: format, tool, command or run; empty when nothing did


@dataclass
class Memory:
    """M^t: everything the modules know about the question. Each `solve()` makes a new one."""

    question: str
    analysis: str = ""
    steps: list[Step] = field(default_factory=list)
    result_chars: int = 400  # longer results and commands are cut in the middle, with a mark

    def render(self) -> str:
        return "".join(self._render_step(n, step) for n, step in enumerate(self.steps, start=1))

    def _render_step(self, n: int, step: Step) -> str:
        command, result = (cut_middle(text, self.result_chars) for text in (step.command, step.result))
        text = MEMORY_STEP.format(n=n, sub_goal=step.sub_goal, tool=step.tool, command=command, result=result)
        return text + MEMORY_VERDICT.format(verdict=step.verdict) if step.verdict else text


@dataclass
class Trajectory:
    """One rollout of a question. The trainer learns from its turns, and the judge scores its answer."""

    question: str
    turns: list[Turn]
    memory: Memory
    answer: str
    reward: float = 0.0
    advantage: float = 0.0
    tokens: Counter[str] = field(default_factory=Counter)  # its cost: planner_read, planner_written, frozen_read, ...


def cut_middle(text: str, limit: int) -> str:
    """Keep `limit` characters, half at each end, as both ends carry meaning. A mark says how many were cut."""
    if len(text) <= limit:
        return text
    head, tail = text[: (limit + 1) // 2], text[len(text) - limit // 2 :]
    return f"{head} [... {len(text) - limit} characters cut ...] {tail}"


MEMORY_STEP = """

Step {n}
Sub-Goal: {sub_goal}
Tool: {tool}
Command: {command}
Result: {result}"""
MEMORY_VERDICT = """
Verdict: {verdict}"""

# --- query analysis (frozen) ------------------------------------------------------------------------------------------

ANALYST_PROMPT = """You prepare the work of a planner. Say in at most three short lines what has to be found out to \
answer the question, and which skills and tools that takes. Do not answer the question.

Tools:
{tools}

Question: {question}"""

# --- planner (trained) ------------------------------------------------------------------------------------------------

PLANNER_PROMPT = """You plan, one step at a time, how to answer a question with the help of tools. Read the question, \
the analysis and the steps so far, then choose the next step: one sub-goal that one tool can reach now.

Tools:
{tools}

Rules:
- Choose exactly one tool and write its exact name.
- Build on the results so far. Do not repeat a step that has already given its result.
- The tool knows nothing of the earlier steps: put every name and number it needs into the context.

Write these four lines and nothing else:
Justification: why this is the next step
Context: the names and numbers that the step needs
Sub-Goal: what this one step has to achieve
Tool Name: the name of one tool

An example, in which one of the tools was Weather_Report:
Justification: The trip to Oslo begins on 3 March, and the weather of that day is not known yet.
Context: Oslo, 3 March
Sub-Goal: Find the temperature in Oslo on 3 March
Tool Name: Weather_Report

Question: {question}
Analysis: {analysis}
Steps so far, none at the start:{memory}"""


class PlanError(ValueError):
    """The planner's text has no usable sub-goal or tool name; the message goes into the memory."""


@dataclass
class Plan:
    context: str
    sub_goal: str
    tool: str


_LABEL = re.compile(
    r"""(?imx)
    (?: ^ (?:[^\w\n]|_)*+ (?:(?:step[ ])?\d+(?:[^\w\n]|_)++)?  # at the start of a line, after marks and a number; or
      | (?<=[.;,][ ]) (?=[\w -]+:) | (?<=>)<? )  # within a line, after a sentence or a tag
    (justification | context | sub[\W_]?goal | tool[\W_]?name | tool)
    (?: (?:[^\w\n]|_)*? (?: [:：=>|] | (?<!context) (?:[.] | [ ][-–—])[ ] )  # marks and a colon or the like; or
      | (?:[^\w\n]|_)* $ )"""  # nothing: it is a heading, with the value on the next line
)


def parse_plan(text: str, tools: Iterable[str] = TOOLS) -> Plan:
    """Read the labelled lines or the JSON object. If a label appears twice, the last one counts. Raises `PlanError`."""
    text = reply(text)
    parts = _LABEL.split(text)  # [before, label, value, label, value, ...]
    said = list(zip(parts[1::2], parts[2::2]))
    for found in find_objects(text):
        if "goal" in str([*found]).lower():  # another object may be part of a value
            said += found.items()
    fields = {re.sub(r"[\W_]|name", "", str(label).lower()): str(value or "") for label, value in said}
    tool = _tool_name(fields.get("tool", ""), tools)
    context, sub_goal = (" ".join(_strip_markup(fields.get(key, "")).split()) for key in ("context", "subgoal"))
    if not sub_goal:
        raise PlanError("The plan has no Sub-Goal line.")
    if not tool:
        raise PlanError("The plan has no Tool Name line.")
    return Plan(context, sub_goal, tool)


def _strip_markup(value: str) -> str:
    """Drop code fences, lines without a word, bullets, closing tags, and the bold or quote marks around a value."""
    value = re.sub(r"(?m)^```.*$|^[^\w\n]+$|^[ \t]*[-•>][ ]|</[\w -]+>", "", value).strip("*`_|, \t\r\n")
    return re.sub(r"""(?s)^(["'])((?:(?!\1).)*)\1[,}\s]*$""", r"\2", value)


def _tool_name(value: str, tools: Iterable[str]) -> str:
    """The known tool that the first line begins with, even if chatter follows; else the unknown name itself."""
    line = re.sub(r"(?i)^\W*(?:(?:.*\buse(?: the)?|tool|name)\b\W*)*", "", _strip_markup(value).split("\n")[0])
    for known in sorted(tools, key=len, reverse=True):  # long names first: Search would hide Search_News
        if re.match(known.replace("_", "[ _-]") + r"(_tool)?\b", line, re.IGNORECASE):
            return known
    return re.sub(r"[ -]", "_", re.match(r"(?:[A-Za-z]\w*(?:[ -][A-Z]\w*)*)?", line)[0])


# --- executor (frozen): a sub-goal becomes one tool call --------------------------------------------------------------

EXECUTOR_PROMPT = """You turn one step of a plan into one call of a tool. Write the call on one line, with keyword \
arguments and literal values, such as Tool_Name(argument="value"). Write nothing else.

Tool:
{tool}

Question: {question}
Context: {context}
Sub-Goal: {sub_goal}"""


async def execute(question: str, plan: Plan, env: ToolEnv) -> Step:
    """Make the command for a plan and run it. A mistake becomes the step's result."""
    if plan.tool not in env.tools:
        result = f"Error: there is no tool {plan.tool}. Use one of: {', '.join(env.tools)}."
        return Step(plan.sub_goal, plan.tool, "", result, error="tool")
    prompt = EXECUTOR_PROMPT.format(
        tool=tool_metadata(env.tools[plan.tool]), question=question, context=plan.context, sub_goal=plan.sub_goal
    )
    text = await env.ask("executor", prompt)
    try:
        command = parse_command(text, {plan.tool: env.tools[plan.tool]})  # the executor must call the planner's tool
    except CommandError as error:
        return Step(plan.sub_goal, plan.tool, text.strip(), f"Error: {error}", error="command")
    result, ok = await run_tool(env, command)
    return Step(plan.sub_goal, plan.tool, str(command), result, error="" if ok else "run")


# --- verifier (frozen) ------------------------------------------------------------------------------------------------

VERIFIER_PROMPT = """You check whether a team can stop working on a question. Compare the question with the results \
of the steps so far. Write one short line that explains what is known or still missing, then end with one of \
these lines:
Conclusion: STOP
Conclusion: CONTINUE
Write STOP only if the results hold everything that the answer needs.

Tools:
{tools}

Question: {question}
Analysis: {analysis}
Steps so far:{memory}"""


_DOUBT = re.compile(
    r"(?i)n['’]t\b|\b(?:not?|cannot|continue|false|null|would|if|once|then|until|unless|but|only|too|early|premature|"
    r"missing|needs|requires|mistake|unclear)\b"
)


def parse_verdict(text: str) -> str:
    """STOP if the last verdict (the whole text, if it has no such label) says so, with no word of doubt before it or in
    its own clause. In doubt the question goes on: one more turn costs little, but a wrong stop costs the answer."""
    said = reply(text).strip()
    verdict = re.split(r"(?i)(?<!/)conclusion|verdict|decision|(?=stop_signal|stop signal)", said)[-1]
    if alone := re.search(r"\n\W*(STOP|CONTINUE)\W*$", said):  # a last line with nothing but the word
        verdict = alone[1]
    before, *after = re.split(r"(?i)(?<![a-z])stop(?!p|\W*\?)", verdict, maxsplit=1)
    clause = re.split(r"(?i)[.;\n]|because|since|,(?! *(?:once|if|until|unless|but))", "".join(after))[0]
    return "STOP" if after and not _DOUBT.search(f"{before} {clause}") else "CONTINUE"


# --- generator (frozen) -----------------------------------------------------------------------------------------------

GENERATOR_PROMPT = """Answer the question from the results of the steps below. Write one short line with the facts \
that lead to the answer. Then write the answer alone, as a name, a number or a few words, between the tags <answer> \
and </answer>. If the results do not hold the answer, write <answer>unknown</answer>.

Question: {question}
Analysis: {analysis}
Steps so far:{memory}"""


# Where an answer stands, the surest place first: in tags, in a box (with up to three levels of braces inside it), in a
# last line such as **Final Answer:** Paris, or below such a heading.
_ANSWERS = [
    r"(?is)<answer>(.*?)(?:</answer>|$)",
    r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*\})*)\}",
    r"(?im)^[#>*_ \t-]*(?:the )?(?:(?:final|correct) )?answer(?: is)?\**[:\n]\**[>\s]*(\*\*.*|.*?)(?:\*\*)?\Z",
]


def parse_answer(text: str) -> str:
    """The text in the last pair of answer tags, else in the last box, else in a last line labelled as the answer.
    Without any of these the answer is empty and earns nothing.

    A policy cannot exploit that there are several forms. The generator is frozen, so no gradient drives it to find a
    gap, and `judge.rule_judge` compares the whole answer whichever form it came in.
    """
    for pattern in _ANSWERS:
        if answers := re.findall(pattern, reply(text).strip()):
            return answers[-1].strip()
    return ""


# --- Algorithm 1 of the paper -----------------------------------------------------------------------------------------

Planner = Callable[[str], Awaitable[Completion]]


async def solve(
    question: str, planner: Planner, env: ToolEnv, max_turns: int = 4, result_chars: int = 400
) -> Trajectory:
    """Run one question to its answer (Algorithm 1, inference in the flow).

    `planner(prompt)` samples the trained policy. `env.ask(role, prompt)` asks the frozen model, which plays all other
    modules. `env` holds what the tools need. Many of these coroutines run at once, so engines can batch their prompts.
    """
    tools = toolbox(env.tools)
    memory = Memory(question, result_chars=result_chars)  # M^1: the question, and its analysis
    memory.analysis = (await env.ask("analyst", ANALYST_PROMPT.format(tools=tools, question=question))).strip()
    turns = []
    for _ in range(max_turns):
        # The planner acts: a^t ~ pi_theta( . | q, K, M^t). Only this factor of Eq. 2 has theta.
        prompt = PLANNER_PROMPT.format(tools=tools, question=question, analysis=memory.analysis, memory=memory.render())
        action = await planner(prompt)
        truncated = action.finish_reason == "length"
        turns.append(Turn(action.prompt_ids, action.completion_ids, action.logprobs, truncated))

        # The executor turns the sub-goal into a command and runs the tool: e^t.
        try:
            step = await execute(question, parse_plan(action.text, env.tools), env)
        except PlanError as error:
            step = Step("none", "none", "none", f"Error: {error}", error="format")
        memory.steps.append(step)

        # The verifier decides whether M^t is enough: v^t. M^{t+1} = f_mem(M^t, a^t, e^t, v^t).
        prompt = VERIFIER_PROMPT.format(
            tools=tools, question=question, analysis=memory.analysis, memory=memory.render()
        )
        step.verdict = parse_verdict(await env.ask("verifier", prompt))  # the memory does not keep its reasons
        if step.verdict == "STOP":
            break

    # The generator writes the answer from what the memory holds: o.
    prompt = GENERATOR_PROMPT.format(question=question, analysis=memory.analysis, memory=memory.render())
    answer = parse_answer(await env.ask("generator", prompt))
    return Trajectory(question, turns, memory, answer)


def toolbox(tools: dict[str, Callable] = TOOLS) -> str:
    """K: the text about the tools in the prompts."""
    return "\n".join(tool_metadata(tool) for tool in tools.values())


# --- many questions at once -------------------------------------------------------------------------------------------


@dataclass
class AgentSystem:
    """The engines and tools that solve questions. Training, evaluation and benchmarks all use it."""

    planner: Any  # the engine of the trained policy
    frozen: Any  # the engine of analyst, executor, verifier, generator, the tools' model
    corpus: Any  # the articles that Search looks into
    sandbox: Any  # where the programs of Python_Coder run
    max_turns: int = 4
    max_tokens: int = 64  # limit of one completion
    result_chars: int = 400  # limit of a tool's result in the memory
    tools: dict[str, Callable] = field(default_factory=TOOLS.copy)
    temperature: float = 1.0  # the planner's; 0 is greedy
    reward: Callable = rules  # what `judge.score` calls
    solve: Callable = solve  # the loop over the turns of a question, Algorithm 1

    def rollout(
        self, questions: list[str], group_size: int, seed: tuple, label: str = "rollouts"
    ) -> list[list[Trajectory]]:
        """Sample `group_size` trajectories of each question, all at the same time -> [question][sample].

        `seed` is a key such as (run seed, step). Each planner request adds its question, sample, turn and role.
        """
        lockstep = Lockstep(self.frozen, self.planner)  # see there: frozen first, then all planner prompts at once
        keys = [(p, g) for p in team().share(range(len(questions))) for g in range(group_size)]
        with tqdm(total=len(keys), desc=label, leave=False) as bar:

            async def one(order, p, g):
                trajectory = await self.run(questions[p], (*seed, p, g), lockstep, order)
                bar.update()
                return trajectory

            flat = asyncio.run(lockstep.gather(one(order, *key) for order, key in enumerate(keys)))
        return team().gather([flat[i : i + group_size] for i in range(0, len(flat), group_size)])

    async def run(self, question: str, seed: tuple, lockstep: Lockstep, order: int) -> Trajectory:
        """Run `solve` on one question, as trajectory number `order` of a lockstep."""
        tokens, turns = Counter(), itertools.count(1)

        async def complete(module, engine, prompt, temperature, seed=0):
            request = Request(engine.encode(prompt), self.max_tokens, temperature, seed)
            completion = await lockstep.generate(engine, request, order)
            read, written = completion.usage
            tokens.update({f"{module}_read": read, f"{module}_written": written})
            return completion

        async def planner(prompt: str) -> Completion:
            turn_seed = derive_seed(*seed, next(turns), "planner")
            return await complete("planner", self.planner, prompt, self.temperature, turn_seed)

        async def ask(role: str, prompt: str) -> str:
            return reply((await complete("frozen", self.frozen, prompt, temperature=0.0)).text)  # without its thinking

        env = ToolEnv(ask, self.corpus, self.sandbox, self.tools)
        trajectory = await self.solve(question, planner, env, self.max_turns, self.result_chars)
        trajectory.tokens = tokens
        return trajectory


if __name__ == "__main__":  # python agent.py "a question" shows how the system thinks about it
    find("lab.ask.run", {})()
