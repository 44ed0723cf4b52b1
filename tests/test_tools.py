"""Tools, the door for functions of your own, and the command parser."""

import asyncio
import time

import pytest

import tools
from sandbox import Sandbox
from tasks import Corpus
from tools import Command, CommandError, ToolEnv, UserError, find, find_tools, parse_command, run_tool, tool_metadata

ARTICLES = [("Veldoria", "Veldoria is a country. Its capital is Marn."), ("Marn", "Marn is the capital of Veldoria.")]


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    return Sandbox()


async def Scale(env: ToolEnv, number: float, by: int = 2, names: list[str] | None = None) -> str:
    """Scales."""
    return str(number * by)


def call(text: str, answer: str = "", asked: list | None = None, sandbox: Sandbox | None = None) -> tuple[str, bool]:
    """The result of a command, with a frozen model that gives this answer."""

    async def ask(role: str, prompt: str) -> str:
        if asked is not None:
            asked.append((role, prompt))
        return answer

    env = ToolEnv(ask, Corpus.from_articles(ARTICLES), sandbox, tools.TOOLS | {"Scale": Scale})
    return asyncio.run(run_tool(env, parse_command(text, env.tools)))


# --- the door for functions of your own -------------------------------------------------------------------------------


def test_find():
    assert find("Search", tools.TOOLS) is tools.Search
    assert find("short", {"short": "tools.find"}) is find("tools.find", {}) is find
    assert find_tools(["Search", "test_tools.Scale"]) == {"Search": tools.Search, "Scale": Scale}


@pytest.mark.parametrize("name", ["Google", "no_such_module.function", "tools.no_such_function", "", ".x", "x."])
def test_what_cannot_be_found_is_one_line(name):
    with pytest.raises(UserError, match=f"there is no {name} .*: use Base_Generator, Python_Coder, Search, any module"):
        find(name, tools.TOOLS)


# --- the tools of the bundled world -----------------------------------------------------------------------------------


def test_base_generator():
    asked = []
    command = 'Base_Generator(query="the {query} {0} of France")'
    assert call(command, "Paris", asked) == ("Paris", True)
    assert asked == [("base", tools.BASE_GENERATOR_PROMPT.replace("{query}", "the {query} {0} of France"))]


def test_python_coder(sandbox):
    asked, command = [], 'Python_Coder(query="6 times 7")'
    answer = "Here:\n```python\nprint(6 * 7)\n```\nIt prints 42."
    assert call(command, answer, asked, sandbox) == ("42", True)
    assert asked == [("coder", tools.PYTHON_CODER_PROMPT.replace("{query}", "6 times 7"))]
    text, ok = call(command, "```python\n1 / 0\n```", sandbox=sandbox)
    assert "ZeroDivisionError" in text and not ok and type(text) is str


def test_search():
    assert call('Search(query="capital of Veldoria")') == ("Veldoria: " + ARTICLES[0][1], True)
    assert call('Search(query="?")') == ("No results.", True)


def test_faults_in_a_tool_are_not_hidden():
    async def ask(role: str, prompt: str) -> str:
        raise ConnectionError("engine died")

    env = ToolEnv(ask, None, None, tools.TOOLS)
    with pytest.raises(ConnectionError):
        asyncio.run(run_tool(env, parse_command('Base_Generator(query="x")')))


def test_prompts_end_with_the_query():
    for prompt in (tools.BASE_GENERATOR_PROMPT, tools.PYTHON_CODER_PROMPT):
        assert prompt.endswith("{query}") and prompt.count("{") == 1


def test_metadata():
    line = tool_metadata(tools.Search)
    assert line.startswith("Search(query: str): Finds") and "Limits:" in line and "env" not in line and "\n" not in line
    assert list(tools.TOOLS) == ["Base_Generator", "Python_Coder", "Search"]


# --- from a model's text to a call ------------------------------------------------------------------------------------

WANTED = Command("Search", {"query": "capital of X"})


@pytest.mark.parametrize(
    "text",
    [
        'Search(query="capital of X")',
        "Search(query='capital of X');",
        'Search("capital of X")',
        "```python\nSearch(query='capital of X')\n```",
        'execution = Search(query="capital of X")',
        'Let me use Search(query) here.\n\nSearch(\n    query="capital of X",\n)\nThat\'s it: (done',
        'Search (query="""capital of X""")',
        'Search(query="capital " "of X")  # a comment (',
        'Command: Search(query="capital of X") or Search(query="other")',
        'print(Search(query="capital of X"))',
    ],
)
def test_parse_command(text):
    assert parse_command(text) == WANTED
    assert parse_command(str(parse_command(text))) == WANTED


def test_parse_command_keeps_brackets_and_quotes_in_strings():
    query = "it's f(x) = {1: [2]} \"quoted\" Search(query='y')"
    assert parse_command(str(Command("Python_Coder", {"query": query}))) == Command("Python_Coder", {"query": query})
    assert parse_command(f"Python_Coder(query={query!r})").kwargs == {"query": query}
    assert parse_command('Search(query="""a "b" c)\nd""")').kwargs == {"query": 'a "b" c)\nd'}
    assert parse_command(r'Search(query="\d")').kwargs == {"query": r"\d"}


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "no tool call"),
        ("I do not know", "no tool call"),
        ('Google_Search(query="x")', "no tool call found; write one call of Base_Generator, Python_Coder, Search"),
        ('tool.execute(query="x")', "no tool call"),
        ('os.Search(query="x")', "no tool call"),
        ("__import__('os').system('true')", "no tool call"),
        ("Search()", "missing a required argument: 'query'"),
        ('Search(query="x", k=3)', "unexpected keyword argument 'k'"),
        ('Search("x", "y")', "too many positional"),
        ('Search("x", query="y")', "multiple values"),
        ('Search(query="x", query="y")', "(given twice|not a valid call)"),
        ("Search(query=3)", "query must be str, not int"),
        ("Search(query=None)", "query must be str"),
        ('Search(query=f"{1}")', "literal"),
        ("Search(query=open('/etc/passwd').read())", "literal"),
        ('Search(query=__import__("os").system("touch pwned"))', "literal"),
        ("Search(query=sub_goal)", "literal"),
        ("Search(*[1])", "literal"),
        ('Search(query=b"x")', "literal"),
        ("Search(query={[]: 1})", "literal"),
        ('Search(query="\\ud800")', "literal"),
        ('Search(**{"a": 1}, **{"b": 2})', "given twice"),
        ('Search(query="x"', "not a valid call"),
        ("Search(query='what's up')", "not a valid call"),
        ('Search(query="x\0")', "(valid call|literal)"),
        ("Search(]", "not a valid call"),
        ('Search(query="' + "x" * 9000 + '")', "longer than"),
        ("Search(query=" + "[" * 3000 + "]" * 3000 + ")", "Search"),
        ("Search(query=" + "-" * 7000 + "1)", "Search"),
        ("Search(query=" + "1+" * 3500 + "1)", "Search"),
        ("Search(" * 1100, "not a valid call"),
        ('Search(query="' * 500, "Search"),
    ],
)
def test_parse_command_explains_what_is_wrong(text, message):
    start = time.process_time()
    with pytest.raises(CommandError, match=message) as error:
        parse_command(text)
    assert len(str(error.value)) < 300 and time.process_time() - start < 1


def test_arguments_are_checked_against_the_signature_of_any_tool():
    assert call("Scale(3)") == ("6", True)
    assert call('Scale(1.5, by=4, names=["a"])') == ("6.0", True)
    with pytest.raises(CommandError, match="by must be int, not str"):
        call('Scale(1, by="2")')
    assert tool_metadata(Scale) == "Scale(number: float, by: int = 2, names: list[str] | None = None): Scales."
