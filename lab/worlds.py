"""Write a task's folder of another world, or of other families of questions: what did a planner really learn?

    python -m lab.worlds --folder data/world1 --seed 1                              # new articles, new questions
    python -m lab.worlds --folder data/half --families lookup two-hop difference    # train on these, test on the rest
    python -m lab.worlds --folder data/hops --families three-hop four-hop five-hop  # longer chains
    python eval.py --task data/world1 --planners tinyworld/backbone runs/tinyworld-seed0

A world with a seed of its own shares no fact with the bundled one. The same arguments write the same files.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from eval import Ranged, run_main, setting
from lab.teacher import TEST_WORLD
from tasks import bundled_world, index, tinyworld, write_atomically
from tinyworld.world import FAMILIES, HARD_FAMILIES, SPLITS, World
from tools import UserError

KNOWN = (*FAMILIES, *HARD_FAMILIES)


@dataclass
class WorldConfig(Ranged):
    folder: str = setting("", "folder of the task", group="the world")
    seed: int = setting(TEST_WORLD, "seed of the world", low=0)
    families: list[str] = setting(list(FAMILIES), f"families of questions: {', '.join(KNOWN)}")


def world_of(seed: int) -> World:
    """The bundled world, or one that shares no fact with it."""
    bundled = bundled_world()
    return bundled if seed == TEST_WORLD else World(seed, avoid=bundled.all_facts())


def main(config: WorldConfig) -> None:
    folder, families = Path(config.folder), tuple(dict.fromkeys(config.families))
    if not config.folder:
        raise UserError("--folder: name the folder that the task goes to")
    if not families or not set(families) <= set(KNOWN):
        raise UserError(f"--families {' '.join(families)}: must be of {', '.join(KNOWN)}")
    world = world_of(config.seed)
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {}
    for split in SPLITS:
        rows = [asdict(example) for example in tinyworld(split, families, world)]
        sizes[split] = len(rows)
        write_atomically(folder / f"{split}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    articles = [json.dumps({"title": title, "text": text}) + "\n" for title, text in world.articles.items()]
    write_atomically(folder / "articles.jsonl", "".join(articles))
    count = index(folder / "articles.jsonl", folder / "corpus.db")
    print(f"{folder}: {count} articles; {', '.join(f'{size:,} {split}' for split, size in sizes.items())} questions")


if __name__ == "__main__":
    run_main(main, WorldConfig)
