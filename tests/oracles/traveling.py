"""How blocks travel, planned token by token and rank by rank: every pair is looked at. What a plan means, not how."""

from seqpar.collectives.ring import Hop
from seqpar.collectives.rows import count, subtract, union, within


def places(shard):
    """Of each rank: (document, position) of each of its rows."""
    position = [(document, p) for document, length in enumerate(shard.lengths) for p in range(length)]
    return [[position[token] for token in shard.indices_of(rank).tolist()] for rank in range(shard.size)]


def sees(query, key, causal, window, right=None):
    """Whether a token sees another."""
    (document, q), (other, k) = query, key
    within = (window is None or k > q - window) and (right is None or k <= q + right)
    return document == other and not (causal and k > q) and within


def needed(queries, keys, causal, window, right=None):
    """The rows of ``keys`` that any of ``queries`` sees."""
    return union((j, j + 1) for j, key in enumerate(keys) if any(sees(q, key, causal, window, right) for q in queries))


def ring_hops(shard, causal, window, right=None):
    """My part in every hop."""
    size, rank, held_by = shard.size, shard.rank, places(shard)

    def reach(source):
        found = [()]
        for index in range(size - 1, 0, -1):
            mine = needed(held_by[(source + index) % size], held_by[source], causal, window, right)
            found.append(union([*mine, *found[-1]]))
        return [*reversed(found[1:]), ()] if size > 1 else [()]

    hops = []
    own = [union([(0, len(held_by[rank]))]), *reach(rank)]
    for index in range(size):
        source = (rank - index) % size
        of_source = [union([(0, len(held_by[source]))]), *reach(source)]
        held, onward = of_source[index], of_source[index + 1]
        ending = within(subtract(held, onward), held) if index else ()
        coming = subtract(own[index], own[index + 1]) if index else ()
        hops.append((Hop(source, count(held), within(onward, held), ending, coming), held))
    return hops


def gathered(shard, causal, window, right, everything):
    """Rows for every rank, rows from every rank, and (document, position) of what I gather, in the order of use."""
    held_by, mine = places(shard), shard.rank
    if everything:
        whole = [union([(0, len(rows))]) for rows in held_by]
        sends, wanted = [whole[mine]] * shard.size, whole
    else:
        sends = [needed(rows, held_by[mine], causal, window, right) for rows in held_by]
        wanted = [needed(held_by[mine], rows, causal, window, right) for rows in held_by]
    keys = [held_by[source][row] for source, ranges in enumerate(wanted) for r in ranges for row in range(*r)]
    return tuple(sends), tuple(count(ranges) for ranges in wanted), keys


def visible(queries, keys, causal, window, right=None):
    """The pairs (row, key row) that are seen."""
    pairs = ((i, j) for i in range(len(queries)) for j in range(len(keys)))
    return {(i, j) for i, j in pairs if sees(queries[i], keys[j], causal, window, right)}
