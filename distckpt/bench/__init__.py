"""`distckpt bench`: save and restore of a GPT-like state, measured against the raw disk and other checkpointers.

Everything of one run is measured in interleaved rounds (`runner`), on a state of DTensors (`state`), in named cases
(`cases`), for distckpt (`product`) and its rivals (`raw`, `dcp`, `safetensors`), and reported by `report`.
"""
