"""Reading and writing together: ranks exchange bytes through shared memory, and by messages between nodes.

    reading, writing               entry points: the shared reads of a restore, the shared writes of a save
    taking                         one rank's part in reading together: what it wants, reads and takes
    node                           the rounds, and how all ranks stop when one fails
    across, wants                  reading together over several nodes, with messages between them
    aggregation                    small parts, sent to the rank that writes them

The words, from a variable to a message (`layout.exchange`, `.rounds` and `.parcels` define them):

    box      a block of a variable's elements, in global coordinates: a shard, or what a rank wants
    span     elements from start to stop (exclusive) in row-major order: one range of bytes in the file
    hull     the smallest span that contains a box
    piece    a box of at most 8 MiB that was written as a whole and has one checksum
    band     overlapping spans, joined: read as a whole, so that pieces can be verified
    mover    who moves bytes between the file and memory: a rank, or one of several threads of a rank
    range    a span, and its place in the memory of the mover that moves it
    unit     the ranges that a mover moves in one round
    party    ranks that share what they read: those of a node, or of several nodes that want the same; and its movers
    cell     a box of a variable whose elements are packed somewhere in memory
    parcel   the cells of a unit that another node wants, as a message
    lane     the ranks at the same position on their nodes, which send parcels to each other
"""
