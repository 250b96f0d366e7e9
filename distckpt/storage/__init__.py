"""The only room that touches files: one HDF5 file per checkpoint, written and read at known positions.

Names, the file, and what writing and reading share:

    paths, latest, state           names of files, the newest one, the state file
    commit                         temporary names, the commit, removal
    creation, skeleton             make the file
    hdf5, manifest                 open it, and check it
    hdf5_types, hdf5_build         HDF5's types, and what HDF5 this is
    checksum                       checksums of pieces
    rawio                          system calls
    transfer                       write jobs and read jobs

Data:

    writing, mpio                  write pieces, with `pwrite` or through parallel HDF5
    packing                        write small variables, many at a time
    reading, filling, verify       read boxes into tensors, or only to compare their checksums
    parallel_reading, threads      the same with several threads
    units, piece_checks            read or write what ranks exchange

Memory:

    snapshot, staging              the copy of a save in the background, and its memory
    room, scratch                  memory between the file and tensors
"""
