"""Which rows run together, and trees: what rows of tokens begin with in common is computed once.

The rows of a step repeat each other: all prompts begin with the instructions and tools, the prompts of a group with one
question, the turns of a trajectory with its memory, and equal samples are equal to the end. So rows become a tree, and
the tree becomes one sequence of N nodes for one forward pass. A node sees itself and its ancestors, nothing else:

    rows             token       position   sees nodes      end      so node n sees node m if m <= n < end[m]
    a b c            0  a        0          0               5
    a b d e          1  b        1          0 1             5
    f                2  c        2          0 1 2           3
                     3  d        2          0 1   3         5
                     4  e        3          0 1   3 4       5
                     5  f        0                    5     6

The nodes stand in preorder, row after row of the sorted rows. So the descendants of m are the nodes up to end[m].
Each node gets what its row alone would get: the same ancestors at the same positions. Only rounding differs.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

BLOCK = 128  # queries of a tree that share their keys
AT_ONCE = {"cpu": 4}  # blocks in one call of the attention. A GPU takes 128: pads cost it less than many calls


@dataclass
class Tree:
    """Rows of tokens, ready for one forward pass."""

    inputs: dict[str, Any]  # what the model takes: input_ids (1, M), position_ids (1, M), and `tree` for the attention
    nodes: Tensor  # (B, S), the node of each token of each row; -1 on pads
    reads: Tensor  # (M,), the nodes that the pass computes: all N, or those that no cache holds


def plant(rows: list, model: torch.nn.Module, known: int = 0) -> Tree:
    """The tree of B rows (lists or tuples of token ids), of which the longest has S tokens. A cache holds the first
    `known` rows already, so the pass leaves their nodes out, except each node at which one of the other rows ends. For
    a model without tree attention the rows stay apart, padded on the right: under its causal mask no token sees a pad.
    """
    if not has_trees(model):
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)  # (B, S)
        nodes = torch.arange(ids.numel()).view_as(ids).masked_fill(ids < 0, -1)  # (B, S)
        reads = torch.arange(ids.numel(), device=model.device)
        return Tree({"input_ids": ids.clamp(min=0).to(model.device)}, nodes.to(model.device), reads)
    order, ids, new = sort_rows(rows)
    count = new.flatten().cumsum(dim=0).view_as(new)  # nodes up to here
    # In each column the newest node is the one that the rows below share.
    nodes = torch.where(new, count - 1, -1).cummax(dim=0).values.masked_fill(ids < 0, -1)  # (B, S)
    real, last = nodes >= 0, nodes.amax(dim=1, keepdim=True)  # last: (B, 1), the last node of each row
    size = int(count[-1, -1])  # N
    end = torch.zeros(size, dtype=torch.long)
    end = end.scatter_reduce(0, nodes[real], last.expand_as(nodes)[real], "amax") + 1  # (N,)
    nodes = nodes[torch.tensor(order).argsort()]  # (B, S), in the order of the rows again
    held = torch.zeros(size, dtype=torch.bool)
    held[nodes[:known][nodes[:known] >= 0]] = True
    held[nodes[known:].amax(dim=1)] = False  # somebody needs the state of these
    reads = (~held).nonzero()[:, 0]  # (M,)
    tokens, positions = ids[new][None, reads].to(model.device), new.nonzero()[None, reads, 1].to(model.device)  # (1, M)
    inputs = {"input_ids": tokens, "position_ids": positions, "tree": blocks_of(reads, end, model.device)}
    inputs["attention_mask"] = tokens.new_empty(1, 1, 0, 0)  # of four dimensions: the library makes no mask of its own
    return Tree(inputs, nodes.to(model.device), reads.to(model.device))


def sort_rows(rows: list) -> tuple[list[int], Tensor, Tensor]:
    """(order, ids, new): the rows sorted, so that those with a common beginning are neighbours; their ids (B, S), -1 on
    pads; and which tokens (B, S) come after the first difference to the row above."""
    order = sorted(range(len(rows)), key=rows.__getitem__)
    ids = pad_sequence([torch.tensor(rows[i]) for i in order], batch_first=True, padding_value=-1)  # (B, S)
    new = ids >= 0
    new[1:] &= (ids[1:] == ids[:-1]).cumprod(dim=1) == 0
    return order, ids, new


def blocks_of(reads: Tensor, end: Tensor, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """Groups of C blocks of Q queries: the K nodes that each block takes as keys, (C, K), and which of them each query
    sees, (C, 1, Q, K). First come the keys that some query of the block may descend from; pads are others, unseen."""
    groups, blocks = [], pad(reads[None], (0, -len(reads) % BLOCK), mode="replicate").view(-1, BLOCK, 1)
    for queries in blocks.split(AT_ONCE.get(device.type, 128)):  # (C, Q, 1)
        near = (torch.arange(len(end)) <= queries[:, -1]) & (queries[:, 0] < end)  # (C, N)
        keys = near.byte().argsort(dim=1, descending=True, stable=True)[:, : near.sum(dim=1).max()]  # (C, K)
        sees = (keys[:, None] <= queries) & (queries < end[keys][:, None])  # (C, Q, K)
        groups.append((keys.to(device), sees[:, None].to(device)))
    return groups


def tree_attention(module, query: Tensor, key: Tensor, value: Tensor, attention_mask, tree=None, **options):
    """Attention of (1, H, M, D) queries: batches of blocks, each over its own keys. Without a tree: SDPA."""
    if tree is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (M, H, D), (N, H, D)
    outputs, queries = [], pad(query, (0, 0, 0, 0, 0, -len(query) % BLOCK)).unflatten(0, (-1, BLOCK))
    for q, (keys, sees) in zip(queries.split(len(tree[0][0])), tree):  # (C, Q, H, D), (C, K), (C, 1, Q, K)
        k, v = (x.index_select(0, keys.flatten()).unflatten(0, keys.shape) for x in (key, value))  # (C, K, H, D)
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        outputs.append(sdpa_attention_forward(module, q, k, v, sees, **options)[0])  # (C, Q, H, D)
    return torch.cat(outputs).flatten(0, 1)[None, : len(query)], None


torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each length: on an H200, rollouts took 11 times as long
AttentionInterface.register("tree", tree_attention)
AttentionMaskInterface.register("tree", sdpa_mask)  # for all passes without a tree


def use_trees(model: Any) -> None:
    """Give the model tree attention, if each of its layers sees all tokens so far."""
    kinds = getattr(model.config, "layer_types", None) or ["full_attention"]
    if set(kinds) == {"full_attention"} and not getattr(model.config, "sliding_window", None):
        model.set_attn_implementation("tree")
    if not has_trees(model):
        print(f"{model.name_or_path}: its attention takes no trees, so what rows share is computed for each of them")


def has_trees(model: Any) -> bool:
    return model.config._attn_implementation == "tree"


def old_nodes(tree: Tree, before: Tree) -> Tensor:
    """(N,): which node each node was in an earlier tree, whose rows are the first of this one; 0 for new nodes."""
    rows, width = before.nodes.shape
    nodes, real = tree.nodes[:rows, :width], before.nodes >= 0
    old = nodes.new_zeros(int(tree.nodes.max()) + 1)
    old[nodes[real]] = before.nodes[real]
    return old


class TreeCache(DynamicLayer):
    """The keys and values of a layer, (1, H, N, D), by node. Those of `old` nodes are there already."""

    def __init__(self, layer: DynamicLayer, old: Tensor, reads: Tensor):
        super().__init__()
        self.is_initialized, self.reads = True, reads
        self.keys, self.values = layer.keys.index_select(2, old), layer.values.index_select(2, old)

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self.reads], self.values[:, :, self.reads] = keys, values
        return self.keys, self.values


class RowCache(DynamicLayer):
    """The keys and values of a layer, copied from a tree to B rows, with room for more: a new token is written
    in its place, and nothing else is copied."""

    def __init__(self, layer: Any, nodes: Tensor, room: int):
        super().__init__()
        self.is_initialized, self.length = True, nodes.shape[1]
        nodes = pad(nodes, (0, room)).clamp(min=0)  # (B, S + room)
        by_node = (x.transpose(0, 1).flatten(1, 2) for x in (layer.keys, layer.values))  # (H, N, D)
        rows = (x.index_select(1, nodes.flatten()).unflatten(1, nodes.shape) for x in by_node)  # (H, B, S + room, D)
        self.keys, self.values = (x.transpose(0, 1) for x in rows)

    def update(self, keys: Tensor, values: Tensor, *_, **__) -> tuple[Tensor, Tensor]:
        self.keys[:, :, self.length : self.length + 1], self.values[:, :, self.length : self.length + 1] = keys, values
        self.length += 1
        return self.keys[:, :, : self.length], self.values[:, :, : self.length]

    def get_seq_length(self) -> int:
        return self.length


def split_rows(rows: list, max_tokens: int, model: Any) -> list[list[int]]:
    """Split row indices into passes of at most max_tokens nodes. A row that is longer gets a pass of its own."""
    if not rows or not has_trees(model):
        return micro_batches([len(row) for row in rows], max_tokens)
    order, _, new = sort_rows(rows)
    batches, size = [], 0
    for i, added in zip(order, new.sum(dim=1).tolist()):
        if batches and size + added <= max_tokens:
            batches[-1].append(i)
            size += added
        else:
            batches.append([i])
            size = len(rows[i])
    return batches


def micro_batches(lengths: list[int], max_tokens: int, max_padding: float = 0.05) -> list[list[int]]:
    """Split row indices so that rows * longest <= max_tokens, and at most the share max_padding is padding. A row that
    is longer than max_tokens gets a batch of its own.

    Rows are sorted to keep the padding small. The longest come first: if memory is too small for them, the run fails
    at once.
    """
    batches = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):  # stable: equal lengths keep their order
        batch = [*batches[-1], i] if batches else [i]
        size = len(batch) * lengths[batch[0]]
        padding = size - sum(lengths[j] for j in batch)
        if batches and size <= max_tokens and padding <= max_padding * size:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches
