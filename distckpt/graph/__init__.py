"""What there is to save: live objects and the stored object graph. No MPI, no files.

    trackable                      what users build checkpoints from
    adapters/                      how each kind of object is saved and restored
    view, values                   the walk over live objects, and what it finds
    sharding                       from a DTensor to the boxes that this rank holds
    python_value                   python values as JSON
    capture, fingerprint           the record of a walk, for the other ranks
    memory                         tensors that share memory

A restore then

    selection, rename              takes the part of the stored graph that is wanted, under its live names
    binding, match                 matches it with a walk (node_matching, value_matching, slot_matching)
    assignment                     decides what to read and what to set
    group_order                    gives a scheduler its values in the order of the live groups
    claims                         leaves a value to the newest of several restores
"""
