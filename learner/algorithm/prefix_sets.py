"""How many completions of a group share a prefix: the process sets of Sullivan & Koller.

|lambda_i(t)| is the number of completions of the group whose tokens 0..t equal those of
completion i (arXiv 2509.21154 [P]). The group's prefix trie is walked one depth at a time and only
where it still branches: a completion that is alone stays alone, and costs nothing further.

Legend: G completions of one group, N = sum of their lengths.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def shared_prefixes(
    token_ids: Sequence[Sequence[int]],
) -> Iterator[tuple[int, list[int], list[list[int]]]]:
    """Every prefix that several completions of ONE group share, and the empty one.

    Yields its length, the completions that have it, and these by the token that follows.
    """
    sharing = [list(range(len(token_ids)))]
    depth = 0
    while sharing:
        split = []
        for members in sharing:
            by_token: defaultdict[int, list[int]] = defaultdict(list)
            for member in members:
                if depth < len(token_ids[member]):
                    by_token[token_ids[member][depth]].append(member)
            branches = list(by_token.values())
            yield depth, members, branches
            split += [branch for branch in branches if len(branch) > 1]
        sharing = split
        depth += 1


def prefix_set_sizes(token_ids: Sequence[Sequence[int]]) -> Tensor:
    """Sizes |lambda_i(t)| for the completions of ONE group, packed in their order, [N] float32.

    Time is linear in the number of tokens that lie on shared prefixes, plus N.
    """
    starts = [0]
    for ids in token_ids:
        starts.append(starts[-1] + len(ids))
    sizes_N = torch.ones(starts[-1], dtype=torch.float32)
    places: list[int] = []
    counts: list[int] = []
    for depth, _, branches in shared_prefixes(token_ids):
        for branch in branches:
            places += [starts[member] + depth for member in branch]
            counts += [len(branch)] * len(branch)
    sizes_N[torch.tensor(places, dtype=torch.long)] = torch.tensor(counts, dtype=torch.float32)
    return sizes_N
