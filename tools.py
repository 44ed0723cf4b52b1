"""The tools, the parser that makes a call of the executor's text, and `find`, which loads functions of your own.

To add a tool, write one async function that takes `env` first. The planner reads its docstring. It returns a
`sandbox.Failure` for a model's mistake. Add it to `TOOLS`, or leave it in a file of your own and name it by a flag:

    python train.py --tools Search Python_Coder my_tools.Calendar
"""

import ast
import contextlib
import importlib
import inspect
import itertools
import json
import re
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from sandbox import UNREADABLE, Failure, extract_code, parse, reply

BASE_GENERATOR_PROMPT = """\
Answer the query from your own knowledge. Be brief and exact. If you do not know, say that you do not know.

Query: {query}"""

PYTHON_CODER_PROMPT = """\
Write a short Python program that computes the answer to the query and prints it.
Use only the standard library. Do not read input or files. Answer with one ```python block and nothing else.

Query: {query}"""

SEARCH_CHARS = 2000  # limit per article: a long one would crowd the memory
MAX_COMMAND_CHARS = 8000
STRAIGHT = str.maketrans("“”„`‘’", '""""\'\'')  # quotes as Python writes them
SIMPLE_TYPES = (str, int, float, bool, list, dict)  # types that `read_call` checks; it ignores other annotations


class UserError(Exception):
    """A user's mistake. Its one line says what to do; the scripts print it and exit with code 2."""


def find(name: str, known: dict[str, Callable | str], arguments: int = 0) -> Callable:
    """Look a name up among the `known`, else load it as module.function, such as lab.web.Web_Search. The function must
    take that many arguments."""
    target = known.get(name, name)
    if callable(target):
        return target
    module, _, function = target.rpartition(".")
    try:
        target = getattr(importlib.import_module(module), function)
        inspect.signature(target).bind_partial(*range(arguments))
        return target
    except Exception as error:  # anything can be wrong in a module
        there = ", ".join([*known, "any module.function"])
        raise UserError(f"there is no {name} that works ({one_line(error)}): use {there}") from None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or repr(error)


@dataclass
class ToolEnv:
    """What a tool may use. Every tool gets it as first argument, so tools hold no state of their own."""

    ask: Callable[[str, str], Awaitable[str]]  # await ask(role, prompt) -> text of a frozen model; one call at a time
    corpus: Any  # tasks.Corpus, the articles that Search looks into
    sandbox: Any  # sandbox.Sandbox, where code runs
    tools: dict[str, Callable]  # what the planner may choose from, by name


# --- the tools of the bundled world -----------------------------------------------------------------------------------


async def Base_Generator(env: ToolEnv, query: str) -> str:
    """Answers from what a language model knows: facts, explanations, reasoning.
    Args: query - the question, complete in itself.
    Limits: looks nothing up and computes nothing; it may be wrong.
    """
    return await env.ask("base", BASE_GENERATOR_PROMPT.format(query=query))


async def Python_Coder(env: ToolEnv, query: str) -> str:
    """Writes and runs a Python program: arithmetic, counting, dates, algorithms.
    Args: query - what to compute, with every number it needs.
    Limits: standard library only; no network, no files; a few seconds.
    """
    return await env.sandbox.run(extract_code(await env.ask("coder", PYTHON_CODER_PROMPT.format(query=query))))


async def Search(env: ToolEnv, query: str) -> str:
    """Finds the encyclopedia article that matches best.
    Args: query - the name of the thing to look up, and a few keywords.
    Limits: one article a call; knows nothing outside the encyclopedia.
    """
    articles = env.corpus.search(query)
    return "\n".join(f"{title}: {text[:SEARCH_CHARS]}" for title, text in articles) or "No results."


TOOLS = {tool.__name__: tool for tool in (Base_Generator, Python_Coder, Search)}


def find_tools(names: list[str]) -> dict[str, Callable]:
    """The tools of `--tools`, by the names that the planner uses."""
    tools = {tool.__name__: tool for tool in (find(name, TOOLS, 1) for name in names)}
    if len(tools) < len(names) or not all(map(is_tool, tools.values())):
        raise UserError(f"--tools {' '.join(names)}: each once, async, with a docstring and named arguments")
    return tools


def is_tool(tool: Callable) -> bool:
    """Whether a model can call it: an async function with a docstring, whose arguments all have names."""
    kinds = {parameter.kind for parameter in inspect.signature(tool).parameters.values()}
    named = {inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY}
    return inspect.iscoroutinefunction(tool) and bool(tool.__doc__) and kinds <= named


# --- from a model's text to a call ------------------------------------------------------------------------------------


def signature_of(tool: Callable) -> inspect.Signature:
    """The signature as the model sees it: without `env`."""
    signature = inspect.signature(tool, eval_str=True)
    return signature.replace(parameters=list(signature.parameters.values())[1:], return_annotation=signature.empty)


def tool_metadata(tool: Callable) -> str:
    """One line for the prompts: name, arguments with their types, what it is for, limits."""
    return f"{tool.__name__}{signature_of(tool)}: {' '.join(tool.__doc__.split())}"


@dataclass(frozen=True)
class Command:
    name: str
    kwargs: dict

    def __str__(self) -> str:
        """The call as the memory keeps it: with double quotes, whichever quotes the model wrote."""
        arguments = (
            f"{key}={json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)}"
            for key, value in self.kwargs.items()
        )
        return f"{self.name}({', '.join(arguments)})"


class CommandError(ValueError):
    """The command cannot run. The message tells the model why."""


def parse_command(text: str, tools: dict[str, Callable] = TOOLS) -> Command:
    """Find the first well-formed call of a tool in the model's text. Python parses the text and never runs it."""
    text = reply(text)
    if len(text) > MAX_COMMAND_CHARS:
        raise CommandError(f"the command is longer than {MAX_COMMAND_CHARS} characters")
    names, problem = "|".join(tools), None
    # A tool's name and then its arguments as an object: <function=Search>{...}, Search({...}), Action Input: {...}
    named = rf"(?<![\w.])({names})\W*(?:(?:json|Action Input)\W*)?(\{{[^{{}}]*\}})"
    objects = find_objects(re.sub(named, r'{"name": "\1", "arguments": \2}', text))
    text = "\n".join([text, *map(object_as_call, objects)])
    starts = re.finditer(rf"(?<![\w.])(?:{names})\s*\(", text)
    for start in itertools.islice(starts, 8):  # chatter may name a tool before the call
        try:
            return read_call(shortest(text[start.start() :], r"\)"), tools, text[: start.start()])
        except CommandError as error:
            problem = problem or error
    raise problem or CommandError(f"no tool call found; write one call of {', '.join(tools)}, with all its arguments")


def find_objects(text: str) -> Iterator[dict]:
    """The JSON objects and Python dicts in a text. What one of them holds comes after it."""
    for brace in list(re.finditer("{", text))[:20]:  # a flood of braces would take too long
        piece = text[brace.start() :]
        with contextlib.suppress(*UNREADABLE):
            try:
                yield json.JSONDecoder(strict=False).raw_decode(piece)[0]
            except ValueError:
                yield dict(ast.literal_eval(shortest(piece, "}")))


def object_as_call(said: dict) -> str:
    """The call that a tool-call object stands for: {"name": ..., "arguments": {...}}, as Qwen and Llama write it."""
    name, arguments = (
        next((said.pop(key) for key in [*said] if re.fullmatch(keys, str(key))), said)  # they may stand beside the name
        for keys in ("name|tool|tool_name|function|action", "arguments|parameters|args|(tool_|action_)?input")
    )
    arguments = next(find_objects(str(arguments)), {"input": arguments})  # OpenAI's are JSON in a string
    return str(Command(name, arguments))


def shortest(text: str, bracket: str) -> ast.expr:
    """Parse what the text begins with: the shortest piece that ends with the bracket and is valid Python."""
    for spelling in (text, text.translate(STRAIGHT)):
        for end in list(re.finditer(bracket, spelling))[:100]:  # a flood of brackets would take too long
            with contextlib.suppress(*UNREADABLE):
                return parse(spelling[: end.end()])
    raise CommandError(f"{text[:80]!r} is not a valid call")


def literal(node: ast.expr, before: str) -> Any:
    """The value of a literal, of strings joined by plus signs, or of a name bound to these in a line before."""
    match node:
        case ast.Name(name):
            bound = re.findall(rf"(?m)^[ \t]*{name}\s*(?::\s*\w+\s*)?=(.+?)[ ;]*$", before)
            return literal(parse(bound[-1]), "")
        case ast.BinOp(left, ast.Add(), right):
            return "".join([literal(left, before), literal(right, before)])
    return ast.literal_eval(node)


def read_call(call: ast.Call, tools: dict[str, Callable], before: str) -> Command:
    """Make a `Command`. Raises `CommandError` if an argument is no literal value or does not fit the tool. A single
    argument under a name that the tool does not know becomes its first one."""
    name = call.func.id
    signature = signature_of(tools[name])
    try:
        args = [literal(argument, before) for argument in call.args]
        kwargs = {keyword.arg: literal(keyword.value, before) for keyword in call.keywords}
        json.dumps([args, kwargs], ensure_ascii=False).encode()  # refuses bytes, sets and lone surrogates
    except UNREADABLE:
        raise CommandError(f'the arguments of {name} must be literal values, such as "text" or 3') from None
    try:
        if len(kwargs) < len(call.keywords):
            raise TypeError("an argument is given twice")
        if not args and len(kwargs) == 1 and set(kwargs).isdisjoint(signature.parameters):
            args, kwargs = kwargs.values(), {}
        arguments = signature.bind(*args, **kwargs).arguments
        for key, value in arguments.items():
            wanted = signature.parameters[key].annotation
            if wanted in SIMPLE_TYPES and not isinstance(value, (int, float) if wanted is float else wanted):
                raise TypeError(f"{key} must be {wanted.__name__}, not {type(value).__name__}")
    except TypeError as error:
        raise CommandError(f"{name}: {error}; write {name}{signature}") from None
    return Command(name, arguments)


async def run_tool(env: ToolEnv, command: Command) -> tuple[str, bool]:
    """The tool's text, and whether it succeeded. An exception is a fault of the machine, so it stops the run."""
    text = await env.tools[command.name](env, **command.kwargs)
    return str(text), not isinstance(text, Failure)
