"""Reading and writing together: ranks move bytes between each other, in shared memory and between nodes.

    reading, writing               entry points: what a restore reads together, and what a save writes together
    taking                         one rank: what it wants, what it moves, what it takes
    node                           the rounds, and how all ranks stop where one fails
    across, wants                  the same over several nodes, with messages between them
    aggregation                    small parts, sent to the rank that writes them

The words, from a variable to a message (`layout.exchange`, `.rounds` and `.parcels` define them):

    box      a block of a variable's elements, in global coordinates: a shard, or what a rank wants
    span     elements from start to stop in row-major order: one range of bytes in the file
    hull     the span from the first to behind the last element of a box
    piece    what was written, and has a checksum, as a whole: a box of at most 8 MiB
    band     spans joined where they overlap: read as a whole, so that pieces can be verified
    range    a span, and where it is in the memory of the rank that moves it
    unit     the ranges that a rank moves between the file and memory in one round
    party    ranks that share what they read: those of a node, or of several nodes that want the same
    cell     a box of a variable whose elements are packed somewhere in memory
    parcel   the cells of a unit that another node wants, as a message
    lane     the ranks of equal place on their nodes, which send parcels to each other
"""
