"""`distckpt bench`: saves and restores of a GPT-like state, measured against the raw disk and other checkpointers.

A run (`session`) measures named cases (`cases`) on a state of DTensors (`state`), in interleaved rounds (`runner`), for
distckpt (`product`) and its rivals (`raw`, `dcp`, `torchsnapshot`, `torch_save`, `safetensors`). `report` makes tables
and JSON of the results.
"""
