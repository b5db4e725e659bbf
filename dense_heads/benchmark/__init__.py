"""What `scripts/benchmark.py` measures: this project beside what others would use, in one run, as ratios.

A part is a module of this room with `add_arguments(parser)` and `cases(arguments, scratch)`; `scratch` is a folder that
is removed afterwards.
"""

PARTS = {  # module of this room -> what it measures
    "backbone": "backbone forward against transformers, timm and, where installed, the original code",
    "epochs": "an epoch and the way to the final head: cache off, cold, warm",
    "grid": "a grid of 12 heads against 12 runs",
    "startup": "start-up: the help, a mistake, a shortest run; the trials of a sweep against runs",
    "windows": "sliding-window evaluation against a straight implementation: time and peak memory",
}
