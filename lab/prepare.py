"""Make a task's folder of the files that benchmarks publish, once, in the plain shape that `tasks.py` reads.

    python -m lab.prepare bamboogle                 # fetches; writes data/bamboogle/test.jsonl
    python eval.py --task data/bamboogle
    python -m lab.prepare my_file.json my_folder    # converts a file of yours; writes my_folder/test.jsonl

The first form knows the paper's data: ten benchmarks and the training mix. `SOURCES` pins each file to a revision and
names its checksum, if that is known. GAIA and GPQA are gated: accept the terms on their pages, then set HF_TOKEN.

The second form takes a JSON list or JSON lines. `read_row` knows the shapes of their rows: `query` or `question`; one
answer, several, or a list that was written as a text; options as a list, by letter, or as a text; the numbers of a game
of 24; instructions for another harness at the end of the question.
"""

import ast
import csv
import hashlib
import json
import random
import re
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet
import requests
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HTTPError, RepositoryNotFoundError

import tasks
from eval import one_line_errors
from lab.judges import evaluate_expression
from tasks import Example, as_text, at, parse, read_lines
from tools import UserError

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# The authors of AgentFlow end their questions with this. Our generator has its own instructions.
INSTRUCTIONS = re.compile(r"\s*When ready, output the final answer enclosed in <answer> and </answer> tags\..*", re.S)

# --- reading what was published ---------------------------------------------------------------------------------------


def read_row(row: Any) -> Example:
    """The example of a row in any known shape, checked by the core's own reader; `ValueError` says what is wrong."""
    if not isinstance(row, dict):
        raise ValueError(f"a row must be an object with a question and an answer, not {type(row).__name__}")
    question = row.get("query") or row.get("question")
    if not isinstance(question, str):
        raise ValueError("the question must be a text that is not empty")
    question = INSTRUCTIONS.sub("", question).strip()
    published, options = read_list(row.get("answer")), read_options(row)
    numbers = row["question"] if isinstance(row.get("question"), list) else []  # of a game of 24
    answers = [as_text(answer) for answer in published]
    kind = "game24" if numbers else "text" if any(isinstance(answer, str) for answer in published) else "math"
    if options:
        kind, answers, question = "choice", right_option(answers, options), list_options(question, options)
    kind = row.get("kind", kind)
    if kind == "game24":
        check_game24(question, answers, numbers)
    plain = {"question": question, "answer": answers, "family": row.get("family", "all"), "kind": kind}
    return tasks.read_row(parse(json.dumps(plain).encode()))


def read_list(value: Any) -> list:
    """A list as it is, a list of texts that was written as a text, or one value."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):  # an interval [0, 1), or prose
            parts = ast.literal_eval(value.strip())
            if parts and all(isinstance(part, str) for part in parts):  # [0, 1] is an interval or a matrix
                return list(parts)
    return value if isinstance(value, list) else [value]


def read_options(row: dict) -> list[str]:
    """The options without their letters, from a list, by letter, or from a text; [] if the row has none."""
    options = row.get("options") or row.get("choices")
    if not options:
        return []
    if isinstance(options, dict):
        if sorted(options) != list(LETTERS[: len(options)]):
            raise ValueError(f"the letters of the options must be A, B, ..., not {', '.join(options)}")
        options = [options[letter] for letter in sorted(options)]
    options = read_list(options)
    if len(options) == 1 and isinstance(options[0], str):  # each begins at its letter, else on a line of its own
        pieces = re.split(r"^(?=[ \t]*\(?[A-Z][).:])", options[0], flags=re.MULTILINE)
        options = without_letters(pieces[1:]) or re.split(r"\n\s*", options[0].strip())
    if not 2 <= len(options) <= len(LETTERS) or not all(isinstance(option, str) for option in options):
        raise ValueError(f"the options must be 2 to {len(LETTERS)} texts")
    options = [option.strip() for option in without_letters(options) or options]
    if not all(options):
        raise ValueError("no option may be empty")
    return options


def without_letters(options: list[str]) -> list[str]:
    """The options without A, B, C, ... before them; [] unless all have their letters."""
    marks = [re.match(r"\s*\(?([A-Z])[).:]", option) for option in options]  # A) A. A: (A)
    lettered = all(mark and mark[1] == letter for mark, letter in zip(marks, LETTERS))
    return [option[mark.end() :] for mark, option in zip(marks, options)] if lettered else []


def right_option(answers: list[str], options: list[str]) -> list[str]:
    """[letter, content] of the option that every answer names, by its letter, its content, or both."""
    right = []
    for letter, option in zip(LETTERS, options):
        names = rf"\(?{letter}[).:]?|(?:\(?{letter}[).:]\s*)?{re.escape(option)}"
        if all(re.fullmatch(names, answer.strip()) for answer in answers):
            right.append([letter, option])
    if len({option for _, option in right}) != 1:
        raise ValueError(f"the answer must name one of the options, by its letter or its content, not {answers}")
    return right[0]


def list_options(question: str, options: list[str]) -> str:
    """The question with its options, which many have already."""
    lettered = list(zip(LETTERS, options))
    if all(re.search(rf"(?<!\w){letter}\W{{1,4}}{re.escape(option)}(?!\w)", question) for letter, option in lettered):
        return question
    return question + "".join(f"\n{letter}) {option}" for letter, option in lettered)


def check_game24(question: str, answers: list[str], numbers: list) -> None:
    """`ValueError` unless each answer makes 24 of the row's numbers: all of a list, or some that its question has."""
    given = Counter(str(number) for number in numbers or re.findall(r"\d+", question))
    for answer in answers:
        value, used = None, []
        with suppress(ValueError, ZeroDivisionError):
            value, used = evaluate_expression(answer)
        uses_given = Counter(used) == given if numbers else Counter(used) <= given and len(used) > 1
        if value != 24 or not uses_given:
            raise ValueError(f"the answer {answer!r} does not make 24 of the given numbers, each once")


def read_file(path: Path) -> list[Example]:
    """The examples of a JSON list or of JSON lines; `UserError` names file and row, or file and line."""
    text = path.read_bytes()
    rows = read_lines(path)
    if text.lstrip().startswith(b"["):
        rows = ((f"{path}, row {number}", row) for number, row in enumerate(at(str(path), parse, text), start=1))
    return [at(place, read_row, row) for place, row in rows]


# --- the paper's data: from published files to splits -----------------------------------------------------------------


def as_the_authors_ran_it(data: Path) -> dict[str, list[Example]]:
    """All of a short set (Bamboogle has 125 questions), the first 100 of a longer one."""
    examples = read_file(data)
    return {"test": examples if len(examples) <= 127 else examples[:100]}


def gaia(metadata: Path) -> dict[str, list[Example]]:
    """The validation questions that come without a file: 127."""
    examples = []
    for row in pyarrow.parquet.read_table(metadata).to_pylist():
        if not row["file_name"]:
            answer = [row["Final answer"]]  # in a list, because some look like one
            examples.append(read_row(dict(question=row["Question"], answer=answer, family=f"level {row['Level']}")))
    return {"test": examples}


def gpqa(diamond: Path) -> dict[str, list[Example]]:
    """The diamond set, 198 questions; the options of each in an order of its own."""
    with diamond.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    examples = []
    for number, row in enumerate(rows):
        right = row["Correct Answer"].strip()
        options = [right, *(row[f"Incorrect Answer {n}"].strip() for n in (1, 2, 3))]
        random.Random(number).shuffle(options)
        answer, family = [LETTERS[options.index(right)], right], row["High-level domain"]
        examples.append(read_row(dict(question=row["Question"], options=options, answer=answer, family=family)))
    return {"test": examples}


def mix(nq: Path, *deepmath: Path) -> dict[str, list[Example]]:
    """As many questions of NQ as of DeepMath, as the paper says; dev and test hold 500 each that train does not."""
    searches = [dict(question=row["question"], answer=row["golden_answers"]) for _, row in read_lines(nq)]
    rows = pyarrow.parquet.read_table(list(deepmath), columns=["prompt", "solution"]).to_pylist()
    # The solutions are LaTeX between dollar signs. They are in lists because some look like one.
    problems = [dict(question=row["prompt"][0]["content"], answer=[row["solution"].strip("$")]) for row in rows]
    halves = [usable(searches, "search", "text"), usable(problems, "math", "math")]
    size = min(map(len, halves))
    held_out = min(250, size // 10)
    parts = {"dev": slice(held_out), "test": slice(held_out, 2 * held_out), "train": slice(2 * held_out, size)}
    splits = {}
    for split, part in parts.items():
        both = halves[0][part] + halves[1][part]
        splits[split] = random.Random(0).sample(both, len(both))
    return splits


def usable(rows: list[dict], family: str, kind: str) -> list[Example]:
    """Shuffled; equal questions once, and none without an answer to compare with. Prints how many rows that drops."""
    examples = {}
    for row in rows:
        with suppress(ValueError):
            example = read_row({**row, "family": family, "kind": kind})
            examples.setdefault(" ".join(example.question.casefold().split()), example)
    print(f"{family}: {len(examples)} questions; {len(rows) - len(examples)} rows repeat one or have no usable answer")
    return random.Random(0).sample(list(examples.values()), len(examples))


# --- the paper's data: fetching ---------------------------------------------------------------------------------------

NQ = "RUC-NLPIR/FlashRAG_datasets@87aab18c372ee7714a7288c7d660423c7ee96dde/nq"
# Question and answer of all 103,022 rows, 13 MB. zwhe99/DeepMath-103K has solutions too, 2.1 GB.
DEEPMATH = "trl-lib/DeepMath-103K@3a6c4e8d7dbf29647458c0c8365a07ad0650d827/data"
GAIA = "gaia-benchmark/GAIA@682dd723ee1e1697e00360edccf2366dc8418dd9/2023/validation"
AUTHORS = "https://raw.githubusercontent.com/lupantech/AgentFlow/b94006436b8712ab8682846fb0d886a5f174f2d4/test"
# task -> {URL, or REPOSITORY@REVISION/FILE of the Hugging Face hub: sha256, "" if it is not known}
SOURCES: dict[str, dict[str, str]] = {
    "mix": {
        f"{NQ}/train.jsonl": "572685d3f384d9c37479b1fb14232984c85ff13b58923c0c9442232bd5d5647b",
        f"{DEEPMATH}/train-00000-of-00001.parquet": "",
        f"{DEEPMATH}/test-00000-of-00001.parquet": "",
    },
    "gaia": {f"{GAIA}/metadata.parquet": ""},
    "gpqa": {"Idavidrein/gpqa@633f5ee89ab8ad4522a9f850766b73f62147ffdd/gpqa_diamond.csv": ""},
}
for task, sha256 in {
    "bamboogle": "647c37dda2f27341e3f28e5b2a9625f6abcff44639f26a08dcbe1667d831d5e2",
    "2wiki": "eb4b045ebf8e3441bb14a7420e5d84bafcaea58c776cfec75c3bb98ee1653122",
    "hotpotqa": "81f09495a18c6bc1cd1c48483babc6c59dfb9381e524850be53ffb62a9c28fd7",
    "musique": "195b9e75a45c58a5a0398c753a1d8fb7a8adf87b4bfde3f12d20ce22517e4759",
    "aime24": "9284356275e85963bc7508d41c42b73215faffc962abad02f248a650ca51feb2",
    "amc23": "",
    "gameof24": "ffb0c95018ba400931f2940a2dabae666f1ed6d0383beadd969f0447869a14ff",
    "medqa": "",
}.items():
    SOURCES[task] = {f"{AUTHORS}/{task}/data/data.json": sha256}


def fetch(source: str, folder: Path) -> Path:
    """The file at the source, in the folder. The hub's client resumes, and reads HF_TOKEN and HF_ENDPOINT."""
    if "@" not in source:
        response = requests.get(source, timeout=60)
        response.raise_for_status()
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "data.json"
        path.write_bytes(response.content)
        return path
    repo, revision, name = re.fullmatch("(.+)@([0-9a-f]{40})/(.+)", source).groups()
    try:
        return Path(hf_hub_download(repo, name, revision=revision, repo_type="dataset", local_dir=folder))
    except RepositoryNotFoundError:  # it is gated, or the token was refused
        page = f"https://huggingface.co/datasets/{repo}"
        raise UserError(f"{repo} is closed to you: accept the terms on {page}, then set HF_TOKEN") from None
    except (OSError, HTTPError) as error:  # in several lines
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


def prepare(task: str, folder: Path) -> None:
    """Fetch the task's files into FOLDER/downloads, and write FOLDER/SPLIT.jsonl."""
    paths = []
    for source, expected in SOURCES[task].items():
        path = fetch(source, folder / "downloads")
        found = hashlib.sha256(path.read_bytes()).hexdigest()
        if expected and found != expected:
            path.unlink()
            raise UserError(f"{source} arrived damaged (sha256 {found}, not {expected}): give the command again")
        paths.append(path)
    convert = {"mix": mix, "gaia": gaia, "gpqa": gpqa}.get(task, as_the_authors_ran_it)
    try:
        splits = convert(*paths)
    except (ValueError, LookupError, TypeError, AttributeError, csv.Error, pyarrow.ArrowException) as error:
        raise UserError(f"{task} has an unknown shape ({error!r}): remove {folder / 'downloads'}, try again") from error
    for split, examples in splits.items():
        write_split(folder / f"{split}.jsonl", examples)


def write_split(path: Path, examples: list[Example]) -> None:
    """The file is whole or not there."""
    if not examples:
        raise UserError(f"{path} would be empty: the source holds no questions")
    partial = path.with_suffix(".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps(asdict(example), ensure_ascii=False) + "\n" for example in examples]
    partial.write_text("".join(rows), encoding="utf-8")
    partial.replace(path)
    print(f"{path}: {len(examples)} questions")


def main() -> None:
    names = ", ".join(SOURCES)
    parser = tasks.Parser(description="Make a task's folder of the files that benchmarks publish.")
    parser.add_argument("source", help=f"paper's data to fetch ({names}), or JSON file to convert")
    parser.add_argument("folder", type=Path, nargs="?", help="folder of the task; for the paper's data: data/NAME")
    parser.add_argument("--split", choices=["train", "dev", "test"], default="test", help="split that the file becomes")
    arguments = parser.parse_args()
    source, folder = arguments.source, arguments.folder
    with one_line_errors():
        if source in SOURCES:
            prepare(source, folder or Path("data", source))
        elif folder and Path(source).is_file():
            target = folder / f"{arguments.split}.jsonl"
            if target.exists() and target.samefile(source):
                raise UserError(f"{target} is the published file itself: name another folder")
            write_split(target, read_file(Path(source)))
        else:
            raise UserError(f"there is no {source}: name one of {names}, or a JSON file and a folder")


if __name__ == "__main__":
    main()
