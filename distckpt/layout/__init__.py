"""Where every byte belongs: pure functions on frozen records. No MPI, no files, no live objects.

    records                        what travels between rooms and ranks, and into the file
    box, dtypes, keys              shards as boxes, element types, names
    placement, meshes              DTensors: the boxes of a rank, and whether the ranks see the same mesh

Rank 0 merges the layouts of all ranks for a save (`merge`):

    unify, ties                    one object graph
    merged_values, replicas        its values, and whether their holders agree
    cover, tiling                  who holds which box, without overlap and gap
    writers, checksum_index        who writes what, and where its checksums are
    collector                      no garbage collection meanwhile

A restore, and reading without one:

    validation                     whether the shards of a manifest can be true
    plan                           what to read
    aliases, slicing               a value by any of its paths, and a part of a variable

What ranks move for one another:

    exchange, rounds, parcels      variables that are read or written together
    aggregation                    small variables that few ranks write
"""
